"""Runs trials in the processes of a Dask cluster, on this machine or on others, each with a pool.

Trials come back in the order in which they finish. If a worker dies, Dask runs its trial again
elsewhere, so that a trial may start more than once, but it comes back once. A trial that killed all
its workers is retried alone. If it kills them again, and they can then score the base, it is
recorded as crashed; otherwise the machine is at fault.
"""

import contextlib
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import dask
import torch
from dask.system import CPU_COUNT
from distributed import (
    CancelledError,
    Client,
    Future,
    KilledWorker,
    LocalCluster,
    get_worker,
    rpc,
    wait,
)
from distributed.security import Security
from distributed.utils import LoopRunner

from optimer_hf.errors import ConfigError, OptimerError, StudyError
from optimer_hf.files.staging import scratch_directory
from optimer_hf.files.text import quote
from optimer_hf.models.spinning import choose_spins
from optimer_hf.progress import announce
from optimer_hf.scoring.objective import Asked
from optimer_hf.searching.faults import naming_faults
from optimer_hf.searching.trial import Pool, ResidentPool, run_trial
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.trials import Candidate, Trial

logger = logging.getLogger(__name__)


WAIT_FOR_SCHEDULER = 10  # seconds
WAIT_FOR_WORKERS = 600  # seconds without any worker, after which a search gives up
SECONDS_BETWEEN_WARNINGS = 30
ENVIRONMENT = "distributed.nanny.pre-spawn-environ"  # of workers on this machine
SECURITY_LOADER = "distributed.client.security-loader"  # code of a site that makes keys for clients


@dataclass(frozen=True)
class _Opening:
    """What a worker process needs to open its pool. `session` identifies the pool, `config` is the
    study as JSON, and `inputs` are the digests of the first pool that was opened.
    """

    session: str
    config: str
    pool: Callable[[StudyConfig], Pool]
    n_threads: int | None
    inputs: dict[str, str] | None = None


@dataclass(frozen=True)
class _Request:
    """What a worker process needs to run a trial."""

    opening: _Opening
    candidate: Candidate
    asked: list[Asked]


class _AllDiedError(Exception):
    """A task killed all the workers that Dask gave it."""


@dataclass(frozen=True)
class Workers:
    """Runs one trial in each process of a Dask cluster: `n_workers` processes of this machine, or
    the workers of the scheduler at an address. Each process has a pool of its own.

    Raises ConfigError unless exactly one of the two is given.
    """

    n_workers: int | None = None
    scheduler: str | None = None
    pool: Callable[[StudyConfig], Pool] = ResidentPool

    def __post_init__(self) -> None:
        if (self.n_workers is None) == (self.scheduler is None):
            raise ConfigError(
                f"workers: found n_workers {self.n_workers!r} and scheduler {self.scheduler!r}. "
                "Give one of them: a number of processes on this machine, or the address of a Dask "
                "scheduler."
            )

    def open(self, config: StudyConfig) -> "Cluster":
        """Return a cluster for the trials of a study; it is a context manager.

        Raises ConfigError for several processes on this machine that would each take all its GPUs,
        and for vLLM, which has processes of its own.
        """
        if config.device_map is not None and (self.n_workers or 1) > 1:
            raise ConfigError(
                f"device_map: found {quote(config.device_map)} and {self.n_workers} workers, but "
                "each of them would spread its model over all GPUs. Use one worker, or leave "
                "device_map out if the model fits on one GPU."
            )
        if config.engine.name == "vllm":
            raise ConfigError(
                "engine: vllm runs all trials in one engine, which fills the devices itself. Leave "
                "--workers and --scheduler out; `tensor_parallel_size` of the engine spreads a "
                "model over several GPUs."
            )
        return Cluster(config, self.n_workers, self.scheduler, self.pool)


class Cluster:
    """The processes of a Dask cluster, each with a pool of one study; a context manager."""

    def __init__(
        self,
        config: StudyConfig,
        n_workers: int | None,
        scheduler: str | None,
        pool: Callable[[StudyConfig], Pool],
    ) -> None:
        self._n_workers, self._scheduler = n_workers, scheduler
        n_threads = max(1, CPU_COUNT // n_workers) if n_workers is not None else None
        # not the config alone: a vector may be trained again between two searches
        self._session = f"{config.digest()}-{uuid4()}"
        self._opening = _Opening(self._session, config.model_dump_json(), pool, n_threads)
        self._pending: dict[Future, _Request] = {}
        self._lost: deque[_Request] = deque()  # killed their workers; to be retried alone

    def __enter__(self) -> Self:
        """Start or find the cluster; raise StudyError if no scheduler answers."""
        _quiet_dask()
        with contextlib.ExitStack() as stack:
            if (cluster := self._scheduler) is None:  # Dask never removes its own scratch directory
                scratch = stack.enter_context(scratch_directory("optimer-dask-"))
                settings = {"temporary-directory": str(scratch), ENVIRONMENT: _environment()}
                stack.enter_context(dask.config.set(settings))
                cluster = stack.enter_context(_local_cluster(self._n_workers or 1, str(scratch)))
            self._client = stack.enter_context(_connect(cluster))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:  # workers stop in the middle of their trials, and Dask would report it
            logging.getLogger("distributed").setLevel(logging.CRITICAL)
        self._pending, pending = {}, list(self._pending)
        # a scheduler that is gone needs no clean-up
        with self._stack, contextlib.suppress(OSError, CancelledError):
            self._client.cancel(pending)
            if self._scheduler is not None:
                self._client.run(_forget, self._session, on_error="ignore")

    def count_slots(self) -> int:
        """Return how many trials may run at the same time now: one for each worker, or one in all
        while a trial has to run alone. Waits while there is no worker.
        """
        return 1 if self._lost else len(self._wait_for_workers())

    def digest_inputs(self) -> dict[str, str]:
        """Wait for a worker, open its pool and return the digests of its inputs, see Pool.

        Raises what `next_finished` raises, and StudyError if all workers die of it.
        """
        with announce("search: opening base, vectors and tasks in the workers"):
            self._wait_for_workers()
            with self._naming_lost_scheduler():
                future = self._client.submit(_digest_in_worker, self._opening, pure=False)
                self._wait_for_one([future])
        try:
            inputs: dict[str, str] = self._result_of(future)
        except _AllDiedError as error:
            address = self._client.scheduler.address
            raise StudyError(f"{address}: no pool could be opened. {error}") from None
        self._opening = replace(self._opening, inputs=inputs)
        return inputs

    def submit(self, candidate: Candidate, asked: Sequence[Asked]) -> None:
        """Hand a candidate to the first worker that is idle; return at once."""
        self._submit(_Request(self._opening, candidate, list(asked)))

    def _submit(self, request: _Request) -> None:
        with self._naming_lost_scheduler():
            # Dask prefers idle workers. If one were named (`workers=`), the trial would wait for
            # ever once all workers die, even with `allow_other_workers`
            self._pending[self._client.submit(_run_in_worker, request, pure=False)] = request

    def next_finished(self) -> Trial:
        """Wait until a submitted trial finishes, and return it with the name of its worker. A trial
        that killed its workers, and again when alone, is crashed if they can score the base.

        Raises the OptimerError with which a worker cannot open its pool; and StudyError if a trial
        and then the base killed all workers that Dask gave them, if there is no worker for ten
        minutes, or if the connection to the scheduler is lost.
        """
        while self._pending:
            with self._naming_lost_scheduler():
                future = self._wait_for_one(list(self._pending))
            request = self._pending.pop(future)
            try:
                return self._trial_of(future)
            except _AllDiedError as error:
                number = request.candidate.number
                logger.warning("trial %d: %s Trying once more, alone", number, error)
                self._lost.append(request)
        return self._retry_alone(self._lost.popleft())

    def _retry_alone(self, request: _Request) -> Trial:
        """Retry a trial that killed its workers, while no other runs; see `next_finished`."""
        candidate = request.candidate
        base = replace(candidate, weights=dict.fromkeys(candidate.weights, 0.0))
        try:
            return self._run_now(request)
        except _AllDiedError as error:
            fault = error
        try:
            if candidate.weights == base.weights:
                raise fault
            self._run_now(replace(request, candidate=base))
        except _AllDiedError:
            weights = ", ".join(f"{name} {value:.4g}" for name, value in candidate.weights.items())
            raise StudyError(
                f"trial {candidate.number} (weights: {weights}): {fault} It died of this trial "
                "alone, too, and of the base, so the weights are not at fault. Give the workers "
                "more memory, or start fewer of them, and run the same command again: finished "
                "trials are kept, and this one is done anew."
            ) from None
        error_text = f"{fault} It died of this trial alone, too, and then scored the base."
        logger.warning("trial %d is recorded as crashed: %s", candidate.number, error_text)
        return candidate.to_crashed_trial(error_text)

    def _run_now(self, request: _Request) -> Trial:
        self._submit(request)
        with self._naming_lost_scheduler():
            future = self._wait_for_one(list(self._pending))
        self._pending.pop(future)
        return self._trial_of(future)

    def _trial_of(self, future: Future) -> Trial:
        finished: Trial = self._result_of(future)
        return finished

    def _result_of(self, future: Future) -> Any:
        """Return the result of a finished task; raise _AllDiedError if it killed its workers."""
        with self._naming_lost_scheduler():
            if future.status != "error":
                return future.result()
        error = future.exception()
        if "deserialization" in str(error) and isinstance(error.__cause__, ImportError):
            raise StudyError(
                f"{self._client.scheduler.address}: the Dask scheduler cannot load a trial "
                f"({error.__cause__}). Install the same optimer-hf there as on this machine."
            ) from error
        if not isinstance(error, KilledWorker):
            with naming_faults(f"{self._client.scheduler.address}: a worker"):
                raise error
        raise _AllDiedError(
            f"KilledWorker: its worker died {error.allowed_failures + 1} times. It has too little "
            "memory, or another optimer-hf than this machine, or none; the log of the workers says "
            "which."
        )

    def _wait_for_one(self, futures: Sequence[Future]) -> Future:
        while True:
            with contextlib.suppress(TimeoutError), self._client.as_current():
                done = wait(
                    list(futures),
                    timeout=SECONDS_BETWEEN_WARNINGS,
                    return_when="FIRST_COMPLETED",
                ).done
                return next(future for future in futures if future in done)
            self._wait_for_workers()

    def _wait_for_workers(self) -> list[str]:
        """Return the addresses of the workers; wait while there is none."""
        started = perf_counter()
        with self._naming_lost_scheduler():
            while not (addresses := list(self._client.nthreads())):
                waited = perf_counter() - started
                if waited > WAIT_FOR_WORKERS:
                    raise StudyError(
                        f"{self._client.scheduler.address}: the scheduler has had no worker for "
                        f"{waited:.0f} s. Start workers for it, with optimer-hf installed, and run "
                        "the same command again; finished trials are kept."
                    )
                try:
                    self._client.wait_for_workers(1, timeout=SECONDS_BETWEEN_WARNINGS)
                except TimeoutError:
                    logger.warning(
                        "no worker for %.0f s, waiting up to %d s",
                        perf_counter() - started,
                        WAIT_FOR_WORKERS,
                    )
        return addresses

    @contextlib.contextmanager
    def _naming_lost_scheduler(self) -> Iterator[None]:
        try:
            yield
        except (OSError, CancelledError) as error:
            raise StudyError(
                f"{self._client.scheduler.address}: the connection to the Dask scheduler was lost "
                f"({error}). Start it and run the same command again; finished trials are kept."
            ) from error


def _quiet_dask() -> None:
    """Keep Dask's own messages, which it logs at INFO, from a screen that shows only warnings."""
    if not logging.getLogger().isEnabledFor(logging.INFO):
        logging.getLogger("distributed").setLevel(logging.ERROR)
        # an interrupt that hits Dask while it starts to wait makes a callback of its own fail
        logging.getLogger("tornado.application").setLevel(logging.CRITICAL)


def _environment() -> dict[str, Any]:
    """Return the variables that Dask sets in a worker of this machine before it loads anything,
    unless this process has them.
    """
    return {**dask.config.get(ENVIRONMENT), **choose_spins(os.environ)}


def _local_cluster(n_workers: int, scratch: str) -> LocalCluster:
    """Return a cluster of processes on this machine, without Dask's limit of memory: a model may
    fill all of it.

    They accept connections only with the keys of this process. Every user of a machine reaches its
    loopback interface, and whoever reaches a scheduler can run code in it.
    """
    return LocalCluster(
        security=Security.temporary(),
        n_workers=n_workers,
        threads_per_worker=1,
        processes=True,
        dashboard_address=None,
        memory_limit=0,
        local_directory=scratch,
        # even without a dashboard the scheduler listens on 8787, and warns when that port is taken
        scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
        preload=[__name__],  # runs `dask_setup`
    )


def _connect(cluster: LocalCluster | str) -> Client:
    """Return a client of a cluster.

    A client that cannot connect stays half open until it is garbage, and then closes itself in
    whatever thread finds it: while another loop starts there, both wait for each other. So a
    scheduler is asked for its identity before there is a client of it.
    """
    try:
        if isinstance(cluster, str) and not dask.config.get(SECURITY_LOADER, None):
            LoopRunner().run_sync(_identify, cluster)
        return Client(cluster, timeout=WAIT_FOR_SCHEDULER, set_as_default=False)
    # Dask's own: an AssertionError on a timeout, a TypeError for TLS without keys
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise StudyError(
            f"scheduler {cluster!r}: no Dask scheduler answered within {WAIT_FOR_SCHEDULER} s "
            f"({error or type(error).__name__}). Start one with `dask scheduler` and give the "
            "address that it prints, like tcp://HOST:8786."
        ) from error


async def _identify(address: str) -> None:
    """Ask a scheduler who it is, with the keys that Dask's configuration has for clients."""
    keys = Security().get_connection_args("client")
    async with rpc(address, timeout=WAIT_FOR_SCHEDULER, connection_args=keys) as scheduler:
        await scheduler.identity()


# -- in a worker process ---------------------------------------------------------------------------


def dask_setup(_: object) -> None:
    """Make a worker ignore the signals that end a terminal or a batch job (Dask calls this in each
    worker). They reach the process that opened the cluster, too, and it ends the workers in order.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # what a trial raises comes back as its result; at the end, heartbeats find no scheduler
    logging.getLogger("distributed").setLevel(logging.CRITICAL)


_open_pools: dict[str, Pool] = {}  # by session; at most one, since a model may fill the memory
_one_at_a_time = threading.Lock()


def _run_in_worker(request: _Request) -> Trial:
    """Run a trial in this process."""
    with _open_pool(request.opening) as (name, pool):
        trial = run_trial(pool, request.candidate, request.asked)
    return replace(trial, worker=name)


def _digest_in_worker(opening: _Opening) -> dict[str, str]:
    """Return the digests of what the pool of this process scores."""
    with _open_pool(opening) as (_, pool):
        return pool.inputs


@contextlib.contextmanager
def _open_pool(opening: _Opening) -> Iterator[tuple[str, Pool]]:
    """Yield the name of this worker and its pool, to one task at a time. An OptimerError, which
    ends the search, gets the name of the worker.
    """
    worker = get_worker()
    # a worker without a name has its address as one, and trials are published
    name = worker.id if "://" in str(worker.name) else str(worker.name)
    with _one_at_a_time:
        # Dask starts workers with OMP_NUM_THREADS=1
        torch.set_num_threads(opening.n_threads or worker.state.nthreads)
        if (
            opening.n_threads is not None and torch.cuda.is_available()
        ):  # each worker takes a GPU in turn
            torch.cuda.set_device(int(worker.name) % torch.cuda.device_count())
        try:
            yield name, _pool_of(opening)
        except OptimerError as error:
            raise type(error)(f"worker {name}: {error}") from None


def _pool_of(opening: _Opening) -> Pool:
    if opening.session not in _open_pools:
        _open_pools.clear()
        config = StudyConfig.model_validate_json(opening.config)
        pool = opening.pool(config)
        own, first = pool.inputs, opening.inputs or {}
        if differing := sorted(name for name in first if first[name] != own.get(name)):
            raise StudyError(
                f"{', '.join(differing)}: not the weights or items of the first worker. Give all "
                "workers the same files."
            )
        _open_pools[opening.session] = pool
    return _open_pools[opening.session]


def _forget(session: str) -> None:
    """Free the memory of a finished search in a worker that goes on."""
    _open_pools.pop(session, None)
