"""The files in a model directory: the weights, their digests, and the files to copy with them."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from optimer_hf.errors import ConfigError, ModelError
from optimer_hf.files.digest import digest, fingerprint, sha256_file
from optimer_hf.files.reading import read_json
from optimer_hf.files.reference import is_there

INDEX = ".safetensors.index.json"
ANY_WEIGHTS = "*.safetensors"
PENDING = ".update"  # in a pulled directory: a whole update that is not yet in place
PICKLES = ("*model*.bin", "*model*.pt", "consolidated*.pth")  # not training_args.bin, optimizer.pt

GENERATION_CONFIG = "generation_config.json"  # lists the tokens that end an answer
OF_TOKENIZER = [  # the endings make sure that only data matches: a tokenizer.py is code
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.txt",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "chat_template*.jinja",
    "chat_template*.json",
    "*.model",
    "*.tiktoken",
]
LEGAL = [
    name + ending
    for name in ("LICEN[SC]E", "LICEN[SC]E[-_]*", "COPYING", "USE_POLICY", "NOTICE")
    for ending in ("", ".txt", ".md", ".rst", ".html")
]
COPIED_BESIDE_WEIGHTS = [
    "config.json",
    GENERATION_CONFIG,
    *OF_TOKENIZER,
    "*processor_config.json",
    *LEGAL,
]
OTHER = re.compile(r"LICEN[SC]E[-_].*\.(?!txt$|md$|rst$|html$)\w*[a-z]\w*", re.IGNORECASE)


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
        raise ModelError(f"{path}: found no safetensors weights in this directory.")
    return files


def refuse_pickled(where: str, names: Sequence[str]) -> None:
    """Raise ModelError if a place without safetensors has pickled weights instead."""
    for name in names:
        if any(fnmatch(name, pattern) for pattern in PICKLES):
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


def weight_files(path: Path) -> dict[str, str]:
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


def weights_fingerprint(path: Path) -> str:
    """Return a digest that distinguishes the weights in a directory, see `fingerprint`."""
    return digest({file.name: fingerprint(file) for file in _identifying_files(path)})


def tokenizer_files(path: Path) -> dict[str, str]:
    """Return the sha256 of each file that belongs to the tokenizer (file name -> digest).

    These include the chat template and generation_config.json, which lists the tokens that end an
    answer.
    """
    return {file.name: sha256_file(file) for file in _files_of_tokenizer(path)}


def _files_of_tokenizer(path: Path) -> list[Path]:
    found = {file for pattern in (*OF_TOKENIZER, GENERATION_CONFIG) for file in path.glob(pattern)}
    return sorted(file for file in found if file.is_file())


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


def is_beside_weights(name: str, patterns: Sequence[str] = COPIED_BESIDE_WEIGHTS) -> bool:
    """Whether a file is copied with a model: config, tokenizer and licence are, code never is."""
    return (
        "/" not in name
        and OTHER.fullmatch(name) is None
        and any(fnmatch(name, pattern) for pattern in patterns)
    )


def files_beside_weights(source: Path, *, tokenizer: Path | None = None) -> list[Path]:
    """Return a model's config, tokenizer, chat template and licence files.

    If `tokenizer` is given, the `tokenizer_files` come from that directory.
    """
    patterns = [
        pattern
        for pattern in COPIED_BESIDE_WEIGHTS
        if tokenizer is None or pattern not in OF_TOKENIZER
    ]
    files = [
        path
        for path in sorted(source.glob("*"))
        if path.is_file() and is_beside_weights(path.name, patterns)
    ]
    return files if tokenizer is None else [*files, *_files_of_tokenizer(tokenizer)]


def copy_beside_weights(source: Path, out: Path, *, tokenizer: Path | None = None) -> None:
    """Copy a model's `files_beside_weights` to `out`."""
    for path in files_beside_weights(source, tokenizer=tokenizer):
        shutil.copyfile(path, out / path.name)


def model_digests(
    base: Path, vectors: Mapping[str, Path], tokenizer: Path | None
) -> dict[str, str]:
    """Return digests of all models in a study, for `Study.check_inputs`.

    The tokenizer is included if it is not that of the base.
    """
    digests = {"base_model": weights_fingerprint(base)} | {
        f"vectors.{name}": weights_fingerprint(path) for name, path in vectors.items()
    }
    if tokenizer is not None:
        digests["tokenizer_source"] = digest(tokenizer_files(tokenizer))
    return digests


@dataclass(frozen=True)
class ResolvedModel:
    """A local model directory, and the reference by which another machine finds the model."""

    path: Path
    reference: str
    commit: str | None = None


MAX_SHARD_SIZE = 5 * 10**9
