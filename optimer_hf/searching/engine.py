"""The engine of a study, opened: a model in memory whose weights are those of a merge, and the
model of lm-eval that scores with it.

`transformers` holds the model in this process. `vllm` runs it in processes of its own, which hold
base and vectors, too.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

from optimer_hf.errors import ModelError, StudyError
from optimer_hf.files.digest import digest
from optimer_hf.files.text import first_line
from optimer_hf.merging.gradients import Derivatives
from optimer_hf.merging.resident import ResidentModel
from optimer_hf.merging.tokenizer import generation_folder, set_generation_config
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.live import default_device
from optimer_hf.models.placement import Placement
from optimer_hf.printable import warn_once
from optimer_hf.scoring.objective import Objective, naming_test
from optimer_hf.scoring.vllm_options import (
    refuse_missing_vllm,
    refuse_unknown_sampling,
    refuse_unusable_options,
    vllm_version,
)
from optimer_hf.scoring.vllm_processes import call_engine
from optimer_hf.study.engine import EngineConfig
from optimer_hf.vectors.vector import DistributionVector

logger = logging.getLogger(__name__)

WORKER = "optimer_hf.merging.vllm_worker.MergeWorker"


class Engine(Protocol):
    """A model in memory that merges in place; `lm` is lm-eval's model of it."""

    lm: Any

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Set its parameters to base + sum_i w_i v_i. Vectors that are not named get weight 0."""
        ...

    def derivatives(self) -> Derivatives | None:
        """Return what takes derivatives in the weights; None, with a warning, if it has none."""
        ...


# -- opening ---------------------------------------------------------------------------------------


def refuse_missing_engine(config: EngineConfig) -> None:
    """Raise ConfigError if the engine is not installed; nothing is imported."""
    if config.name == "vllm":
        refuse_missing_vllm()


def refuse_unusable_engine(
    config: EngineConfig, base: ResolvedModel, tokenizer: ResolvedModel | None, dtype: str
) -> None:
    """Raise ConfigError if the engine is not installed, or cannot run the base with its options.
    No weights are read.
    """
    refuse_missing_engine(config)
    if config.name == "vllm":
        refuse_unusable_options(base.path, _vllm_options(config, base, tokenizer, dtype))


def refuse_other_generation(
    config: EngineConfig, objectives: Sequence[Objective], tasks: Mapping[str, Any]
) -> None:
    """Raise EvaluationError for settings of generation that the engine does not have."""
    if config.name == "transformers":
        return  # `load_tasks` has tried them with transformers
    for objective in objectives:
        with naming_test(objectives, objective):
            for term in objective.scored_terms:
                task = None if term.function is not None else tasks[term.task_key]
                if task is not None and task.OUTPUT_TYPE == "generate_until":
                    refuse_unknown_sampling(term, task.config.generation_kwargs)


def engine_version(config: EngineConfig) -> str | None:
    """Return name and version of an engine whose scores are bound to them; None: transformers, with
    which earlier versions of this package scored.
    """
    return vllm_version() if config.name == "vllm" else None


def open_engine(
    config: EngineConfig,
    base: ResolvedModel,
    vectors: Sequence[DistributionVector],
    *,
    dtype: str,
    scoring_tokenizer: Any,
    tokenizer: ResolvedModel | None = None,
    placement: Placement | None = None,
) -> Engine:
    """Return the engine with base and vectors. `tokenizer` is the model that the merge takes its
    tokenizer and generation config from, if it is not the base; `placement` is for transformers.
    Within `keep_engine`, an engine of vLLM that runs already takes the vectors in place of its own.
    """
    if config.name == "transformers":
        return _TransformersEngine(base, vectors, dtype, scoring_tokenizer, tokenizer, placement)
    options, kept = _vllm_options(config, base, tokenizer, dtype), _kept.get()
    key = digest([str(base.path), options])
    engine = None if kept is None else kept.get(key)
    if engine is None:
        _close_all(kept)  # another one has the memory of the device
        engine = _VllmEngine(base, dtype, scoring_tokenizer, options)
        if kept is not None:
            kept[key] = engine
    engine.open_pool(vectors)
    return engine


_kept: ContextVar[dict[str, "_VllmEngine"] | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def keep_engine() -> Iterator[None]:
    """Keep a running engine of vLLM for all that is opened inside, and end it afterwards."""
    if _kept.get() is not None:
        yield
        return
    kept: dict[str, _VllmEngine] = {}
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)
        _close_all(kept)


def _close_all(kept: dict[str, "_VllmEngine"] | None) -> None:
    while kept:
        kept.popitem()[1].close()


# -- transformers ----------------------------------------------------------------------------------


class _TransformersEngine:
    """A resident model, in this process."""

    def __init__(
        self,
        base: ResolvedModel,
        vectors: Sequence[DistributionVector],
        dtype: str,
        scoring_tokenizer: Any,
        tokenizer: ResolvedModel | None,
        placement: Placement | None,
    ) -> None:
        self._resident = ResidentModel(
            base, vectors, dtype=dtype, device=default_device(), placement=placement
        )
        if tokenizer is not None:
            set_generation_config(self._resident.model, tokenizer)
        from optimer_hf.scoring.lm_eval_model import make_lm_eval_model  # takes seconds to import

        self.lm = make_lm_eval_model(self._resident.model, scoring_tokenizer)
        self._is_spread = placement is not None
        self._derivatives: Derivatives | None = None

    def set_weights(self, weights: Mapping[str, float]) -> None:
        self._resident.set_weights(weights)

    def derivatives(self) -> Derivatives | None:
        if self._is_spread:
            warn_once(logger, "a model that device_map spreads over devices has no gradients")
        elif not self.lm.can_differentiate:
            kind = type(self._resident.model).__name__
            warn_once(logger, f"{kind}: no gradients, as its head is no single matrix product")
        else:
            self._derivatives = self._derivatives or Derivatives(self._resident)
        return self._derivatives


# -- vLLM ------------------------------------------------------------------------------------------


def _vllm_options(
    config: EngineConfig, base: ResolvedModel, tokenizer: ResolvedModel | None, dtype: str
) -> dict[str, Any]:
    """Return all options of `LLM` but the model: those of the study, and what follows from it."""
    options = {
        "dtype": dtype,
        "tokenizer": str((tokenizer or base).path),
        "worker_extension_cls": WORKER,
    }
    folder = None if tokenizer is None else generation_folder(base.path, tokenizer.path)
    if folder is not None:
        options["generation_config"] = str(folder)
    return options | config.options


class _VllmEngine:
    """An engine of vLLM, in processes of its own; they end with this process."""

    def __init__(
        self,
        base: ResolvedModel,
        dtype: str,
        scoring_tokenizer: Any,
        options: Mapping[str, Any],
    ) -> None:
        from optimer_hf.scoring.vllm_model import make_vllm_model

        self._base, self._dtype, self._names = base, dtype, frozenset[str]()
        self.lm = make_vllm_model(base.path, scoring_tokenizer, options)

    def open_pool(self, vectors: Sequence[DistributionVector]) -> None:
        """Load base and vectors in the workers, in place of what they had."""
        self.set_weights({})  # tensors that only the earlier vectors moved go back to the base
        self._names = frozenset(vector.name for vector in vectors)
        pool = {vector.name: [str(vector.path), *sorted(vector.names)] for vector in vectors}
        base = str(self._base.path), self._base.reference
        self._call("open_merge_pool", *base, pool, self._dtype, os.getpid())

    def set_weights(self, weights: Mapping[str, float]) -> None:
        if unknown := set(weights) - self._names:
            raise ModelError(
                f"no vector named {sorted(unknown)[0]!r} in the pool; known: "
                f"{', '.join(sorted(self._names))}."
            )
        if self._names:
            self._call("set_merge_weights", dict(weights))
            if not self.lm.model.reset_prefix_cache():
                raise StudyError(
                    "vLLM keeps keys and values of the weights before, since a request is still "
                    "running. Run the command again; the finished trials are kept."
                )

    def derivatives(self) -> None:
        warn_once(logger, "vLLM computes no gradients; engine: transformers does")

    def close(self) -> None:
        """End the processes, and free the memory of the device."""
        self.lm.model.llm_engine.engine_core.shutdown()

    def _call(self, method: str, *arguments: Any) -> None:
        """Call a method of MergeWorker in all workers."""
        call = partial(self.lm.model.collective_rpc, method, args=arguments)
        try:
            call_engine(self.lm.processes, call)
        except Exception as error:  # vLLM raises plain ones, with the message of the worker
            if type(error) is not Exception:
                raise
            raise RuntimeError(first_line(error)) from error
