"""Run a recipe folder from corpora to the compared merge. Finished stages are skipped."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from optimer_hf.errors import OutputError
from optimer_hf.experiment.folder import (
    RESULTS,
    Inputs,
    Run,
    check_sources,
    load_inputs,
    vector_dir,
)
from optimer_hf.experiment.marks import CLAIM_FILE, DONE_FILE, Claim, Done, read_claim
from optimer_hf.files.staging import write_text
from optimer_hf.files.text import markdown_table
from optimer_hf.models.layout import VECTOR_FILE
from optimer_hf.vectors.training_record import TRAINING_FILE, TrainingRecord

if TYPE_CHECKING:
    from optimer_hf.comparison.ledger import Ledger
    from optimer_hf.comparison.result import Comparison
    from optimer_hf.experiment.plan_file import Plan
    from optimer_hf.study.directory import Study
    from optimer_hf.training.config import TrainConfig

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
RECIPE = "recipe.yaml"


def finished_summary(run: Run) -> str | None:
    """Return the summary of a finished run, or None if something is left to do. Only small files
    are read.
    """
    return read_summary(run) if is_finished(run) else None


def is_finished(run: Run, *, needed: Sequence[str] = RESULTS) -> bool:
    """Whether a run has finished with these inputs, and the files are there that are needed."""
    file = run.out / DONE_FILE
    if not file.exists():
        return False
    done = Done.read(file)
    is_whole = all((run.out / name).exists() for name in needed)
    return is_whole and done.inputs_sha256 == run.inputs_digest()


def read_summary(run: Run) -> str:
    """Return the results and the ledger of a run, which results.md has as Markdown."""
    return (run.out / "results.md").read_text(encoding="utf-8")


def run_recipe(run: Run) -> str:
    """Run every stage that is not finished yet and return the summary.

    Raises ConfigError and CorpusError for bad input before any training, OutputError if `run.out`
    holds something else, StudyError if another process holds it.
    """
    from optimer_hf.comparison.ledger import StageCost, write_ledger
    from optimer_hf.comparison.ratio_check import check_ratios
    from optimer_hf.comparison.results_file import results_of
    from optimer_hf.comparison.sealed import compare
    from optimer_hf.experiment.mixtures import train_attempts, train_mixtures
    from optimer_hf.models.memory import peak_memory
    from optimer_hf.searching.loop import search

    started = perf_counter()
    logger.info("run %s: checking texts, tasks and models", run.name)
    done = Done(inputs_sha256=run.inputs_digest())  # before they are read: edits meanwhile count
    inputs = load_inputs(run)
    check_sources(inputs)
    stages = _number_stages(inputs)
    with claim_directory(run.out, run.claim()):
        _announce(stages, "train the vectors")
        train_vectors(run, inputs.trainings)
        _announce(stages, "search")
        study = search(inputs.study, run.out / "study")
        _announce(stages, "train the data mixtures")
        mixtures = train_mixtures(run, study, inputs)
        train_attempts(run, study, inputs)
        _announce(stages, "sealed test")
        comparison = compare(study, mixtures=mixtures)
        _announce(stages, "report and recipe")
        spent = ledger_of_run(run, study, list(inputs.trainings))
        _write_recipe_and_report(run, study, comparison, spent)
        _announce(stages, "build the model")
        writing = perf_counter()
        _write_model(run, study)
        write = StageCost(seconds=round(perf_counter() - writing, 1))
        whole = StageCost(seconds=round(perf_counter() - started, 1), peak_bytes=peak_memory())
        spent = spent.model_copy(update={"write": write, "this_invocation": whole})
        check = check_ratios(study)
        correlation = None if check is None else check.correlation
        results_of(comparison, correlation).write(run.out / "results.json")
        write_ledger(spent, run.out / "ledger.json")
        planned = _compare_with_plan(run, done, spent)
        write_text(run.out / "results.md", _results_text(run, comparison, study, spent, planned))
        done.write(run.out / DONE_FILE)
    _warn_of_edits(run, done)
    return read_summary(run)


def _warn_of_edits(run: Run, done: Done) -> None:
    """Warn if inputs have changed since a run read them."""
    if run.inputs_digest() != done.inputs_sha256:
        logger.warning(
            "%s: changed while the run went on, so some results may be of the older files. Run it "
            "again.",
            run.folder,
        )


def _write_recipe_and_report(
    run: Run, study: "Study", comparison: "Comparison", spent: "Ledger"
) -> None:
    from optimer_hf.recipes.write import write_recipe
    from optimer_hf.report.captions import FIGURES
    from optimer_hf.report.page import write_report

    write_recipe(study, run.out / RECIPE, name=run.name, sealed=comparison, ledger=spent)
    write_report(study, run.out / "report.html", figures=run.out / FIGURES)


def _write_model(run: Run, study: "Study") -> None:
    """Build the model of the recipe, and write the config with which mergekit builds it."""
    from optimer_hf.recipes.build import build
    from optimer_hf.recipes.record import VANILLA_CONFIG
    from optimer_hf.recipes.vanilla import write_vanilla

    build(run.out / RECIPE, run.out / "merged", replace=True)
    write_vanilla(study, run.out / VANILLA_CONFIG)


def _number_stages(inputs: Inputs) -> dict[str, str]:
    """Return `stage 3 of 6` for every stage that a run has, by its name."""
    names = ["search", "sealed test", "report and recipe", "build the model"]
    if inputs.trainings:
        names.insert(0, "train the vectors")
    if inputs.study.baselines.n_trained_models:
        names.insert(names.index("search") + 1, "train the data mixtures")
    return {name: f"stage {index} of {len(names)}" for index, name in enumerate(names, 1)}


def _announce(stages: Mapping[str, str], name: str) -> None:
    """Log the number and the name of a stage, if the run has it."""
    if name in stages:
        logger.info("%s: %s", stages[name], name)


def plan_run(run: Run) -> "Plan":
    """Probe this machine, write plan.json into `run.out` and return the plan. The run compares it
    with what it took. Raises what `run_recipe` raises for bad input and for `run.out`.
    """
    from optimer_hf.experiment.planning import make_plan

    inputs_sha256 = run.inputs_digest()  # before they are read, as in `run_recipe`
    inputs = load_inputs(run)
    with claim_directory(run.out, run.claim()):
        plan = make_plan(inputs.study, inputs.trainings, run.out, is_run=True)
        plan = plan.model_copy(update={"inputs_sha256": inputs_sha256})
        plan.write(run.out / PLAN_FILE)
    return plan


@contextmanager
def claim_directory(out: Path, claim: Claim) -> Iterator[None]:
    """Hold an output directory for this process, and mark it with its claim. Each stage checks its
    own inputs.

    Raises OutputError if it holds something else, and then leaves it as it is; StudyError if
    another process holds it.
    """
    from optimer_hf.study.directory import lock_directory

    _refuse_other_claim(out, claim)  # before a lock appears in a directory that is not ours
    with lock_directory(out):
        if not _refuse_other_claim(out, claim):
            claim.write(out / CLAIM_FILE)
        yield


def mark_directory(out: Path, claim: Claim) -> None:
    """Mark an output directory with its claim, and let other processes use it, too.

    Raises OutputError if it holds something else, and then leaves it as it is.
    """
    if not _refuse_other_claim(out, claim):
        claim.write(out / CLAIM_FILE)


def _refuse_other_claim(out: Path, claim: Claim) -> bool:
    """Return whether a directory is marked with a claim; raise OutputError if it has another one,
    or holds files and has none. A directory for several seeds may hold some that were copied there.
    """
    others = sorted(path.name for path in out.glob("[!.]*"))  # before another process marks it
    marked = read_claim(out)
    if marked is not None:
        if marked != claim:
            raise OutputError(
                f"{out}: holds results of another recipe, or of another budget (--short, "
                f"--profile, --tokens, --seeds): found {marked}, expected {claim}. Give another "
                "output directory."
            )
        return True
    if claim.seeds:
        others = [name for name in others if not _is_one_seed(out / name, claim)]
    if others:
        raise OutputError(
            f"{out}: is not empty ({others[0]}) and was not made by `optimer run`. Give another "
            "output directory."
        )
    return False


def _is_one_seed(directory: Path, claim: Claim) -> bool:
    """Whether a directory has a run under one of the seeds of a claim, and its name."""
    marked = read_claim(directory)
    if marked is None or directory.name != seed_directory(marked.seed):
        return False
    return marked == claim.model_copy(update={"seeds": False, "seed": marked.seed})


def seed_directory(seed: int) -> str:
    """Return the name of the folder of a run under one of several seeds."""
    return f"seed-{seed}"


def train_vectors(run: Run, trainings: Mapping[str, "TrainConfig"]) -> None:
    """Train and describe every vector that is not finished yet."""
    if not trainings:
        return
    from optimer_hf.models.resolve import resolve_base
    from optimer_hf.training.run import prepare, train
    from optimer_hf.vectors.delta import write_record

    for name, config in trainings.items():  # check and pack all before training the first
        prepare(config, vector_dir(run, name))
    for name, config in trainings.items():
        out = vector_dir(run, name)
        if not (out / VECTOR_FILE).exists():
            train(config, out)
            write_record(out, resolve_base(config.base_model), name=name, kind=config.kind)


# -- ledger ----------------------------------------------------------------------------------------


def ledger_of_run(run: Run, study: "Study", names: Sequence[str]) -> "Ledger":
    """Return the seconds and tokens of every stage; `names` are the vectors trained here."""
    from optimer_hf.comparison.costs import ledger_of_study, training_cost, trial_cost
    from optimer_hf.comparison.sealed_file import SealedLog
    from optimer_hf.study.trials import TrialLog

    files = [vector_dir(run, name) / TRAINING_FILE for name in names]
    trained = [TrainingRecord.read(file).training for file in files]
    files = sorted((run.out / "mixtures").glob(f"*/{TRAINING_FILE}"))
    mixed = [TrainingRecord.read(file).training for file in files]
    others = sorted((run.out / "study" / "searches").glob("*/trials.jsonl"))
    rows = SealedLog(study.directory, study.config).scored
    costs = {
        "train": training_cost(trained) if trained else None,
        "mixtures": training_cost(mixed, n=len(mixed)) if mixed else None,
        "other_searches": trial_cost([t for path in others for t in TrialLog(path).trials])
        if others
        else None,
        "sealed": trial_cost(rows) if rows else None,
    }
    return ledger_of_study(study).model_copy(update=costs)


def _results_text(
    run: Run, comparison: "Comparison", study: "Study", ledger: "Ledger", planned: str
) -> str:
    from optimer_hf.comparison.ledger import describe_ledger
    from optimer_hf.comparison.tables import intervals_to_markdown, to_markdown

    best = study.best_trial
    weights = ", ".join(f"{name} {weight:g}" for name, weight in best.weights.items())
    return (
        f"# {run.name}\n\nBest weights: {weights} (trial {best.number}, "
        f"{best.origin})\n\n{to_markdown(comparison)}\n## Paired 95 % intervals of "
        f"the gains, in percent\n\n{intervals_to_markdown(comparison)}\n## Ledger\n\n"
        f"{markdown_table(['stage', 'time', 'what'], describe_ledger(ledger))}\n"
        f"{planned}"
        "Beside this file are the merged model, in `merged`, and its recipe, `recipe.yaml`.\n"
    )


def _compare_with_plan(run: Run, done: Done, ledger: "Ledger") -> str:
    from optimer_hf.experiment.plan_file import Plan, compare_with_ledger

    file = run.out / PLAN_FILE
    if not file.exists():
        return ""
    plan = Plan.read(file)
    if plan.inputs_sha256 not in (None, done.inputs_sha256):
        return "## Planned and taken\n\nThe plan in `plan.json` was made for other inputs.\n\n"
    return f"## Planned and taken\n\n{compare_with_ledger(plan, ledger)}\n"
