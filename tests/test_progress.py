"""progress.py: the lines of long work where there is no terminal."""

import logging

from optimer_hf import progress
from optimer_hf.progress import Meter


def test_lines_tell_how_far_and_the_last_one_what_came_out(caplog, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1)
    with caplog.at_level(logging.INFO), Meter("search", 3, "trials", done=1) as meter:
        meter.advance(1, "+0.1000, best +0.1000")
        meter.advance(1, "-0.2000, best +0.1000")
    first, last = caplog.messages
    assert first.startswith("search: 2/3 trials, ") and first.endswith(" left")
    assert "+0.1000, best +0.1000" in first
    assert last.startswith("search: 3/3 trials, ") and last.endswith("-0.2000, best +0.1000")


def test_work_that_fails_does_not_say_that_it_is_done(caplog):
    with caplog.at_level(logging.INFO):
        try:
            with Meter("search", 3, "trials"):
                raise ValueError
        except ValueError:
            pass
    assert caplog.messages == []
