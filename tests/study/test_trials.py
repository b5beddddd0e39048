"""trials.py: lines of trials.jsonl."""

import pytest

from optimer_hf.errors import StudyError
from optimer_hf.study.trials import TrialLog


@pytest.mark.parametrize("line", [b"[]\n", b"3\n", b"\xff\n", b'{"number": 1}\n', b"\n"])
def test_any_line_that_is_no_trial_is_an_error(tmp_path, line):
    (tmp_path / "trials.jsonl").write_bytes(line)
    with pytest.raises(StudyError, match=r"trials\.jsonl:1: not a trial"):
        TrialLog(tmp_path / "trials.jsonl")
