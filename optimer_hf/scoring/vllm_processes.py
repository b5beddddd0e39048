"""Call an engine of vLLM, and notice when one of its processes dies."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar

import psutil

from optimer_hf.errors import StudyError

SECONDS_BETWEEN_LOOKS = 1.0
DIED = (
    "engine: vLLM's engine has died, perhaps for lack of memory; its messages are above. Run the "
    "same command again: finished trials are kept."
)
Result = TypeVar("Result")


def running_processes() -> list[psutil.Process]:
    """Return the processes of the engines that this process has started."""
    children = psutil.Process().children(recursive=True)
    return [each for each in children if _is_of_vllm(each)]


def _is_of_vllm(process: psutil.Process) -> bool:
    try:
        return any("VLLM::" in part for part in process.cmdline())
    except psutil.Error:  # it has just ended
        return False


def call_engine(processes: Sequence[psutil.Process], call: Callable[[], Result]) -> Result:
    """Return what a call of an engine returns; `processes` are those of the engine.

    Raises StudyError if one of them dies: no weights are at fault, and no other trial can run in
    it. vLLM itself waits for ever for a process that was killed, for instance by the system when
    memory ran out.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    answer: Future[Result] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # raised again below, where somebody waits for it
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True, name="call of vLLM").start()
    while not wait([answer], timeout=SECONDS_BETWEEN_LOOKS).done:
        if not all(map(_is_alive, processes)):
            raise StudyError(DIED)
    try:
        return answer.result()
    except EngineDeadError as error:
        raise StudyError(DIED) from error


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
