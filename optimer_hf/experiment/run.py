"""A folder of inputs run from corpora to the compared merge; a finished stage is skipped."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from optimer_hf.errors import OutputError
from optimer_hf.experiment.folder import RESULTS, Run, _vector_dir, check_given, load
from optimer_hf.files.reading import read_json, read_yaml
from optimer_hf.files.staging import write_text
from optimer_hf.files.text import markdown_table, slug
from optimer_hf.vectors.training_record import TRAINING_FILE, TrainingRecord

if TYPE_CHECKING:
    from optimer_hf.comparison.ledger import Ledger
    from optimer_hf.comparison.result import Comparison
    from optimer_hf.experiment.plan import Plan
    from optimer_hf.study.directory import Study
    from optimer_hf.training.config import TrainConfig

logger = logging.getLogger(__name__)


def finished_summary(run: Run) -> str | None:
    """Return the summary of a finished run, or None when there is something to do; reads files
    only, in a moment.
    """
    done = run.out / "done.json"
    if not done.exists():
        return None
    record = read_yaml(done)
    is_whole = all((run.out / name).exists() for name in RESULTS)
    if not is_whole or record.get("inputs_sha256") != run.inputs_digest():
        return None
    return summary(run)


def summary(run: Run) -> str:
    """Return the results and the ledger of a run as Markdown."""
    return (run.out / "results.md").read_text(encoding="utf-8")


def run_recipe(run: Run) -> str:
    """Run every stage that is not finished yet and return the summary.

    Raises ConfigError and CorpusError for bad input before any training, OutputError when `out` is
    not ours.
    """
    from optimer_hf.comparison.ledger import StageCost
    from optimer_hf.comparison.results_file import results_of
    from optimer_hf.comparison.sealed import compare
    from optimer_hf.experiment import plan
    from optimer_hf.recipes.build import build
    from optimer_hf.recipes.write import write_recipe, write_vanilla
    from optimer_hf.report.captions import FIGURES
    from optimer_hf.report.page import write_report
    from optimer_hf.searching import loop as search
    from optimer_hf.study.directory import lock_directory

    started = perf_counter()
    inputs = load(run)
    check_given(inputs)
    claim(run.out, {"recipe": run.name} | run.budget)
    with lock_directory(run.out):
        train_vectors(run, inputs.trainings)
        study = search.search(inputs.study, run.out / "study")
        comparison = compare(study, mixtures=train_mixtures(run, study, inputs.trainings))
        spent = ledger_of(run, study, list(inputs.trainings))
        write_report(study, run.out / "report.html", figures=run.out / FIGURES)
        recipe_file = run.out / "recipe.yaml"
        write_recipe(study, recipe_file, name=run.name, sealed=comparison, ledger=spent)
        writing = perf_counter()
        build(recipe_file, run.out / "merged", replace=True)
        write_vanilla(study, run.out / "mergekit_config.yml")
        write = StageCost(seconds=round(perf_counter() - writing, 1))
        whole = StageCost(seconds=round(perf_counter() - started, 1), peak_bytes=plan.peak_memory())
        spent = spent.model_copy(update={"write": write, "this_invocation": whole})
        results_of(comparison).write(run.out / "results.json")
        write_text(run.out / "ledger.json", json.dumps(spent.to_json(), indent=2))
        write_text(run.out / "results.md", _results(run, comparison, study, spent))
        write_text(run.out / "done.json", json.dumps({"inputs_sha256": run.inputs_digest()}))
    return summary(run)


def plan_run(run: Run) -> "Plan":
    """Probe this machine, write plan.json into `out` and return the plan; the run compares it with
    what it took.
    """
    from optimer_hf.experiment import plan
    from optimer_hf.study.directory import lock_directory

    inputs = load(run)
    claim(run.out, {"recipe": run.name} | run.budget)
    with lock_directory(run.out):
        found = plan.plan(inputs.study, inputs.trainings, run.out, is_run=True)
        write_text(run.out / "plan.json", json.dumps(plan.to_json(found), indent=2))
    return found


def claim(out: Path, owner: Mapping[str, Any]) -> None:
    """Take an output directory for a run; each stage checks its own inputs.

    Raises OutputError for one that holds something else.
    """
    marker = out / "run.json"
    if marker.exists():
        if (found := read_yaml(marker)) != owner:
            raise OutputError(
                f"{out}: holds results of another recipe, or of the other budget (--short, "
                f"--tokens, --seeds): found {found}, expected {dict(owner)}. Give another output "
                "directory."
            )
        return
    if others := sorted(path.name for path in out.glob("[!.]*")):
        raise OutputError(
            f"{out}: is not empty ({others[0]}) and was not made by `optimer run`. Give another "
            "output directory."
        )
    write_text(marker, json.dumps(owner))


def train_vectors(run: Run, trainings: Mapping[str, "TrainConfig"]) -> None:
    """Train and describe every vector that is not there yet."""
    if not trainings:
        return
    from optimer_hf.models.resolve import resolve_base
    from optimer_hf.training.run import prepare, train
    from optimer_hf.vectors.delta import write_record

    for name, config in trainings.items():  # all are checked and packed before the first is trained
        prepare(config, _vector_dir(run, name))
    for name, config in trainings.items():
        out = _vector_dir(run, name)
        if not (out / "vector.json").exists():
            train(config, out)
            write_record(out, resolve_base(config.base_model), name=name, kind=config.kind)


def train_mixtures(
    run: Run, study: "Study", trainings: Mapping[str, "TrainConfig"]
) -> dict[str, str]:
    """Train the data mixtures that `baselines` asks for, with the settings of the vectors, and
    return where they are, by name.
    """
    from optimer_hf.training.mixture import mix_runs, ratios_of
    from optimer_hf.training.run import train

    tokens = {name: int(training.max_tokens or 0) for name, training in trainings.items()}
    weights, trained = study.best_trial.weights, {}
    for name, baseline in study.config.baselines.mixtures.items():
        shares = baseline.shares
        if shares == "uniform":
            shares = dict.fromkeys(trainings, 1.0)
        elif shares == "searched" and not any(weight > 0 for weight in weights.values()):
            logger.warning("mixture %r: no weight is above 0, so it has no ratios", name)
            continue
        elif shares == "searched":
            shares = ratios_of(weights, tokens).shares
        n_tokens = sum(tokens.values()) // (1 if baseline.budget == "all" else len(tokens))
        config = mix_runs(trainings, shares, name=slug(name), max_tokens=n_tokens)
        out = run.out / "mixtures" / f"{config.name}-{config.digest()[:6]}"
        train(config, out)
        trained[name] = str(out)
    return trained


# -- ledger ----------------------------------------------------------------------------------------


def ledger_of(run: Run, study: "Study", names: Sequence[str]) -> "Ledger":
    """Return where the time went: seconds and tokens of every stage; `names` are the vectors that
    were trained here.
    """
    from optimer_hf.comparison.costs import ledger, training_cost, trial_cost
    from optimer_hf.comparison.sealed_file import SealedLog
    from optimer_hf.study.trials import TrialLog

    files = [_vector_dir(run, name) / TRAINING_FILE for name in names]
    trained = [TrainingRecord.read(file).training for file in files]
    files = sorted((run.out / "mixtures").glob(f"*/{TRAINING_FILE}"))
    mixed = [TrainingRecord.read(file).training for file in files]
    others = sorted((run.out / "study" / "searches").glob("*/trials.jsonl"))
    rows = SealedLog(study.directory, study.config).rows
    costs = {
        "train": training_cost(trained) if trained else None,
        "mixtures": training_cost(mixed, n=len(mixed)) if mixed else None,
        "other_searches": trial_cost([t for path in others for t in TrialLog(path).trials])
        if others
        else None,
        "sealed": trial_cost(rows) if rows else None,
    }
    return ledger(study).model_copy(update=costs)


def _results(run: Run, comparison: "Comparison", study: "Study", ledger: "Ledger") -> str:
    from optimer_hf.comparison.tables import intervals_to_markdown, to_markdown

    best = study.best_trial
    weights = ", ".join(f"{name} {weight:g}" for name, weight in best.weights.items())
    rows = [[stage, _entry(entry)] for stage, entry in ledger.to_json().items()]
    return (
        f"# {run.name}\n\nBest weights: {weights} (trial {best.number}, "
        f"{best.origin})\n\n{to_markdown(comparison)}\n## Paired 95 % intervals of "
        f"the gains, in percent\n\n{intervals_to_markdown(comparison)}\n## Ledger\n\n"
        f"{markdown_table(['stage', 'seconds and counts'], rows)}\n"
        f"{_against_plan(run, ledger)}"
        "Beside this file: the merged model in `merged`, and its recipe in `recipe.yaml`.\n"
    )


def _against_plan(run: Run, ledger: "Ledger") -> str:
    from optimer_hf.experiment import plan

    file = run.out / "plan.json"
    if not file.exists():
        return ""
    planned = read_json(file)
    table = plan.against(planned, ledger)
    return f"## Planned and taken\n\n{table}\n"


def _entry(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:,}" for key, value in entry.items())
