"""Stdout is for results: what other code prints there goes to stderr."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.support.cli import process

NOISY = """
import atexit, logging, os, subprocess, sys

def greet(name):
    return (
        f"import logging, os, subprocess, sys; print({name!r} + ' print');"
        f"logging.getLogger({name!r}).addHandler(logging.StreamHandler(sys.stdout));"
        f"logging.getLogger({name!r}).error({name!r} + ' log');"
        f"sys.__stdout__.write({name!r} + ' first stream\\\\n'); sys.__stdout__.flush();"
        f"os.write(1, ({name!r} + ' C library\\\\n').encode());"
        f"subprocess.run(['echo', {name!r} + ' child'])"
    )

exec(greet("import"))
atexit.register(exec, greet("exit"))

def score(model, tokenizer, limit):
    exec(greet("run"))
    return [1.0, 0.0]
"""


def test_what_a_library_prints_at_its_import_while_it_runs_and_at_the_end_is_no_result(
    pool, tmp_path
):
    (tmp_path / "noisy.py").write_text(NOISY)
    terms = [{"function": "noisy.py:score", "higher_is_better": True}]
    (tmp_path / "objective.yaml").write_text(yaml.safe_dump({"terms": terms}))
    command = ["evaluate", pool[0], tmp_path / "objective.yaml", "--format", "json"]
    result = process("-m", "optimer_hf", *command)
    assert json.loads(result.stdout)["score"]["score"] == 0.5
    for when in ("import", "run", "exit"):
        for way in ("print", "log", "first stream", "C library", "child"):
            assert f"{when} {way}\n" in result.stderr


def test_help_is_a_result():
    result = process("-m", "optimer_hf", "evaluate", "--help")
    assert "Usage:" in result.stdout and result.stderr == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", "> /dev/full"])
def test_a_closed_stream_or_a_full_disk_is_left_as_it_is(closed):
    command = f"{sys.executable} -m optimer_hf --version {closed}"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert ("optimer" in result.stdout) == closed.startswith("2")
