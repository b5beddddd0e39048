"""placement.py: a model of which parts lie in host memory or on disk computes as a whole one."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM

from optimer_hf.errors import ConfigError
from optimer_hf.models.live import load_model
from optimer_hf.models.placement import (
    Placement,
    devices_of,
    input_device,
    is_only_placed,
    live_state,
)
from optimer_hf.models.plain_head import is_plain_head, plain_weight
from optimer_hf.models.stored import stored_views
from tests.support.tiny import bits, tiny_model

IDS = torch.tensor([[5, 6, 7, 8]])
MAPS = {
    "all on disk": {"": "disk"},
    "one layer on disk": {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    },
    "only layers in memory": {
        "model.embed_tokens": "disk",
        "model.rotary_emb": "cpu",
        "model.layers": "cpu",
        "model.norm": "disk",
        "lm_head": "disk",
    },
}


@pytest.fixture(params=MAPS)
def device_map(request) -> dict[str, int | str]:
    return MAPS[request.param]


def unique(tensors):
    return list({tensor.data_ptr(): tensor for tensor in tensors}.values())


@torch.no_grad()
def test_a_placed_model_holds_and_computes_what_a_whole_one_does(make_base, kind, device_map):
    base = make_base(kind, torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(base.path).eval()
    placed = load_model(base, torch.float32, Placement(device_map)).eval()
    assert any(parameter.device.type == "meta" for parameter in placed.parameters())
    state, expected = live_state(placed), whole.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(bits(state[name]), bits(expected[name])) for name in expected)
    assert torch.equal(placed(IDS).logits, whole(IDS).logits)
    assert input_device(placed) == torch.device("cpu") and devices_of(placed) == [IDS.device]


@torch.no_grad()
def test_what_is_written_to_the_live_state_is_computed_with(make_base, kind, device_map):
    base = make_base(kind, torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(base.path).eval()
    placed = load_model(base, torch.float32, Placement(device_map)).eval()
    for model in (whole, placed):
        for tensor in unique(live_state(model).values()):
            tensor.mul_(1.25)
    assert torch.equal(placed(IDS).logits, whole(IDS).logits)
    assert len(unique(live_state(placed).values())) == len(unique(whole.state_dict().values()))


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
@torch.no_grad()
def test_weights_that_accelerate_keeps_elsewhere_are_found(kind, offload, tmp_path):
    whole, placed = tiny_model(kind).eval(), tiny_model(kind).eval()
    folder = {"offload_dir": tmp_path} if offload is disk_offload else {}
    offload(placed, execution_device=torch.device("cpu"), **folder)
    assert {parameter.device.type for parameter in placed.parameters()} == {"meta"}
    for model in (whole, placed):
        for tensor in unique(live_state(model).values()):
            tensor.add_(0.5)
    assert torch.equal(placed(IDS).logits, whole(IDS).logits)


def test_views_of_a_placed_model_are_those_of_a_whole_one(make_base, kind, device_map):
    base = make_base(kind, torch.float32)
    whole = stored_views(load_model(base, torch.float32))
    placed = stored_views(load_model(base, torch.float32, Placement(device_map)))
    assert list(placed) == list(whole)
    assert all(torch.equal(bits(placed[name]), bits(whole[name])) for name in whole)


def test_a_placed_head_is_plain_and_one_with_other_code_is_not(make_base, kind, device_map):
    model = load_model(make_base(kind, torch.float32), torch.float32, Placement(device_map))
    whole = load_model(make_base(kind, torch.float32), torch.float32)
    assert is_plain_head(model.eval())
    assert torch.equal(plain_weight(model), plain_weight(whole))
    head = model.get_output_embeddings()
    forward = type(head).forward
    head._old_forward = lambda hidden: 2 * forward(head, hidden)
    assert not is_only_placed(head) and plain_weight(model) is None


def test_a_gpu_that_is_not_there_is_an_error_before_anything_is_loaded():
    n_gpus = torch.cuda.device_count()
    message = rf"device_map: found device .*99.*, but this machine has {n_gpus} GPUs"
    for device_map in ({"": 99}, {"": "cuda:99"}, {"model": "cpu", "lm_head": "99"}):
        with pytest.raises(ConfigError, match=message):
            Placement(device_map)
    with pytest.raises(ConfigError, match=message):
        Placement("auto", {"99": "1GiB"})


def test_numbers_of_gpus_that_went_through_json_are_numbers_again(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = Placement({"": "1", "lm_head": "cuda:0"}, {"0": "1GiB", "cpu": "2GiB"}).options("f")
    assert options["device_map"] == {"": 1, "lm_head": 0}
    assert options["max_memory"] == {0: "1GiB", "cpu": "2GiB"}
