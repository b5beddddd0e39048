"""splitting.py: one vector with a weight for each group of its tensors, against sums in float64."""

import pytest
import torch

from optimer_hf.errors import ModelError
from optimer_hf.merging.gradients import Derivatives
from optimer_hf.merging.resident import ResidentModel
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.groups import Groups, weights_of_parts
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.splitting import refuse_unknown_groups, split_pool
from tests.support.merges import assert_same_bits, tensors_in
from tests.support.tiny import VOCABULARY, whole_delta


def numbered(kind: str, n: int) -> Groups:
    return Groups.of_keys(f"{kind}.{number + 1}" for number in range(n))


BY_NAME = Groups.of_keys(["self_attn", "mlp", "else"])
BY_LAYER = numbered("layers", 2)
BY_RUN = Groups.of_keys(["layers.0:1", "layers.1:2"])
BY_GRADIENT = numbered("gradient", 2)
WEIGHTS = {
    BY_NAME: {"math.self_attn": 0.3, "math.mlp": -0.8, "math.else": 1.1},
    BY_LAYER: {"math.layers.1": 0.3, "math.layers.2": -0.8},
    BY_RUN: {"math.layers.0:1": 0.3, "math.layers.1:2": -0.8},
    BY_GRADIENT: {"math.gradient.1": 0.3, "math.gradient.2": -0.8},
}
KINDS = ["checkpoint", "adapter", "delta", "int8"]


def weight_of(groups: Groups, name: str) -> float:
    """The weight of a tensor, told from its name without the code under test."""
    weights = list(WEIGHTS[groups].values())
    if groups is not BY_NAME:
        return weights[".layers.1." in name]
    return weights[0] if "self_attn" in name else weights[1] if "mlp" in name else weights[2]


@pytest.fixture(scope="module")
def make_pool(make_base, make_tuned, make_adapter, tmp_path_factory):
    """Return a function kind -> base and vectors `math`, to split, and `ja`."""

    def pool(kind: str):
        base = make_base("llama", torch.float32)
        tuned = make_tuned(base, "llama", 0, torch.float32)
        path = tuned
        if kind == "adapter":
            path = make_adapter(base, 0, target_modules=["q_proj", "up_proj"])
        elif kind != "checkpoint":
            path = tmp_path_factory.mktemp("deltas") / kind
            stored = "int8" if kind == "int8" else "float32"
            extract(open_vector("x", str(tuned), base), base, path, dtype=stored)
        other = make_tuned(base, "llama", 1, torch.float32)
        return base, [open_vector("math", str(path), base), open_vector("ja", str(other), base)]

    return pool


def groups_for(groups: Groups, kind: str) -> Groups:
    """Groups without `else` for a LoRA that moves nothing else."""
    return Groups.of_keys(["self_attn", "mlp"]) if kind == "adapter" and groups.names else groups


@pytest.mark.parametrize("groups", WEIGHTS, ids=["names", "layers", "runs", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_with_a_weight_for_each_group_is_the_sum_in_float64(
    make_pool, kind, groups, tmp_path
):
    base, (math, ja) = make_pool(kind)
    pool = split_pool([math, ja], {"math": groups_for(groups, kind)}, base)
    assert {vector.kind for vector in pool} == {math.kind, ja.kind}
    own = weights_of_parts(WEIGHTS[groups], {"math": groups}, 2)
    weights = {vector.name: own.get(vector.name, 0.5) for vector in pool}
    assert len(weights) == len(pool) > 2
    write_merged(base, pool, weights, tmp_path / "merged")
    checkpoint, merged = Checkpoint(base.path), tensors_in(tmp_path / "merged")
    for name in merged:
        exact = checkpoint.read(name).double()
        for vector, weight in ((math, weight_of(groups, name)), (ja, 0.5)):
            if name in vector.names:
                exact = exact + weight * whole_delta(vector, base, name).double()
        torch.testing.assert_close(merged[name].double(), exact, rtol=1e-5, atol=1e-6)

    resident = ResidentModel(base, pool, dtype="float32")
    resident.set_weights(weights)
    parameters = {name: resident.parameters[name].detach() for name in resident.parameters}
    assert_same_bits(parameters, {name: merged[name] for name in parameters})


@pytest.mark.parametrize("kind", KINDS)
def test_groups_with_one_weight_are_the_whole_vector_bit_for_bit(make_pool, kind, tmp_path):
    base, (math, ja) = make_pool(kind)
    pool = split_pool([math, ja], {"math": groups_for(BY_NAME, kind)}, base)
    weights = {vector.name: 0.7 if "." in vector.name else -0.4 for vector in pool}
    assert sum(vector.n_bytes for vector in pool) == math.n_bytes + ja.n_bytes
    write_merged(base, pool, weights, tmp_path / "split")
    write_merged(base, [math, ja], {"math": 0.7, "ja": -0.4}, tmp_path / "whole")
    assert_same_bits(tensors_in(tmp_path / "split"), tensors_in(tmp_path / "whole"))


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_groups_sum_to_that_of_the_vector_and_match_differences(make_pool, kind):
    base, (math, _) = make_pool(kind)
    pool = split_pool([math], {"math": groups_for(BY_NAME, kind)}, base)
    resident = ResidentModel(base, pool, dtype="float32")
    ids = torch.arange(3, VOCABULARY).view(4, -1)

    def loss_at(weights: dict[str, float]) -> torch.Tensor:
        resident.set_weights(weights)
        return resident.model(input_ids=ids, labels=ids).loss

    derivatives, at = Derivatives(resident), {vector.name: 0.5 for vector in pool}
    with derivatives.active():
        loss_at(at).backward()
        slopes = dict(zip(derivatives.names, derivatives.take().tolist(), strict=True))
    whole = ResidentModel(base, [math], dtype="float32")
    total = Derivatives(whole)
    whole.set_weights({"math": 0.5})
    with total.active():
        whole.model(input_ids=ids, labels=ids).loss.backward()
        assert sum(slopes.values()) == pytest.approx(total.take().item(), rel=1e-3, abs=1e-6)
    for name in at:
        with torch.no_grad():
            up, down = (loss_at(at | {name: 0.5 + step}).item() for step in (0.02, -0.02))
        assert slopes[name] == pytest.approx((up - down) / 0.04, rel=0.05, abs=2e-4)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (Groups.of_keys(["atn", "else"]), r"no tensor has 'atn' in its name.*Parts.*self_attn"),
        (
            Groups.of_keys(["mlp", "up_proj", "else"]),
            r"'up_proj' has no tensors, as 'mlp' before it",
        ),
        (Groups.of_keys(["self_attn", "mlp"]), r"no group takes 'lm_head.weight'.*'else'"),
        (
            Groups.of_keys(["model", "lm_head", "else"]),
            r"'else' has no tensors, as the other groups",
        ),
        (numbered("layers", 9), r"found layers: 9, but the base has 2 layers"),
        (numbered("gradient", 9), r"found gradient: 9, but the base has 2 layers"),
        (
            Groups.of_keys(["layers.0:1", "layers.1:3"]),
            r"found layers: layers.1:3, but the base has 2 layers",
        ),
        (Groups.of_keys(["layers.0:1"]), r"the groups end at layer 1, but the base has 2 layers"),
    ],
)
def test_groups_that_do_not_fit_are_refused(make_pool, groups, message):
    base, (math, _) = make_pool("checkpoint")
    with pytest.raises(ModelError, match=rf"vectors\.math\.by: {message}"):
        split_pool([math], {"math": groups}, base)


def test_groups_of_a_vector_to_be_trained_are_checked_against_the_base(make_pool):
    base, _ = make_pool("checkpoint")
    refuse_unknown_groups("math", Groups.of_keys(["self_attn", "mlp"]), base)
    for groups in (Groups.of_keys(["atn", "else"]), numbered("layers", 9)):
        with pytest.raises(ModelError, match=r"vectors\.math\.by"):
            refuse_unknown_groups("math", groups, base)
