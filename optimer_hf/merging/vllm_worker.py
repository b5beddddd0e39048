"""The part of a search that runs inside vLLM's workers: base and vectors are held there, and a
trial sends nothing but its weights.

vLLM mixes `MergeWorker` into its own worker class (`worker_extension_cls`) and imports this module
in each of its processes. Workers that share a model by tensor parallelism also share the merge:
each adds up its part of the rows of every tensor, and then they exchange the parts.
"""

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any

import psutil
import torch

from optimer_hf.merging.shared_pool import SharedPool
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.splitting import restrict

RELOADING = "vllm.model_executor.model_loader.reload"  # warns of every layer that stays as it is
SECONDS_BETWEEN_LOOKS = 1.0
_set_num_threads = torch.set_num_threads  # vLLM's CPU worker later puts a warning in its place


class MergeWorker:
    """Methods that vLLM's worker gets; the engine calls them in all workers at once."""

    device: Any
    get_model: Any
    reload_weights: Any

    def open_merge_pool(
        self, base: str, reference: str, pool: Mapping[str, Sequence[str]], dtype: str, owner: int
    ) -> None:
        """Open a base and vectors for merges in `dtype`: of each vector, by name, its directory and
        the tensors that it moves. The worker ends when the process `owner` has ended.
        """
        from vllm.distributed import get_tp_group

        for name in ("layerwise", "inplace"):
            logging.getLogger(f"{RELOADING}.{name}").setLevel(logging.ERROR)
        _end_after(owner)
        resolved, group = ResolvedModel(Path(base), reference), get_tp_group()
        opened = {path: open_vector(path, path, resolved) for path, *_ in pool.values()}
        self._merge_pool = SharedPool(
            resolved,
            [restrict(opened[path], name, tensors) for name, (path, *tensors) in pool.items()],
            dtype=dtype,
            device=str(self.device),
            rank=group.rank_in_group,
            n_ranks=group.world_size,
            gather=lambda part: group.all_gather(part, dim=0),
        )

    def set_merge_weights(self, weights: Mapping[str, float]) -> None:
        """Set the parameters to base + sum_i w_i v_i."""
        with torch.no_grad(), _setting_threads():
            tensors = self._merge_pool.merged_tensors(weights)
            self.reload_weights(weights_iterator=tensors)
            if self._merge_pool.moves_vocabulary:
                _repack_heads(self.get_model())


def _repack_heads(model: Any) -> None:
    """Pack the output layers for the CPU's kernels again. vLLM packs only what it reloads, and a
    tied head is reloaded as the embedding.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


@contextmanager
def _setting_threads() -> Iterator[None]:
    """Let torch set its number of threads, which vLLM forbids: a merge needs one for each block."""
    forbidding = torch.set_num_threads
    torch.set_num_threads = _set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = forbidding


def _end_after(owner: int) -> None:
    """End this process, and the engine's that started it, when a process has ended. vLLM's engine
    would outlive a search that was killed, and keep the memory of the device.
    """
    own, parent = psutil.Process(), psutil.Process(os.getppid())
    started_by = psutil.Process(owner)  # remembers when it began, so a new process is not it

    def watch() -> None:
        while started_by.is_running() and started_by.status() != psutil.STATUS_ZOMBIE:
            sleep(SECONDS_BETWEEN_LOOKS)
        if parent.pid != owner and parent.is_running():  # the engine's, as it was at the start
            parent.kill()
        own.kill()

    threading.Thread(target=watch, daemon=True, name="end after the search").start()
