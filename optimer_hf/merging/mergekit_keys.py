"""Check the keys and values of a merge config against those that mergekit knows (`Keys`).

mergekit silently ignores keys that it does not know. Here a key that no merge method knows is an
error, and a key that only other methods know has no effect. Keys that only hold YAML anchors are
allowed. `mergekit_yaml` reads the keys from the installed mergekit; nothing here imports it.
"""

import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter

from optimer_hf.errors import ConfigError
from optimer_hf.files.model import Mistake, list_mistakes
from optimer_hf.files.paths import Place
from optimer_hf.files.text import did_you_mean, quote
from optimer_hf.merging.mergekit_models import model_name, models_of, unknown_field

METHOD = "optimer"  # the merge method of this package
DTYPES_OF_MERGES = ["bfloat16", "float16", "float32", "float64", "int64"]
FORMER_PARAMETERS = {"embed_slerp"}  # older versions read them, and recipes still have them
NOTES = {"name", "random_seed"}  # for other programs that read these files
OTHER_PROGRAMS = {"experts": "mergekit-moe", "genome": "mergekit-evolve"}
LARGEST = 10**6  # for a parameter; useful weights are far below
NUMBERS = {  # fields outside of parameters: lowest and highest value
    "layer_range": (0, 10**5),
    "pad_to_multiple_of": (1, 2**16),
    "residual_weight": (-LARGEST, LARGEST),
    "token_id": (0, 2**31 - 1),
}
EXPECTED = {float: "a number", int: "a whole number", bool: "true or false"}
KINDS_OF_TOKENS = ("model_token", "zero")


@dataclass(frozen=True)
class Keys:
    """What mergekit knows: the fields of each block of a config, the parameters of each merge
    method with the types of their values, and the names of its chat templates.

    The blocks are config, module, model, slice, source, tokenizer, token, model_token and zero.
    """

    fields: Mapping[str, Sequence[str]]
    parameters: Mapping[str, Mapping[str, Any]]
    chat_templates: Collection[str]

    def parameters_of(self, method: Any) -> Mapping[str, Any]:
        """Return the parameters of a merge method; none for a method that does not exist."""
        return self.parameters.get(method, {}) if isinstance(method, str) else {}

    @functools.cached_property
    def all_parameters(self) -> frozenset[str]:
        """The parameters of all merge methods; they do no harm where a method ignores them."""
        return frozenset(FORMER_PARAMETERS).union(*self.parameters.values())


def is_for_mergekit(keys: Collection[str]) -> bool:
    """Whether a file with these keys is for mergekit or one of the programs that come with it."""
    if "merge_method" in keys or "experts" in keys or "genome" in keys:
        return True
    return "models" in keys


def check_merge_config(config: Mapping[str, Any], path: Path, keys: Keys) -> list[Place]:
    """Return the places of the keys in a config that its merge method ignores.

    Raises ConfigError with one line for each mistake: keys that no merge method knows, values that
    the method does not accept, and models that are not named as mergekit names them.
    """
    _refuse_other_programs(config, path)
    mistakes = list(_mistakes(config, path, keys))
    ignored: list[Place] = []
    for at, block, fields in _blocks(config, keys):
        if isinstance(block, Mapping):
            for place, message in _stray_keys(at, block, fields, config, path, keys):
                if message is None:
                    ignored.append(place)
                else:
                    mistakes.append((place, message))
    if mistakes:
        raise ConfigError(list_mistakes(path, mistakes))
    return ignored


def keep_read_keys(
    config: Mapping[str, Any], ignored: Sequence[Place], keys: Keys
) -> dict[str, Any]:
    """Return a config without the keys at the `ignored` places and without those that only hold
    YAML anchors.
    """
    read = {key: value for key, value in config.items() if key in keys.fields["config"]}
    kept: dict[str, Any] = _without(read, ignored)
    return kept


def _refuse_other_programs(config: Mapping[str, Any], path: Path) -> None:
    for key, program in OTHER_PROGRAMS.items():
        if key in config and "merge_method" not in config:
            raise ConfigError(
                f"{path}: found {key!r}, a config for {program}, expected one for mergekit-yaml, "
                "with `merge_method`."
            )


def _without(value: Any, places: Sequence[Place], at: Place = ()) -> Any:
    """Return a nested value without the entries at some places."""
    if isinstance(value, list):
        return [_without(item, places, (*at, i)) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    return {
        key: _without(item, places, (*at, key))
        for key, item in value.items()
        if (*at, key) not in places
    }


# -- values ----------------------------------------------------------------------------------------


def _mistakes(config: Mapping[str, Any], path: Path, keys: Keys) -> Iterator[Mistake]:
    """Yield what is wrong with the values of a config."""
    method, known = config.get("merge_method"), list(keys.parameters)
    if method is None:
        example = "To use the method of this package, write `merge_method: optimer`."
        yield (), f"field 'merge_method' is missing. {example}"
    elif method not in known:
        hint = did_you_mean(str(method), known)
        yield ("merge_method",), f"mergekit has no merge_method {method!r}.{hint}"
    for field in ("dtype", "out_dtype"):
        name = str(config.get(field) or "float32").removeprefix("torch.")
        if name not in DTYPES_OF_MERGES:
            hint = did_you_mean(name, DTYPES_OF_MERGES)
            yield (
                (field,),
                f"{field}: found {config[field]!r}, which is no dtype for a merge.{hint}",
            )
    for field in ("models", "slices"):
        if not isinstance(config.get(field, []), list):
            yield (field,), f"{field}: found {quote(config[field])}, expected a list."
    for at, block, _ in _blocks(config, keys):
        dotted = ".".join(map(str, at))
        if not isinstance(block, Mapping):
            yield at, f"{dotted}: found {quote(block)}, expected a mapping."
        elif at[-2:-1] in (("models",), ("sources",)) and block.get("model") is None:
            yield at, f"{dotted}: field 'model' is missing."
        if isinstance(block, Mapping):
            yield from _number_mistakes(at, block)
            yield from _slice_mistakes(at, block)
    for at, value in models_of(config):
        try:
            model_name(value, path.resolve().parent)
        except ValueError as error:
            yield at, f"{'.'.join(map(str, at))}: {error}"
    yield from _template_mistakes(config.get("chat_template"), keys)


def _slice_mistakes(at: Place, block: Mapping[str, Any]) -> Iterator[Mistake]:
    """Yield what a slice or one of its sources lacks."""
    dotted = ".".join(map(str, at))
    if at[-2:-1] == ("slices",) and not (
        isinstance(block.get("sources"), list) and block["sources"]
    ):
        yield at, f"{dotted}: field 'sources' is missing. Give a list of models with layer_range."
    if at[-2:-1] == ("sources",) and block.get("layer_range") is None:
        yield at, f"{dotted}: field 'layer_range' is missing. Give [first, end] of its layers."


def _template_mistakes(template: Any, keys: Keys) -> Iterator[Mistake]:
    """Yield a wrong chat_template, which mergekit would find only after the merge. It may be
    `auto`, the name of a template of mergekit, or the template itself.
    """
    if template is None or template == "auto":
        return
    if isinstance(template, str) and "{" in template and len(template) >= 20:
        return
    known = [*keys.chat_templates, "auto"]
    if template not in known:
        hint = did_you_mean(str(template), known)
        expected = "expected auto, a name or a Jinja template."
        yield ("chat_template",), f"chat_template: found {quote(template)}, {expected}{hint}"


# -- keys ------------------------------------------------------------------------------------------


def _blocks(config: Mapping[str, Any], keys: Keys) -> Iterator[tuple[Place, Any, Sequence[str]]]:
    """Yield the mappings of a config except `parameters`, each with its place and the fields that
    mergekit reads there.
    """
    fields = keys.fields
    yield (), config, fields["config"]
    yield from _layers(config, (), fields)
    for at, module in _entries(config.get("modules"), ("modules",)):
        yield at, module, fields["module"]
        if isinstance(module, Mapping):
            yield from _layers(module, at, fields)
    tokenizer = config.get("tokenizer")
    if tokenizer is None:
        return
    yield ("tokenizer",), tokenizer, fields["tokenizer"]
    tokens = tokenizer.get("tokens") if isinstance(tokenizer, Mapping) else None
    for at, token in _entries(tokens, ("tokenizer", "tokens")):
        yield at, token, fields["token"]
        source = token.get("source") if isinstance(token, Mapping) else None
        if isinstance(source, Mapping) and source.get("kind") in KINDS_OF_TOKENS:
            yield (*at, "source"), source, fields[source["kind"]]


def _layers(
    block: Mapping[str, Any], at: Place, fields: Mapping[str, Sequence[str]]
) -> Iterator[tuple[Place, Any, Sequence[str]]]:
    for place, model in _entries(block.get("models"), (*at, "models")):
        yield place, model, fields["model"]
    for place, piece in _entries(block.get("slices"), (*at, "slices")):
        yield place, piece, fields["slice"]
        sources = piece.get("sources") if isinstance(piece, Mapping) else None
        for inner, source in _entries(sources, (*place, "sources")):
            yield inner, source, fields["source"]


def _entries(value: Any, at: Place) -> Iterator[tuple[Place, Any]]:
    """Yield the entries of a list or of a mapping; mergekit refuses anything else."""
    if isinstance(value, list):
        yield from (((*at, index), item) for index, item in enumerate(value))
    if isinstance(value, Mapping):
        yield from (((*at, key), item) for key, item in value.items())


def _stray_keys(
    at: Place,
    block: Mapping[Any, Any],
    fields: Sequence[str],
    config: Mapping[str, Any],
    path: Path,
    keys: Keys,
) -> Iterator[tuple[Place, str | None]]:
    """Yield the place of every key that mergekit would ignore and of every value that the method
    does not accept, with what is wrong, or None for a key that merely has no effect.
    """
    where, parameters = ".".join(map(str, at)), keys.parameters_of(config.get("merge_method"))
    for key in block:
        if key not in fields and not (at == () and key in _anchor_keys(path)):
            message = _why_misplaced(key, fields, parameters, at == (), keys)
            yield (*at, key), message and f"{where}: {message}".removeprefix(": ")
    given = block.get("parameters")
    if given is None or "parameters" not in fields:
        return
    at, where = (*at, "parameters"), f"{where}.parameters".removeprefix(".")
    if not isinstance(given, Mapping):
        yield at, f"{where}: found {quote(given)}, expected a mapping."
        return
    for key, value in given.items():
        if key in parameters:
            for place, message in _value_mistakes(parameters[key], value, (*at, key)):
                yield place, f"{where}.{key}: {message}"
        elif key in keys.all_parameters:
            yield (*at, key), None
        else:
            yield (*at, key), f"{where}: {unknown_field(key, list(parameters))}"


def _why_misplaced(
    key: Any, fields: Sequence[str], parameters: Mapping[str, Any], is_top: bool, keys: Keys
) -> str | None:
    """Return what is wrong with a key outside of `parameters` that mergekit does not read there."""
    if key in parameters and key != "int8_mask":
        fix = "Put it under `parameters:`."
        return f"unknown field {key!r}, which mergekit would ignore here. {fix}"
    if key in keys.all_parameters or (is_top and key in NOTES):
        return None
    return unknown_field(key, fields)


def _value_mistakes(kind: Any, value: Any, at: Place) -> Iterator[Mistake]:
    """Yield what is wrong with the value of a parameter. It may be a scalar, a gradient (a list of
    scalars), a mapping of filter and value, or a list of such mappings.
    """
    items = value if isinstance(value, list) else [value]
    if not any(isinstance(item, Mapping) for item in items):
        yield from _gradient_mistakes(kind, value, at)
        return
    for index, item in enumerate(items):
        place = (*at, index) if items is value else at
        if not isinstance(item, Mapping):
            yield place, f"found {quote(item)} among filters, expected {{filter, value}}."
            continue
        for key in item:
            if key not in ("filter", "value"):
                yield (*place, key), unknown_field(key, ["filter", "value"])
        if not isinstance(item.get("filter"), str | None):
            text = quote(item["filter"])
            yield (*place, "filter"), f"filter: found {text}, expected part of a tensor name."
        inner = (*place, "value") if "value" in item else place
        yield from _gradient_mistakes(kind, item.get("value"), inner)


def _gradient_mistakes(kind: Any, value: Any, at: Place) -> Iterator[Mistake]:
    """Yield what is neither a scalar for a parameter nor a list of them."""
    kinds = (kind, *get_args(kind))
    expected = next((text for each, text in EXPECTED.items() if each in kinds), "another value")
    if value == []:
        yield at, f"found an empty list, expected {expected} or a list of them."
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        if reason := _why_no_scalar(kind, item, kinds, expected):
            yield (*at, index) if isinstance(value, list) else at, reason


def _why_no_scalar(kind: Any, value: Any, kinds: tuple[Any, ...], expected: str) -> str | None:
    if value is None:
        return f"found nothing, expected {expected}."
    is_switch = isinstance(value, bool) and bool not in kinds  # mergekit would count true as 1
    try:
        if is_switch or not isinstance(value, bool | int | float | str):
            raise ValueError
        number = TypeAdapter(kind).validate_python(value)
    except ValueError:
        return f"found {quote(value)}, expected {expected}."
    if isinstance(number, float) and not math.isfinite(number):
        return f"found {number}, expected a finite number."
    least, most = (0, LARGEST) if int in kinds else (-LARGEST, LARGEST)
    if not isinstance(number, bool | str) and not least <= number <= most:
        return f"found {value!r}, expected {expected} from {least:,} to {most:,}."
    return None


def _number_mistakes(at: Place, block: Mapping[Any, Any]) -> Iterator[Mistake]:
    """Yield fields outside of `parameters` that should be numbers in a range and are not."""
    for field, (least, most) in NUMBERS.items():
        value = block.get(field)
        items: Any = value if field == "layer_range" else [value]
        is_sound = isinstance(items, list) and len(items) == (2 if items is value else 1)
        for item in items if is_sound else ():
            kinds: Any = int | float if field == "residual_weight" else int
            is_number = isinstance(item, kinds) and not isinstance(item, bool)
            is_sound = is_sound and is_number and least <= item <= most
        if value is not None and not is_sound:
            what = "[first, end] of layers" if field == "layer_range" else "a number"
            dotted = ".".join(map(str, (*at, field)))
            expected = f"expected {what} from {least:,} to {most:,}."
            yield (*at, field), f"{dotted}: found {quote(value)}, {expected}"


def _anchor_keys(path: Path) -> set[str]:
    """Return the top-level keys of a YAML file that define an anchor used by another key."""
    if path.suffix == ".json":
        return set()
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    defined: dict[int, str] = {}  # id of a node -> the first key with it
    keys = set()
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        for node in _nodes(value):
            first = defined.setdefault(id(node), key.value)
            if first != key.value:
                keys.add(first)
    return keys


def _nodes(node: yaml.Node) -> Iterator[yaml.Node]:
    """Yield a YAML node and all nodes within it, each once."""
    seen, left = set(), [node]
    while left:
        current = left.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        for part in current.value if isinstance(current, yaml.CollectionNode) else ():
            left += part if isinstance(part, tuple) else [part]
