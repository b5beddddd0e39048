"""Processes that have imported the libraries before they start.

Importing torch, transformers, SMAC and lm-eval takes longer than most things that a test wants to
see in a process of its own: a command that is killed, a worker that dies. A server imports them
once, and every process here is a fork of it. Tests of the imports themselves, of the environment
that a library reads while it is imported, and of what a user starts, start Python.
"""

import atexit
import contextlib
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MODULES = (
    "distributed",
    "torch",
    "accelerate",
    "datasets",
    "lm_eval.evaluator",
    "lm_eval.models.huggingface",
    "peft",
    "smac",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "optimer_hf.experiment.run",
    "optimer_hf.searching.workers",
)


class Warm:
    """A call of a function in a process and process group of its own; what it prints goes to
    `said`.
    """

    def __init__(self, target: Callable[..., None], *given: object, said: Path | None = None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(MODULES))
        output = os.devnull if said is None else str(said)
        surroundings = output, dict(os.environ), str(Path.cwd())
        self._process = context.Process(target=_be, args=(target, given, *surroundings))
        self._process.start()
        atexit.register(self.kill)  # before Python waits for it, should a test have failed

    @property
    def pid(self) -> int:
        """Number of the process, and of its group."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Exit status, -N for a signal N, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float = 300) -> int:
        """Wait for its end, and return the exit status. After `timeout` seconds it is killed."""
        self._process.join(timeout)
        if (status := self._process.exitcode) is None:
            self.kill()
            pytest.fail(f"it runs for more than {timeout} s")
        return status

    def signal(self, number: int) -> None:
        """Send a signal to all processes of the group, as a terminal or a batch system does."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """Kill it and its group, should they still run."""
        with contextlib.suppress(ProcessLookupError):  # it may not have a group yet, or any more
            self.signal(signal.SIGKILL)
        self._process.kill()
        self._process.join()

    def kill_when(self, is_far_enough: Callable[[], object]) -> None:
        """Kill it as soon as a condition holds, which has to be before its end."""
        deadline, is_far = time.monotonic() + 120, False
        while not (is_far := bool(is_far_enough())) and self.poll() is None:
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        status = self.poll()
        self.kill()
        assert status is None, f"it ended with {status} before it was killed"
        assert is_far, "it did not get far enough to be killed"
        assert self.poll() == -signal.SIGKILL, "it should have been killed before its end"


def start_optimer(*words: object, said: Path | None = None) -> Warm:
    """Start a command of `optimer`."""
    return Warm(_be_optimer, *map(str, words), said=said)


def _be(
    target: Callable[..., None],
    given: tuple[object, ...],
    output: str,
    environment: dict[str, str],
    folder: str,
) -> None:
    """Call a function in this process, which is a fork of the server."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # the server has looked for it already
    with open(output, "ab") as file, open(os.devnull, "rb") as nothing:
        for descriptor, opened in ((0, nothing), (1, file), (2, file)):
            os.dup2(opened.fileno(), descriptor)
    # a shell without job control starts what runs in the background with SIGINT ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    target(*given)


def _be_optimer(*words: str) -> None:
    sys.argv = ["optimer", *words]
    runpy.run_module("optimer_hf", run_name="__main__")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The server, with the environment as it is before a test changes it."""
    Warm(_do_nothing).wait()


def _do_nothing() -> None: ...


@pytest.fixture
def warm_workers(server: None) -> Iterator[None]:
    """Let workers of Dask on this machine be such processes. They have the environment of the
    server, but for what Dask sets in them.
    """
    dask = importlib.import_module("dask")
    utils = importlib.import_module("distributed.utils")
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        utils.get_mp_context().set_forkserver_preload(list(MODULES))
        yield
