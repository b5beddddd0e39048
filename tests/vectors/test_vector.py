"""The delta of each kind of vector equals tuned minus base."""

import torch
from safetensors.torch import load_file

from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.vector import CheckpointVector
from tests.support.tiny import delta_rows, whole_delta


def test_a_checkpoint_delta_is_tuned_minus_base_in_float32(base, tuned):
    vector = open_vector("v", str(tuned), base)
    assert isinstance(vector, CheckpointVector)
    before, after = (
        load_file(base.path / "model.safetensors"),
        load_file(tuned / "model.safetensors"),
    )
    assert vector.names == before.keys()
    for name in before:
        assert torch.equal(
            whole_delta(vector, base, name), after[name].float() - before[name].float()
        )


def test_rows_of_a_delta_are_rows_of_the_whole_for_every_kind(base, tuned, adapter, tmp_path):
    extract(open_vector("v", str(tuned), base), base, tmp_path / "delta")
    name, rows = "model.layers.0.mlp.up_proj.weight", slice(5, 17)
    for source in (tuned, adapter, tmp_path / "delta"):
        vector = open_vector("v", str(source), base)
        torch.testing.assert_close(
            delta_rows(vector, base, name, rows),
            whole_delta(vector, base, name)[rows],
            rtol=1e-6,
            atol=1e-9,
        )
