"""Records, references and writes: errors name the mistake, and nothing half-written stays."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import pytest
import yaml
from filelock import FileLock
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field

from optimer_hf.errors import ConfigError, OutputError
from optimer_hf.files.digest import differences, digest, fingerprint, sha256_file
from optimer_hf.files.locks import hold_place, remove_dead_locks
from optimer_hf.files.model import FileModel, VersionedFile
from optimer_hf.files.reading import read_yaml, yaml_text
from optimer_hf.files.reference import (
    LocalPath,
    LocalText,
    Reference,
    ReferenceText,
    absolute_reference,
    relative_reference,
)
from optimer_hf.files.staging import (
    finish_move,
    require_empty,
    scratch_directory,
    staged_directory,
    write_text,
)


class Part(FileModel):
    source: ReferenceText
    share: float = Field(default=1.0, ge=0)


class Example(VersionedFile):
    base_model: ReferenceText
    n_trials: int = 3
    corpus: LocalPath | None = None
    parts: dict[str, Part] = Field(default_factory=dict)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "example.yaml"
    path.write_text(text, encoding="utf-8")
    return path


WRITABLE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


def mistakes(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Example.read(written(tmp_path, text))
    return str(caught.value)


def test_unknown_key_is_refused_with_the_closest_known_one(tmp_path):
    message = mistakes(tmp_path, "base_modell: a/b\nbase_model: a/b\n")
    assert (
        "example.yaml" in message
        and "'base_modell'" in message
        and "Did you mean 'base_model'?" in message
    )


def test_unknown_key_inside_a_part_names_the_whole_field(tmp_path):
    message = mistakes(tmp_path, "base_model: a/b\nparts: {x: {source: a/b, shar: 2}}\n")
    assert "'parts.x.shar'" in message and "Did you mean 'share'?" in message


def test_unknown_key_that_resembles_none_lists_what_is_known(tmp_path):
    assert "Known: base_model, corpus" in mistakes(tmp_path, "base_model: a/b\nqqqqqq: 1\n")


def test_missing_field_is_named(tmp_path):
    assert mistakes(tmp_path, "n_trials: 3\n").endswith("field 'base_model' is missing.")


def test_all_mistakes_are_listed_at_once_each_with_the_file(tmp_path):
    lines = mistakes(
        tmp_path, "n_trials: many\nparts: {x: {source: a/b, share: -1}}\nwhat: 1\n"
    ).splitlines()
    assert len(lines) == 4
    assert all(re.search(r"example\.yaml(:\d+)?: ", line) for line in lines)
    assert any("n_trials: found 'many'" in line for line in lines)
    assert any("parts.x.share: found -1" in line for line in lines)


def test_long_wrong_values_are_shortened_in_the_message(tmp_path):
    line = mistakes(tmp_path, f"base_model: a/b\nn_trials: {'x' * 500}\n")
    assert "..." in line and len(line) < 400


def test_infinite_numbers_are_refused(tmp_path):
    assert "share" in mistakes(
        tmp_path, "base_model: a/b\nparts: {x: {source: a/b, share: .inf}}\n"
    )


class Whole(VersionedFile):
    parts: dict[str, Part] = Field(default_factory=dict)
    limits: list[int] = []
    kind: Literal["fast", "slow"] = "fast"

    def mistakes(self):
        yield from ((("parts", name), "its name has a blank") for name in self.parts if " " in name)
        if len(self.limits) < 2:
            yield ("limits",), "give at least two"


def test_mistakes_between_fields_are_told_at_once_each_with_its_line(tmp_path):
    path = written(tmp_path, "parts:\n  a b: {source: a/b}\n  c d: {source: a/b}\nlimits: [1]\n")
    with pytest.raises(ConfigError) as caught:
        Whole.read(path)
    assert str(caught.value).splitlines() == [
        f"{path}:2: parts.a b: its name has a blank.",
        f"{path}:3: parts.c d: its name has a blank.",
        f"{path}:4: limits: give at least two.",
    ]


def test_a_choice_that_is_none_gets_the_closest_one(tmp_path):
    with pytest.raises(ConfigError, match=r":1: kind: found 'fsat'\..*Did you mean 'fast'\?"):
        Whole.read(written(tmp_path, "kind: fsat\nlimits: [1, 2]\n"))


def test_an_unknown_field_is_compared_with_those_of_its_place_only(tmp_path):
    message = mistakes(tmp_path, "base_model: a/b\nsource: 1\nparts: {x: {source: a/b, corpus: 1}}")
    assert "unknown field 'source'. Known: base_model, corpus" in message
    assert "unknown field 'parts.x.corpus'. Known: share, source." in message


def test_exponents_without_a_point_are_numbers(tmp_path):
    path = written(tmp_path, "a: 2e-4\nb: -1E+3\nc: 1.e2\nd: 2e\ne: '2e-4'\nf: 12e4f6\n")
    assert list(read_yaml(path).values()) == [2e-4, -1000.0, 100.0, "2e", "2e-4", "12e4f6"]


def test_a_later_format_version_is_refused(tmp_path):
    assert "format_version: found 2" in mistakes(tmp_path, "format_version: 2\nbase_model: a/b\n")


def test_duplicate_key_is_refused_with_its_line(tmp_path):
    message = mistakes(
        tmp_path, "base_model: a/b\nparts:\n  x: {source: a/b}\n  x: {source: c/d}\n"
    )
    assert "example.yaml:4: not valid YAML. key 'x' is given twice." in message


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n",
        "a: &a {x: 1, y: 2}\nb: {x: 3, <<: *a}\n",
        "a: {x: 1, y: 2}\nb: {<<: [{x: 3}, {x: 4, y: 2}]}\n",
        "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  <<: {x: 3}\n",
        "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 2}\nd: [{<<: *b}, {<<: *b}]\n",
    ],
)
def test_merge_keys_are_read_as_pyyaml_reads_them(tmp_path, text):
    found = read_yaml(written(tmp_path, text))
    assert found == yaml.safe_load(text) and found["b"] == {"x": 3, "y": 2}


def test_a_duplicate_key_beside_a_merge_key_is_refused(tmp_path):
    for text in ("a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}\n", "b: {<<: {y: 1, y: 2}}\n"):
        with pytest.raises(ConfigError, match="key 'y' is given twice"):
            read_yaml(written(tmp_path, text))


def test_invalid_yaml_is_refused_with_its_line(tmp_path):
    message = mistakes(tmp_path, "base_model: a/b\nparts: [1, 2\n")
    assert "example.yaml:3: not valid YAML" in message and "expected ',' or ']'" in message


@pytest.mark.parametrize(
    ("text", "found"), [("", "an empty file"), ("- 1\n", "a list"), ("hello\n", "a str")]
)
def test_a_file_that_holds_no_mapping_is_refused(tmp_path, text, found):
    with pytest.raises(ConfigError, match=f"found {found}, expected a mapping"):
        read_yaml(written(tmp_path, text))


def test_a_directory_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="found a directory, expected a file"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b": }', r"example\.json:2: not valid JSON\. Expecting value"),
        ('{"a": 1, "a": 2}', r"example\.json: not valid JSON\. key 'a' is given twice"),
        ("[" * 10**5, r"example\.json: is nested too deeply"),
    ],
)
def test_invalid_json_is_refused(tmp_path, text, message):
    (tmp_path / "example.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "example.json")


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        read_yaml(tmp_path / "binary.yaml")


def test_a_written_file_reads_back_equal(tmp_path):
    example = Example(base_model="a/b", parts={"é": Part(source="hf://c/d@main", share=0.1)})
    example.write(tmp_path / "deep" / "example.json")
    assert Example.read(tmp_path / "deep" / "example.json") == example
    assert "é" in (tmp_path / "deep" / "example.json").read_text(encoding="utf-8")


# -- references ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["org/name", "org/name@abc", "hf://org/name@main", "pypi:some-package"]
)
def test_references_to_elsewhere_stay_as_they_are(tmp_path, text):
    assert absolute_reference(text, tmp_path) == text


@pytest.mark.parametrize("text", ["./model", "../model", "model", "a/b/c", "."])
def test_references_that_look_local_become_absolute_from_the_folder(tmp_path, text):
    assert absolute_reference(text, tmp_path) == str((tmp_path / text).resolve())


def test_org_and_name_is_a_local_path_only_when_it_exists(tmp_path):
    assert absolute_reference("vectors/ja", tmp_path) == "vectors/ja"
    (tmp_path / "vectors" / "ja").mkdir(parents=True)
    assert absolute_reference("vectors/ja", tmp_path) == str((tmp_path / "vectors/ja").resolve())


def test_a_home_that_nobody_has_and_a_name_that_is_too_long_are_names_like_any_other(tmp_path):
    assert absolute_reference("~nobody-at-all/m", tmp_path) == str(tmp_path / "~nobody-at-all/m")
    assert Reference("~nobody-at-all/m").path is None
    assert absolute_reference(f"org/{'x' * 300}", tmp_path) == f"org/{'x' * 300}"
    example = Example(base_model="a/b", corpus="~nobody-at-all/x")
    assert example.corpus == Path("~nobody-at-all/x").resolve()


def test_home_and_absolute_references_do_not_depend_on_the_folder(tmp_path):
    assert absolute_reference("~/model", tmp_path) == str((Path.home() / "model").resolve())
    assert absolute_reference(str(tmp_path / "m"), Path("elsewhere")) == str(
        (tmp_path / "m").resolve()
    )


def test_relative_paths_are_relative_to_the_file_not_to_the_working_directory(
    tmp_path, monkeypatch
):
    (tmp_path / "sub").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    path = tmp_path / "sub" / "example.yaml"
    path.write_text(
        "base_model: ./base\ncorpus: data/x.jsonl\nparts: {x: {source: ../v}}\n", encoding="utf-8"
    )
    for given_path in (path, Path("..") / "sub" / "example.yaml"):
        example = Example.read(given_path)
        assert example.base_model == str(tmp_path.resolve() / "sub" / "base")
        assert example.corpus == tmp_path.resolve() / "sub" / "data" / "x.jsonl"
        assert example.parts["x"].source == str(tmp_path.resolve() / "v")


def test_reference_splits_repository_and_revision():
    assert Reference("hf://org/name@abc").repo == ("org/name", "abc")
    assert Reference("org/name").repo == ("org/name", None)
    assert Reference("pypi:thing").package == "thing" and Reference("org/name").package is None
    assert Reference("org/name").path is None


# -- writing ---------------------------------------------------------------------------------------


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


def test_what_is_staged_is_on_the_disk_before_it_is_moved(tmp_path, monkeypatch):
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
def test_a_directory_whose_filling_was_killed_is_whole_at_the_next_look(
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

    def found():
        return {path.name: None if path.is_dir() else path.read_text() for path in out.iterdir()}

    number, states = 0, []
    while write_old() or killed_at(number, replace):
        finish_move(out)
        assert [entry.name for entry in out.parent.iterdir()] == ["out"]
        states.append({k: v for k, v in found().items() if not k.startswith(".partial-")})
        replace()  # as the next start does
        assert found() == new
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


def test_what_was_written_into_an_output_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="not empty"), staged_directory(out) as staging:
        (staging / "a").write_text("a")
        out.mkdir()
        (out / "mine").write_text("mine")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in out.iterdir()] == ["mine"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch, number):
    def refuse(lock, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    (tmp_path / ".partial-0a1b2c3d-out").mkdir()  # of a process that may be alive
    with staged_directory(tmp_path / "out") as staging:
        write_text(staging / "a", "a")
    assert (tmp_path / "out" / "a").read_text() == "a\n"
    assert (tmp_path / ".partial-0a1b2c3d-out").exists()


def test_an_output_that_holds_files_is_refused_and_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"), staged_directory(out):
        pytest.fail("the body must not run")
    assert (out / "mine.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="not empty"), staged_directory(out / "mine.txt"):
        pytest.fail("the body must not run")


def test_an_empty_output_directory_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with staged_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("a")
    assert (tmp_path / "out" / "a").exists()


# -- digests ---------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=4))
def test_digest_does_not_depend_on_the_order_of_keys(value):
    assert digest(value) == digest(dict(reversed(value.items())))


@given(VALUES, VALUES)
def test_digests_are_equal_only_for_equal_json(a, b):
    assert (digest(a) == digest(b)) == (
        json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    )


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert (
        sha256_file(tmp_path / "f")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


class Named(VersionedFile):
    """Whatever may name a file."""

    path: LocalPath
    reference: ReferenceText
    text: LocalText
    prompt: str


def test_paths_are_written_relative_to_the_file_and_read_from_there(tmp_path):
    (tmp_path / "one" / "study").mkdir(parents=True)
    file = tmp_path / "one" / "study" / "named.json"
    paths = {"path": tmp_path / "one" / "t.jsonl", "reference": str(tmp_path / "one" / "v")}
    record = Named(**paths, text=str(file.parent / "x" / "*.txt"), prompt="/no_think")
    record.write(file)
    assert json.loads(file.read_text()) == {
        "format_version": 1,
        "path": "../t.jsonl",
        "reference": "../v",
        "text": "./x/*.txt",
        "prompt": "/no_think",
    }
    assert Named.read(file) == record
    (tmp_path / "one").rename(tmp_path / "two")
    moved = Named.read(tmp_path / "two" / "study" / "named.json")
    assert moved.path == tmp_path / "two" / "t.jsonl"
    assert moved.reference == str(tmp_path / "two" / "v")
    assert moved.text == str(tmp_path / "two" / "study" / "x" / "*.txt")


@pytest.mark.parametrize("text", ["org/name", "hf://org/name@main", "pypi:model"])
def test_references_to_elsewhere_are_written_as_they_are(tmp_path, text):
    assert relative_reference(absolute_reference(text, tmp_path), tmp_path) == text


def test_mistakes_of_a_file_come_all_at_once_with_their_lines(tmp_path: Path):
    from optimer_hf.study.config import StudyConfig

    path = tmp_path / "study.yaml"
    path.write_text(
        "base_model: org/base\n"
        "vectors:\n"
        "  a: {source: org/a}\n"
        "  b:\n"
        "    sorce: org/b\n"
        "    bounds: [0, x]\n"
        "objective:\n"
        "  terms:\n"
        "    - task: piqa\n"
        "      wieght: 2\n"
    )
    with pytest.raises(ConfigError) as error:
        StudyConfig.read(path)
    lines = str(error.value).splitlines()
    assert {line.removeprefix(f"{path}:").split(":")[0] for line in lines} == {"5", "6", "10"}
    assert any("Did you mean 'weight'?" in line for line in lines)
    assert all(line.startswith(f"{path}:") for line in lines)


@pytest.mark.parametrize("write", [lambda out: write_text(out, "x"), lambda out: staged(out)])
def test_a_place_under_a_file_is_refused(tmp_path, write):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"file: cannot create this directory \(.*Give another"):
        write(tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


def staged(out: Path) -> None:
    with staged_directory(out):
        pytest.fail("nothing may be written")


@given(
    st.dictionaries(
        st.from_regex(r"[a-z0-9.+-]{1,8}", fullmatch=True),
        st.from_regex(r"[0-9.eE+-]{1,8}", fullmatch=True) | WRITABLE | st.floats(allow_nan=False),
    )
)
@example({"1e6": "2e-4", "3e5-model": "1e3 tokens"})
@example({"0": "\x85", "1": "a\u2028b\u2029", "2": "a\r\nb\n\n", "3": "\ufeffa"})
def test_what_is_written_as_yaml_is_read_back_equal(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("yaml") / "data.yaml"
    write_text(file, yaml_text(data))
    assert read_yaml(file) == data


def test_differences_name_every_field_that_differs_and_both_values():
    found = {"a": 1, "b": {"c": [1, 2], "d": [1]}, "e": None}
    expected = {"a": 1, "b": {"c": [1, 3], "d": [1, 2]}, "f": 2}
    assert differences(found, expected) == [
        "b.c.1: found 2, expected 3",
        "b.d: found [1], expected [1, 2]",
        "f: found None, expected 2",
    ]
    assert differences(found, found) == []


@pytest.mark.parametrize("n_bytes", [0, 1, 100_000, 5 * 2**20])
def test_a_fingerprint_tells_versions_of_a_file_apart(tmp_path, n_bytes):
    content = random.Random(0).randbytes(n_bytes)
    (tmp_path / "f").write_bytes(content)
    (tmp_path / "g").write_bytes(content)
    found = fingerprint(tmp_path / "f")
    assert found == fingerprint(tmp_path / "g")
    for other in (content + b"x", random.Random(1).randbytes(n_bytes), content[:-1]):
        if other != content:
            (tmp_path / "g").write_bytes(other)
            assert found != fingerprint(tmp_path / "g")


def test_scratch_of_a_dead_process_is_removed_and_that_of_a_living_one_stays(tmp_path, monkeypatch):
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
