"""vector.json as it is read."""

import pytest

from optimer_hf.errors import ModelError
from optimer_hf.vectors.record import read_record
from tests.support.damage import TEXTS


@pytest.mark.parametrize("text", [*TEXTS, "[]", "{}", "null", '{"format_version": 1e400}'])
def test_a_vector_json_of_another_form_is_refused(tmp_path, text):
    (tmp_path / "vector.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError, match=r"vector\.json: not a vector\.json"):
        read_record(tmp_path)
