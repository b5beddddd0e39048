"""The files in a model directory: what each is for, by its name, and what identifies a model.

One table gives each file a role. Whatever fetches, copies, digests, pushes or pulls files asks it.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from optimer_hf.errors import ConfigError, ModelError
from optimer_hf.files.digest import digest, fingerprint, fingerprint_of, sha256_file
from optimer_hf.files.reading import read_json, read_yaml
from optimer_hf.files.reference import is_there
from optimer_hf.models.union import UnionRecord

INDEX = ".safetensors.index.json"
ANY_WEIGHTS = "*.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
VECTOR_FILE = "vector.json"
GENERATION_CONFIG = "generation_config.json"
PENDING = ".update"  # in a pulled directory: a whole update that is not yet in place
MAX_SHARD_SIZE = 5 * 10**9  # bytes

Role = Literal[
    "code",
    "state",
    "pickle",
    "weights",
    "other weights",
    "index",
    "vector",
    "config",
    "generation",
    "tokenizer",
    "vocabulary",
    "tokens",
    "template",
    "licence",
    "data",
]
MORE_TEMPLATES = "additional_chat_templates"  # transformers' folder for all but the default one
NUMBER = "[0-9]" * 5  # of a shard, in a pattern
TEXTS = ("", ".txt", ".md", ".rst", ".html")  # endings of a licence

FILES: dict[Role, list[str]] = {  # a name has the first role with a pattern that matches
    "code": ["*.py", "*.pyc", "*.pyd", "*.so", "*.dll", "*.sh"],
    "state": [  # of a training run, pickled
        "training_args.bin",
        *(f"{name}*.{end}" for name in ("optimizer", "scheduler") for end in ("pt", "bin")),
        "rng_state*.pth",
    ],
    "pickle": ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"],  # weights that can run code
    "weights": [  # by the names that transformers, PEFT and this package give them
        *("model.safetensors", "vector.safetensors", "adapter_model.safetensors"),
        *(f"{prefix}-{NUMBER}-of-{NUMBER}.safetensors" for prefix in ("model", "vector")),
    ],
    "other weights": [ANY_WEIGHTS],  # read if an index names them, or if there are no others
    "index": [f"model{INDEX}", f"vector{INDEX}"],
    "vector": [VECTOR_FILE, ADAPTER_CONFIG],  # how the weights of a vector are read
    "config": ["config.json", "*processor_config.json"],  # of the model; of images and sound
    "generation": [GENERATION_CONFIG],  # lists the tokens that end an answer
    "tokenizer": ["tokenizer_config.json"],
    "vocabulary": [  # each is enough to read a tokenizer from
        *("tokenizer.json", "tokenizer.txt", "tekken.json", "vocab.json", "vocab.txt"),
        *("*.model", "*.tiktoken"),
    ],
    "tokens": ["special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.bpe"],
    "template": ["chat_template*.jinja", "chat_template*.json"],
    "licence": [
        name + ending
        for name in ("LICEN[SC]E", "LICEN[SC]E[-_]*", "COPYING", "USE_POLICY", "NOTICE")
        for ending in TEXTS
    ],
    "data": ["*.json", "*.txt", "*.jinja"],  # for other programs and other kinds of model
}
NO_LICENCE = re.compile(  # an ending with a letter other than in TEXTS, as in LICENSE-check.rb
    r"LICEN[SC]E[-_].*\.(?!txt$|md$|rst$|html$)\w*[a-z]\w*", re.IGNORECASE
)
OF_TOKENIZER: tuple[Role, ...] = ("tokenizer", "vocabulary", "tokens", "template")
COPIED: tuple[Role, ...] = ("config", "generation", *OF_TOKENIZER, "licence")
FETCHED: tuple[Role, ...] = (*COPIED, "index", "vector", "data")  # beside the weights
RUNNABLE: tuple[Role, ...] = ("code", "pickle", "state")  # never fetched, copied or pushed


def role_of(name: str) -> Role | None:
    """Return what a file in a model directory is for, by its name.

    It is None for an unknown file, and for one in a folder below, apart from a chat template.
    """
    if "/" in name:
        folder, _, file = name.partition("/")
        is_template = folder == MORE_TEMPLATES and "/" not in file and file.endswith(".jinja")
        return "template" if is_template else None
    for role, names in FILES.items():
        if any(fnmatchcase(name, pattern) for pattern in names):
            return None if role == "licence" and NO_LICENCE.fullmatch(name) else role
    return None


def may_fetch(name: str) -> bool:
    """Whether `resolve.fetch_snapshot` may fetch a file of this name.

    It leaves out pickles, code, and the second copy of the weights in Mistral's repositories.
    """
    role = role_of(name)
    is_weights = role == "weights" or (
        role == "other weights" and not name.startswith("consolidated")
    )
    return is_weights or role in FETCHED


def patterns(*roles: Role) -> list[str]:
    """Return the patterns of the files that have one of these roles."""
    return [pattern for role in roles for pattern in FILES[role]]


def files_with_role(path: Path, *roles: Role) -> dict[str, Path]:
    """Return the files in a directory that have one of these roles, by name, sorted."""
    files = (*path.glob("*"), *path.glob(f"{MORE_TEMPLATES}/*"))
    named = {file.relative_to(path).as_posix(): file for file in sorted(files) if file.is_file()}
    return {name: file for name, file in named.items() if role_of(name) in roles}


def has_tokenizer(path: Path) -> bool:
    """Whether a directory contains a tokenizer."""
    return bool(files_with_role(path, "tokenizer", "vocabulary"))


def is_delta(path: Path) -> bool:
    """Whether a directory holds a delta, which is no model. Raises ConfigError for a vector.json
    that cannot be read.
    """
    record = path / VECTOR_FILE
    return record.is_file() and read_yaml(record).get("kind") == "delta"


def find_weights_files(path: Path, prefix: str, weight_map: Mapping[str, str] | None) -> list[Path]:
    """Return the safetensors files to read: those in the map, else PREFIX.safetensors, else all.

    Raises ModelError if there are none.
    """
    if weight_map is not None:
        return [path / file for file in sorted(set(weight_map.values()))]
    if (path / f"{prefix}.safetensors").exists():
        return [path / f"{prefix}.safetensors"]
    files = sorted(path.glob(ANY_WEIGHTS))
    if not files:
        refuse_pickled(str(path), sorted(file.name for file in path.glob("*")))
        below = sorted({file.parent.name for file in path.glob(f"*/{ANY_WEIGHTS}")})
        raise ModelError(
            f"{path}: found no safetensors weights in this directory."
            + (f" Give the folder that has them: {', '.join(below[:5])}." if below else "")
        )
    return files


def refuse_pickled(where: str, names: Sequence[str]) -> None:
    """Raise ModelError if a place without safetensors has pickled weights instead."""
    for name in names:
        if role_of(name) == "pickle":
            raise ModelError(
                f"{where}: has no safetensors weights, only pickled ones ({name}), which can run "
                "code when they are read. If you trust them, load model and tokenizer with "
                "transformers (an adapter with PEFT), save both with `save_pretrained(DIRECTORY)`, "
                "which writes safetensors, and give DIRECTORY."
            )


def missing_shards(index: Path) -> list[str]:
    """Return the files that an index names but that do not exist beside it."""
    return sorted(
        file
        for file in set(_weight_map(index).values())
        if not is_there(index.parent / file) or not (index.parent / file).is_file()
    )


def read_index(index: Path) -> dict[str, str]:
    """Return the shard of each tensor (tensor -> file), as an index says.

    Raises ModelError if a shard is missing.
    """
    files = _weight_map(index)
    missing = missing_shards(index)
    if missing:
        shown_names = ", ".join(missing[:5]) + (" ..." if missing[5:] else "")
        raise ModelError(
            f"{index.parent}: missing shard {shown_names} ({len(missing)} of "
            f"{len(set(files.values()))} that {index.name} names). Fetch it again."
        )
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = read_json(index)["weight_map"]
        files = {name: str(file) for name, file in weight_map.items()}
    except (ConfigError, KeyError, TypeError, AttributeError):
        raise ModelError(
            f"{index}: not an index of safetensors shards (no `weight_map`). Fetch it again."
        ) from None
    for file in files.values():
        if Path(file).name != file:
            raise ModelError(f"{index}: names {file!r}, expected the name of a file beside it.")
    return files


def weight_digests(path: Path) -> dict[str, str]:
    """Return the sha256 of each weights file that is read (file name -> digest).

    They identify a model. An adapter's config counts, too, since rank and alpha scale the weights.
    """
    return {file.name: sha256_file(file) for file in _identifying_files(path)}


def weight_states(path: Path) -> dict[str, tuple[int, int]]:
    """Return size in bytes and modification time in ns of each weights file, by file name.

    They show that a model has not changed, without reading it.
    """
    states = {file.name: file.stat() for file in _identifying_files(path)}
    return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}


def weights_fingerprint(path: Path, adapter_config: bytes | None = None) -> str:
    """Return a digest that distinguishes the weights in a directory, see `fingerprint`. With
    `adapter_config`, it is that of a copy whose adapter_config.json has this content.
    """
    digests = {file.name: fingerprint(file) for file in _identifying_files(path)}
    if adapter_config is not None:
        digests[ADAPTER_CONFIG] = fingerprint_of(adapter_config)
    return digest(digests)


def tokenizer_digests(path: Path) -> dict[str, str]:
    """Return the sha256 of each file that belongs to the tokenizer (file name -> digest).

    These include the chat template and generation_config.json, which lists the tokens that end an
    answer.
    """
    return {name: sha256_file(file) for name, file in _files_of_tokenizer(path).items()}


def _files_of_tokenizer(path: Path) -> dict[str, Path]:
    return files_with_role(path, *OF_TOKENIZER, "generation")


def _identifying_files(path: Path) -> list[Path]:
    if (path / "adapter_config.json").exists():
        return sorted([*path.glob(ANY_WEIGHTS), path / "adapter_config.json"])
    names = weight_names(path)
    if names == [ANY_WEIGHTS]:
        return sorted(path.glob(ANY_WEIGHTS))
    return [path / name for name in names if (path / name).is_file()]  # Checkpoint names the others


def weight_names(path: Path) -> list[str]:
    """Return the names of a model's weights files, or ANY_WEIGHTS, even if not fetched yet.

    `Checkpoint` reads only these. Others, such as Mistral's consolidated.safetensors, are copies.
    """
    whole, index = "model.safetensors", path / f"model{INDEX}"
    if (path / whole).exists():
        return [whole]
    return sorted(set(_weight_map(index).values())) if index.exists() else [ANY_WEIGHTS]


def files_beside_weights(source: Path, *, tokenizer: Path | None = None) -> dict[str, Path]:
    """Return a model's config, tokenizer, chat template and licence files, by name.

    If `tokenizer` is given, the `tokenizer_digests` come from that directory.
    """
    if tokenizer is None:
        return files_with_role(source, *COPIED)
    own = [role for role in COPIED if role not in OF_TOKENIZER]
    return files_with_role(source, *own) | _files_of_tokenizer(tokenizer)


def copy_beside_weights(source: Path, out: Path, *, tokenizer: Path | None = None) -> None:
    """Copy a model's `files_beside_weights` to `out`."""
    _copy(files_beside_weights(source, tokenizer=tokenizer), out)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the files of `tokenizer_digests` to `out`."""
    _copy(_files_of_tokenizer(source), out)


def _copy(files: Mapping[str, Path], out: Path) -> None:
    for name, file in files.items():
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, out / name)


def model_digests(
    base: Path, vectors: Mapping[str, Path], tokenizer: Path | None
) -> dict[str, str]:
    """Return digests of all models in a study, for `Study.check_inputs`.

    The tokenizer is included if it is not that of the base. A base with added tokens counts as the
    one that it is a copy of.
    """
    union = UnionRecord.of(base)
    digests = {"base_model": weights_fingerprint(base) if union is None else union.fingerprint} | {
        f"vectors.{name}": weights_fingerprint(path) for name, path in vectors.items()
    }
    if union is not None:
        digests["vocabulary"] = union.digest_tokens()
    if tokenizer is not None:
        digests["tokenizer_source"] = digest(tokenizer_digests(tokenizer))
    return digests


@dataclass(frozen=True)
class ResolvedModel:
    """A local model directory, and the reference by which another machine finds the model."""

    path: Path
    reference: str
    commit: str | None = None
