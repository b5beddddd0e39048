"""progress.py: the lines of long work where there is no terminal."""

import logging
import re

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from optimer_hf import progress
from optimer_hf.progress import Meter, announce


def test_lines_tell_how_far_and_the_last_one_what_came_out(caplog, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1)
    with caplog.at_level(logging.INFO), Meter("search", 3, "trials", done=1) as meter:
        meter.advance(1, "+0.1000, best +0.1000")
        meter.advance(1, "-0.2000, best +0.1000")
    first, last = caplog.messages
    assert first.startswith("search: 2/3 trials, ") and first.endswith(" left")
    assert "+0.1000, best +0.1000" in first
    assert last.startswith("search: 3/3 trials, ") and last.endswith("-0.2000, best +0.1000")


def test_work_that_was_done_before_has_no_rate(caplog):
    caplog.set_level("INFO")
    with Meter("search", 7, "trials", done=7):
        pass
    assert caplog.messages == ["search: 7/7 trials"]


def test_work_that_fails_does_not_say_that_it_is_done(caplog):
    with caplog.at_level(logging.INFO):
        try:
            with Meter("search", 3, "trials"):
                raise ValueError
        except ValueError:
            pass
    assert caplog.messages == []


# -- in a notebook ---------------------------------------------------------------------------------


@pytest.fixture
def cell(monkeypatch):
    """What a cell shows, as it runs."""
    monkeypatch.setattr(progress, "_is_notebook", lambda: True)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_VIEWS", -1)
    InteractiveShell.instance()
    with capture_output() as shown:
        yield shown
    InteractiveShell.clear_instance()


def test_a_cell_shows_one_bar_that_moves(cell, caplog):
    with caplog.at_level(logging.INFO), Meter("search <b>", 3, "trials") as meter:
        meter.advance(1, "best < 1")
        meter.advance(2, "best +0.2")
    views = [output.data for output in cell.outputs]
    assert caplog.messages == []
    assert [re.findall(r'value="(.)" max="3"', view["text/html"]) for view in views] == [
        ["0"], ["1"], ["3"], ["3"]
    ]  # fmt: skip
    assert "search &lt;b&gt;: 1/3 trials" in views[1]["text/html"]
    assert "best &lt; 1" in views[1]["text/html"] and "<b>" not in views[1]["text/html"]
    assert views[3]["text/plain"].endswith("best +0.2")


def test_work_that_cannot_be_counted_is_announced(cell):
    with announce("opening <x>"):
        assert cell.outputs[-1].data["text/html"] == "opening &lt;x&gt; ..."
    assert re.fullmatch(r"opening <x>: \d+\.\d s", cell.outputs[-1].data["text/plain"])


def test_without_a_notebook_or_a_terminal_a_line_announces_it(caplog):
    with caplog.at_level(logging.INFO), announce("opening"):
        assert caplog.messages == ["opening"]
