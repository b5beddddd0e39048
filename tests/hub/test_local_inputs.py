"""local_inputs.py: what an adapter says about its base once it is on the Hub."""

import json

import pytest
from peft import PeftConfig

from optimer_hf.hub.local_inputs import adapter_config_naming

OLD = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("revision", [OLD, "main", None])
def test_an_adapter_asks_for_no_commit_that_its_moved_base_lacks(
    make_base, make_adapter, tmp_path, revision
):
    adapter = make_adapter(make_base("llama"), 0)
    file = adapter / "adapter_config.json"
    before = json.loads(file.read_text()) | {
        "base_model_name_or_path": "google/x",
        "revision": revision,
    }
    file.write_text(json.dumps(before))
    moved = adapter_config_naming("you/merge-base", adapter, is_base_local=True)
    assert moved is not None
    (tmp_path / "adapter_config.json").write_bytes(moved)
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert (config.base_model_name_or_path, config.revision) == ("you/merge-base", None)
    rest = {"base_model_name_or_path": "google/x", "revision": revision}
    assert json.loads(moved) | rest == before
    assert adapter_config_naming("google/x", adapter, is_base_local=False) is None
