"""The source of a corpus: its fields, its name and its fingerprint."""

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
