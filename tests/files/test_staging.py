"""Atomic writes: nothing half-written stays, whenever a process is killed."""

import contextlib
import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from optimer_hf.errors import OutputError
from optimer_hf.files.staging import (
    finish_move,
    require_empty,
    scratch_directory,
    staged_directory,
    write_text,
)


def test_write_text_replaces_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "one")
    write_text(path, "two\n")
    assert path.read_text(encoding="utf-8") == "two\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_write_text_that_fails_says_so_and_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    (path / "inside").mkdir(parents=True)  # a directory cannot be replaced by a file
    with pytest.raises(OutputError, match=r"cannot be written .*The old state was kept"):
        write_text(path, "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert [entry.name for entry in path.iterdir()] == ["inside"]


def test_a_pipe_is_refused_and_stays_also_behind_a_link(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # a device in its place would need a user who may make one
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(OutputError, match="found a device or a pipe, expected a file"):
            write_text(tmp_path / name, "x")
    assert (tmp_path / "pipe").is_fifo() and len([*tmp_path.iterdir()]) == 2


def test_staged_directory_appears_whole_at_the_end(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged_directory(out) as staging:
        (staging / "a.txt").write_text("a")
        assert not out.exists()
    assert (out / "a.txt").read_text() == "a"
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_an_exception_inside_a_staged_directory_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), staged_directory(tmp_path / "out") as staging:
        (staging / "a.txt").write_text("a")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_inside_a_staged_directory_is_an_output_error(tmp_path):
    with (
        pytest.raises(OutputError, match=r"No space left.*Nothing was left behind"),
        staged_directory(tmp_path / "out"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_only_leftovers_of_the_same_name_are_removed(tmp_path):
    names = [".partial-0a1b2c3d-out2", ".partial-mine-out", ".partial-0a1b2c3d-x-out", ".partial-"]
    for name in [*names, ".partial-0a1b2c3d-out"]:
        (tmp_path / name).mkdir()
    with staged_directory(tmp_path / "out"):
        pass
    assert {entry.name for entry in tmp_path.iterdir()} == {*names, "out"}


@pytest.mark.parametrize(
    "name", ["x" * 255, "ä" * 127, "a b\n'[c]*?", "-rf", ".partial-x", "~", "out.lock", "\udcff"]
)
def test_any_name_that_a_file_system_takes_can_be_written(tmp_path, name):
    with staged_directory(tmp_path / name) as staging:
        (staging / "a").write_text("a")
    assert [os.fsencode(entry.name) for entry in tmp_path.iterdir()] == [os.fsencode(name)]
    write_text(tmp_path / name / name, "b")
    assert {entry.name for entry in (tmp_path / name).iterdir()} == {"a", name}


def test_a_staged_directory_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").mkdir()
    with staged_directory(tmp_path / "out"):
        pass
    write_text(tmp_path / "file", "x")
    (tmp_path / "usual" / "file").write_text("x")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual" / "file").stat().st_mode


def test_links_are_followed_to_the_directory_they_name(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, target in {"link": "empty", "dangling": "absent"}.items():
        (tmp_path / name).symlink_to(target)
        with staged_directory(tmp_path / name) as staging:
            (staging / "a").write_text("a")
        assert (tmp_path / target / "a").exists() and (tmp_path / name).is_symlink()


def test_staged_files_are_on_the_disk_before_they_are_moved(tmp_path, monkeypatch):
    events = []
    sync, move = os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (events.append(str(Path(f"/proc/self/fd/{fd}").readlink())), sync(fd)),
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("move"), move(*paths)))
    with staged_directory(tmp_path / "out") as staging:
        (staging / "deep").mkdir()
        (staging / "deep" / "a").write_text("a")
    before, after = events[: events.index("move")], events[events.index("move") + 1 :]
    assert set(before) == {str(staging), str(staging / "deep"), str(staging / "deep" / "a")}
    assert after == [str(tmp_path)]


def test_a_directory_that_cannot_be_replaced_is_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with staged_directory(Path()) as staging:  # the working directory
        assert staging.parent == tmp_path
        (staging / "a").write_text("a")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    with pytest.raises(OutputError, match="not empty"), staged_directory(Path()):
        pytest.fail("the body must not run")


@pytest.mark.parametrize("n_moved", range(4))
def test_a_directory_whose_filling_was_killed_is_completed_by_the_next_command(
    tmp_path, monkeypatch, n_moved
):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    move, moved = os.replace, []

    def dying(*paths):
        if len(moved) == n_moved:
            raise KeyboardInterrupt
        moved.append(move(*paths))

    with (
        monkeypatch.context() as patch,
        contextlib.suppress(KeyboardInterrupt),
        staged_directory(tmp_path / "out") as staging,
    ):
        for name in "abc":
            (staging / name).write_text(name)
        patch.setattr(os, "replace", dying)
    with pytest.raises(OutputError, match="not empty"):
        require_empty(tmp_path / "out")
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == set("abc")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def killed_at(number, function):
    """Call a function in a fork that ends without a word at a change of the file system; return
    whether it came so far.
    """
    child = os.fork()
    if child == 0:
        left = number

        def count(event, arguments):
            nonlocal left
            left -= event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
            if left < 0:
                os._exit(9)

        sys.addaudithook(count)
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("is_mount", [False, True])
def test_a_directory_whose_replacement_was_killed_is_the_old_or_the_new_one(
    tmp_path, monkeypatch, is_mount
):
    monkeypatch.setattr(Path, "is_mount", lambda path: is_mount and path.name == "out")
    out = tmp_path / "top" / "out"
    old, new = {"a": "old", "b": "old", "sub": None}, {"a": "new", "c": "new"}

    def write_old():
        shutil.rmtree(tmp_path / "top", ignore_errors=True)
        (out / "sub").mkdir(parents=True)
        for name in "ab":
            (out / name).write_text("old")

    def replace():
        with staged_directory(out, replace=True) as staging:
            for name in "ac":
                (staging / name).write_text("new")

    def read():
        return {path.name: None if path.is_dir() else path.read_text() for path in out.iterdir()}

    number, states = 0, []
    while write_old() or killed_at(number, replace):
        finish_move(out)
        assert [entry.name for entry in out.parent.iterdir()] == ["out"]
        states.append({k: v for k, v in read().items() if not k.startswith(".partial-")})
        replace()  # as the next start does
        assert read() == new
        assert [entry.name for entry in out.parent.iterdir()] == ["out"]
        number += 1
    assert number >= 6
    first_new = states.index(new)
    assert all(state == old for state in states[:first_new])
    assert all(state == new for state in states[first_new:])


def test_a_failed_replacement_leaves_the_old_directory(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old")
    with (
        pytest.raises(OutputError, match=r"No space left.*The old state was kept"),
        staged_directory(out, replace=True) as staging,
    ):
        (staging / "a").write_text("new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert (out / "a").read_text() == "old"
    with (
        pytest.raises(OutputError, match="found a file, expected a directory"),
        staged_directory(out / "a", replace=True),
    ):
        pytest.fail("the body must not run")


def test_files_that_others_wrote_into_an_output_meanwhile_are_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="not empty"), staged_directory(out) as staging:
        (staging / "a").write_text("a")
        out.mkdir()
        (out / "mine").write_text("mine")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in out.iterdir()] == ["mine"]


def test_an_output_that_holds_files_is_refused_and_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"), staged_directory(out):
        pytest.fail("the body must not run")
    assert (out / "mine.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="not empty"), staged_directory(out / "mine.txt"):
        pytest.fail("the body must not run")


def test_an_empty_output_directory_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    with staged_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("a")
    assert (tmp_path / "out" / "a").exists()


@pytest.mark.parametrize("write", [lambda out: write_text(out, "x"), lambda out: staged(out)])
def test_a_place_below_a_file_is_refused(tmp_path, write):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"file: cannot create this directory \(.*Give another"):
        write(tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


def staged(out: Path) -> None:
    with staged_directory(out):
        pytest.fail("nothing may be written")


def test_the_scratch_directory_of_a_dead_process_is_removed_and_that_of_a_live_one_stays(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, elsewhere, link = tmp_path / "x-dead", tmp_path / "elsewhere", tmp_path / "x-link"
    young = tmp_path / "x-young"
    for made in (dead, elsewhere, young):
        made.mkdir()
        (made / "file").touch()
    link.symlink_to(elsewhere)
    with scratch_directory("x-") as living:
        for old in (dead, living):
            os.utime(old, (0, 0))
        with scratch_directory("x-") as other:
            assert living.is_dir() and other.is_dir() and other != living
            assert not dead.exists() and (young / "file").exists()
            assert (elsewhere / "file").exists()
    assert not living.exists() and not other.exists()
