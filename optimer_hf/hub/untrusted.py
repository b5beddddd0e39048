"""Validate what was pulled from others, before it is put in place; nothing of it is run.

A reference may point into the file system of the reader, and a lock may belong to another recipe:
both are refused. No YAML file can make reading slow, see `files.reading`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimer_hf.comparison.sealed_file import SealedLog
from optimer_hf.errors import HubError
from optimer_hf.files.model import parse
from optimer_hf.files.paths import strings_in
from optimer_hf.files.reading import read_yaml
from optimer_hf.files.reference import COMMIT, pin
from optimer_hf.files.text import quote
from optimer_hf.hub.publication import Kind, is_weights
from optimer_hf.recipes.record import LOCK, Lock, Recipe
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.directory import open_study
from optimer_hf.study.trials import STUDY_FILE
from optimer_hf.vectors.record import VectorFile, read_record

LARGEST_TEXT = 64 * 2**20  # bytes of a file beside the weights; the largest tokenizers have 33 MB


def check_pulled(kind: Kind, directory: Path) -> Recipe | VectorFile:
    """Validate the small files in a pulled directory and return its record.

    Raises HubError for inputs that are not pinned, and ConfigError for unknown fields and for YAML
    that is malformed, too large or too deep.
    """
    for path in directory.iterdir():
        if path.suffix in (".yaml", ".yml"):
            read_yaml(path)  # also those that only mergekit will read
    if kind == "vector":
        return _check_vector(directory)
    data = read_yaml(directory / "recipe.yaml")
    vectors = data.get("vectors")
    references = {"base_model": data.get("base_model")} | {
        f"vectors.{name}.source": item.get("source")
        for name, item in (vectors.items() if isinstance(vectors, dict) else ())
        if isinstance(item, dict)
    }
    named = data.get("tokenizer_source")
    if named not in (None, "base", *(vectors if isinstance(vectors, dict) else ())):
        references["tokenizer_source"] = named
    for where, reference in references.items():
        _refuse_local(f"{directory / 'recipe.yaml'}: {where}", reference)
    for at, text in strings_in(data.get("objective")):
        if at[-1] == "function":
            _refuse_code(f"{directory / 'recipe.yaml'}: objective.{'.'.join(map(str, at))}", text)
    recipe = parse(Recipe, data, directory / "recipe.yaml")
    lock = Lock.read(directory / LOCK)
    if set(lock.vectors) != set(recipe.vectors):
        raise HubError(
            f"{directory / LOCK}: locks the vectors {', '.join(sorted(lock.vectors))}, but the "
            f"recipe has {', '.join(sorted(recipe.vectors))}. Ask its author to push it again."
        )
    if (directory / "study" / STUDY_FILE).exists():
        _check_study(directory / "study")
    return recipe


def _check_study(directory: Path) -> None:
    """Raise an OptimerError for a study that cannot be read, or that names files outside its own
    folder. A push leaves only the names of local files.
    """
    file = directory / STUDY_FILE
    data = read_yaml(file)
    for at, text in strings_in(data):
        if at[-1] == "function":
            _refuse_code(f"{file}: {'.'.join(map(str, at))}", text)
        is_file = at[-1] in ("text", "include_path")
        is_reference = at[-1] in ("source", "base_model", "tokenizer_source") or "models" in at
        if is_file or (is_reference and not _is_named_elsewhere(text)):
            _refuse_folders(f"{file}: {'.'.join(map(str, at))}", text)
    study = open_study(StudyConfig.read_record(file), directory, repair=False)
    SealedLog(directory, study.config, repair=False)


def _refuse_code(where: str, function: str) -> None:
    """Raise HubError for a function that is to be loaded from a file."""
    if re.search(r"[:/\\]|\.py$", function):
        raise HubError(
            f"{where}: found {quote(function)}, expected the name of a function. Code from others "
            "is never run; give such a function from Python."
        )


def _is_named_elsewhere(reference: str) -> bool:
    """Whether a reference, pinned or not, names something on the Hub or a package."""
    unpinned = reference.removeprefix("hf://").partition("@")[0]
    return _is_remote(reference) or _is_remote(f"{unpinned}@{'0' * 40}")


def _refuse_folders(where: str, text: str) -> None:
    """Raise HubError for a text that, read as a path, leads out of its folder."""
    if re.search(r"[/\\\0]", text) or text.startswith(("~", ".")):
        raise HubError(
            f"{where}: found {quote(text)}, expected a model on the Hub or the name of a file. "
            "Files from others may not name local files."
        )


def refuse_other_weights(repo_id: str, lock: Lock, digests: Mapping[str, str]) -> None:
    """Raise HubError unless the weights among `digests` (file -> sha256) are those in the lock that
    came with them.
    """
    pulled = {
        name: sha256
        for name, sha256 in digests.items()
        if is_weights(name) or name == "adapter_config.json"
    }
    if pulled != lock.output:
        raise HubError(
            f"{repo_id}: its weights are not those in its own recipe.lock.json. Build the recipe "
            "yourself, or ask its author."
        )


def _check_vector(directory: Path) -> VectorFile:
    record = read_record(directory)
    assert record is not None  # vector.json is there
    base = record.base
    _refuse_local(f"{directory / 'vector.json'}: base", pin(base.reference, base.commit))
    return record


def _refuse_local(where: str, reference: Any) -> None:
    if not isinstance(reference, str) or not _is_remote(reference):
        raise HubError(
            f"{where}: found {reference!r}, expected org/name@<40-digit commit> or pypi:package. "
            "Files from others may not name local files."
        )


def _is_remote(reference: str) -> bool:
    if reference.startswith("pypi:"):
        return re.fullmatch(r"[A-Za-z0-9_-]+", reference.removeprefix("pypi:")) is not None
    name, _, revision = reference.removeprefix("hf://").partition("@")
    parts = name.split("/")
    return (
        len(parts) == 2
        and all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", part) for part in parts)
        and COMMIT.fullmatch(revision) is not None
    )
