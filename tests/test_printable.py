"""What is printed shows control characters, and obeys none."""

import json
import logging

import pytest
import yaml
from click.testing import CliRunner

from optimer_hf.cli import main
from optimer_hf.printable import VisibleFormatter, make_visible

EVIL = ["\x1b]0;LICENCE\x07", "a\rb", "\x9b2J", "abc\u202etxt.exe", "\x00", "\u2028x", "\x7f"]


@pytest.mark.parametrize("evil", EVIL)
def test_control_characters_are_shown_and_read_back(evil):
    shown = make_visible(f"name: {evil} end")
    assert shown.isprintable()
    assert make_visible(shown) == shown
    assert (
        json.loads(f'"{make_visible(evil)}"') == yaml.safe_load(f'"{make_visible(evil)}"') == evil
    )


def test_text_of_any_language_tabs_and_line_ends_stay():
    text = "日本語 ünïcödé\temoji 🙂\nعربى\n"
    assert make_visible(text) == text


@pytest.mark.parametrize("evil", EVIL)
def test_log_lines_and_errors_show_them(evil, tmp_path):
    record = logging.LogRecord("a", logging.INFO, "f", 1, "moved: %s", (evil,), None)
    assert VisibleFormatter("%(message)s").format(record).isprintable()
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({f"n_{evil}": 1, "vectors": {}}))
    result = CliRunner().invoke(main, ["validate", str(tmp_path / "study.yaml")])
    assert result.exit_code == 1
    assert result.output.replace("\n", "").isprintable()
