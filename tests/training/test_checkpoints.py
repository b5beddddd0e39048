"""checkpoints.py: a checkpoint counts when its seal fits, also one that version 0.1.0 sealed."""

import json
from pathlib import Path

import pytest

from optimer_hf.files.digest import sha256_file
from optimer_hf.progress import Cost
from optimer_hf.training.checkpoints import (
    CHECKPOINTS,
    SEAL,
    SPENT_FILE,
    CheckpointSeal,
    SpentRecord,
    drop_damaged,
    newest_checkpoint,
    read_spent,
    seal,
)


def make_checkpoint(out: Path, step: int, seconds: float = 0.0) -> Path:
    """Write a sealed checkpoint of three files."""
    folder = out / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "weights").write_bytes(b"0123")
    SpentRecord(seconds=seconds, cpu_seconds=2 * seconds).write(folder / SPENT_FILE)
    seal(folder)
    return folder


def seal_as_0_1_0(folder: Path) -> None:
    """Seal a checkpoint as version 0.1.0 did: the digests alone, and the time without a version."""
    (folder / SPENT_FILE).write_text('{"seconds": 3.0, "cpu_seconds": 6.0}')
    files = [path for path in folder.iterdir() if path.name != SEAL]
    (folder / SEAL).write_text(json.dumps({path.name: sha256_file(path) for path in files}))


@pytest.mark.parametrize("finish", [lambda folder: None, seal_as_0_1_0], ids=["now", "0.1.0"])
def test_the_time_of_the_newest_sealed_checkpoint_is_read(tmp_path: Path, finish):
    assert read_spent(newest_checkpoint(tmp_path / CHECKPOINTS)).cost == Cost()
    make_checkpoint(tmp_path, 3, 1.0)
    newest = make_checkpoint(tmp_path, 20, 3.0)
    finish(newest)
    assert newest_checkpoint(tmp_path / "checkpoints") == newest
    assert read_spent(newest_checkpoint(tmp_path / CHECKPOINTS)).cost == Cost(3.0, 6.0)
    (newest / "weights").write_bytes(b"0124")
    assert read_spent(newest_checkpoint(tmp_path / CHECKPOINTS)).cost == Cost(1.0, 2.0)


def test_a_seal_names_every_other_file(tmp_path: Path):
    folder = make_checkpoint(tmp_path, 1)
    files = CheckpointSeal.read(folder / SEAL).files
    assert files.keys() == {"trainer_state.json", "weights", SPENT_FILE}
    assert files["weights"] == sha256_file(folder / "weights")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": {}}', '{"files": 3}', "9" * 5000])
def test_a_checkpoint_with_a_damaged_seal_was_not_finished(tmp_path: Path, text: str, caplog):
    kept, damaged = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    (damaged / SEAL).write_text(text)
    assert newest_checkpoint(tmp_path / "checkpoints") == kept
    drop_damaged(tmp_path / "checkpoints")
    assert kept.exists() and not damaged.exists()
    assert "was not finished; removing it" in caplog.text
