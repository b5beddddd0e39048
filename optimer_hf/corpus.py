"""Text sources, or mixtures of them by ratio -> packed blocks of tokens on disk, ready for the
Trainer.

Documents come in one at a time (JSONL, plain text, or anything `datasets` streams), so a corpus may
be larger than memory. What goes out is a memory-mapped array of fixed-length blocks without
padding. A document that does not fit the rest of a block goes on in the next one, where it starts
with BOS again: every segment looks to the model like the beginning of a document, which is how
documents are scored later.
"""

import gzip
import json
import logging
import lzma
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from pydantic import Field

from optimer_hf.errors import CorpusError
from optimer_hf.files import FileModel, LocalPath, Mistake, make_directory, sha256_file

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
SHUFFLE_BUFFER = 10_000
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may name them, no tokenizer takes them
TEXT = (".jsonl", ".txt", ".md")
TABLES = (".json", ".csv", ".parquet", ".arrow")  # what `datasets` reads
_OPENERS = {".xz": lzma.open, ".gz": gzip.open}


class CorpusConfig(FileModel):
    """Where training text comes from: a local file, or a data set that `datasets` can stream."""

    path: LocalPath | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    text_field: str = "text"

    def mistakes(self) -> Iterator[Mistake]:
        if (self.path is None) == (self.dataset is None):
            yield (), "give exactly one of 'path' (a local file) and 'dataset' (a Hub data set)"

    @property
    def name(self) -> str:
        """What to call the corpus in messages and metadata; never a path of this machine."""
        return self.path.name if self.path is not None else str(self.dataset)


class MixturePart(CorpusConfig):
    """One corpus of a mixture: its share of the tokens, and whether it is repeated when it is too
    small for that.
    """

    share: float = Field(gt=0, le=1)
    upsample: bool = False


@dataclass(frozen=True)
class Part:
    """What one corpus gave: tokens, the documents they are from, and how many documents were read
    again because the corpus was too small for its share.
    """

    name: str
    n_tokens: int
    n_documents: int
    n_repeats: int = 0


@dataclass(frozen=True)
class PackedCorpus:
    """Blocks of tokens on disk: int32 [n_blocks, 2, block_size], token ids and positions within the
    segment.
    """

    blocks: "NDArray[np.int32]"
    sha256: str
    parts: list[Part] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, "NDArray[np.int64]"]:
        """Return one training example; the first token of a segment has no context and is never a
        label.
        """
        ids, positions = self.blocks[index].astype(np.int64)
        labels = np.where(positions == 0, IGNORED_LABEL, ids)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}

    @property
    def n_tokens(self) -> int:
        """Tokens in all blocks."""
        return int(self.blocks.shape[0] * self.blocks.shape[2])

    @property
    def n_documents(self) -> int:
        """Different documents in all blocks."""
        return sum(part.n_documents for part in self.parts)


# -- documents -------------------------------------------------------------------------------------


def documents(config: CorpusConfig) -> Iterator[str]:
    """Yield the texts of a corpus in file order.

    Raises CorpusError that names file and line for a missing or damaged file, malformed JSON or a
    missing text field.
    """
    if config.path is not None:
        _refuse_unreadable(config.path)
    if config.path is None or not _is_text_file(config.path):
        yield from _streamed(config)
        return
    try:
        with _open_text(config.path) as file:
            if ".jsonl" not in config.path.name:
                yield file.read()
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text_of(line, config.text_field, f"{config.path}:{number}")
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise CorpusError(f"{config.path}: cannot be read as UTF-8 text ({error}).") from error


def _refuse_unreadable(path: Path) -> None:
    """Raise CorpusError for what is no file, or none of a known format."""
    if not path.is_file():
        found = "is a directory, expected a file" if path.is_dir() else "no such file"
        raise CorpusError(f"{path}: {found}.")
    known = path.suffix in (*_OPENERS, *TEXT, *TABLES)
    if not known or not {*path.suffixes} & {*TEXT, *TABLES}:
        raise CorpusError(
            f"{path}: found a file that ends in {path.suffix!r}. Expected {', '.join(TEXT)} (as it "
            f"is, or as .gz or .xz), {', '.join(TABLES)}."
        )


def _is_text_file(path: Path) -> bool:
    return any(suffix in TEXT for suffix in path.suffixes)


def _open_text(path: Path) -> TextIO:
    opener: Any = _OPENERS.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8")  # type: ignore[no-any-return]


def _text_of(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: not a JSON object ({error.msg}).") from None
    except ValueError as error:  # a number with thousands of digits
        raise CorpusError(f"{where}: not a JSON object ({error}).") from None
    except RecursionError:
        raise CorpusError(f"{where}: is nested too deeply.") from None
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise CorpusError(f"{where}: no text in field {field!r}; found {found}. Set `text_field`.")
    if not row[field].isascii() and SURROGATE.search(row[field]):
        raise CorpusError(f"{where}: holds half a character (\\ud800 to \\udfff). Remove it.")
    return str(row[field])


def _streamed(config: CorpusConfig) -> Iterator[str]:
    import datasets

    try:
        if config.path is not None:
            kind = config.path.suffix.lstrip(".").replace("jsonl", "json")
            rows = datasets.load_dataset(
                kind, data_files=str(config.path), split="train", streaming=True
            )
        else:
            rows = datasets.load_dataset(
                str(config.dataset), config.dataset_config, split=config.split, streaming=True
            )
        iterator = iter(rows)
        for row in iterator:
            if not isinstance(row.get(config.text_field), str):
                raise CorpusError(
                    f"{config.name}: no text in field {config.text_field!r}; found {sorted(row)}. "
                    "Set `text_field`."
                )
            yield row[config.text_field]
    except CorpusError:
        raise
    except (
        Exception
    ) as error:  # `datasets` raises dozens of types for a missing or unreadable data set
        raise CorpusError(f"{config.name}: `datasets` cannot read it ({error}).") from error


def shuffled(texts: Iterable[str], seed: int, buffer_size: int = SHUFFLE_BUFFER) -> Iterator[str]:
    """Yield texts in random order from a buffer, so that only `buffer_size` of them are in memory
    at once.
    """
    rng = random.Random(seed)
    buffer: list[str] = []
    for text in texts:
        if len(buffer) < buffer_size:
            buffer.append(text)
            continue
        index = rng.randrange(buffer_size)
        yield buffer[index]
        buffer[index] = text
    rng.shuffle(buffer)
    yield from buffer


# -- packing ---------------------------------------------------------------------------------------


def segments(
    token_lists: Iterable[list[int]], *, bos: int | None, eos: int | None, block_size: int
) -> Iterator[list[list[int]]]:
    """Yield blocks, each a list of segments whose lengths sum to `block_size`.

    A document ends with EOS when it is complete; each segment starts with BOS (if the tokenizer has
    one). Tokens left at the end that do not fill a block are dropped. A gap too small for BOS and
    one token takes the next token without BOS, so nothing is ever padded.
    """
    head = [] if bos is None else [bos]
    tail = [] if eos is None else [eos]
    block: list[list[int]] = []
    room = block_size
    for tokens in token_lists:
        document = tokens + tail
        start = 0
        while start < len(document):
            prefix = head if room > len(head) else []
            stop = start + room - len(prefix)
            segment = prefix + document[start:stop]
            start = stop
            block.append(segment)
            room -= len(segment)
            if room == 0:
                yield block
                block, room = [], block_size


def pack(
    config: CorpusConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    block_size: int,
    max_tokens: int | None,
    seed: int,
    out: Path,
) -> PackedCorpus:
    """Tokenise a corpus in shuffled order into `out` (a .npy file), reading no more of it than is
    needed.

    Packs `max_tokens // block_size` blocks, or everything when `max_tokens` is None. Raises
    CorpusError when the corpus is empty or holds fewer tokens than asked.
    """
    wanted = None if max_tokens is None else max(max_tokens // block_size, 1)
    part = _pack(config, tokenizer, block_size, wanted, seed, out)
    if part.n_tokens < (wanted or 1) * block_size:
        raise CorpusError(
            f"{_holds(part)}, but max_tokens asks for {max_tokens or block_size:,}. Add text or "
            "lower max_tokens."
        )
    return load_packed(out, [part])


def pack_mixture(
    mixture: Sequence[MixturePart],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    block_size: int,
    max_tokens: int,
    seed: int,
    out: Path,
) -> PackedCorpus:
    """Pack several corpora into `out`, each with its share of `max_tokens`, exact to a block; the
    blocks of a corpus stay together, as Trainer shuffles them.

    Raises CorpusError when a corpus is smaller than its share and may not be repeated.
    """
    counts = shared_out([part.share for part in mixture], max(max_tokens // block_size, 1))
    files, parts = [], []
    for number, (config, n_blocks) in enumerate(zip(mixture, counts, strict=True)):
        if n_blocks == 0:
            logger.warning("%s: its share of %g is less than a block", config.name, config.share)
            parts.append(Part(config.name, 0, 0))
            continue
        files.append(out.with_name(f"{out.stem}.{number}.npy"))
        part = _pack(
            config, tokenizer, block_size, n_blocks, seed, files[-1], repeat=config.upsample
        )
        if part.n_tokens < n_blocks * block_size:
            raise CorpusError(
                f"{_holds(part)}, but its share of {config.share:g} asks for "
                f"{n_blocks * block_size:,}. Add text, lower its share or max_tokens, or set "
                "`upsample: true` to repeat it."
            )
        parts.append(part)
    _concatenate(files, out)
    return load_packed(out, parts)


def shared_out(shares: Sequence[float], n: int) -> list[int]:
    """Return n things dealt out by shares that sum to 1, each within one of its exact part (the
    largest remainders get what is left).
    """
    exact = np.array(shares) * n
    counts = np.floor(exact + 1e-9).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: n - int(counts.sum())]:
        counts[index] += 1
    return [int(count) for count in counts]


def _pack(
    config: CorpusConfig,
    tokenizer: "PreTrainedTokenizerBase",
    block_size: int,
    wanted: int | None,
    seed: int,
    out: Path,
    *,
    repeat: bool = False,
) -> Part:
    """Write up to `wanted` blocks and return what they are made of; with `repeat` the corpus is
    read again, in another order, until there are as many.
    """
    n_documents, n_repeats = 0, 0

    def token_lists() -> Iterator[list[int]]:
        nonlocal n_documents, n_repeats
        n_passes = 0
        while n_passes == 0 or (repeat and n_documents):
            for text in shuffled(documents(config), seed + n_passes):
                tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                if tokens:
                    n_documents += n_passes == 0
                    n_repeats += n_passes > 0
                    yield list(tokens)
            n_passes += 1

    bos = tokenizer.bos_token_id if _starts_with_bos(tokenizer) else None
    blocks = segments(token_lists(), bos=bos, eos=tokenizer.eos_token_id, block_size=block_size)
    n_blocks = _write_blocks(blocks, wanted, block_size, out)
    if n_documents == 0:
        raise CorpusError(
            f"{config.name}: holds no text. Give a corpus with at least one document."
        )
    return Part(config.name, n_blocks * block_size, n_documents, n_repeats)


def _holds(part: Part) -> str:
    return f"{part.name}: holds {part.n_tokens:,} tokens in {part.n_documents:,} documents"


def load_packed(path: Path, parts: Sequence[Part]) -> PackedCorpus:
    """Map packed blocks from disk."""
    return PackedCorpus(np.load(path, mmap_mode="r"), sha256_file(path), list(parts))


def _concatenate(files: Sequence[Path], out: Path) -> None:
    """Move the blocks of some files into one, file after file, without holding them in memory."""
    arrays = [np.load(file, mmap_mode="r") for file in files]
    shape = (sum(len(array) for array in arrays), *arrays[0].shape[1:])
    whole = np.lib.format.open_memmap(out, mode="w+", dtype=np.int32, shape=shape)
    start = 0
    for array in arrays:
        whole[start : start + len(array)] = array
        start += len(array)
    whole.flush()
    for file in files:
        file.unlink()


def _starts_with_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether this tokenizer puts BOS before a text; having a BOS token is not enough (Qwen,
    GPT-2).
    """
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _write_blocks(
    blocks: Iterable[list[list[int]]], wanted: int | None, block_size: int, out: Path
) -> int:
    """Write blocks as int32 [n, 2, block_size] in .npy format without holding them in memory;
    return n.
    """
    make_directory(out.parent)
    raw = out.with_suffix(".raw")
    n_blocks = 0
    with open(raw, "wb") as file:
        for block in blocks:
            ids = [token for segment in block for token in segment]
            positions = [position for segment in block for position in range(len(segment))]
            file.write(np.asarray([ids, positions], dtype=np.int32).tobytes())
            n_blocks += 1
            if n_blocks == wanted:
                break
    if n_blocks:
        data = np.memmap(raw, dtype=np.int32, mode="r", shape=(n_blocks, 2, block_size))
        np.save(out, data)
    raw.unlink()
    return n_blocks
