"""Scores one trial: weights and terms come in, a Trial with scores or an error goes out.

A Pool does the work: a resident model that lm-eval scores or, in tests, a plain function of the
weights. If the machine is at fault, not the weights (memory ran out, the disk is full, ...), the
trial is tried once more. If it fails again, the search ends and the trial is not recorded.
"""

import logging
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import torch

from optimer_hf.errors import ConfigError, EvaluationError, OptimerError
from optimer_hf.files.text import first_line
from optimer_hf.merging.tokenizer import scoring_tokenizer
from optimer_hf.merging.union import open_base
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel, model_digests
from optimer_hf.models.memory import collect_memory
from optimer_hf.models.placement import Placement
from optimer_hf.models.resolve import resolve_base, resolve_tokenizer
from optimer_hf.progress import Cost
from optimer_hf.scoring.evaluator import Evaluator
from optimer_hf.scoring.functions import Scorer
from optimer_hf.scoring.items import check_disjoint
from optimer_hf.scoring.objective import Asked
from optimer_hf.scoring.scores import TermScore
from optimer_hf.scoring.tasks import load_tasks
from optimer_hf.searching.engine import (
    engine_version,
    open_engine,
    refuse_missing_engine,
    refuse_other_generation,
    refuse_unusable_engine,
)
from optimer_hf.searching.faults import is_environmental
from optimer_hf.study.config import StudyConfig, VectorConfig
from optimer_hf.study.trials import ENGINE, Candidate, Trial
from optimer_hf.vectors.delta import measure_norms, warn_of_norms
from optimer_hf.vectors.groups import slopes_of_groups, weights_of_parts
from optimer_hf.vectors.layers import layers_for
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.splitting import idle_weights, split_pool

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """What a pool found for one set of weights: scores by label of the term, seconds by phase, the
    number of tokens read, and for each differentiable term, by label and name of the vector, the
    derivative of its score in the weight, in the unit of the score.
    """

    terms: dict[str, TermScore]
    seconds: dict[str, float]
    n_tokens: int
    gradients: dict[str, dict[str, float]] = field(default_factory=dict)


class Pool(Protocol):
    """What runs the trials of a study: it sets weights and scores terms. Tests make one from a
    function of the weights.
    """

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of base, vectors and items, by the field of the study that names them. They are
        of the content, wherever the files are.
        """
        ...

    def score(
        self, weights: Mapping[str, float], asked: Sequence[Asked], *, gradients: bool = False
    ) -> Scored:
        """Return the scores of terms and, with `gradients`, their derivatives in the weights where
        this pool can take them.
        """
        ...


class ResidentPool:
    """The pool of a real search: the engine of the study, scored by lm-eval."""

    def __init__(
        self, config: StudyConfig, *, functions: Mapping[str, Scorer] | None = None
    ) -> None:
        """Open base, vectors and tasks, so that every mismatch is found before the first trial.

        `functions` score the terms that name them, see Evaluator.
        """
        refuse_missing_engine(config.engine)
        base, self._tokenizer = base_of_study(config)
        refuse_unusable_engine(config.engine, base, self._tokenizer, config.dtype)
        tokenizer = scoring_tokenizer(
            base, self._tokenizer, apply_chat_template=config.objective.apply_chat_template
        )
        vectors = [open_vector(name, source, base) for name, source in sources_of(config).items()]
        warn_of_norms(vectors, Checkpoint(base.path))
        self._paths = {vector.name: vector.path for vector in vectors}
        self.vectors = split_pool(vectors, config.groups, base, idle=idle_weights(config.fixed))
        self._groups, self._n_layers = config.groups, layers_for(config.groups, base)
        self.base, self._reference = base, config.tokenizer_reference
        self._free, self._has_gradients = frozenset(config.free), True
        self._are_finite = False
        self._objectives = {"objective": config.objective}
        if config.test is not None:
            self._objectives["test"] = config.test
        objectives = list(self._objectives.values())
        tasks = load_tasks(objectives)
        refuse_other_generation(config.engine, objectives, tasks)
        self._engine = open_engine(
            config.engine,
            base,
            self.vectors,
            dtype=config.dtype,
            scoring_tokenizer=tokenizer,
            tokenizer=self._tokenizer,
            placement=placement_of(config),
        )
        self._evaluator = Evaluator.of(self._engine.lm, tasks, objectives, functions=functions)
        if config.test is not None:
            check_disjoint(config.objective, config.test, self._evaluator.tasks)
        self.inputs = self._digests()
        if (version := engine_version(config.engine)) is not None:
            self.inputs[ENGINE] = version

    def _digests(self) -> dict[str, str]:
        """Return digests of base, vectors and items, see Pool."""
        tokenizer = None if self._reference is None else resolve_tokenizer(self._reference).path
        digests = model_digests(self.base.path, self._paths, tokenizer)
        for name, objective in self._objectives.items():
            for term in objective.scored_terms:
                if (items := self._evaluator.digest_items(term)) is not None:
                    digests[f"{name}.{term.label}"] = items
        return digests

    def score(
        self, weights: Mapping[str, float], asked: Sequence[Asked], *, gradients: bool = False
    ) -> Scored:
        """Merge in place and evaluate; see Pool.

        Raises ModelError for a vector with values that are not finite: no weights are at fault.
        """
        try:
            return self._score(weights, asked, gradients)
        except EvaluationError:
            self._refuse_not_finite()
            raise

    def _refuse_not_finite(self) -> None:
        """Raise ModelError that names a vector with values that are not finite; looks only once."""
        if self._are_finite:
            return
        base = Checkpoint(self.base.path)
        for vector in self.vectors:
            measure_norms(vector, base)
        self._are_finite = True

    def _score(
        self, weights: Mapping[str, float], asked: Sequence[Asked], gradients: bool
    ) -> Scored:
        started = perf_counter()
        self._engine.set_weights(weights_of_parts(weights, self._groups, self._n_layers))
        merged = perf_counter()
        forward, tokens = self._evaluator.forward_seconds, self._evaluator.n_tokens
        backward = self._evaluator.backward_seconds if gradients else 0.0
        scores, slopes = self._differentiate(asked) if gradients else ({}, {})
        if not scores:
            if gradients and self._has_gradients:
                collect_memory()  # of a backward pass that failed
            scores = self._evaluator.evaluate(asked)
            self._has_gradients = self._has_gradients and not gradients  # the weights can be scored
        seconds = {
            "merge": merged - started,
            "evaluate": perf_counter() - merged,
            "forward": self._evaluator.forward_seconds - forward,
        }
        if slopes:
            seconds["backward"] = self._evaluator.backward_seconds - backward
        return Scored(scores, seconds, self._evaluator.n_tokens - tokens, slopes)

    def _differentiate(
        self, asked: Sequence[Asked]
    ) -> tuple[dict[str, TermScore], dict[str, dict[str, float]]]:
        """Return scores and their derivatives in the free weights; nothing, after a warning, if the
        model has no derivatives.
        """
        if not self._has_gradients:
            return {}, {}
        try:
            if (derivatives := self._engine.derivatives()) is None:
                return {}, {}
            scores, slopes = self._evaluator.differentiate(asked, derivatives)
        except (RuntimeError, TypeError) as error:  # an operation without a derivative, or memory
            if isinstance(error, torch.AcceleratorError):
                raise
            logger.warning("no gradients: the backward pass failed (%s)", first_line(error))
            logger.debug("the backward pass failed", exc_info=True)
            return {}, {}
        by_group = {
            label: slopes_of_groups(gradient, self._groups, self._n_layers)
            for label, gradient in slopes.items()
        }
        return scores, {
            label: {name: slope for name, slope in gradient.items() if name in self._free}
            for label, gradient in by_group.items()
        }


def base_of_study(config: StudyConfig) -> tuple[ResolvedModel, ResolvedModel | None]:
    """Return the base of the merges of a study, with the tokens of its `vocabulary`, and the model
    that they take their tokenizer from (None: that base). Reads all vectors for a union.
    """
    base, reference = resolve_base(config.base_model), config.tokenizer_reference
    sources = sources_of(config) if config.vocabulary == "union" else {}
    return open_base(base, sources, reference, config.vocabulary)


def placement_of(config: StudyConfig) -> Placement | None:
    """Return where the trials of a study keep their model; None: on one device.

    Raises ConfigError for a GPU that this machine does not have.
    """
    if config.device_map is None:
        return None
    return Placement(config.device_map, config.max_memory)


def sources_of(config: StudyConfig) -> dict[str, str]:
    """Return where each vector of a study is. Raises ConfigError for one to be trained first."""
    return {name: source_of(name, vector) for name, vector in config.vectors.items()}


def source_of(name: str, vector: VectorConfig) -> str:
    """Return where a vector is. Raises ConfigError for one that has to be trained first."""
    if vector.source is None and vector.mixture is not None:
        raise ConfigError(
            f"vectors.{name}.mixture: a mixture has to be trained first. Run `optimer run` on the "
            "recipe folder, or give the trained vector as `source`."
        )
    if vector.source is None:
        raise ConfigError(
            f"vectors.{name}.train: {vector.train!r} has to be trained first. Run `optimer run` on "
            "the recipe folder, or give a 'source'."
        )
    return vector.source


def run_trial(pool: Pool, candidate: Candidate, asked: Sequence[Asked]) -> Trial:
    """Score a candidate and return its trial; if the weights break it, a crashed trial with the
    traceback.

    If the machine is at fault (see `faults`), frees memory and tries once more. Raises
    EvaluationError if the machine fails again, and lets any other OptimerError of the pool pass.
    """
    outcome = _attempt(pool, candidate, asked)
    if isinstance(outcome, Trial):
        return outcome
    logger.warning("trial %d: %s; trying once more", candidate.number, outcome)
    collect_memory()  # the frames that failed, and what they held, are gone by now
    outcome = _attempt(pool, candidate, asked)
    if isinstance(outcome, Trial):
        return outcome
    raise EvaluationError(
        f"trial {candidate.number}: {outcome}, twice. Its weights are not at fault, so it is not "
        "recorded. Free memory, disk or device and run the same command again: finished trials are "
        "kept, and this one is done anew."
    )


def _attempt(pool: Pool, candidate: Candidate, asked: Sequence[Asked]) -> Trial | str:
    """Return the trial, scored or crashed; or, if the machine is at fault, the error in one line.

    Raises EvaluationError if the device has failed, since this process cannot use it any more.
    """
    started = Cost.now()
    try:
        scored = pool.score(candidate.weights, asked, gradients=candidate.with_gradients)
    except Exception as error:  # one bad set of weights must not end a search of hours
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
    seconds = candidate.seconds | scored.seconds | {"cpu": started.since().cpu_seconds}
    rounded = {phase: round(value, 4) for phase, value in seconds.items()}
    return candidate.to_trial(scored.terms, rounded, scored.n_tokens, scored.gradients)
