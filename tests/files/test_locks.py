"""One writer at a time: locks are held, waited for and removed."""

import errno
import os
import subprocess
import sys

import pytest
from filelock import FileLock

from optimer_hf.errors import OutputError
from optimer_hf.files.locks import hold_place, remove_dead_locks
from optimer_hf.files.staging import (
    staged_directory,
    write_text,
)

WRITER = """
import sys
from pathlib import Path
from optimer_hf.files.staging import replacing, staged_directory
with staged_directory(Path("out")) as staging, replacing(Path("file.txt")) as partial:
    (staging / "stale").write_text("x")
    partial.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_a_place_that_another_process_writes_is_refused_until_it_ends_or_dies(tmp_path):
    command = [sys.executable, "-c", WRITER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdin=pipe, stdout=pipe) as writer:
        writer.stdout.readline()
        assert len(list(tmp_path.iterdir())) == 4  # two locks, a directory, a file
        with (
            pytest.raises(OutputError, match=r"out: another process is writing to it\. Wait"),
            staged_directory(tmp_path / "out"),
        ):
            pytest.fail("the body must not run")
        assert len(list(tmp_path.iterdir())) == 4
        writer.kill()
    assert len(list(tmp_path.iterdir())) == 4
    with staged_directory(tmp_path / "out"):
        pass
    write_text(tmp_path / "file.txt", "whole")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file.txt", "out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_locks_of_dead_processes_are_removed_and_those_of_live_ones_are_not(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / f".partial-{name}.lock").touch()
    (tmp_path / "mine.lock").touch()
    with hold_place(tmp_path / "out"):
        remove_dead_locks(tmp_path)
        assert {entry.name for entry in tmp_path.iterdir()} == {".partial-out.lock", "mine.lock"}
    remove_dead_locks(tmp_path / "absent")
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.lock"]


CONTENDER = """
import sys
from pathlib import Path
from optimer_hf.files.locks import hold_place, remove_dead_locks
for _ in range(int(sys.argv[1])):
    remove_dead_locks(Path())
    with hold_place(Path("counter"), wait=True):
        count = int(Path("counter").read_text())
        Path("counter").write_text(str(count + 1))
"""


def test_a_place_has_one_writer_while_others_remove_its_lock(tmp_path):
    (tmp_path / "counter").write_text("0")
    command = [sys.executable, "-c", CONTENDER, "30"]
    writers = [subprocess.Popen(command, cwd=tmp_path) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert (tmp_path / "counter").read_text() == "90"
    assert [entry.name for entry in tmp_path.iterdir()] == ["counter"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_written_to_anyway(tmp_path, monkeypatch, number):
    def refuse(lock, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    (tmp_path / ".partial-0a1b2c3d-out").mkdir()  # of a process that may be alive
    with staged_directory(tmp_path / "out") as staging:
        write_text(staging / "a", "a")
    assert (tmp_path / "out" / "a").read_text() == "a\n"
    assert (tmp_path / ".partial-0a1b2c3d-out").exists()
