"""Where the trials of a search run: in this process, or (see `workers`) in many.

A caller makes a Runner and hands it to a search. The search opens it when there is something to
score, and closes it at the end.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from optimer_hf.progress import announce
from optimer_hf.scoring.objective import Asked
from optimer_hf.searching.engine import keep_engine
from optimer_hf.searching.faults import naming_faults
from optimer_hf.searching.trial import Pool, ResidentPool, run_trial
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.trials import Candidate, Trial


class Slots(Protocol):
    """Takes candidates of one study, and gives back trials as they finish."""

    def count_slots(self) -> int:
        """Return how many trials may run at the same time now, at least one."""
        ...

    def digest_inputs(self) -> dict[str, str]:
        """Return digests of what is merged and scored, see Pool."""
        ...

    def submit(self, candidate: Candidate, asked: Sequence[Asked]) -> None:
        """Start scoring a candidate."""
        ...

    def next_finished(self) -> Trial:
        """Wait until one of the submitted candidates is scored, and return its trial."""
        ...


class Runner(Protocol):
    """Where trials run."""

    def open(self, config: StudyConfig) -> AbstractContextManager[Slots]:
        """Open what the trials of a study need: base, vectors and tasks."""
        ...


@dataclass(frozen=True)
class InProcess:
    """Runs one trial at a time, in this process, with one pool."""

    pool: Callable[[StudyConfig], Pool] = ResidentPool

    @contextmanager
    def open(self, config: StudyConfig) -> Iterator[Slots]:
        """Open the pool; raise EvaluationError if the machine is at fault."""
        opening = "opening base, vectors and tasks"
        with keep_engine():
            with announce(f"search: {opening}"), naming_faults(opening):
                slots = _OneSlot(self.pool(config))
            yield slots


class _OneSlot:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._submitted: deque[tuple[Candidate, Sequence[Asked]]] = deque()

    def count_slots(self) -> int:
        return 1

    def digest_inputs(self) -> dict[str, str]:
        return self._pool.inputs

    def submit(self, candidate: Candidate, asked: Sequence[Asked]) -> None:
        self._submitted.append((candidate, asked))

    def next_finished(self) -> Trial:
        return run_trial(self._pool, *self._submitted.popleft())
