"""trial.py, faults.py: which failures are the fault of the weights."""

import errno

import numpy as np
import pytest
import torch
from distributed.comm import CommClosedError
from safetensors import SafetensorError

from optimer_hf.errors import EvaluationError
from optimer_hf.searching import trial as pool_module
from optimer_hf.searching.trial import run_trial
from optimer_hf.study.trials import Candidate
from tests.support.landscapes import config_of, failing_at


def caused_by(cause: Exception) -> Exception:
    error = ValueError("the task cannot be scored")
    error.__cause__ = cause
    return error


NO_FAULT_OF_WEIGHTS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
    RuntimeError("can't start new thread"),
    MemoryError(),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EMFILE, "Too many open files"),
    ConnectionResetError("reset by peer"),
    TimeoutError("the Hub did not answer"),
    FileNotFoundError("items.jsonl"),
    ModuleNotFoundError("No module named 'sacrebleu'"),
    SafetensorError("Error while deserializing header"),
    CommClosedError("the worker is gone"),
    caused_by(MemoryError()),
    ExceptionGroup("two", [ValueError("no"), MemoryError()]),
]


FAULT_OF_WEIGHTS = [
    EvaluationError("the score of item 0 is not a finite number"),
    OverflowError("math range error"),
    ZeroDivisionError("float division by zero"),
    FloatingPointError("invalid value"),
    ValueError("generation stopped at a token that is none"),
    RuntimeError("probability tensor contains either `inf`, `nan` or element < 0"),
    np.linalg.LinAlgError("singular"),
    KeyError("resps"),
    AssertionError("no"),
]


@pytest.mark.parametrize("error", NO_FAULT_OF_WEIGHTS, ids=repr)
def test_what_is_not_the_fault_of_the_weights_is_tried_twice_and_raised(error, monkeypatch):
    freed = []
    monkeypatch.setattr(pool_module, "collect_memory", lambda: freed.append(True))
    config = config_of()
    asked = (Candidate(3, "x", dict.fromkeys("wxyz", 0.1)), [])
    assert run_trial(failing_at({0: error})(config), *asked).status == "ok"
    with pytest.raises(EvaluationError, match=r"trial 3: .*, twice\."):
        run_trial(failing_at({0: error, 1: error})(config), *asked)
    assert len(freed) == 2


@pytest.mark.parametrize("error", FAULT_OF_WEIGHTS, ids=repr)
def test_what_the_weights_break_is_a_crashed_trial(error):
    asked = (Candidate(3, "x", dict.fromkeys("wxyz", 0.1)), [])
    crashed = run_trial(failing_at({0: error})(config_of()), *asked)
    assert crashed.status == "crashed" and not crashed.is_blameless
