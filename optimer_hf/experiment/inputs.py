"""Which kind of file an input is, what is wrong with it, and its JSON Schema.

A YAML file comes in; its kind and the local files that it names and that are missing go out, or a
ConfigError with every mistake. `schemas/` holds the schemas as files, each as `optimer schema KIND`
prints it. A YAML file names its own on its first line: `# yaml-language-server: $schema=PATH`.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.errors import ConfigError
from optimer_hf.files.model import (
    VersionedFile,
    list_absent_files,
    list_absent_files_of_data,
    list_mistakes,
)
from optimer_hf.files.reading import read_yaml
from optimer_hf.merging.mergekit_keys import is_for_mergekit
from optimer_hf.recipes.record import Recipe
from optimer_hf.scoring.objective import Objective, ObjectiveFile
from optimer_hf.study.config import StudyConfig
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.fields import is_settled, list_field_mistakes

if TYPE_CHECKING:
    from optimer_hf.scoring.overlap import TermOverlap

KINDS: dict[str, type[VersionedFile]] = {
    "study": StudyConfig,
    "train": TrainConfig,
    "objective": ObjectiveFile,
    "recipe": Recipe,
}


def schema_of(kind: str) -> str:
    """Return the JSON Schema (draft 2020-12) of one kind of file, a key of KINDS, as text."""
    schema = KINDS[kind].model_json_schema()
    return json.dumps({"title": f"{kind}.yaml"} | schema, indent=2, ensure_ascii=False)


def kind_of(keys: Collection[str]) -> str:
    """Return the kind, a key of KINDS, of a file with these keys."""
    if "study" in keys and "scores" in keys:
        return "recipe"
    if "objective" in keys or "vectors" in keys:
        return "study"
    return "objective" if "terms" in keys else "train"


# -- checking --------------------------------------------------------------------------------------


def check_file(path: Path, *, strict: bool = False) -> tuple[str, list[str]]:
    """Return what a YAML file is, in words, and a line for each local file that it names and that
    is missing. Models and tasks are not opened.

    Raises ConfigError for a file with mistakes, a line for each; with `strict`, missing files are
    mistakes.
    """
    try:
        what, fields = _checked(path)
    except ConfigError as error:
        missing = _absent_beside_mistakes(path) if strict else ""
        raise ConfigError("\n".join(filter(None, [str(error), missing]))) from error
    missing = list_absent_files(path, fields)
    if strict and missing:
        raise ConfigError(missing)
    return what, missing.splitlines()


def _checked(path: Path) -> tuple[str, Any]:
    """Return what a file is, and its fields with local paths absolute."""
    keys = set(read_yaml(path))
    if keys and keys <= {"train", "study"}:
        return "short budget of a recipe", {}
    if is_for_mergekit(keys):
        return "merge config", _checked_merge_config(path)
    kind = kind_of(keys)
    config = _read_checked(path, kind)
    if isinstance(config, TrainConfig) and not is_settled(config):
        from optimer_hf.training.checks import check_config  # takes seconds to import

        check_config(config, path)
    # what a recipe was searched with need not be here
    fields = config.model_dump(exclude={"objective"} if kind == "recipe" else None)
    for vector in fields["vectors"].values() if kind == "study" else ():
        if vector["train"] is not None:
            vector["train"] = str(path.resolve().parent / vector["train"])
    return "train config" if kind == "train" else kind, fields


def _checked_merge_config(path: Path) -> dict[str, Any]:
    from optimer_hf.merging.mergekit_pool import linear_merge_of, with_absolute_references
    from optimer_hf.merging.mergekit_yaml import read_merge_config

    config = read_merge_config(path)
    linear_merge_of(config, path)
    return with_absolute_references(config, path)


def _absent_beside_mistakes(path: Path) -> str:
    """Return, as `list_absent_files` does, the missing files that a file with mistakes names.

    The text is empty for a file that is not YAML.
    """
    from optimer_hf.merging.mergekit_models import list_absent_models

    try:
        data = read_yaml(path)
    except ConfigError:
        return ""
    if is_for_mergekit(data):
        return list_absent_models(data, path)
    return list_absent_files_of_data(KINDS[kind_of(data)], data, path)


def check_fields(path: Path, kind: str) -> None:
    """Raise ConfigError for a mistake in the fields of a file, so far as it can be found without a
    library that takes seconds to import.

    `kind` is a key of KINDS, or "merge config". A mergekit YAML passes as a study.
    """
    from optimer_hf.merging.mergekit_yaml import known_keys, read_keys

    if kind == "merge config" or (kind == "study" and is_for_mergekit(read_yaml(path))):
        read_keys(path, known_keys())
        return
    _read_checked(path, kind)


def _read_checked(path: Path, kind: str) -> VersionedFile:
    """Return a file of a kind without mistakes in its fields."""
    config = KINDS[kind].read(path)
    if isinstance(config, TrainConfig) and (mistakes := list_field_mistakes(config)):
        raise ConfigError(list_mistakes(path, mistakes))
    return config


# -- sorting ---------------------------------------------------------------------------------------


def corpora_and_objectives(
    files: Sequence[Path], text_field: str
) -> tuple[list[CorpusConfig], dict[str, Objective]]:
    """Sort files into corpora (JSONL, text, the corpora of train files) and objectives by name (of
    objective files and studies, with their sealed tests).

    Raises ConfigError for a file that is neither, and where one of the two is missing.
    """
    corpora: list[CorpusConfig] = []
    objectives: dict[str, Objective] = {}
    for path in files:
        keys = set(read_yaml(path)) if path.suffix in (".yaml", ".yml") else None
        if keys is None:
            corpora.append(CorpusConfig(path=path.resolve(), text_field=text_field))
        elif "objective" in keys and "scores" not in keys:  # a recipe has both
            study = StudyConfig.read(path)
            objectives[f"{path} objective"] = study.objective
            if study.test is not None:
                objectives[f"{path} test"] = study.test
        elif "terms" in keys:
            objectives[str(path)] = ObjectiveFile.read(path)
        elif keys & {"corpus", "mixture"}:
            corpora.extend(TrainConfig.read(path).corpora)
        else:
            raise ConfigError(
                f"{path}: found the fields {', '.join(sorted(map(str, keys)))}, expected those of "
                "an objective, a study or a train config. Give one of these, or a corpus file."
            )
    _refuse_one_sided(corpora, objectives)
    return corpora, objectives


def _refuse_one_sided(corpora: Collection[Any], objectives: Collection[Any]) -> None:
    if not corpora or not objectives:
        missing = "objective" if corpora else "corpus"
        kinds = (
            "an objective.yaml or a study.yaml"
            if corpora
            else "a JSONL or text file, or a train.yaml"
        )
        raise ConfigError(f"check-overlap: found no {missing} among the files. Add {kinds}.")


def overlap_of_files(
    files: Sequence[Path], *, n: int = 13, text_field: str = "text"
) -> "list[TermOverlap]":
    """Return, for each term of the objectives among some files, its items that share `n` units in a
    row with the corpora among them; see `corpora_and_objectives` and `check_overlap`.
    """
    corpora, objectives = corpora_and_objectives(files, text_field)
    from optimer_hf.scoring.overlap import check_overlap  # takes seconds to import

    return check_overlap(corpora, objectives, n=n)
