"""Read mergekit's YAML and return a config in which mergekit reads every key.

mergekit silently ignores keys that it does not know. Here a key that no merge method knows is an
error, and a key that only other methods know is left out with a warning. Keys that only hold YAML
anchors are allowed.
"""

import functools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from optimer_hf.errors import ConfigError
from optimer_hf.files.model import Mistake, list_absent_files, list_mistakes
from optimer_hf.files.paths import Place
from optimer_hf.files.reading import read_yaml
from optimer_hf.files.reference import absolute_reference, expand_home, is_there
from optimer_hf.files.text import did_you_mean, first_line, quote

logger = logging.getLogger(__name__)


METHOD = "optimer"  # the merge method of this package
DTYPES_OF_MERGES = ["bfloat16", "float16", "float32", "float64", "int64"]
FORMER_PARAMETERS = {"embed_slerp"}  # older versions read them, and recipes still have them
NOTES = {"name", "random_seed"}  # for other programs that read these files
OTHER_PROGRAMS = {"experts": "mergekit-moe", "genome": "mergekit-evolve"}
WORDS = ("union", "base")  # for a tokenizer; not models
LARGEST = 10**6  # for a parameter; useful weights are far below
NUMBERS = {  # fields outside of parameters: lowest and highest value
    "layer_range": (0, 10**5),
    "pad_to_multiple_of": (1, 2**16),
    "residual_weight": (-LARGEST, LARGEST),
    "token_id": (0, 2**31 - 1),
}
EXPECTED = {float: "a number", int: "a whole number", bool: "true or false"}


# -- models ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelName:
    """A model in a config: `org/name@revision`, an absolute path or `pypi:...`, with an adapter to
    merge into it first and an architecture to read it as, if given.
    """

    model: str
    adapter: str | None = None
    architecture: str | None = None

    @property
    def parts(self) -> list[str]:
        """The references of the model and, if there is one, of the adapter."""
        return [self.model] if self.adapter is None else [self.model, self.adapter]

    def __str__(self) -> str:
        return "+".join(self.parts)

    @property
    def long_form(self) -> dict[str, Any]:
        """The reference as a mapping. Unlike MODEL+ADAPTER, it allows + and @ in paths."""
        reference: dict[str, Any] = {"model": _long_path(self.model)}
        if self.adapter is not None:
            reference["lora"] = _long_path(self.adapter)
        if self.architecture is not None:
            reference["override_architecture"] = self.architecture
        return reference


def _long_path(reference: str) -> dict[str, str]:
    text = reference.removeprefix("hf://")
    name, at, revision = text.partition("@")
    is_local = text.startswith(("/", "pypi:"))
    return {"path": text} if is_local or not at else {"path": name, "revision": revision}


def model_name(value: Any, folder: Path) -> ModelName:
    """Return a model reference, given as text or in the long form, with absolute local paths.

    Revisions of local paths are dropped, as mergekit does. Raises ValueError that says what was
    found and what was expected.
    """
    if isinstance(value, str):
        model, adapter = _split(value, folder)
        return ModelName(_absolute(model, folder), adapter and _absolute(adapter, folder))
    if not isinstance(value, Mapping):
        raise ValueError(f"found {quote(value)}, expected a path or a Hub id.")
    _refuse_other_keys(value, ["model", "lora", "override_architecture"])
    if value.get("model") is None:
        raise ValueError(f"found {quote(value)}, expected {{model: {{path: ...}}}}.")
    adapter = value.get("lora")
    return ModelName(
        _of_long_path(value["model"], folder),
        None if adapter is None else _of_long_path(adapter, folder),
        value.get("override_architecture"),
    )


def _of_long_path(value: Any, folder: Path) -> str:
    if isinstance(value, str):
        return _absolute(value, folder)
    if not isinstance(value, Mapping) or not isinstance(value.get("path"), str):
        raise ValueError(f"found {quote(value)}, expected {{path: ..., revision: ...}}.")
    _refuse_other_keys(value, ["path", "revision"])
    path, revision = value["path"], value.get("revision")
    return _absolute(path if revision is None else f"{path}@{revision}", folder)


def _refuse_other_keys(value: Mapping[Any, Any], known: list[str]) -> None:
    for key in value:
        if key not in known:
            raise ValueError(_unknown(key, known))


def _unknown(key: Any, known: Sequence[str]) -> str:
    hint = did_you_mean(str(key), list(known))
    return f"unknown field {key!r}, which mergekit would ignore.{hint}"


def _split(text: str, folder: Path) -> tuple[str, str | None]:
    """Split a reference into MODEL and ADAPTER. The path of an existing file may contain `+`."""
    if "+" not in text or _exists(text, folder):
        return text, None
    pairs = [(text[:place], text[place + 1 :]) for place, char in enumerate(text) if char == "+"]
    for model, adapter in pairs:
        parts = (model, adapter)
        if all(part and ("+" not in part or _exists(part, folder)) for part in parts):
            return model, adapter
    raise ValueError(f"found {text!r}, expected MODEL or MODEL+ADAPTER.")


def _absolute(text: str, folder: Path) -> str:
    path, at, _ = text.partition("@")
    if at and not _exists(text, folder) and _exists(path, folder):
        return absolute_reference(path, folder)
    return absolute_reference(text, folder)


def _exists(text: str, folder: Path) -> bool:
    return is_there(folder / expand_home(Path(text)))


def with_models(config: Mapping[str, Any], changed: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a config with every model reference replaced by `changed` of it."""
    replaced = _with_models(dict(config), (), lambda _, value: changed(value))
    assert isinstance(replaced, dict)
    return replaced


def models_of(config: Mapping[str, Any]) -> Iterator[tuple[Place, Any]]:
    """Yield every model reference in a config, with its place."""
    references: list[tuple[Place, Any]] = []
    _with_models(dict(config), (), lambda at, value: references.append((at, value)))
    yield from references


def _with_models(value: Any, at: Place, changed: Callable[[Place, Any], Any]) -> Any:
    if isinstance(value, list):
        return [_with_models(item, (*at, i), changed) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    return {
        key: changed((*at, key), item)
        if _is_model((*at, key), item)
        else _with_models(item, (*at, key), changed)
        for key, item in value.items()
    }


def _is_model(at: Place, value: Any) -> bool:
    """Whether the value at a place in a config is a model reference."""
    match at:
        case ("tokenizer_source",) | ("tokenizer", "source"):
            return value is not None and value not in WORDS
        case ("tokenizer", "tokens", _, "source"):
            return value is not None and not (isinstance(value, dict) and "kind" in value)
        case (*_, "parameters", _) | ("modules", _) | ("tokenizer", "tokens", _):
            return False
        case (*_, "model" | "base_model"):
            return value is not None
    return False


def absent_models(config: Mapping[str, Any], path: Path) -> str:
    """Return the missing local models of a config with mistakes, like `list_absent_files`."""

    def absolute(value: Any) -> Any:
        try:
            parts = model_name(value, path.resolve().parent).parts
            return parts if parts[1:] else parts[0]
        except ValueError:  # reported as a mistake elsewhere
            return None

    return list_absent_files(path, dict[str, Any](with_models(config, absolute)))


# -- reading ---------------------------------------------------------------------------------------


def is_for_mergekit(keys: Collection[str]) -> bool:
    """Whether a file with these keys is for mergekit or one of the programs that come with it."""
    if "merge_method" in keys or "experts" in keys or "genome" in keys:
        return True
    return "models" in keys


def read_merge_config(path: Path, *, warns: bool = True) -> dict[str, Any]:
    """Return a mergekit YAML as a mapping, without the keys that its merge method ignores; a
    warning names those.

    Raises ConfigError with one line for each mistake: keys that no merge method knows, values that
    the method does not accept, and everything else that mergekit would refuse before it opens a
    model. Importing mergekit takes seconds.
    """
    config = {key: value for key, value in read_yaml(path).items() if value is not None}
    _refuse_other_programs(config, path)
    mistakes = list(_mistakes(config, path))
    ignored: list[Place] = []
    parameters = _parameters_of(config.get("merge_method"))
    for at, block, known in _blocks(config):
        if isinstance(block, Mapping):
            for place, message in _stray_keys(at, block, known, parameters, path):
                if message is None:
                    ignored.append(place)
                else:
                    mistakes.append((place, message))
    if mistakes:
        raise ConfigError(list_mistakes(path, mistakes))
    if ignored and warns:
        named = ", ".join(".".join(map(str, place)) for place in ignored)
        method = config["merge_method"]
        logger.warning("%s: merge_method %s does not read %s; left out", path, method, named)
    known = next(fields for _, _, fields in _blocks(config))
    read: dict[str, Any] = _without({k: v for k, v in config.items() if k in known}, ignored)
    for field in ("dtype", "out_dtype"):
        if field in read:  # mergekit would copy the prefix into config.json, which then fails
            read[field] = str(read[field]).removeprefix("torch.")
    parse_with_mergekit(read, path)
    return read


def parse_with_mergekit(config: Mapping[str, Any], path: Path) -> Any:
    """Return a config as mergekit's own object. Raises ConfigError for what mergekit refuses.

    The models keep the order of the file. mergekit's own order changes from run to run, and its
    first model provides config and tokenizer when there is no base_model, and ids for new tokens.
    """
    folder = path.resolve().parent
    long = with_models(config, lambda value: model_name(value, folder).long_form)
    try:
        return _ordered_configuration().model_validate(long)
    except (ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise ConfigError(f"{path}: mergekit refuses this config: {reason}.") from error


@functools.cache
def _ordered_configuration() -> Any:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration

    class OrderedConfiguration(MergeConfiguration):
        def referenced_models(self) -> list[ModelReference]:
            layers = [self, *(self.modules or {}).values()]
            models = [self.base_model] if self.base_model else []
            for layer in layers:
                models += [entry.model for entry in layer.models or ()]
                for piece in layer.slices or ():
                    models += [source.model for source in piece.sources]
            return list(dict.fromkeys(models))

    return OrderedConfiguration


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


def _mistakes(config: Mapping[str, Any], path: Path) -> Iterator[Mistake]:
    """Yield what is wrong with the values of a config."""
    method, known = config.get("merge_method"), list(registered_parameters())
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
    for at, block, _ in _blocks(config):
        dotted = ".".join(map(str, at))
        if not isinstance(block, Mapping):
            yield at, f"{dotted}: found {quote(block)}, expected a mapping."
        elif at[-2:-1] in (("models",), ("sources",)) and block.get("model") is None:
            yield at, f"{dotted}: field 'model' is missing."
        if isinstance(block, Mapping):
            yield from _number_mistakes(at, block)
    for at, value in models_of(config):
        try:
            model_name(value, path.resolve().parent)
        except ValueError as error:
            yield at, f"{'.'.join(map(str, at))}: {error}"
    yield from _template_mistakes(config.get("chat_template"))


def _template_mistakes(template: Any) -> Iterator[Mistake]:
    """Yield a wrong chat_template, which mergekit would find only after the merge. It may be
    `auto`, the name of a template of mergekit, or the template itself.
    """
    if template is None or template == "auto":
        return
    if isinstance(template, str) and "{" in template and len(template) >= 20:
        return
    known = [*chat_templates(), "auto"]
    if template not in known:
        hint = did_you_mean(str(template), known)
        expected = "expected auto, a name or a Jinja template."
        yield ("chat_template",), f"chat_template: found {quote(template)}, {expected}{hint}"


def chat_templates() -> dict[str, str]:
    """Return the chat templates that come with mergekit, by name."""
    import importlib.resources

    from mergekit._data import chat_templates as folder

    files = importlib.resources.files(folder).iterdir()
    return {
        file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8")
        for file in files
        if file.name.endswith(".jinja")
    }


# -- keys ------------------------------------------------------------------------------------------


@functools.cache
def registered_parameters() -> dict[str, dict[str, Any]]:
    """Return the parameters of every merge method of mergekit and this package, by method."""
    from mergekit.merge_methods.registry import registered_methods

    from optimer_hf.merging.mergekit_method import register_method

    register_method()
    return {
        method.spec.name: {parameter.name: parameter for parameter in method.spec.parameters}
        for method in registered_methods()
    }


def _parameters_of(method: Any) -> dict[str, Any]:
    return registered_parameters().get(method, {}) if isinstance(method, str) else {}


def _blocks(config: Mapping[str, Any]) -> Iterator[tuple[Place, Any, list[str]]]:
    """Yield the mappings of a config except `parameters`, each with its place and the fields that
    mergekit reads there.
    """
    from mergekit import config as schema
    from mergekit.tokenizer import config as tokenizers

    yield (), config, list(schema.MergeConfiguration.model_fields)
    yield from _layers(config, ())
    for at, module in _entries(config.get("modules"), ("modules",)):
        yield at, module, list(schema.OutputModuleDefinition.model_fields)
        if isinstance(module, Mapping):
            yield from _layers(module, at)
    tokenizer = config.get("tokenizer")
    if tokenizer is None:
        return
    yield ("tokenizer",), tokenizer, list(tokenizers.TokenizerConfig.model_fields)
    tokens = tokenizer.get("tokens") if isinstance(tokenizer, Mapping) else None
    kinds = {"model_token": tokenizers.ModelTokenEmbedding, "zero": tokenizers.ZeroEmbedding}
    for at, token in _entries(tokens, ("tokenizer", "tokens")):
        yield at, token, list(tokenizers.TokenEmbeddingConfig.model_fields)
        source = token.get("source") if isinstance(token, Mapping) else None
        if isinstance(source, Mapping) and source.get("kind") in kinds:
            yield (*at, "source"), source, list(kinds[source["kind"]].model_fields)


def _layers(block: Mapping[str, Any], at: Place) -> Iterator[tuple[Place, Any, list[str]]]:
    from mergekit import config as schema

    for place, model in _entries(block.get("models"), (*at, "models")):
        yield place, model, list(schema.InputModelDefinition.model_fields)
    for place, piece in _entries(block.get("slices"), (*at, "slices")):
        yield place, piece, list(schema.OutputSliceDefinition.model_fields)
        sources = piece.get("sources") if isinstance(piece, Mapping) else None
        for inner, source in _entries(sources, (*place, "sources")):
            yield inner, source, list(schema.InputSliceDefinition.model_fields)


def _entries(value: Any, at: Place) -> Iterator[tuple[Place, Any]]:
    """Yield the entries of a list or of a mapping; mergekit refuses anything else."""
    if isinstance(value, list):
        yield from (((*at, index), item) for index, item in enumerate(value))
    if isinstance(value, Mapping):
        yield from (((*at, key), item) for key, item in value.items())


def _stray_keys(
    at: Place, block: Mapping[Any, Any], known: list[str], parameters: Mapping[str, Any], path: Path
) -> Iterator[tuple[Place, str | None]]:
    """Yield the place of every key that mergekit would ignore and of every value that the method
    does not accept, with what is wrong, or None for a key that merely has no effect.
    """
    where = ".".join(map(str, at))
    for key in block:
        if key not in known and not (at == () and key in _anchor_keys(path)):
            message = _why_misplaced(key, known, parameters, at == ())
            yield (*at, key), message and f"{where}: {message}".removeprefix(": ")
    given = block.get("parameters")
    if given is None or "parameters" not in known:
        return
    at, where = (*at, "parameters"), f"{where}.parameters".removeprefix(".")
    if not isinstance(given, Mapping):
        yield at, f"{where}: found {quote(given)}, expected a mapping."
        return
    for key, value in given.items():
        if key in parameters:
            for place, message in _value_mistakes(parameters[key], value, (*at, key)):
                yield place, f"{where}.{key}: {message}"
        elif key in _known_parameters():
            yield (*at, key), None
        else:
            yield (*at, key), f"{where}: {_unknown(key, list(parameters))}"


def _why_misplaced(
    key: Any, known: list[str], parameters: Mapping[str, Any], is_top: bool
) -> str | None:
    """Return what is wrong with a key outside of `parameters` that mergekit does not read there."""
    if key in parameters and key != "int8_mask":
        fix = "Put it under `parameters:`."
        return f"unknown field {key!r}, which mergekit would ignore here. {fix}"
    if key in _known_parameters() or (is_top and key in NOTES):
        return None
    return _unknown(key, known)


@functools.cache
def _known_parameters() -> frozenset[str]:
    """Return the parameters of all merge methods; they do no harm where a method ignores them."""
    return frozenset(FORMER_PARAMETERS).union(*registered_parameters().values())


def _value_mistakes(parameter: Any, value: Any, at: Place) -> Iterator[Mistake]:
    """Yield what is wrong with the value of a parameter. It may be a scalar, a gradient (a list of
    scalars), a mapping of filter and value, or a list of such mappings.
    """
    items = value if isinstance(value, list) else [value]
    if not any(isinstance(item, Mapping) for item in items):
        yield from _gradient_mistakes(parameter, value, at)
        return
    for index, item in enumerate(items):
        place = (*at, index) if items is value else at
        if not isinstance(item, Mapping):
            yield place, f"found {quote(item)} among filters, expected {{filter, value}}."
            continue
        for key in item:
            if key not in ("filter", "value"):
                yield (*place, key), _unknown(key, ["filter", "value"])
        if not isinstance(item.get("filter"), str | None):
            text = quote(item["filter"])
            yield (*place, "filter"), f"filter: found {text}, expected part of a tensor name."
        inner = (*place, "value") if "value" in item else place
        yield from _gradient_mistakes(parameter, item.get("value"), inner)


def _gradient_mistakes(parameter: Any, value: Any, at: Place) -> Iterator[Mistake]:
    """Yield what is neither a scalar for a parameter nor a list of them."""
    kinds = (parameter.value_type, *get_args(parameter.value_type))
    expected = next((text for kind, text in EXPECTED.items() if kind in kinds), "another value")
    if value == []:
        yield at, f"found an empty list, expected {expected} or a list of them."
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        if reason := _why_no_scalar(parameter, item, kinds, expected):
            yield (*at, index) if isinstance(value, list) else at, reason


def _why_no_scalar(parameter: Any, value: Any, kinds: tuple[Any, ...], expected: str) -> str | None:
    if value is None:
        return f"found nothing, expected {expected}."
    is_switch = isinstance(value, bool) and bool not in kinds  # mergekit would count true as 1
    try:
        if is_switch or not isinstance(value, bool | int | float | str):
            raise ValueError
        number = parameter.validate(value)
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
