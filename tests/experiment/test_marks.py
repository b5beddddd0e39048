"""marks.py: run.json and done.json, also those of version 0.1.0."""

import json
from pathlib import Path

import pytest

from optimer_hf.errors import ConfigError
from optimer_hf.experiment.folder import run_of
from optimer_hf.experiment.marks import CLAIM_FILE, DONE_FILE, Claim, Done, read_claim
from tests.support.experiments import run_optimer


@pytest.mark.parametrize(
    ("fields", "written"),
    [
        ({}, {"short": False}),
        ({"short": True, "tokens": 512}, {"short": True, "tokens": 512}),
        ({"profile": "gpu"}, {"short": False, "profile": "gpu"}),
        ({"seeds": True}, {"seeds": True, "short": False}),
        ({"seed": 3}, {"short": False, "seed": 3}),
    ],
)
def test_a_claim_says_only_what_the_command_line_changed(tmp_path: Path, fields, written):
    claim = Claim(recipe="tiny", **fields)
    claim.write(tmp_path / CLAIM_FILE)
    assert read_claim(tmp_path) == claim
    data = json.loads((tmp_path / CLAIM_FILE).read_text())
    assert data == {"format_version": 1, "recipe": "tiny"} | written
    (tmp_path / CLAIM_FILE).write_text(json.dumps({"recipe": "tiny"} | written))  # as 0.1.0 did
    assert read_claim(tmp_path) == claim


def test_the_marks_of_0_1_0_are_those_of_the_same_run(golden: Path):
    out = golden / "runs" / "tiny"
    run = run_of(golden / "recipes" / "tiny", out)
    assert read_claim(out) == run.claim()
    assert Done.read(out / DONE_FILE).inputs_sha256 == run.inputs_digest()


def test_a_file_of_the_user_is_no_claim_and_a_damaged_claim_is_named(tmp_path: Path):
    assert read_claim(tmp_path) is None
    (tmp_path / CLAIM_FILE).write_text('{"mine": 1}')
    assert read_claim(tmp_path) is None
    (tmp_path / CLAIM_FILE).write_text('{"recipe": "tiny", "shorts": true}')
    with pytest.raises(ConfigError, match=r"run\.json: unknown field 'shorts'"):
        read_claim(tmp_path)


def test_damaged_marks_of_a_run_are_named(recipe_dir: Path, tmp_path: Path):
    for name in ("run.json", "done.json"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("{")
        result = run_optimer("run", recipe_dir, out)
        assert result.exit_code == 1 and f"{name}:1: not valid JSON" in result.output
