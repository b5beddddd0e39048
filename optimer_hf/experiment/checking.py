"""Check a YAML file that a person wrote: its fields, and the local files that it names."""

import logging
import sys
from pathlib import Path
from typing import Any

from optimer_hf.errors import ConfigError
from optimer_hf.experiment.inputs import KINDS, kind_of_file
from optimer_hf.files.model import (
    VersionedFile,
    list_absent_files,
    list_absent_files_of_data,
    list_mistakes,
)
from optimer_hf.files.reading import read_yaml
from optimer_hf.merging.mergekit_keys import is_for_mergekit
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.plugins import refuse_missing_plugins
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.fields import is_settled, list_field_mistakes

logger = logging.getLogger(__name__)


def check_file(path: Path, *, strict: bool = False) -> tuple[str, list[str]]:
    """Return what a YAML file is, in words, and one line for each missing local file that it names.
    Models and tasks are not opened.

    Raises ConfigError with one line for each mistake. With `strict`, missing files are mistakes.
    """
    try:
        what, fields = _read_whole(path)
    except ConfigError as error:
        missing = _list_absent_beside_mistakes(path) if strict else ""
        raise ConfigError("\n".join(filter(None, [str(error), missing]))) from error
    missing = list_absent_files(path, fields)
    if strict and missing:
        raise ConfigError(missing)
    return what, missing.splitlines()


def _read_whole(path: Path) -> tuple[str, Any]:
    """Return what a file is, in words, and its fields with absolute local paths."""
    keys = set(read_yaml(path))
    if keys and keys <= {"train", "study"}:
        return "profile of a recipe", {}
    if is_for_mergekit(keys):
        return "merge config", _read_merge_config(path)
    kind = kind_of_file(keys)
    config = _read_fields(path, kind)
    if isinstance(config, TrainConfig) and not is_settled(config):
        if "transformers" not in sys.modules:
            logger.info("%s: loading the libraries that check it", path)
        from optimer_hf.training.checks import check_config  # takes seconds to import

        check_config(config, path)
    # the tasks of a recipe need not be on this disk
    fields = config.model_dump(exclude={"objective"} if kind == "recipe" else None)
    for vector in fields["vectors"].values() if kind == "study" else ():
        if vector["train"] is not None:
            vector["train"] = str(path.resolve().parent / vector["train"])
    return "train config" if kind == "train" else kind, fields


def _read_merge_config(path: Path) -> dict[str, Any]:
    if "mergekit.config" not in sys.modules:
        logger.info("%s: loading mergekit, which checks it", path)
    from optimer_hf.merging.mergekit_pool import linear_merge_of, with_absolute_references
    from optimer_hf.merging.mergekit_yaml import read_merge_config

    config = read_merge_config(path)
    linear_merge_of(config, path)
    return with_absolute_references(config, path)


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
    """Return one line for each missing local file that a file names, except models of baselines.

    Raises ConfigError for mistakes in its fields that are found without a library that takes
    seconds to import. `kind` is a key of KINDS, or "merge config". A mergekit YAML passes as a
    study.
    """
    from optimer_hf.merging.mergekit_models import list_absent_models
    from optimer_hf.merging.mergekit_yaml import known_keys, read_keys

    if kind == "merge config" or (kind == "study" and is_for_mergekit(read_yaml(path))):
        read_keys(path, known_keys())
        return list_absent_models(read_yaml(path), path)
    config = _read_fields(path, kind)
    return list_absent_files(path, config.model_dump(exclude={"baselines"}))


def _read_fields(path: Path, kind: str) -> VersionedFile:
    """Read a file of a kind; raise ConfigError for mistakes in its fields, or for another kind."""
    _refuse_other_kind(path, kind)
    config = KINDS[kind].read(path)
    if isinstance(config, StudyConfig):
        try:
            refuse_missing_plugins(config)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    if isinstance(config, TrainConfig) and (mistakes := list_field_mistakes(config)):
        raise ConfigError(list_mistakes(path, mistakes))
    return config


TYPICAL = {  # fields that only files of a kind have, and what is done with such files
    "study": ({"search", "test", "baselines"}, "`optimer search` takes a study"),
    "train": ({"corpus", "mixture", "trainer"}, "`optimer train` takes a train file"),
    "objective": ({"terms"}, "`optimer evaluate` and `search --objective` take an objective"),
    "recipe": ({"scores", "versions", "ledger"}, "`optimer build` takes a recipe"),
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
