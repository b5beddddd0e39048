"""vector.json as it is read."""

import shutil

import pytest

from optimer_hf.errors import ModelError
from optimer_hf.models.layout import weight_digests
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.record import VectorFile, read_record
from tests.support.damage import TEXTS


@pytest.mark.parametrize("text", [*TEXTS, "[]", "{}", "null", '{"format_version": 1e400}'])
def test_a_vector_json_of_another_form_is_refused(tmp_path, text):
    (tmp_path / "vector.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError, match=r"vector\.json: not a vector\.json"):
        read_record(tmp_path)


def test_a_damaged_record_is_refused_by_name(base, tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "v")
    (tmp_path / "v" / "vector.json").write_text(
        '{"format_version": 1, "name": "v"}', encoding="utf-8"
    )
    with pytest.raises(ModelError, match=r"vector\.json: not a vector\.json of format version 1"):
        open_vector("v", str(tmp_path / "v"), base)


def test_a_record_survives_a_round_trip(base, tmp_path):
    record = VectorFile.model_validate(
        {
            "name": "日本語",
            "kind": "delta",
            "base": {"reference": "b", "files": weight_digests(base.path)},
            "norm": 0.1,
            "relative_norm": 0.2,
        }
    )
    record.write(tmp_path / "vector.json")
    assert read_record(tmp_path) == record
    assert read_record(base.path) is None
