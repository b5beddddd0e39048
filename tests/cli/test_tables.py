"""Tables are drawn on a terminal and stay Markdown elsewhere."""

import io
import sys

import pytest

from optimer_hf.cli.tables import echo_markdown
from optimer_hf.files.text import markdown_table

TEXT = (
    f"# Title\n\n{markdown_table(['row', 'gain'], [['uniform sum', '+1.25 %'], ['x', '']])}* note"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def draw(monkeypatch):
    """Return a function that returns what a terminal of 60 columns gets for a text."""
    monkeypatch.setenv("COLUMNS", "60")

    def drawn(text: str) -> str:
        stream = Terminal()
        monkeypatch.setattr(sys, "stdout", stream)
        echo_markdown(text)
        return stream.getvalue()

    return drawn


def test_a_pipe_gets_the_markdown_as_it_is(capsys):
    echo_markdown(TEXT)
    assert capsys.readouterr().out == TEXT + "\n"


def test_a_terminal_gets_drawn_tables_and_every_value(draw):
    text = draw(TEXT)
    assert "|" not in text and "---" not in text and "#" not in text
    for part in ("Title", "row", "gain", "uniform sum", "+1.25 %", "* note"):
        assert part in text


@pytest.mark.parametrize("columns", [10, 20, 40])
def test_a_terminal_that_is_too_narrow_gets_every_value_whole(draw, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    cells = {f"weight {name}": "-0.2207 %" for name in "abcdefgh"} | {"last use": "2026-11-28"}
    text = draw(markdown_table([*cells, "origin"], [[*cells.values(), "surrogate"]]))
    assert text.count("-0.2207 %") == 8 and "2026-11-28" in text and "surrogate" in text
    assert "…" not in text


def test_nothing_in_a_cell_is_read_as_markup_or_as_a_control_character(draw):
    text = draw(markdown_table(["[bold]a[/bold]"], [["[+0.1, +0.2] \x1b]0;title\x07"]]))
    assert "[bold]a[/bold]" in text
    assert "[+0.1, +0.2] \\u001b]0;title\\u0007" in text
