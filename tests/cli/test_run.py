"""run and plan: what is refused before any work."""

import pytest

from tests.support.cli import optimer


@pytest.mark.parametrize("text", ["x", "0", "-5", "1e6"])
def test_tokens_that_are_no_number_are_refused(tmp_path, text):
    assert f"--tokens '{text}': expected a number" in (
        optimer("run", tmp_path, "--tokens", text, ok=False).stderr
    )
