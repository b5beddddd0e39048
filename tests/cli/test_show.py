"""trials and status over a run of version 0.1.0, whole and cut short."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import pytest

from optimer_hf.files.locks import hold_place, locking
from tests.support.cli import optimer


@pytest.fixture
def run(golden: Path, tmp_path: Path) -> Path:
    shutil.copytree(golden / "runs" / "tiny", tmp_path / "tiny")
    return tmp_path / "tiny"


def recorded(run: Path) -> list[dict]:
    lines = (run / "study" / "trials.jsonl").read_text("utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["fidelity"] == "search"]


def test_trials_come_best_first_with_every_number_of_the_record(run):
    rows = json.loads(optimer("trials", run, "--format", "json").stdout)
    values = [row["objective"] for row in rows]
    assert values == sorted(values, reverse=True) and len(rows) == len(recorded(run))
    by_number = {row["trial"]: row for row in rows}
    for trial in recorded(run):
        row = by_number[trial["number"]]
        assert {k: row[f"weight/{k}"] for k in trial["weights"]} == trial["weights"]
        assert row["seconds/merge"] == trial["seconds"]["merge"]
    assert [row["trial"] for row in rows if row["best"]] == [9]


def test_the_table_names_weights_and_gains_and_marks_the_best(run):
    header, _, first, *_ = optimer("trials", run).stdout.splitlines()
    assert header == (
        "| trial | origin | weight aaa | weight xyz | aaa | xyz | mix | objective | seconds |"
    )
    assert first.startswith("| 9 * | surrogate | 0.934 | 0.976 | +0.13 % | +0.38 % |")


@pytest.mark.parametrize(("column", "key"), [("xyz", "gain/xyz"), ("trial", "trial")])
def test_trials_are_sorted_by_a_column(run, column, key):
    text = optimer("trials", run, "--format", "csv", "--sort", column).stdout
    values = [float(row[key]) for row in csv.DictReader(io.StringIO(text))]
    assert values == sorted(values, reverse=column != "trial") and len(values) == 10


def test_an_unknown_column_is_refused_with_the_nearest(run):
    result = optimer("trials", run, "--sort", "objektive", ok=False)
    assert "--sort 'objektive': no such column. Did you mean 'objective'?" in result.stderr


def test_crashed_trials_come_last_and_have_no_score(run):
    file = run / "study" / "trials.jsonl"
    first, second, *rest = file.read_text("utf-8").splitlines()
    crashed = json.loads(second) | {"status": "crashed", "terms": {}, "error": "E: e"}
    file.write_text("\n".join([first, json.dumps(crashed), *rest]) + "\n", "utf-8")
    assert optimer("trials", run).stdout.splitlines()[-1].split(" | ")[-2] == "crashed"
    assert json.loads(optimer("trials", run, "--format", "json").stdout)[-1]["objective"] is None


def test_trials_that_were_scored_again_are_listed_with_those_scores(run):
    rows = json.loads(optimer("trials", run, "--rescored", "--format", "json").stdout)
    assert len(rows) == 3 and {row["trial"] for row in rows} >= {0, 9}


# -- status ----------------------------------------------------------------------------------------


def status(directory: Path) -> dict:
    return json.loads(optimer("status", directory, "--format", "json").stdout)


def test_a_finished_run_is_finished_in_every_part(run):
    state = status(run)
    assert state["is_done"] and all(part["is_done"] for part in state["parts"])
    parts = {part["part"]: part["state"] for part in state["parts"]}
    assert parts["vector aaa"] == "trained on 512 tokens"
    assert parts["search"] == "10 of 10 trials; the best is trial 9"
    assert parts["scoring the best again"] == "3 of 3 merges"
    text = optimer("status", run).stdout
    assert "run of 'tiny' (its own budget), finished" in text and "| vector aaa | trained" in text


def test_a_pulled_study_has_a_status_like_its_trials(run, tmp_path):
    shutil.copytree(run / "study", tmp_path / "theirs/study")
    state = status(tmp_path / "theirs")
    assert state["kind"] == "study" and state["parts"][0] == status(run / "study")["parts"][0]


def test_a_training_whose_text_is_packed_has_not_trained_yet(run):
    (run / "vectors/xyz/training.json").unlink()
    parts = {part["part"]: part for part in status(run)["parts"]}
    assert parts["vector xyz"]["state"] == "text packed, no checkpoint yet"


def test_an_interrupted_run_says_where_it_stopped(run):
    (run / "done.json").unlink()
    (run / "vectors" / "xyz" / "training.json").unlink()
    (run / "vectors" / "xyz" / "checkpoints" / "checkpoint-12").mkdir(parents=True)
    file = run / "study" / "trials.jsonl"
    file.write_text("".join(file.read_text("utf-8").splitlines(keepends=True)[:4]), "utf-8")
    parts = {part["part"]: part for part in status(run)["parts"]}
    assert parts["vector xyz"]["state"] == "begun, checkpoint of step 12"
    assert parts["search"]["state"] == "4 of 10 trials" and not parts["search"]["is_done"]
    assert parts["results and model"]["state"] == "not written yet"
    assert not status(run)["is_done"]


def test_a_study_and_a_training_have_a_status_of_their_own(run):
    assert status(run / "study")["kind"] == "study"
    assert status(run / "vectors" / "aaa")["parts"][0]["state"] == "trained on 512 tokens"


def device_of(path: Path) -> tuple[int, int]:
    device = path.stat().st_dev
    return os.major(device), os.minor(device)


def test_the_process_that_holds_a_directory_is_named(run):
    mounts = Path("/proc/self/mountinfo")  # its third column is the device as the kernel names it
    lines = mounts.read_text("utf-8").splitlines() if mounts.exists() else []
    devices = [line.split()[2] for line in lines]
    can_tell = "{}:{}".format(*device_of(run)) in devices
    assert status(run)["process"] is None
    with locking(run / ".lock"):
        assert status(run)["process"] == (os.getpid() if can_tell else None)
    assert status(run)["process"] is None


def test_a_lock_on_another_file_system_is_not_that_of_the_directory(run, monkeypatch, tmp_path):
    (run / ".lock").touch()
    inode, (major, minor) = (run / ".lock").stat().st_ino, device_of(run)
    locks = tmp_path / "locks"
    monkeypatch.setattr("optimer_hf.experiment.status.LOCKS", locks)
    stranger = f"1: FLOCK  ADVISORY  WRITE 11 {major + 1:02x}:{minor:02x}:{inode} 0 EOF\n"
    locks.write_text(stranger, "ascii")
    assert status(run)["process"] is None
    waiting = f"2: -> FLOCK  ADVISORY  WRITE 22 {major:02x}:{minor:02x}:{inode} 0 EOF\n"
    holder = f"2: FLOCK  ADVISORY  WRITE 33 {major:02x}:{minor:02x}:{inode} 0 EOF\n"
    locks.write_text(stranger + waiting + holder, "ascii")
    assert status(run)["process"] == 33


def test_the_process_that_trains_a_vector_is_named(run, monkeypatch, tmp_path):
    vector, locks = run / "vectors" / "aaa", tmp_path / "locks"
    monkeypatch.setattr("optimer_hf.experiment.status.LOCKS", locks)
    for beside in (None, vector):  # inside it, where its folder is read-only
        with hold_place(vector, beside=beside):
            (lock,) = (beside or vector.parent).glob(".partial-*.lock")
            major, minor = device_of(lock)
            inode = lock.stat().st_ino
            line = f"1: FLOCK  ADVISORY  WRITE 44 {major:02x}:{minor:02x}:{inode} 0 EOF\n"
            locks.write_text(line, "ascii")
            assert status(vector)["process"] == 44
    assert status(vector)["process"] is None


def test_a_directory_of_something_else_is_refused(tmp_path):
    assert "holds no run, study or training" in optimer("status", tmp_path, ok=False).stderr
