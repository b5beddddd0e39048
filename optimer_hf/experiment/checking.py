"""Check a YAML file that a person wrote: its fields, and the files and tasks that it names."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optimer_hf.comparison.rows import check_titles
from optimer_hf.errors import ConfigError
from optimer_hf.experiment.inputs import KINDS, kind_of_file
from optimer_hf.experiment.profile import (
    STUDY,
    RecipeFiles,
    check_profile,
    is_profile,
    list_profiled_fields,
    read_recipe_files,
)
from optimer_hf.experiment.recipe_checks import check_mixtures, check_study
from optimer_hf.files.layered import Origin, file_of
from optimer_hf.files.model import (
    FileModel,
    VersionedFile,
    list_absent_files,
    list_absent_files_of_data,
    list_mistakes,
    parse,
)
from optimer_hf.files.paths import Place
from optimer_hf.files.reading import read_yaml
from optimer_hf.files.text import count, first_line, prefix_field
from optimer_hf.merging.mergekit_keys import is_for_mergekit
from optimer_hf.recipes.record import Recipe
from optimer_hf.scoring.objective import Objective, ObjectiveFile
from optimer_hf.scoring.task_names import list_unknown_tasks
from optimer_hf.study.config import StudyConfig, VectorConfig
from optimer_hf.study.plugins import refuse_missing_plugins
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.fields import is_settled, list_field_mistakes
from optimer_hf.vectors.shapes import refuse_other_shapes

logger = logging.getLogger(__name__)

MOST_SHOWN = 20  # weights of a search
TRAINING_INPUTS = {"base_model", "corpus", "mixture", "replay"}  # fields that name files to read


def check_file(path: Path, *, strict: bool = False) -> tuple[str, list[str]]:
    """Return what a YAML file is, in words, with the weights that a search of it would have, and
    one line for each missing local file or task of lm-eval that it names. Models and tasks are not
    opened.

    Raises ConfigError with one line for each mistake. With `strict`, what is missing is a mistake.
    """
    try:
        what, missing = _read_whole(path)
    except ConfigError as error:
        missing = _list_absent_beside_mistakes(path) if strict else ""
        raise ConfigError("\n".join(filter(None, [str(error), missing]))) from error
    if strict and missing:
        raise ConfigError(missing)
    return what, missing.splitlines()


def _read_whole(path: Path) -> tuple[str, str]:
    """Return what a file is, in words, and one line for each thing that it names and that is
    missing.
    """
    keys = set(read_yaml(path))
    if is_profile(keys):
        files = check_profile(path)
        if files is not None:
            _check_recipe(files)
        missing = "" if files is None else list_missing_inputs_of_recipe(files)
        own = [line for line in missing.splitlines() if line.startswith(f"{path}:")]
        return "profile of a recipe", "\n".join(own)
    if is_for_mergekit(keys):
        what, fields = _read_merge_config(path)
        return what, list_absent_files(path, fields)
    kind = kind_of_file(keys)
    config = _read_fields(path, kind)
    if isinstance(config, TrainConfig):
        _check_training(config, path)
    if isinstance(config, StudyConfig):
        _check_for_run(config, path)
        kind += _describe_weights([*config.free])
    return "train config" if kind == "train" else kind, list_missing_inputs(path, config)


def _check_recipe(files: RecipeFiles) -> None:
    """Raise ConfigError for what `optimer run` would refuse of the files of a recipe folder before
    it opens what they name.
    """
    check_study(files)
    check_mixtures(files)
    for name, training in files.trainings.items():
        _check_training(training, files.train_files[name])


def _check_training(config: TrainConfig, origin: Origin) -> None:
    """Raise ConfigError for a training that a library would refuse."""
    if is_settled(config):
        return
    if "transformers" not in sys.modules:
        logger.info("%s: loading the libraries that check it", origin)
    from optimer_hf.training.checks import check_config  # takes seconds to import

    check_config(config, origin)


def _check_for_run(config: StudyConfig, path: Path) -> None:
    """Raise ConfigError for the study.yaml of a recipe folder that `optimer run` would refuse, if
    its train files are here; they are checked on their own. What a profile or `--tokens` may give
    is left to them.
    """
    if path.name != STUDY or all(vector.source is not None for vector in config.vectors.values()):
        return
    try:
        files = read_recipe_files(path.parent, None)
    except ConfigError:
        return
    profiled = list_profiled_fields(path.parent)
    check_study(files, needs_test=("study", "test") not in profiled)
    if all(training.max_tokens is not None for training in files.trainings.values()):
        check_mixtures(files, has_budget=("train", "max_tokens") not in profiled)


def list_missing_inputs(origin: Origin, config: VersionedFile, *, baselines: bool = True) -> str:
    """Return one line for each missing local file or task of lm-eval that a config, read from
    `origin`, names. The objective of a recipe need not be here, nor models of baselines on request.
    """
    if isinstance(config, Recipe):
        return list_absent_files(origin, config.model_dump(exclude={"objective"}))
    fields = config.model_dump(exclude=set() if baselines else {"baselines"})
    if isinstance(config, StudyConfig):
        for vector in fields["vectors"].values():
            if vector["train"] is not None:
                vector["train"] = str(file_of(origin).resolve().parent / vector["train"])
    unknown = [
        (where, prefix_field(where, fault))
        for at, objective in _objectives_of(config)
        for where, fault in list_unknown_tasks(objective, at)
    ]
    parts = (list_absent_files(origin, fields), list_mistakes(origin, unknown))
    return "\n".join(filter(None, parts))


def list_missing_inputs_of_recipe(files: RecipeFiles) -> str:
    """Return one line for each missing local file or task that the files of a folder name."""
    missing = [list_missing_inputs(files.file, files.study)]
    for name, training in files.trainings.items():
        named = training.model_dump(include=TRAINING_INPUTS)
        missing.append(list_absent_files(files.train_files[name], named))
    return "\n".join(filter(None, missing))


def _objectives_of(config: VersionedFile) -> Iterator[tuple[Place, Objective]]:
    """Yield the objectives in a config, each with its place."""
    if isinstance(config, ObjectiveFile):
        yield (), config
    elif isinstance(config, StudyConfig):
        yield ("objective",), config.objective
        if config.test is not None:
            yield ("test",), config.test


def _read_merge_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Return what a mergekit YAML is good for, in words, and its fields."""
    if "mergekit.config" not in sys.modules:
        logger.info("%s: loading mergekit, which checks it", path)
    from optimer_hf.merging.mergekit_pool import linear_merge_of, with_absolute_references
    from optimer_hf.merging.mergekit_yaml import read_merge_config

    config = read_merge_config(path)
    linear_merge_of(config, path)
    what = "merge config"
    try:
        what += _weights_to_search(config, path)
    except ConfigError as error:
        reason = first_line(error).removeprefix(str(path)).partition(": ")[2]
        what += f" for `optimer merge`; `optimer search` refuses it: {reason}"
    return what, with_absolute_references(config, path)


class _Pool(FileModel):
    """The vectors of a mergekit YAML, as in a study."""

    vectors: dict[str, VectorConfig]


def _weights_to_search(config: Mapping[str, Any], path: Path) -> str:
    """Return the weights that a mergekit YAML has to search, in words; at most these if slices may
    lack the tensors of a filter. Raises ConfigError if a search refuses it.
    """
    from optimer_hf.merging.mergekit_search import groups_of, pool_to_search, splits_to_search

    _, sources = pool_to_search(config, path)
    splits = splits_to_search(config, path)
    is_open = bool(config.get("slices")) and any(
        each.names for each in map(groups_of, splits.values())
    )
    fields = {name: {"source": source, "by": splits.get(name)} for name, source in sources.items()}
    try:
        pool = parse(_Pool, {"vectors": fields}, path)
    except ConfigError:
        if is_open:  # a search may leave groups out
            return ""
        raise
    own = {
        n: each
        for name, vector in pool.vectors.items()
        for n, each in vector.weights_of(name).items()
    }
    names = [name for name, (_, fixed) in own.items() if fixed is None]
    return _describe_weights(names, "at most " * is_open)


def _describe_weights(names: Sequence[str], most: str = "") -> str:
    shown = ", ".join(names[:MOST_SHOWN]) + ", ..." * (len(names) > MOST_SHOWN)
    return f", {most}{count(len(names), 'weight')} to search: {shown}"


def _list_absent_beside_mistakes(path: Path) -> str:
    """Return the missing files that a file with mistakes names, like `list_absent_files`; nothing
    for a file that is not YAML.
    """
    from optimer_hf.merging.mergekit_models import list_absent_models

    try:
        data = read_yaml(path)
    except ConfigError:
        return ""
    if is_for_mergekit(data):
        return list_absent_models(data, path)
    return list_absent_files_of_data(KINDS[kind_of_file(data)], data, path)


def check_fields(path: Path, kind: str) -> str:
    """Return one line for each missing local file or task of lm-eval that a file names, except
    models of baselines.

    Raises ConfigError for mistakes in its fields that are found without a library that takes
    seconds to import, and, if nothing is missing, for a mergekit YAML that cannot be searched, and
    ModelError for vectors whose headers show that they do not fit the base.
    `kind` is a key of KINDS, "merge config", or "study or merge config".
    """
    from optimer_hf.merging.mergekit_models import list_absent_models
    from optimer_hf.merging.mergekit_pool import pool_of
    from optimer_hf.merging.mergekit_yaml import known_keys, read_keys

    is_either = kind == "study or merge config"
    if is_either:
        kind = "merge config" if is_for_mergekit(read_yaml(path)) else "study"
    if kind == "merge config":
        _refuse_other_kind(path, kind)
        read_keys(path, known_keys())
        missing = list_absent_models(read_yaml(path), path)
        if is_either and not missing:
            refuse_other_shapes(*pool_of(read_yaml(path), path))
        return missing
    config = _read_fields(path, kind)
    missing = list_missing_inputs(path, config, baselines=False)
    if isinstance(config, StudyConfig) and not missing:
        given = {n: str(v.source) for n, v in config.vectors.items() if v.source is not None}
        refuse_other_shapes(config.base_model, given)
    return missing


def _read_fields(path: Path, kind: str) -> VersionedFile:
    """Read a file of a kind; raise ConfigError for mistakes in its fields, or for another kind."""
    _refuse_other_kind(path, kind)
    config = KINDS[kind].read(path)
    if isinstance(config, StudyConfig):
        check_titles(config, path)
        refuse_missing_plugins(config, path)
    if isinstance(config, TrainConfig) and (mistakes := list_field_mistakes(config)):
        raise ConfigError(list_mistakes(path, mistakes))
    return config


TYPICAL = {  # fields that only files of a kind have, and what is done with such files
    "study": ({"search", "test", "baselines"}, "`optimer search` takes a study"),
    "train": ({"corpus", "mixture", "trainer"}, "`optimer train` takes a train file"),
    "objective": ({"terms"}, "`optimer evaluate` and `search --objective` take an objective"),
    "recipe": ({"scores", "versions", "ledger"}, "`optimer build` takes a recipe"),
    "merge config": (
        {"merge_method"},
        "`optimer merge` and `search --objective` take a merge config",
    ),
}


def _refuse_other_kind(path: Path, kind: str) -> None:
    """Raise ConfigError for a file that is, by its fields, clearly of another kind."""
    data = read_yaml(path)
    for other, (fields, use) in TYPICAL.items():
        if other != kind and fields & data.keys() and not TYPICAL[kind][0] & data.keys():
            names = {"train": "train file"}
            found, expected = names.get(other, other), names.get(kind, kind)
            raise ConfigError(
                f"{path}: found a file of the kind {found}, expected {expected}. {use}."
            )
