"""Pack documents, or mixtures of corpora by ratio, into blocks of tokens on disk."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.corpus.documents import read_documents, shuffle
from optimer_hf.errors import CorpusError
from optimer_hf.files.digest import sha256_file
from optimer_hf.files.staging import make_directory
from optimer_hf.files.text import count
from optimer_hf.models.head_loss import IGNORED_LABEL
from optimer_hf.training.config import MixturePart
from optimer_hf.vectors.training_record import Part

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedCorpus:
    """Blocks of tokens on disk: int32 [n_blocks, 2, block_size], token ids and the positions of the
    tokens in their segments.
    """

    blocks: "NDArray[np.int32]"
    sha256: str
    parts: list[Part] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, "NDArray[np.int64]"]:
        """Return one training example. The first token of a segment has no context, so it is never
        a label.
        """
        ids, positions = self.blocks[index].astype(np.int64)
        labels = np.where(positions == 0, IGNORED_LABEL, ids)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}

    @property
    def n_tokens(self) -> int:
        """Number of tokens in all blocks."""
        return int(self.blocks.shape[0] * self.blocks.shape[2])

    @property
    def n_documents(self) -> int:
        """Number of different documents in all blocks."""
        return sum(part.n_documents for part in self.parts)


# -- packing ---------------------------------------------------------------------------------------


def segments(
    token_lists: Iterable[list[int]],
    *,
    bos: int | None,
    eos: int | None,
    block_size: int,
    context: int | None = None,
) -> Iterator[list[list[int]]]:
    """Yield blocks, each a list of segments whose lengths sum to `block_size`.

    Each segment starts with BOS, if the tokenizer has one; the last segment of a document ends with
    EOS. A segment has at most `context` tokens, as many as the model reads at once. A gap too small
    for BOS and one token takes the next token without BOS, so nothing is ever padded. Tokens that
    do not fill the last block are dropped.
    """
    head = [] if bos is None else [bos]
    tail = [] if eos is None else [eos]
    block: list[list[int]] = []
    room = block_size
    for tokens in token_lists:
        document = tokens + tail
        start = 0
        while start < len(document):
            most = min(room, context or room)
            prefix = head if most > len(head) else []
            stop = start + most - len(prefix)
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
    context: int | None = None,
) -> PackedCorpus:
    """Tokenise a corpus in shuffled order into `out` (a .npy file), reading only as much as needed.
    `context` is the longest text that the model reads, in tokens (None: any).

    Packs `max_tokens // block_size` blocks, or everything when `max_tokens` is None. Raises
    CorpusError when the corpus is empty or too small.
    """
    wanted = None if max_tokens is None else max(max_tokens // block_size, 1)
    part = _pack(config, _Packing(tokenizer, block_size, seed, context), wanted, out)
    if part.n_tokens < (wanted or 1) * block_size:
        is_short = wanted is not None and wanted > 1
        field, n = ("max_tokens", max_tokens) if is_short else ("block_size", block_size)
        raise CorpusError(
            f"{_size_of(part)}, but {field} asks for {n:,}. Add text or lower {field}."
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
    context: int | None = None,
) -> PackedCorpus:
    """Pack several corpora into `out`, each with its share of `max_tokens`, exact to a block.
    `context` is the longest text that the model reads, in tokens (None: any).

    Blocks of one corpus stay together, because the Trainer shuffles all blocks. Raises CorpusError
    when a corpus is smaller than its share and may not be repeated.
    """
    counts = deal_out([part.share for part in mixture], max(max_tokens // block_size, 1))
    packing = _Packing(tokenizer, block_size, seed, context)
    files, parts = [], []
    for number, (config, n_blocks) in enumerate(zip(mixture, counts, strict=True)):
        if n_blocks == 0:
            logger.warning("%s: its share of %g is less than one block", config.name, config.share)
            parts.append(Part(config.name, 0, 0))
            continue
        files.append(out.with_name(f"{out.stem}.{number}.npy"))
        part = _pack(config, packing, n_blocks, files[-1], repeat=config.upsample)
        if part.n_tokens < n_blocks * block_size:
            raise CorpusError(
                f"{_size_of(part)}, but its share of {config.share:g} asks for "
                f"{n_blocks * block_size:,}. Add text, lower its share or max_tokens, or set "
                "`upsample: true` to repeat it."
            )
        parts.append(part)
    _concatenate(files, out)
    return load_packed(out, parts)


def deal_out(shares: Sequence[float], n: int) -> list[int]:
    """Divide n items by shares that sum to 1 and return the counts, each within one of n * share;
    what is left goes to the largest remainders.
    """
    exact = np.array(shares) * n
    counts = np.floor(exact + 1e-9).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: n - int(counts.sum())]:
        counts[index] += 1
    return [int(count) for count in counts]


@dataclass(frozen=True)
class _Packing:
    """How the corpora of a run are packed."""

    tokenizer: "PreTrainedTokenizerBase"
    block_size: int
    seed: int
    context: int | None


def _pack(
    config: CorpusConfig, packing: _Packing, wanted: int | None, out: Path, *, repeat: bool = False
) -> Part:
    """Write up to `wanted` blocks and return what is in them. With `repeat`, read the corpus again,
    in another order, until there are enough.
    """
    tokenizer, block_size, context = packing.tokenizer, packing.block_size, packing.context
    n_documents, n_repeats = 0, 0

    def token_lists() -> Iterator[list[int]]:
        nonlocal n_documents, n_repeats
        n_passes = 0
        while n_passes == 0 or (repeat and n_documents):
            for text in shuffle(read_documents(config), packing.seed + n_passes):
                tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                if tokens:
                    n_documents += n_passes == 0
                    n_repeats += n_passes > 0
                    yield list(tokens)
            n_passes += 1

    bos = tokenizer.bos_token_id if _starts_with_bos(tokenizer) else None
    eos = tokenizer.eos_token_id
    blocks = segments(token_lists(), bos=bos, eos=eos, block_size=block_size, context=context)
    n_blocks = _write_blocks(blocks, wanted, block_size, out)
    if n_documents == 0:
        raise CorpusError(f"{config.name}: has no text. Give a corpus with at least one document.")
    return Part(config.name, n_blocks * block_size, n_documents, n_repeats)


def _size_of(part: Part) -> str:
    fill = "fills" if part.n_documents == 1 else "fill"
    documents, tokens = count(part.n_documents, "document"), count(part.n_tokens, "token")
    return f"{part.name}: {documents} {fill} whole blocks with {tokens}"


def load_packed(path: Path, parts: Sequence[Part]) -> PackedCorpus:
    """Map packed blocks from disk."""
    return PackedCorpus(np.load(path, mmap_mode="r"), sha256_file(path), list(parts))


def _concatenate(files: Sequence[Path], out: Path) -> None:
    """Move the blocks of several files into one, file after file, without loading them."""
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
    """Whether a tokenizer puts BOS before a text; Qwen and GPT-2 have a BOS token but do not."""
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _write_blocks(
    blocks: Iterable[list[list[int]]], wanted: int | None, block_size: int, out: Path
) -> int:
    """Write blocks to a .npy file, int32 [n, 2, block_size], without holding them in memory, and
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
