"""The functions of `import optimer_hf as optimer`, the counterpart of `cli` for Python.

Each converts what the caller gives and calls one function of a room. A path is a text or a path
object, relative to the working directory. A model is a path, a name on the Hub, or a ResolvedModel:
`a/b` is a directory if there is one, otherwise a name on the Hub; a path object is always a path.
Many rooms take seconds to import, so they are imported when a function is called.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from optimer_hf.errors import ConfigError
from optimer_hf.files.model import VersionedFile, parse, warn_of_idle_fields
from optimer_hf.files.reference import AnyPath
from optimer_hf.files.staging import require_empty
from optimer_hf.progress import announce

if TYPE_CHECKING:
    from optimer_hf.comparison.result import Comparison
    from optimer_hf.models.placement import DeviceMap
    from optimer_hf.models.resolve import AnyModel
    from optimer_hf.recipes.record import Recipe
    from optimer_hf.report.pictures import Pictures
    from optimer_hf.scoring.functions import Scorer
    from optimer_hf.scoring.objective import Objective
    from optimer_hf.scoring.scores import TermScore
    from optimer_hf.searching.runner import Runner
    from optimer_hf.searching.trial import Pool
    from optimer_hf.study.config import StudyConfig
    from optimer_hf.study.directory import Study
    from optimer_hf.study.engine import EngineConfig
    from optimer_hf.study.plugins import Sampler
    from optimer_hf.study.prediction import Prediction
    from optimer_hf.study.trials import Trial
    from optimer_hf.training.config import TrainConfig
    from optimer_hf.vectors.record import VectorFile
    from optimer_hf.vectors.vector import DistributionVector

FileT = TypeVar("FileT", bound=VersionedFile)


# -- vectors ---------------------------------------------------------------------------------------


def train(config: "TrainConfig | Mapping[str, Any] | AnyPath", out: AnyPath) -> "VectorFile | None":
    """Continually pre-train one model on one corpus, write it to `out` as a vector, and return the
    vector's record, which includes its norm.

    `config` is a TrainConfig, a mapping of its fields or a train file. An interrupted run resumes
    in `out`; a finished one is not repeated. Under `accelerate launch` every process calls this,
    and only the first one gets the record. Raises OutputError if `out` belongs to something else.
    """
    with announce("train: loading libraries"):
        from optimer_hf.training.config import TrainConfig
        from optimer_hf.training.run import train_and_record, train_vector
    if isinstance(config, str | os.PathLike):
        return train_vector(Path(config), Path(out))
    return train_and_record(_config(TrainConfig, config), Path(out))


def open_vector(name: str, source: "AnyModel", base: "AnyModel") -> "DistributionVector":
    """Open a vector and give it a name. It is an adapter, a delta or a whole model that was trained
    from `base`.

    Raises ModelError if it was trained from other weights, or does not fit the base.
    """
    from optimer_hf.models.resolve import base_from_here, vector_reference
    from optimer_hf.vectors.opening import open_vector as open_reference

    return open_reference(name, vector_reference(source), base_from_here(base))


def extract(
    tuned: "AnyModel",
    base: "AnyModel",
    out: AnyPath,
    *,
    name: str | None = None,
    dtype: str = "bfloat16",
    block_size: int = 64,
    from_adapter: bool = False,
) -> "VectorFile":
    """Write `tuned` minus `base` as a delta to `out`, which has to be new or empty, and return its
    record, which includes norm and relative error.

    `name` is the name of the vector (None: the name of `out`). `dtype` is the stored dtype:
    bfloat16, float16, float32, or int8 with a scale for every `block_size` numbers. With
    `from_adapter`, `tuned` may be an adapter of any type that PEFT can merge.
    """
    from optimer_hf.vectors.extraction import extract_vector

    return extract_vector(
        tuned,
        base,
        Path(out),
        name=name,
        dtype=dtype,
        block_size=block_size,
        from_adapter=from_adapter,
    )


def merge(config: AnyPath, out: AnyPath, *, engine: str | None = None) -> Path:
    """Run any mergekit YAML, write the merge to `out`, which has to be new or empty, and return
    `out`.

    The streaming writer runs every config that it can, and mergekit the others. `engine`, native or
    mergekit, forces one of them.
    """
    from optimer_hf.merging.engines import merge as run_merge

    directory = Path(out)
    require_empty(directory)
    run_merge(Path(config), directory, engine=engine)
    return directory


# -- the search ------------------------------------------------------------------------------------


def search(
    config: "StudyConfig | Mapping[str, Any] | AnyPath",
    out: AnyPath,
    *,
    objective: AnyPath | None = None,
    test: AnyPath | None = None,
    functions: "Mapping[str, Scorer] | None" = None,
    runner: "Runner | None" = None,
    ask: "Sampler | None" = None,
) -> "Study":
    """Run a study in the directory `out` to its end and return it. Trials that are already on disk
    are not run again.

    `config` is a StudyConfig, a mapping of its fields, a study.yaml, or a mergekit YAML with an
    `objective` file and, for the sealed test, another one, `test`. `functions` score the terms that
    name them: (model, tokenizer, limit) -> a number for each item. `runner` decides where trials
    run (None: in this process); see `searching.workers.Workers` for many processes. `ask` chooses
    weights in place of the surrogate: a function of a `Request` that returns the weight of each
    vector. Raises OptimerError for anything wrong with the config before the first trial. A trial
    that fails is recorded as crashed, and the search goes on.
    """
    with announce("search: loading libraries"):
        from optimer_hf.searching.loop import search as run_search
        from optimer_hf.searching.runner import InProcess
        from optimer_hf.searching.study_file import read_study
        from optimer_hf.searching.trial import ResidentPool
        from optimer_hf.study.config import StudyConfig
    if runner is not None and functions is not None:
        raise ConfigError(
            "functions: found both functions and a runner. Give the functions to the runner's pool."
        )
    where = runner or InProcess(partial(ResidentPool, functions=functions))
    if isinstance(config, str | os.PathLike):
        target, sealed = (None if each is None else Path(each) for each in (objective, test))
        study = read_study(Path(config), objective=target, test=sealed, study_dir=Path(out))
        return run_search(study, Path(out), runner=where, ask=ask)
    for name, given in (("objective", objective), ("test", test)):
        if given is not None:
            raise ConfigError(f"{name}: goes with the path of a mergekit YAML. Leave it out.")
    return run_search(_config(StudyConfig, config), Path(out), runner=where, ask=ask)


def load_study(directory: AnyPath, *, unfinished: bool = False) -> "Study":
    """Open the study in a directory, or in the directory of a run. With `unfinished`, a study that
    is still running or was interrupted is opened, too, with its best trial so far.
    """
    from optimer_hf.study.directory import load_study as load

    return load(Path(directory), unfinished=unfinished)


def predict(
    study: "Study | AnyPath", target: "Objective | Mapping[str, float] | None" = None
) -> "Prediction":
    """Predict the best weights for another objective over the terms of a study, from its trials
    alone; nothing is evaluated.

    `target` is an Objective, or the weight of every term that counts (None: the study's own
    objective).
    """
    from optimer_hf.study.prediction import predict as predict_weights

    return predict_weights(_study(study), target)


# -- evidence --------------------------------------------------------------------------------------


def evaluate(
    model: "AnyModel",
    objective: "Objective | Mapping[str, Any] | AnyPath",
    *,
    dtype: str = "bfloat16",
    engine: "EngineConfig | Mapping[str, Any] | str" = "transformers",
    functions: "Mapping[str, Scorer] | None" = None,
    device_map: "DeviceMap | None" = None,
) -> "dict[str, TermScore]":
    """Score a model on every term of an objective and return the scores by the label of the term.

    `objective` is an Objective, a mapping of its fields or an objective file. `engine` scores, as
    in a study: "vllm", or a mapping with its options. `functions` are described at `search`.
    `device_map` spreads a model of transformers over devices, as in a study file.
    """
    with announce("evaluate: loading libraries"):
        from optimer_hf.scoring.objective import Objective, ObjectiveFile
        from optimer_hf.searching.one_model import score_model
        from optimer_hf.study.engine import engine_of
    target = objective if isinstance(objective, Objective) else _config(ObjectiveFile, objective)
    scorer = engine_of(engine)
    options: dict[str, Any] = {"functions": functions, "device_map": device_map}
    return score_model(model, target, dtype=dtype, engine=scorer, **options)


def compare(
    study: "Study | AnyPath",
    *,
    functions: "Mapping[str, Scorer] | None" = None,
    pool: "Callable[[StudyConfig], Pool] | None" = None,
) -> "Comparison":
    """Score the merge of a finished study and its baselines on the sealed test. Models that were
    scored before are not scored again.

    `functions` are described at `search`; `pool` returns the pool of a study. Raises ConfigError if
    the study has no `test`.
    """
    with announce("compare: loading libraries"):
        from optimer_hf.comparison.sealed import compare as compare_rows
        from optimer_hf.searching.trial import ResidentPool
    return compare_rows(_study(study), pool=pool or partial(ResidentPool, functions=functions))


def write_report(
    study: "Study | AnyPath",
    out: AnyPath,
    *,
    figures: AnyPath | None = None,
    vectors: bool = True,
) -> Path:
    """Write one HTML page about a study, finished or not, and return its path.

    `figures` is a directory to which every figure is written as PNG. `vectors=False` leaves out the
    cosines between vectors, which read every vector once.
    """
    from optimer_hf.report.page import write_report as write_page

    page, folder = Path(out), Path(figures) if figures is not None else None
    write_page(_study(study, unfinished=True), page, figures=folder, vectors=vectors)
    return page


def plot(study: "Study | AnyPath", *names: str) -> "Pictures":
    """Draw the figures of a report, for a notebook, which shows them where a cell ends with this.

    `names` are those of the figures to draw, such as "weights" or "progress" (none: every one that
    there is of this study, finished or not). The cosines between vectors read every vector once;
    they are drawn if they are named, or were measured before. Raises ConfigError for another name.
    """
    from optimer_hf.report.pictures import draw

    return draw(_study(study, unfinished=True), names)


# -- recipes ---------------------------------------------------------------------------------------


def write_recipe(
    study: "Study | AnyPath",
    path: AnyPath,
    *,
    name: str | None = None,
    pick: "Trial | None" = None,
    derived_from: str | None = None,
) -> "Recipe":
    """Write the best merge of a study as recipe.yaml with its lock, merge config and figures, and
    return the recipe.

    `name` is the name of the recipe (None: the name of the study's directory). `pick` is another
    trial to write, for instance one on the Pareto front. `derived_from` is the recipe that this one
    continues, org/name@commit. The recipe of the best trial includes the results of the sealed
    test.
    """
    from optimer_hf.recipes.from_study import write_with_evidence

    opened = _study(study)
    name = name or opened.directory.resolve().name
    return write_with_evidence(opened, Path(path), name=name, pick=pick, derived_from=derived_from)


def build(
    recipe: "Recipe | AnyPath",
    out: AnyPath,
    *,
    out_dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    device: str = "cpu",
    form: Literal["model", "adapter"] = "model",
    rank: int | None = None,
) -> Path:
    """Build the merged model of a recipe, write it to `out` and return `out`, which appears whole
    or not at all.

    `recipe` is a recipe file, a directory with a recipe.yaml, or what `write_recipe` returned.
    `out_dtype` replaces the recipe's dtype, `max_shard_size` is in bytes or a text such as 5GB,
    `device` does the arithmetic. With form="adapter", `out` gets one LoRA adapter with the sum of
    LoRA vectors, of at most `rank` (None: the sum of their ranks, which is exact) and in float32
    unless `out_dtype` says otherwise. Raises ModelError if the base or the vectors are not the
    locked ones, and if a vector has no place in an adapter.
    """
    if form == "adapter":
        from optimer_hf.recipes.adapter import build_adapter

        build_adapter(_recipe_file(recipe), Path(out), rank=rank, out_dtype=out_dtype or "float32")
        return Path(out)
    if rank is not None:
        raise ConfigError("rank: goes with form='adapter'. Leave it out to build a model.")
    from optimer_hf.recipes.build import build as build_model

    build_model(
        _recipe_file(recipe),
        Path(out),
        out_dtype=out_dtype,
        max_shard_size=max_shard_size,
        device=device,
    )
    return Path(out)


def verify(recipe: "Recipe | AnyPath", model: AnyPath) -> None:
    """Raise ModelError unless a built model is the one that the lock of its recipe records."""
    from optimer_hf.recipes.build import verify as verify_model

    verify_model(_recipe_file(recipe), Path(model))


def run(
    recipe_dir: AnyPath,
    out: AnyPath | None = None,
    *,
    short: bool = False,
    profile: str | None = None,
    tokens: int | None = None,
    n_seeds: int | None = None,
) -> Path:
    """Run a recipe folder from corpora to the compared merge, and return the directory with the
    results. Finished stages are skipped.

    `out` is that directory (None: runs/NAME, with the profile, -TOKENS or -seeds appended).
    `profile` names a YAML file of the folder that is laid over its others, and `short` is short for
    the profile of that name, the smaller budget. `tokens` is the number of tokens to train each
    vector on. `n_seeds` is the number of seeds, with a whole run for each.
    """
    from optimer_hf.experiment.commands import run_folder

    target = Path(out) if out is not None else None
    budget: dict[str, Any] = {"short": short, "profile": profile, "tokens": tokens}
    done, _ = run_folder(Path(recipe_dir), target, n_seeds=n_seeds, **budget)
    return done.out


# -- arguments -------------------------------------------------------------------------------------


def _config(cls: type[FileT], given: "FileT | Mapping[str, Any] | AnyPath") -> FileT:
    """Return a config that is given as a config, as its fields, or as a file."""
    if isinstance(given, cls):
        return given
    if isinstance(given, Mapping):
        config = parse(cls, given, Path(cls.__name__))
        warn_of_idle_fields(config, Path(cls.__name__))
        return config
    if isinstance(given, str | os.PathLike):
        return cls.read(Path(given))
    raise TypeError(
        f"found a {type(given).__name__}, expected a {cls.__name__}, its fields or a file"
    )


def _study(given: "Study | AnyPath", *, unfinished: bool = False) -> "Study":
    return (
        load_study(given, unfinished=unfinished) if isinstance(given, str | os.PathLike) else given
    )


def _recipe_file(given: "Recipe | AnyPath") -> Path:
    """Return the file of a recipe.

    Raises ConfigError if the recipe was never written to a file, or was changed since it was read.
    """
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        return path / "recipe.yaml" if path.is_dir() else path
    if given.path is None or type(given).read(given.path) != given:
        raise ConfigError(
            f"recipe {given.name!r}: differs from its file, or has none. Write it to a file and "
            "give the path of the file."
        )
    return given.path
