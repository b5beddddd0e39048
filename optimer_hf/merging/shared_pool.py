"""A base and a pool of vectors that one process, or several together, merge tensor by tensor.

The values are those of the streaming writer bit for bit, because both merge the same blocks of rows
with `merge_rows`.
"""

import logging
import math
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch

from optimer_hf.merging.resident import LARGEST_SHARE, LARGEST_SHARE_OF_BASE
from optimer_hf.merging.writer import merge_rows, merged_dtypes
from optimer_hf.models.blocks import compute_ahead, matrix_shape, row_blocks
from optimer_hf.models.checkpoint import DTYPES, Checkpoint
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.memory import free_memory
from optimer_hf.models.names import vocabulary_names
from optimer_hf.models.ties import ties_of
from optimer_hf.vectors.vector import DistributionVector

logger = logging.getLogger(__name__)

Gather = Callable[[torch.Tensor], torch.Tensor]
END = slice(0, 0)  # after the last block of a tensor


class SharedPool:
    """The part of a merge that one of `n_ranks` processes adds up, held on its device."""

    def __init__(
        self,
        base: ResolvedModel,
        vectors: Sequence[DistributionVector],
        *,
        dtype: str,
        device: str,
        rank: int = 0,
        n_ranks: int = 1,
        gather: Gather = lambda part: part,
    ) -> None:
        """Load what this process adds up of the base, and the vectors. `gather` concatenates the
        equally long parts of all processes along their first axis, in the order of their ranks.
        """
        self._checkpoint = Checkpoint(base.path)
        self._dtypes, self._device = merged_dtypes(self._checkpoint, DTYPES[dtype]), device
        self._rank, self._n_ranks, self._gather = rank, n_ranks, gather
        stored = set(self._checkpoint.names) - ties_of(self._checkpoint).copies
        moved = frozenset[str]().union(*(vector.names for vector in vectors)) & stored
        self.names = names_with_neighbours(stored, moved)
        self.moves_vocabulary = bool(moved & vocabulary_names(self._checkpoint))
        self._base = self._load_base()
        # LoRA factors are small; of whole checkpoints, each process reads only its own rows
        self._vectors = [
            _load_vector(vector, device) if n_ranks == 1 or vector.kind == "adapter" else vector
            for vector in vectors
        ]

    def _own_blocks(self, name: str) -> list[slice]:
        """Return the blocks of rows of a tensor that this process adds up."""
        blocks = row_blocks(self._checkpoint.shape(name), self._device)
        n_each = math.ceil(len(blocks) / self._n_ranks)
        return blocks[self._rank * n_each : (self._rank + 1) * n_each]

    def _load_base(self) -> dict[tuple[str, int], torch.Tensor]:
        """Return blocks of the base by name and first row: on the device if they fit, else in host
        memory, else none.
        """
        blocks = [(name, rows) for name in self.names for rows in self._own_blocks(name)]
        n_bytes = self._checkpoint.n_bytes(self.names) / self._n_ranks
        for place in dict.fromkeys((self._device, "cpu")):
            n_sharing = self._n_ranks if place == "cpu" else 1
            if n_bytes * n_sharing <= LARGEST_SHARE_OF_BASE * free_memory(place):
                return {
                    (name, rows.start): self._checkpoint.read_rows(name, rows).to(place)
                    for name, rows in blocks
                }
            logger.info("base: a second copy does not fit into the memory of %s", place)
        return {}

    def merged_tensors(self, weights: Mapping[str, float]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and the value of every tensor in `names`: base + sum_i w_i v_i, whole, in
        new memory on the device. Vectors that are not named get weight 0.

        If this process fails, it still exchanges what the others wait for before it raises.
        """
        every = {vector.name: float(weights.get(vector.name, 0.0)) for vector in self._vectors}
        parts: dict[str, torch.Tensor] = {}

        def own_blocks() -> Iterator[tuple[str, slice]]:
            for name in self.names:
                parts[name] = self._empty_part(name)
                yield from ((name, rows) for rows in self._own_blocks(name))
                yield name, END

        def merge_block(name: str, rows: slice) -> str | None:
            if rows is END:
                return name
            first = self._own_blocks(name)[0].start
            target = parts[name][rows.start - first : rows.stop - first]
            self._merge_into(target, name, rows, every)
            return None

        left = deque(self.names)
        try:
            for name in self._in_order(merge_block, own_blocks()):
                if name is not None:
                    shape = self._checkpoint.shape(name)
                    left.popleft()
                    whole = self._gather(parts.pop(name))
                    yield name, whole[: matrix_shape(shape)[0]].view(shape)
        except Exception:
            for name in left:  # the other processes would wait for these parts for ever
                self._gather(self._empty_part(name))
            raise

    def _in_order(
        self,
        merge_block: Callable[[str, slice], str | None],
        blocks: Iterator[tuple[str, slice]],
    ) -> Iterator[str | None]:
        """Yield the results for blocks, which the threads of a CPU compute ahead. A GPU needs one
        thread: another one would use another stream.
        """
        if self._device.startswith("cpu"):
            yield from compute_ahead(merge_block, blocks)
        else:
            yield from (merge_block(*block) for block in blocks)

    def _empty_part(self, name: str) -> torch.Tensor:
        """Return memory for the rows of this process, and for as many as the first process has."""
        _, *columns = matrix_shape(self._checkpoint.shape(name))
        blocks = row_blocks(self._checkpoint.shape(name), self._device)
        n_rows = math.ceil(len(blocks) / self._n_ranks) * (blocks[0].stop - blocks[0].start)
        return torch.empty(n_rows, *columns, dtype=self._dtypes[name], device=self._device)

    def _merge_into(
        self, out: torch.Tensor, name: str, rows: slice, weights: Mapping[str, float]
    ) -> None:
        base_rows = self._base.get((name, rows.start))
        if base_rows is None:
            base_rows = self._checkpoint.read_rows(name, rows)
        base_rows = base_rows.to(self._device)
        if base_rows.is_floating_point():
            merge_rows(base_rows, name, rows, self._vectors, weights, out.dtype, out=out)
        else:
            out.copy_(base_rows)


def _load_vector(vector: DistributionVector, device: str) -> DistributionVector:
    """Load a vector to the device if it fits, else to host memory, else not at all."""
    for place in dict.fromkeys((device, "cpu")):
        if vector.n_bytes <= LARGEST_SHARE * free_memory(place):
            return vector.load_to(place)
        logger.info("vector %s: does not fit into the memory of %s", vector.name, place)
    return vector


def names_with_neighbours(stored: Collection[str], moved: Collection[str]) -> list[str]:
    """Return the tensors that vectors move and those of the same layer, layer by layer. An engine
    that fuses tensors (q, k and v; all experts) has to reload all of them together.
    """
    layers = {_layer_of(name) for name in moved}
    return sorted(
        (name for name in stored if _layer_of(name) in layers),
        key=lambda name: (_layer_of(name), name),
    )


def _layer_of(name: str) -> str:
    """Return the part of a tensor's name that says which layer it is in."""
    numbered = re.match(r"(.*?\.)?\d+\.", name)
    return numbered[0] if numbered else name.rpartition(".")[0]
