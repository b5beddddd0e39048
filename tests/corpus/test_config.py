"""The source of a corpus: its fields, its name and its fingerprint."""

import json

import pytest
from pydantic import ValidationError

from optimer_hf.corpus.config import CorpusConfig


def test_a_corpus_has_exactly_one_source(tmp_path):
    with pytest.raises(ValidationError, match="exactly one of 'path'"):
        CorpusConfig()
    with pytest.raises(ValidationError, match="exactly one of 'path'"):
        CorpusConfig(path=tmp_path / "a.jsonl", dataset="org/name")


def test_the_name_of_a_corpus_is_never_a_path(tmp_path):
    assert CorpusConfig(path=tmp_path / "a.jsonl").name == "a.jsonl"
    assert CorpusConfig(dataset="org/name").name == "org/name"


def test_arguments_of_load_dataset_beside_a_path_are_refused(tmp_path):
    with pytest.raises(ValidationError, match="'data_files' goes with 'dataset'"):
        CorpusConfig(path=tmp_path / "a.jsonl", data_files="b.jsonl")


def test_a_changed_text_changes_the_fingerprint_of_its_corpus(tmp_path):
    config = CorpusConfig(path=tmp_path)
    assert config.fingerprint() is None
    (tmp_path / "a.jsonl").write_text("{}")
    before = config.fingerprint()
    (tmp_path / "a.jsonl").write_text("{} ")
    assert None not in (before, config.fingerprint())
    assert before != config.fingerprint()


@pytest.mark.parametrize(
    "fields",
    [
        {"dataset": "./data"},
        {"dataset": "json", "data_files": "./data/deep/*.jsonl"},
        {"dataset": "json", "data_files": {"train": ["./data/deep/a.jsonl"]}},
    ],
)
def test_other_text_in_a_local_data_set_changes_its_fingerprint(tmp_path, monkeypatch, fields):
    monkeypatch.chdir(tmp_path)
    assert CorpusConfig(**fields).fingerprint() is None
    file = tmp_path / "data" / "deep" / "a.jsonl"
    file.parent.mkdir(parents=True)
    digests = set()
    for text in ("x", "y"):
        file.write_text(json.dumps({"text": text}))
        digests.add(CorpusConfig(**fields).fingerprint())
    assert len(digests) == 2 and None not in digests


def test_hidden_files_and_texts_about_a_data_set_do_not_change_its_fingerprint(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jsonl").write_text("{}")
    config = CorpusConfig(dataset=str(tmp_path))
    before = config.fingerprint()
    for name in (".git/index", "deep/.cache/b.jsonl", ".DS_Store", "README.md", "deep/LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert config.fingerprint() == before is not None


def test_a_data_set_on_the_hub_has_no_fingerprint():
    assert CorpusConfig(dataset="org/name", data_files="data/*.parquet").fingerprint() is None
