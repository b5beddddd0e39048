"""One trial: weights and terms in, scores out; a failure is a recorded crash.

A Pool is whatever can do that: a resident model with the harness, or in tests a plain function of
the weights. Memory that ran out, a full disk and the like are not
the weights' fault. Such a trial is tried once more and then ends the search, unrecorded.
"""

import logging
import traceback
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Protocol

import torch

from optimer_hf.errors import ConfigError, EvaluationError, OptimerError
from optimer_hf.files.text import first_line
from optimer_hf.merging.resident import ResidentModel
from optimer_hf.merging.tokenizer import open_tokenizer, scoring_tokenizer, set_generation_config
from optimer_hf.models.layout import model_digests
from optimer_hf.models.live import default_device
from optimer_hf.models.resolve import resolve_base
from optimer_hf.progress import Cost
from optimer_hf.scoring.evaluator import Evaluator, Scorer
from optimer_hf.scoring.items import check_disjoint
from optimer_hf.scoring.objective import Asked
from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching.faults import collect_memory, is_environmental
from optimer_hf.study.config import StudyConfig, VectorConfig
from optimer_hf.study.trials import Candidate, Trial
from optimer_hf.vectors.opening import open_vector

logger = logging.getLogger(__name__)


class Pool(Protocol):
    """What a study needs to run a trial: set weights, score terms; tests give a function of the
    weights instead.
    """

    @property
    def inputs(self) -> dict[str, str]:
        """What is merged and scored: digests of base, vectors and items, wherever they lie, by the
        field of the study that names them.
        """
        ...

    def score(
        self, weights: Mapping[str, float], asked: Sequence[Asked]
    ) -> tuple[dict[str, TermScore], dict[str, float], int]:
        """Return scores by term label, seconds by phase, and tokens read."""
        ...


class ResidentPool:
    """The real pool: a resident model and the harness."""

    def __init__(
        self, config: StudyConfig, *, functions: Mapping[str, Scorer] | None = None
    ) -> None:
        """Open base, vectors and tasks; every mismatch is found here, before the first trial.

        `functions` score the terms that name them, see Evaluator.
        """
        base = resolve_base(config.base_model)
        self._tokenizer = open_tokenizer(base, config.tokenizer_reference)
        tokenizer = scoring_tokenizer(
            base, self._tokenizer, apply_chat_template=config.objective.apply_chat_template
        )
        self.vectors = [
            open_vector(name, _source(name, vector), base)
            for name, vector in config.vectors.items()
        ]
        self.base = base
        self._resident = ResidentModel(
            base, self.vectors, dtype=config.dtype, device=default_device()
        )
        if self._tokenizer is not None:
            set_generation_config(self._resident.model, self._tokenizer)
        self._objectives = {"objective": config.objective}
        if config.test is not None:
            self._objectives["test"] = config.test
        self._evaluator = Evaluator(
            self._resident.model, tokenizer, list(self._objectives.values()), functions=functions
        )
        if config.test is not None:
            check_disjoint(config.objective, config.test, self._evaluator.tasks)
        self.inputs = self._digests()

    def _digests(self) -> dict[str, str]:
        """Return digests of base, vectors and items, see Pool."""
        paths = {vector.name: vector.path for vector in self.vectors}
        tokenizer = None if self._tokenizer is None else self._tokenizer.path
        found = model_digests(self.base.path, paths, tokenizer)
        for name, objective in self._objectives.items():
            for term in objective.scored_terms:
                if (items := self._evaluator.digest_items(term)) is not None:
                    found[f"{name}.{term.label}"] = items
        return found

    def score(
        self, weights: Mapping[str, float], asked: Sequence[Asked]
    ) -> tuple[dict[str, TermScore], dict[str, float], int]:
        """Merge in place and evaluate."""
        started = perf_counter()
        self._resident.set_weights(weights)
        merged = perf_counter()
        forward, tokens = self._evaluator.forward_seconds, self._evaluator.n_tokens
        scores = self._evaluator.evaluate(asked)
        seconds = {
            "merge": merged - started,
            "evaluate": perf_counter() - merged,
            "forward": self._evaluator.forward_seconds - forward,
        }
        return scores, seconds, self._evaluator.n_tokens - tokens


def _source(name: str, vector: VectorConfig) -> str:
    if vector.source is None:
        raise ConfigError(
            f"vectors.{name}.train: {vector.train!r} has to be trained first. Run `optimer run` on "
            "the recipe folder, "
            "or give a 'source'."
        )
    return vector.source


def run_trial(pool: Pool, candidate: Candidate, asked: Sequence[Asked]) -> Trial:
    """Score a candidate and return the trial, as crashed with the traceback where that failed.

    What is not the weights' fault (see `faults`) is tried once more, after memory was freed. Raises
    EvaluationError when it fails so again, and any other OptimerError of the pool as it is.
    """
    fault = _attempt(pool, candidate, asked)
    if isinstance(fault, Trial):
        return fault
    logger.warning("trial %d: %s; it is tried once more", candidate.number, fault)
    collect_memory()  # the frames that failed, and what they held, are gone by now
    fault = _attempt(pool, candidate, asked)
    if isinstance(fault, Trial):
        return fault
    raise EvaluationError(
        f"trial {candidate.number}: {fault}, twice. That is not the fault of its weights, so it is "
        "not recorded. Free memory, disk or device and run the same command again: finished trials "
        "are kept, and this one is done anew."
    )


def _attempt(pool: Pool, candidate: Candidate, asked: Sequence[Asked]) -> Trial | str:
    """Return the trial, scored or crashed; or in one line what failed, if the weights are not at
    fault.

    Raises EvaluationError when the device has failed, after which no try of this process can do.
    """
    started = Cost.now()
    try:
        scores, seconds, n_tokens = pool.score(candidate.weights, asked)
    except Exception as error:  # one bad weight set must not end a search of hours
        if isinstance(error, OptimerError) and not isinstance(error, EvaluationError):
            raise
        if isinstance(error, torch.AcceleratorError):
            raise EvaluationError(
                f"trial {candidate.number}: the device failed ({first_line(error)}). Run the same "
                "command again: finished trials are kept, and this one is done anew."
            ) from error
        logger.debug("trial %d", candidate.number, exc_info=True)
        if is_environmental(error):
            return f"{type(error).__name__}: {first_line(error)}"
        text = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"
        logger.warning("trial %d crashed: %s", candidate.number, error)
        return candidate.to_crashed_trial(text)
    seconds = candidate.seconds | seconds | {"cpu": started.since().cpu_seconds}
    rounded = {phase: round(value, 4) for phase, value in seconds.items()}
    return candidate.to_trial(scores, rounded, n_tokens)
