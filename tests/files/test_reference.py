"""References to models and files, and paths that move with the file that names them."""

import json
from pathlib import Path

import pytest

from optimer_hf.files.model import VersionedFile
from optimer_hf.files.reference import (
    LocalPath,
    LocalText,
    Reference,
    ReferenceText,
    absolute_reference,
    relative_reference,
)
from tests.support.files import Example


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


def test_links_are_followed_but_one_to_a_file_without_an_ending_keeps_its_name(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "0123").touch()
    (tmp_path / "newest").symlink_to("model")
    (tmp_path / "newest" / "model.gguf").symlink_to("0123")
    root = tmp_path.resolve()
    assert absolute_reference("./newest", tmp_path) == str(root / "model")
    assert absolute_reference("newest/model.gguf", tmp_path) == str(root / "model" / "model.gguf")
    (tmp_path / "model" / "v3.gguf").touch()
    (tmp_path / "best.gguf").symlink_to("newest/v3.gguf")
    assert absolute_reference("./best.gguf", tmp_path) == str(root / "model" / "v3.gguf")
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    assert absolute_reference("./loop.gguf", tmp_path) == str(root / "loop.gguf")


def test_an_unknown_home_and_a_name_that_is_too_long_are_names_like_any_other(tmp_path):
    assert absolute_reference("~nobody-at-all/m", tmp_path) == str(tmp_path / "~nobody-at-all/m")
    assert Reference("~nobody-at-all/m").path is None
    assert absolute_reference(f"org/{'x' * 300}", tmp_path) == f"org/{'x' * 300}"
    assert absolute_reference("org/na\0me", tmp_path) == "org/na\0me"
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
