"""faults.py: a fault of the machine ends a search and is not recorded against the weights."""

import pytest
import torch

from optimer_hf.errors import EvaluationError
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.trials import TrialLog
from tests.support.landscapes import FunctionPool, config_of, failing_at, outcome, outcome_of


def test_a_device_that_fails_ends_the_search_and_blames_no_weights(tmp_path, uninterrupted):
    pool = failing_at({5: torch.AcceleratorError("CUDA error: an illegal memory access")})
    with pytest.raises(EvaluationError, match=r"trial 5: the device failed \(CUDA error: an ill"):
        search(config_of(), tmp_path / "s", runner=InProcess(pool))
    assert len(TrialLog(tmp_path / "s" / "trials.jsonl").trials) == 5
    assert outcome(search(config_of(), tmp_path / "s", runner=InProcess(FunctionPool))) == outcome(
        uninterrupted
    )


def test_lack_of_memory_ends_the_search_unrecorded(tmp_path, uninterrupted):
    error, expected = torch.OutOfMemoryError("CUDA out of memory."), outcome(uninterrupted)
    once = search(config_of(), tmp_path / "once", runner=InProcess(failing_at({7: error})))
    assert outcome(once) == expected  # tried again
    with pytest.raises(EvaluationError, match=r"trial 7: .*, twice\. .* this one is done anew"):
        search(config_of(), tmp_path / "s", runner=InProcess(failing_at({7: error, 8: error})))
    assert outcome_of(tmp_path / "s") == expected[:7]
    assert outcome(search(config_of(), tmp_path / "s", runner=InProcess(FunctionPool))) == expected


def test_a_pool_that_cannot_be_opened_for_lack_of_memory_is_one_line(tmp_path):
    def opened(config):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(EvaluationError, match=r"opening base.*CUDA out of memory\.\. Free memory"):
        search(config_of(), tmp_path / "s", runner=InProcess(opened))
