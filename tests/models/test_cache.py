"""cache.py: what the cache holds, what killed processes leave in it, and how it is emptied."""

import os
import shutil
import time
from pathlib import Path

import pytest

from optimer_hf.files.locks import locking
from optimer_hf.files.paths import hidden_name
from optimer_hf.models.cache import list_cache, remove_cached
from optimer_hf.models.gguf_record import CONVERSION_FILE
from optimer_hf.models.union import UNION_FILE
from tests.support.cli import optimer

DAY = 86_400
MARKS = {"union": UNION_FILE, "converted": CONVERSION_FILE}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache with two copies of a base, unused for 1 and 40 days, and a converted file."""
    monkeypatch.setenv("OPTIMER_CACHE", str(tmp_path))
    for name, n_bytes, days in (("union/a", 300, 1), ("union/b", 500, 40), ("converted/c", 400, 2)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * n_bytes)
        (tmp_path / name / MARKS[name.partition("/")[0]]).touch()
        (tmp_path / f"{name.replace('/', '/.')}.lock").touch()
        os.utime(tmp_path / name, (time.time() - days * DAY,) * 2)
    return tmp_path


def test_the_largest_comes_first_and_its_kind_size_and_last_use_are_known(cache):
    entries = list_cache()
    assert [(e.path.name, e.kind, e.n_bytes) for e in entries] == [
        ("b", "union", 500),
        ("c", "converted", 400),
        ("a", "union", 300),
    ]
    assert [round((time.time() - e.used) / DAY) for e in entries] == [40, 2, 1]
    assert [e.path.name for e in list_cache(unused_days=30)] == ["b"]


def test_what_is_removed_is_gone_and_what_is_being_written_stays(cache):
    by_name = {each.path.name: each for each in list_cache()}
    with locking(cache / "union" / ".a.lock"):
        assert not remove_cached(by_name["a"])
    assert remove_cached(by_name["b"])
    assert sorted(path.name for path in (cache / "union").iterdir()) == [".a.lock", "a"]


def test_what_a_killed_process_left_is_swept(cache):
    for name in (hidden_name("new", "0123abcd-", before=True), hidden_name("new", ".lock")):
        left = cache / "union" / name
        left.touch() if name.endswith(".lock") else (left / "part").mkdir(parents=True)
    assert len(list_cache()) == 3
    assert {path.name.lstrip(".") for path in (cache / "union").iterdir()} == {
        *("a", "b", "a.lock", "b.lock")
    }


@pytest.mark.parametrize(
    "name",
    [
        *("union/mine/notes.txt", "converted/mine/union.json", "gguf/mine/tiny.gguf"),
        *("mine/a/union.json", "gguf/llama.gguf", "union/union.json"),
    ],
)
def test_what_others_keep_in_the_folder_of_the_cache_stays(cache, name):
    (cache / name).parent.mkdir(parents=True, exist_ok=True)
    (cache / name).write_text("mine")
    left = cache / "mine" / hidden_name("x", "0123abcd-", before=True)
    left.mkdir(parents=True)
    optimer("cache", "--remove")
    assert (cache / name).read_text() == "mine" and left.exists()
    assert not any((cache / each).exists() for each in ("union/a", "union/b", "converted/c"))


@pytest.mark.parametrize("vanished", ["union/b", "union"])
def test_what_another_process_has_removed_meanwhile_is_gone(cache, vanished):
    largest = list_cache()[0]
    shutil.rmtree(cache / vanished)
    assert remove_cached(largest)
    assert len(list_cache()) == (2 if vanished == "union/b" else 1)


def test_the_command_lists_and_removes(cache):
    listed = optimer("cache").output
    assert "| b    | union" in listed or ("b" in listed and "0.00 GB in 3 directories" in listed)
    removed = optimer("cache", "--remove", "--unused", 30).output
    assert f"{cache}/union/b: removed" in removed and "union/a" not in removed
    assert not (cache / "union" / "b").exists() and (cache / "union" / "a").exists()
    assert f"{cache}: nothing unused for 30 days" in optimer("cache", "--unused", 30).output
