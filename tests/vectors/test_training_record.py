"""training.json is read and written in one place; a damaged one is named."""

import json
import math

import pytest

from optimer_hf.errors import ConfigError
from optimer_hf.vectors.record import BaseRecord, VectorFile, read_record
from optimer_hf.vectors.training_record import TRAINING_FILE, RunRecord, read_training
from tests.support.records import RECORD


def test_a_record_is_read_as_it_was_written_and_leaves_out_what_a_run_does_not_have(tmp_path):
    assert read_training(tmp_path) is None
    RECORD.write(tmp_path / TRAINING_FILE)
    assert read_training(tmp_path) == RECORD
    written = json.loads((tmp_path / TRAINING_FILE).read_text())
    assert "parts" not in written["corpus"] and "norms" not in written["training"]
    assert written["training"]["lora"] is None


def test_a_run_that_diverged_has_a_record(tmp_path):
    training = RECORD.training.model_copy(update={"losses": [2.0, math.nan, math.inf]})
    RECORD.model_copy(update={"training": training}).write(tmp_path / TRAINING_FILE)
    record = read_training(tmp_path)
    assert record is not None and math.isnan(record.training.losses[1])
    assert record.training.losses[2] == math.inf


def test_a_vector_repeats_the_corpus_and_the_run(tmp_path):
    training = RECORD.training.model_copy(update={"losses": [2.0, math.nan]})
    record = VectorFile(
        name="ja",
        kind="adapter",
        base=BaseRecord(reference="a/b", files={}),
        norm=1.0,
        relative_norm=0.1,
        corpus=RECORD.corpus,
        training=training,
    )
    record.write(tmp_path / "vector.json")
    again = read_record(tmp_path)
    assert again.corpus == RECORD.corpus and isinstance(again.training, RunRecord)
    assert math.isnan(again.training.losses[1])
    written = json.loads((tmp_path / "vector.json").read_text())
    assert list(written["corpus"]) == ["name", "n_tokens", "n_documents", "sha256"]
    assert written["training"]["losses"][1:] == pytest.approx([math.nan], nan_ok=True)


def test_a_vector_by_another_program_may_say_less_of_its_training_and_more(tmp_path):
    fields = {
        "name": "ja",
        "kind": "adapter",
        "base": {"reference": "a/b", "files": {}},
        "norm": 1.0,
        "relative_norm": 0.1,
        "corpus": RECORD.corpus.model_dump() | {"language": "ja"},
        "training": {"n_tokens": 64, "hardware": {"gpus": 8}},
    }
    (tmp_path / "vector.json").write_text(json.dumps(fields))
    record = read_record(tmp_path)
    assert (record.corpus.name, record.corpus.sha256) == ("ja.jsonl", "s")
    assert (record.training.n_tokens, record.training.seconds) == (64, None)
    kept = record.model_dump(mode="json")
    assert kept["corpus"]["language"] == "ja" and kept["training"]["hardware"] == {"gpus": 8}


def test_a_record_without_its_text_is_named(tmp_path):
    (tmp_path / TRAINING_FILE).write_text(
        json.dumps(RECORD.model_dump(mode="json") | {"corpus": {}})
    )
    with pytest.raises(ConfigError, match=r"training\.json: field 'corpus\.sha256' is missing"):
        read_training(tmp_path)
