"""A recipe folder run from corpora to the compared merge, each finished stage skipped when it is
run again.

    recipes/NAME/  study.yaml, train-*.yaml, data/, tasks/      (inputs, never written to)
    runs/NAME/     vectors/  study/  recipe.yaml  merged/  results.md  report.html  figures/
                   ledger.json                                     (what is made)

`short.yaml` in the folder holds the smaller budget of `--short`: values laid over study.yaml and
the train files.
"""

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from optimer_hf.errors import ConfigError, OutputError
from optimer_hf.files import (
    digest,
    expanded,
    fingerprint,
    is_there,
    markdown_table,
    parse,
    read_yaml,
    sha256_file,
    slug,
    strings_in,
    write_text,
)
from optimer_hf.reading import read_json

logger = logging.getLogger(__name__)
RESULTS = (  # of a finished run, whose figures are in its model, too
    *(f"merged/{name}" for name in ("config.json", "recipe.yaml", "recipe.lock.json")),
    *("merged/figures/captions.json", "results.json", "results.md"),
)


@dataclass(frozen=True)
class Run:
    """A recipe folder, where its results go, and which budget it runs with: the short one, other
    tokens per vector; `seed` is added to the seeds of every training and search.
    """

    folder: Path
    out: Path
    short: bool
    tokens: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the recipe: that of its folder."""
        return self.folder.name

    def inputs_digest(self) -> str:
        """Return the digest of every input file and the budget: equal digests, nothing to do."""
        files = {
            str(path.relative_to(self.folder)): sha256_file(path)
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.suffix != ".md" and "__pycache__" not in path.parts
        }
        return digest({"files": files, "elsewhere": self._elsewhere()} | self.budget)

    def _elsewhere(self) -> dict[str, dict[str, str]]:
        """Return fingerprints of the files that the folder's YAML files name and that lie outside
        of it, of a directory (a model, tasks) those right in it.
        """
        found = {}
        for file in sorted([*self.folder.rglob("*.yaml"), *self.folder.rglob("*.yml")]):
            with contextlib.suppress(ConfigError):  # none of ours, or told when it is read
                for _, text in strings_in(read_yaml(file)):
                    path = (file.parent / expanded(Path(text))).resolve()
                    if is_there(path) and not path.is_relative_to(self.folder):
                        files = sorted(path.iterdir()) if path.is_dir() else [path]
                        found[text] = {f.name: fingerprint(f) for f in files if f.is_file()}
        return found

    @property
    def budget(self) -> dict[str, Any]:
        """What the command line changes of the folder's budget."""
        changed = {"tokens": self.tokens, "seed": self.seed}
        return {"short": self.short} | {name: value for name, value in changed.items() if value}


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
    from optimer_hf import compare, plan, recipe, report, search
    from optimer_hf.study import locked

    started = perf_counter()
    config, trainings = load(run)
    _check_given(config, trainings)
    claim(run.out, {"recipe": run.name} | run.budget)
    with locked(run.out):
        train_vectors(run, trainings)
        study = search.search(config, run.out / "study")
        comparison = compare.compare(with_mixtures(run, study, trainings))
        sealed = compare.to_json(comparison)
        spent = ledger_of(run, study, list(trainings))
        report.write_report(study, run.out / "report.html", figures=run.out / report.FIGURES)
        recipe_file = run.out / "recipe.yaml"
        recipe.write_recipe(study, recipe_file, name=run.name, sealed=sealed, ledger=spent)
        writing = perf_counter()
        recipe.build(recipe_file, run.out / "merged", replace=True)
        recipe.write_vanilla(study, run.out / "mergekit_config.yml")
        spent["write"] = {"seconds": round(perf_counter() - writing, 1)}
        seconds = round(perf_counter() - started, 1)
        spent["this_invocation"] = {"seconds": seconds, "peak_bytes": plan.peak_memory()}
        write_text(run.out / "results.json", json.dumps(sealed, indent=2))
        write_text(run.out / "ledger.json", json.dumps(spent, indent=2))
        write_text(run.out / "results.md", _results(run, comparison, study, spent))
        write_text(run.out / "done.json", json.dumps({"inputs_sha256": run.inputs_digest()}))
    return summary(run)


def plan_run(run: Run) -> Any:
    """Probe this machine, write plan.json into `out` and return the plan; the run compares it with
    what it took.
    """
    from optimer_hf import plan
    from optimer_hf.study import locked

    config, trainings = load(run)
    claim(run.out, {"recipe": run.name} | run.budget)
    with locked(run.out):
        found = plan.plan(config, trainings, run.out, is_run=True)
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


# -- reading a recipe folder -----------------------------------------------------------------------


def load(run: Run) -> tuple[Any, dict[str, Any]]:
    """Return the StudyConfig, its vectors pointing into `out`, and the TrainConfig of each vector
    to train.

    Everything that can be wrong with the inputs is found here, before anything is trained.
    """
    from optimer_hf.study import StudyConfig

    file = run.folder / "study.yaml"
    if not file.exists():
        raise ConfigError(f"{run.folder}: not a recipe folder (it has no study.yaml).")
    short = read_yaml(run.folder / "short.yaml") if run.short else {}
    _check_short(short, run.folder / "short.yaml")
    changes = short.get("train", {}) | ({"max_tokens": run.tokens} if run.tokens else {})
    data = _laid_over(read_yaml(file), short.get("study", {}))
    trainings = {
        name: _seeded(training, run.seed)
        for name, training in _trainings(run.folder, data, changes).items()
    }
    config = parse(StudyConfig, data, file)
    _check_study(config, trainings, file)
    sources = {
        name: vector.model_copy(update={"train": None, "source": str(_vector_dir(run, name))})
        if vector.train
        else vector
        for name, vector in config.vectors.items()
    }
    searches = {name: _seeded(s, run.seed) for name, s in config.baselines.searches.items()}
    changed = {
        "vectors": sources,
        "search": _seeded(config.search, run.seed),
        "baselines": config.baselines.model_copy(update={"searches": searches}),
    }
    return config.model_copy(update=changed), trainings


def _seeded(config: Any, seed: int) -> Any:
    """Return a training or search with `seed` added to its own."""
    return config.model_copy(update={"seed": (config.seed + seed) % 2**32})


def _trainings(
    folder: Path, study: Mapping[str, Any], changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the TrainConfig of every vector to train, with the changes of the budget."""
    from optimer_hf.corpus import documents
    from optimer_hf.train import TrainConfig, check_config

    vectors, trainings = study.get("vectors"), {}
    for name, vector in vectors.items() if isinstance(vectors, dict) else ():
        if isinstance(vector, dict) and "train" in vector:
            file = folder / str(vector["train"])
            training = parse(TrainConfig, _laid_over(read_yaml(file), changes), file)
            check_config(training, file)
            for corpus in training.corpora:
                next(documents(corpus), None)
            trainings[name] = training
    return trainings


def _check_study(config: Any, trainings: Mapping[str, Any], file: Path) -> None:
    """Raise ConfigError for a study that a run cannot carry out."""
    from optimer_hf.evaluate import check_disjoint, load_tasks

    scored = [term for part in (config.objective, config.test) if part for term in part.scored]
    if any(term.function is not None for term in scored):
        raise ConfigError(
            f"{file}: terms with a 'function' are for Python, where functions are given to "
            "ResidentPool; `optimer run` has none."
        )
    if config.test is None:
        raise ConfigError(
            f"{file}: field 'test' is missing. A run ends with the sealed test; name its terms, or "
            "use `optimer search`."
        )
    check_disjoint(config.objective, config.test, load_tasks([config.objective, config.test]))
    for name, training in trainings.items():
        if training.base_model != config.base_model:
            raise ConfigError(
                f"{file}: vectors.{name} is trained from {training.base_model!r}, but base_model "
                f"is {config.base_model!r}. Give both the same base."
            )
    if config.tokenizer_source in trainings:
        raise ConfigError(
            f"{file}: tokenizer_source: the vector {config.tokenizer_source!r} is trained here, "
            "with the tokenizer of the base. Leave the field out, or name another model."
        )
    _check_mixtures(config, trainings, file)


def _check_given(config: Any, trainings: Mapping[str, Any]) -> None:
    """Open the vectors and models that are not trained here, and look for the tools that trials are
    reported to: what cannot be used would be found after the training, or after the search.
    """
    from optimer_hf.convert import resolve_base
    from optimer_hf.tokenizer import opened_tokenizer, scoring_tokenizer
    from optimer_hf.tracking import callbacks_of
    from optimer_hf.vector import open_vector

    for search in (config.search, *config.baselines.searches.values()):
        callbacks_of(search.report_to)
    given = {name: v.source for name, v in config.vectors.items() if name not in trainings}
    base = resolve_base(config.base_model)
    scoring_tokenizer(
        base,
        opened_tokenizer(base, config.tokenizer_reference),
        apply_chat_template=config.objective.apply_chat_template,
    )
    for name, source in (*given.items(), *config.baselines.models.items()):
        open_vector(name, str(source), base)


def _check_mixtures(config: Any, trainings: Mapping[str, Any], path: Path) -> None:
    """Refuse mixtures that could not be trained after the search."""
    from optimer_hf.ratios import mixture

    if not config.baselines.mixtures:
        return
    for name in config.vectors:
        if name not in trainings or trainings[name].max_tokens is None:
            raise ConfigError(
                f"{path}: baselines.mixtures: vector {name!r} is not trained here with max_tokens, "
                "so no mixture has its text. Train it in this folder, or leave the mixtures out."
            )
    for name, baseline in config.baselines.mixtures.items():
        shares = baseline.shares
        mixture(
            trainings,
            shares if isinstance(shares, dict) else dict.fromkeys(trainings, 1.0),
            name=slug(name),
            max_tokens=1,
        )


def _check_short(short: Mapping[str, Any], path: Path) -> None:
    for key in short:
        if key not in ("format_version", "train", "study"):
            raise ConfigError(f"{path}: unknown field {key!r}. Known: study, train.")
    for key in ("train", "study"):
        if not isinstance(short.get(key, {}), dict):
            raise ConfigError(
                f"{path}: {key}: found {short[key]!r}, expected a mapping of fields to values."
            )


def _laid_over(data: Any, changes: Any) -> Any:
    """Return data with the values of changes laid over it; a list of named mappings is changed by
    name.
    """
    if isinstance(data, list) and isinstance(changes, dict):
        names = [item.get("name") if isinstance(item, dict) else None for item in data]
        for name in changes:
            if name not in names:
                raise ConfigError(f"short.yaml: nothing is named {name!r}; known: {names}.")
        pairs = zip(names, data, strict=True)
        return [
            _laid_over(item, changes[name]) if name in changes else item for name, item in pairs
        ]
    if not isinstance(data, dict) or not isinstance(changes, dict):
        return changes
    return data | {key: _laid_over(data.get(key), value) for key, value in changes.items()}


def _vector_dir(run: Run, name: str) -> Path:
    return (run.out / "vectors" / name).resolve()


def train_vectors(run: Run, trainings: Mapping[str, Any]) -> None:
    """Train and describe every vector that is not there yet."""
    if not trainings:
        return
    from optimer_hf.convert import resolve_base
    from optimer_hf.train import prepare, train
    from optimer_hf.vector import describe

    for name, config in trainings.items():  # all are checked and packed before the first is trained
        prepare(config, _vector_dir(run, name))
    for name, config in trainings.items():
        out = _vector_dir(run, name)
        if not (out / "vector.json").exists():
            train(config, out)
            describe(out, resolve_base(config.base_model), name=name, kind=config.kind)


def with_mixtures(run: Run, study: Any, trainings: Mapping[str, Any]) -> Any:
    """Train the data mixtures that `baselines` asks for, with the settings of the vectors, and
    return the study with them among its models.
    """
    from optimer_hf.ratios import mixture, ratios
    from optimer_hf.train import train

    wanted = study.config.baselines
    tokens = {name: int(training.max_tokens or 0) for name, training in trainings.items()}
    models = dict(wanted.models)
    weights = study.incumbent.weights
    for name, baseline in wanted.mixtures.items():
        shares = baseline.shares
        if shares == "uniform":
            shares = dict.fromkeys(trainings, 1.0)
        elif shares == "searched" and not any(weight > 0 for weight in weights.values()):
            logger.warning("mixture %r: no weight is above 0, so it has no ratios", name)
            continue
        elif shares == "searched":
            shares = ratios(weights, tokens).shares
        n_tokens = sum(tokens.values()) // (1 if baseline.budget == "all" else len(tokens))
        config = mixture(trainings, shares, name=slug(name), max_tokens=n_tokens)
        out = run.out / "mixtures" / f"{config.name}-{config.digest[:6]}"
        train(config, out)
        models[name] = str(out)
    baselines = wanted.model_copy(update={"models": models, "mixtures": {}})
    return replace(study, config=study.config.model_copy(update={"baselines": baselines}))


# -- ledger ----------------------------------------------------------------------------------------


def ledger_of(run: Run, study: Any, names: list[str]) -> dict[str, Any]:
    """Return where the time went: seconds and tokens of every stage."""
    from optimer_hf.ledger import ledger, trial_ledger
    from optimer_hf.study import TrialLog

    entries: dict[str, Any] = {}
    records = [read_json(_vector_dir(run, name) / "training.json") for name in names]
    if records:
        entries["train"] = _training_entry([record["training"] for record in records])
    entries |= ledger(study)
    mixed = [
        read_json(file)["training"]
        for file in sorted((run.out / "mixtures").glob("*/training.json"))
    ]
    if mixed:
        entries["mixtures"] = {"n": len(mixed)} | _training_entry(mixed)
    others = sorted((run.out / "study" / "searches").glob("*/trials.jsonl"))
    if others:
        entries["other searches"] = trial_ledger([t for o in others for t in TrialLog(o).trials])
    sealed = run.out / "study" / "sealed.jsonl"
    if sealed.exists():
        entries["sealed"] = trial_ledger(TrialLog(sealed).trials)
    return entries


def _training_entry(records: list[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = sum(record["seconds"] for record in records)
    tokens = sum(record["n_tokens"] for record in records)
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(record.get("cpu_seconds", 0.0) for record in records), 1),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds),
    }


def _results(run: Run, comparison: Any, study: Any, ledger: Mapping[str, Any]) -> str:
    from optimer_hf.compare import intervals_to_markdown, to_markdown

    best = study.incumbent
    weights = ", ".join(f"{name} {weight:g}" for name, weight in best.weights.items())
    rows = [[stage, _entry(entry)] for stage, entry in ledger.items()]
    return (
        f"# {run.name}\n\nBest weights: {weights} (trial {best.number}, "
        f"{best.origin})\n\n{to_markdown(comparison)}\n## Paired 95 % intervals of "
        f"the gains, in percent\n\n{intervals_to_markdown(comparison)}\n## Ledger\n\n"
        f"{markdown_table(['stage', 'seconds and counts'], rows)}\n"
        f"{_against_plan(run, ledger)}"
        f"Merged model: `{os.path.relpath(run.out / 'merged')}`, recipe: "
        f"`{os.path.relpath(run.out / 'recipe.yaml')}`\n"
    )


def _against_plan(run: Run, ledger: Mapping[str, Any]) -> str:
    from optimer_hf import plan

    file = run.out / "plan.json"
    if not file.exists():
        return ""
    planned = read_json(file)
    table = plan.against(planned, ledger, int(ledger["this_invocation"]["peak_bytes"]))
    return f"## Planned and taken\n\n{table}\n"


def _entry(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:,}" for key, value in entry.items())
