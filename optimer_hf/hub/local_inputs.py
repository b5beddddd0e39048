"""What a recipe takes from this machine, and where readers find it: its base and its vectors.

A base, a checkpoint or an adapter is uploaded as it is, or found on the Hub by the sha256 of its
weights. Only the base that an adapter_config.json names, and that a vector.json names, follow the
move to the Hub.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from optimer_hf.errors import HubError
from optimer_hf.files.digest import sha256_file
from optimer_hf.files.reading import read_json
from optimer_hf.files.reference import Reference, is_pinned, pin
from optimer_hf.hub.client import describe_input, retry
from optimer_hf.models.layout import (
    ADAPTER_CONFIG,
    role_of,
    weight_digests,
    weights_fingerprint,
)
from optimer_hf.recipes.record import LOCK, Lock, Recipe
from optimer_hf.vectors.record import VectorFile

BASE = "base_model"
NOT_YET = "0" * 40  # stands for a commit that is not known yet
BASE_NAMES = ("base_model_name_or_path", "revision")  # fields that no weight depends on


@dataclass(frozen=True)
class Placed:
    """Where readers find an input of this machine: its reference on the Hub, and the content of
    the adapter_config.json there (None: the same as here).
    """

    reference: str
    adapter_config: bytes | None = None

    def digests(self, locked: Mapping[str, str]) -> dict[str, str]:
        """Return the sha256 of the files on the Hub, given those that are locked here."""
        if self.adapter_config is None:
            return dict(locked)
        return {**locked, ADAPTER_CONFIG: hashlib.sha256(self.adapter_config).hexdigest()}


@dataclass(frozen=True)
class LocalInput:
    """A base or vector on this machine, with the sha256 of its weights files that are locked."""

    field: str
    path: Path
    locked: Mapping[str, str]
    kind: str

    def fingerprint_at(self, place: Placed) -> str:
        """Return the digest that a study records of this input where readers find it."""
        return weights_fingerprint(self.path, place.adapter_config)

    def refuse_changed(self) -> None:
        """Raise HubError unless the weights are the locked ones."""
        if not self.path.is_dir() or weight_digests(self.path) != self.locked:
            raise HubError(
                f"{self.field}: the weights in {self.path} are not the locked ones. Write the "
                "recipe again."
            )


def local_inputs(directory: Path) -> dict[str, LocalInput]:
    """Return what the recipe in a directory takes from this machine: its vectors by name, and its
    base as `base_model`.
    """
    file = directory / "recipe.yaml"
    recipe, lock = Recipe.read(file), Lock.read(directory / LOCK)
    inputs = {}
    if (path := Reference(recipe.base_model).path) is not None:
        inputs[BASE] = LocalInput(f"{file}: {BASE}", path, lock.base, "base")
    for name, source in recipe.sources.items():
        if (path := Reference(source).path) is not None:
            locked, kind = lock.vectors.get(name, {}), lock.kinds.get(name) or _kind_of(path)
            inputs[name] = LocalInput(f"{file}: vectors.{name}", path, locked, kind)
    return inputs


def _kind_of(path: Path) -> str:
    """Return the kind of a vector whose lock is of 0.1.0, which recorded no kinds."""
    return "adapter" if (path / ADAPTER_CONFIG).exists() else "checkpoint"


# -- on the Hub already ----------------------------------------------------------------------------


def find_on_hub(
    api: HfApi, inputs: Mapping[str, LocalInput], at: Mapping[str, str]
) -> dict[str, Placed]:
    """Return where inputs lie on the Hub that a person named: `at` maps each name to a repository,
    with or without a revision. `base` is the base model, unless a vector has that name.

    Raises HubError if the weights there are not the locked ones.
    """
    return {
        name: place_on_hub(api, option, inputs[name], Reference(reference))
        for name, option, reference in _named_inputs(inputs, at)
    }


def assume_on_hub(inputs: Mapping[str, LocalInput], at: Mapping[str, str]) -> dict[str, Placed]:
    """Return what `find_on_hub` does without asking the Hub whether it is true."""
    named = _named_inputs(inputs, at)
    places = {
        name: text if is_pinned(text) else pin(Reference(text).repo[0], NOT_YET)
        for name, _, text in named
    }
    return {name: Placed(reference) for name, reference in places.items()}


def _named_inputs(
    inputs: Mapping[str, LocalInput], at: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    """Return name, option and repository of each input that a person placed. Raises HubError for
    names of none.
    """
    named = []
    for given, reference in at.items():
        name = BASE if given == "base" and given not in inputs else given
        if name not in inputs:
            raise HubError(
                f"--at {given}={reference}: found no input of that name on this machine, expected "
                f"one of {', '.join(inputs) or 'none, since all are on the Hub'}."
            )
        named.append((name, f"--at {given}={reference}", reference))
    return named


def place_on_hub(api: HfApi, option: str, local: LocalInput, ref: Reference) -> Placed:
    """Return where an input lies in a repository that `option` names. Raises HubError if the
    weights there are not the locked ones.
    """
    if ref.path is not None or ref.package is not None or ref.repo[0].count("/") != 1:
        raise HubError(f"{option}: expected a repository as OWNER/NAME or OWNER/NAME@REVISION.")
    info = describe_input(api, ref)
    files = {file.rfilename: file for file in info.siblings or []}
    download = partial(api.hf_hub_download, info.id, revision=info.sha)
    weights = {name for name in local.locked if name != ADAPTER_CONFIG}
    others = {name for name in files if role_of(name) == "weights"} - weights
    for name in sorted(weights | others):
        sha256 = _sha256_on_hub(files[name], download) if name in files else "no such file"
        if sha256 != local.locked.get(name):
            raise HubError(
                f"{option}: its weights are not those of {local.path}: {name}: found {sha256}, "
                f"expected {local.locked.get(name, 'no such file')}. Give the repository that has "
                "the same files, or push them with --vectors."
            )
    reference = f"{info.id}@{info.sha}"
    if ADAPTER_CONFIG not in local.locked:
        return Placed(reference)
    if ADAPTER_CONFIG not in files:
        raise HubError(f"{option}: has no {ADAPTER_CONFIG}, expected that of {local.path}.")
    there = Path(retry(partial(download, ADAPTER_CONFIG))).read_bytes()
    if hashlib.sha256(there).hexdigest() == local.locked[ADAPTER_CONFIG]:
        return Placed(reference)
    local.refuse_changed()
    if differing := _differing_fields(there, local.path / ADAPTER_CONFIG):
        raise HubError(
            f"{option}: its {ADAPTER_CONFIG} differs from that of {local.path} in "
            f"{', '.join(differing)}. Only the name of the base may differ."
        )
    return Placed(reference, there)


def _sha256_on_hub(file: Any, download: Any) -> str:
    """Return the sha256 of a file in a repository; small ones are downloaded for it."""
    if file.lfs is not None:
        return str(file.lfs.sha256)
    return sha256_file(Path(retry(partial(download, file.rfilename))))


def _differing_fields(there: bytes, here: Path) -> list[str]:
    """Return the fields of two adapter configs that differ and that change what it computes."""
    one, other = json.loads(there), read_json(here)
    if not isinstance(one, dict):
        return ["its content"]
    fields = (one.keys() | other.keys()) - set(BASE_NAMES)
    return sorted(field for field in fields if one.get(field) != other.get(field))


# -- going to the Hub ------------------------------------------------------------------------------


def adapter_config_naming(base: str, path: Path, *, is_base_local: bool) -> bytes | None:
    """Return the adapter_config.json of an adapter for the Hub, where `base` is its base; None if
    it may stay as it is, because it names a base on the Hub and that base did not move.
    """
    config = read_json(path / ADAPTER_CONFIG)
    named = config.get("base_model_name_or_path")
    is_hub_id = isinstance(named, str) and Reference(named).path is None and named.count("/") == 1
    if is_hub_id and not is_base_local and not Path(named).exists():
        return None
    moved: dict[str, str | None] = {"base_model_name_or_path": base}
    if "revision" in config:
        moved["revision"] = None  # a commit of the repository that it named before
    return json.dumps(config | moved, indent=2).encode()


def with_base_on_hub(record: VectorFile, base: str) -> VectorFile:
    """Return a vector.json whose base is the reference `base`, which has the same weights."""
    name, _, commit = base.partition("@")
    moved = record.base.model_copy(update={"reference": name, "commit": commit or None})
    return record.model_copy(update={"base": moved})
