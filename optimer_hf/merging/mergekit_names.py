"""Whether mergekit finds the tensors of a base and its fine-tunes. It looks them up by the names in
its own tables of architectures, and does not know every model class, prefix or older form.

The tables are files of mergekit, which is imported only for models that they do not settle.
"""

import json
import logging
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from optimer_hf.errors import OptimerError
from optimer_hf.files.reading import read_json
from optimer_hf.merging.mergekit_models import ModelName
from optimer_hf.merging.mergekit_pool import BASE_FIELD, VECTORS
from optimer_hf.models.headers import BUFFERS, read_shapes
from optimer_hf.vectors.groups import OF_LAYER

Names = frozenset[str]


class _Template(string.Template):
    idpattern = r"[a-z_]+"


def list_unreadable(base: Path, checkpoints: Mapping[str, Path]) -> list[str]:
    """Return the models in which mergekit does not find all tensors, or would leave some out, as
    fields of a recipe: `base_model`, or `vectors.NAME` for a name of `checkpoints`, fine-tunes of
    that base. None if a file cannot be read, which others refuse.
    """
    names = {name: frozenset(read_shapes(path)) for name, path in checkpoints.items()}
    of_base = frozenset(read_shapes(base))
    if not of_base or not all(names.values()) or not (base / "config.json").is_file():
        return []
    if _tables_settle(base, of_base, [of_base, *names.values()]):
        return []
    if not _finds_all(base, base, of_base, of_base):
        return [BASE_FIELD]
    return [
        f"{VECTORS}.{name}"
        for name, path in checkpoints.items()
        if not _finds_all(base, path, of_base, names[name])
    ]


def _tables_settle(base: Path, of_base: Names, models: Iterable[Names]) -> bool:
    """Whether each model, given by its names, has all that mergekit's table for the base asks for,
    and the layers of the base as they are; and whether the table has all of the base.
    """
    table = _read_table(base)
    stored = {each for each in of_base if not BUFFERS.search(each)}
    in_layers = {each for each in stored if OF_LAYER.match(each)}
    if not stored <= frozenset().union(*table):
        return False
    needed = [names for names, is_needed in table.items() if is_needed]
    return all(
        in_layers <= names and not any(group.isdisjoint(names) for group in needed)
        for names in models
    )


def _read_table(model: Path) -> dict[Names, bool]:
    """Return the names by which mergekit takes each tensor, from its table for the class of a
    model, and whether it needs the tensor; nothing if the table is not a plain one.
    """
    try:
        config = read_json(model / "config.json")
        (architecture,) = config["architectures"]
        table = _find_table(architecture, config.get("model_type"))
        outside = (*table["pre_weights"], *table["post_weights"])
        weights: list[tuple[Any, dict[str, int]]] = [(each, {}) for each in outside]
        for index in range(int(config[table["num_layers_config_key"]])):
            own = {"layer_index": index}
            weights += [(each, own) for each in table["layer_templates"]["weights"]]
        return {_names_of(each, own): not each.get("optional") for each, own in weights}
    except (OptimerError, OSError, ValueError, KeyError, TypeError):
        return {}


def _find_table(architecture: str, model_type: str | None) -> dict[str, Any]:
    """Return mergekit's table for a model class. Raises ValueError if there is not exactly one."""
    package = find_spec("mergekit")
    assert package is not None and package.origin is not None  # it is a requirement
    files = sorted((Path(package.origin).parent / "_data" / "architectures").glob("*.json"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    tables = [json.loads(text) for text in texts if f'"{architecture}"' in text]
    tables = [each for each in tables if architecture in each["architectures"]]
    if len(tables) > 1:
        tables = [each for each in tables if each["model_type"] == model_type]
    (table,) = tables
    return dict(table)


def _names_of(weight: Mapping[str, Any], values: Mapping[str, int]) -> Names:
    """Return the names by which mergekit takes a tensor. Raises KeyError for an unknown number."""
    names = [weight["name"], *(weight.get("aliases") or ()), *(weight.get("tied_names") or ())]
    return frozenset(_Template(name).substitute(values) for name in names)


# -- what mergekit says ----------------------------------------------------------------------------


def _finds_all(base: Path, model: Path, of_base: Names, names: Names) -> bool:
    """Whether mergekit finds all that it needs of a model, and whatever it finds in the layers of
    the base; of the base itself, whether it knows every tensor.
    """
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    references = [ModelName(str(path)).long_form for path in (base, model)]
    models = [{"model": references[1], "parameters": {"weight": 1.0}}]
    config = MergeConfiguration(
        merge_method="task_arithmetic", base_model=references[0], models=models
    )
    try:
        with _in_silence():
            settings = config.base_model.config(trust_remote_code=False)
            weights = get_architecture_info(config, MergeOptions()).all_weights(settings)
            if base == model and _leaves_out(base, names, weights, settings.model_type):
                return False
    except (OptimerError, ValueError, RuntimeError, KeyError, OSError, AttributeError, TypeError):
        return False
    kind = settings.model_type
    for weight in weights:
        in_base = OF_LAYER.match(weight.name) and _can_take(weight, of_base, kind)
        if (in_base or not weight.optional) and not _can_take(weight, names, kind):
            return False
    return True


def _leaves_out(base: Path, names: Names, weights: Sequence[Any], model_type: str) -> bool:
    """Whether mergekit leaves out tensors of a base: those that it knows neither by name nor as
    parts of others in their layer, such as the experts that it stacks. It stacks none into a tensor
    that its table calls optional.
    """
    from optimer_hf.models.checkpoint import Checkpoint  # imports torch
    from optimer_hf.models.ties import ties_of

    known = {name for each in weights for name in _all_names(each)}
    rest = {each for each in names - known if not BUFFERS.search(each)}
    made = [w for w in weights if rest and not w.optional and names.isdisjoint(_all_names(w))]
    stacked = {_layer_of(w.name) for w in made if _can_take(w, names, model_type)}
    rest = {each for each in rest if _layer_of(each) not in stacked}
    return bool(rest) and bool(rest - ties_of(Checkpoint(base)).copies)


def _layer_of(name: str) -> str:
    """Return the part of a tensor's name that says its layer; nothing if it is in none."""
    numbered = OF_LAYER.match(name)
    return "" if numbered is None else numbered[0]


def _all_names(weight: Any) -> set[str]:
    return {weight.name, *(weight.aliases or ()), *(weight.tied_names or ())}


def _can_take(weight: Any, names: Names, model_type: str) -> bool:
    """Whether mergekit can take a tensor of its tables from stored ones with these names."""
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    targets = (weight.name, *(weight.aliases or ()))
    if not names.isdisjoint(_all_names(weight)):
        return True
    return any(can_convert_checkpoint_keys(model_type, {*names}, each) for each in targets)


@contextmanager
def _in_silence() -> Iterator[None]:
    """Keep back what mergekit and transformers log about a model that nobody has asked to merge."""
    root, handler = logging.getLogger(), logging.NullHandler()
    loud = [logging.getLogger(name) for name in (None, "mergekit", "transformers")]
    before = [each.level for each in loud]
    root.addHandler(handler)  # without one, mergekit's calls would set logging up
    for each in loud:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for each, level in zip(loud, before, strict=True):
            each.setLevel(level)
