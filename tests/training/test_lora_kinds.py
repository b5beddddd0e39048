"""Kinds of LoRA: what `train` takes is what `open_vector` opens, and it refuses the rest first."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.errors import ConfigError, OptimerError
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.training import run as run_module
from optimer_hf.training.checks import check_config
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.run import prepare, train
from optimer_hf.vectors.lora_config import FIELDS, HANDLED, HARMLESS
from optimer_hf.vectors.opening import open_vector
from tests.support.tiny import tiny_model, whole_delta

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ONE_STEP = {"learning_rate": 0.1, "warmup_steps": 0, "bf16": False, "save_strategy": "no"}
HANGING = r"(([a-z._0-9])+)+!"


@pytest.fixture(scope="module")
def biased(save_model) -> ResolvedModel:
    """A Llama, untied, whose linear layers have biases."""
    config = tiny_model("llama").config
    config.attention_bias = config.mlp_bias = True
    torch.manual_seed(0)
    return ResolvedModel(save_model(LlamaForCausalLM(config), "biased"), "biased")


@pytest.fixture
def make_config(make_base, corpus_dir):
    """Return a function LoRA options -> TrainConfig of one float32 step."""

    def config(base: ResolvedModel | None = None, trainer=ONE_STEP, **lora) -> TrainConfig:
        return TrainConfig(
            name="aaa",
            base_model=str((base or make_base("llama", torch.float32)).path),
            corpus=CorpusConfig(path=corpus_dir / "aaa.train.jsonl"),
            block_size=32,
            max_tokens=32,
            lora={"r": 4, "lora_alpha": 8, "target_modules": ALL} | lora,
            trainer=trainer,
        )

    return config


ACCEPTED = {
    "plain": {},
    "all linear": {"target_modules": "all-linear", "use_rslora": True},
    "a pattern": {"target_modules": r".*\.0\..*(q|v)_proj", "exclude_modules": r".*v_proj"},
    "patterns of ranks": {"rank_pattern": {r".*\.0\..*[qv]_proj": 2}, "lora_dropout": 0.1},
    "keys whose order counts": {
        "alpha_pattern": {"up_proj": 3, "0.mlp.up_proj": 90, "^model.layers.1.mlp.down_proj": 5}
    },
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "biases of the layers": {"bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "biases of B": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "the wrong way round": {"fan_in_fan_out": True},
    "no task": {"task_type": None},
}


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.arange(3, 35).unsqueeze(0)
        return type(model).forward(model.eval(), input_ids=ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore::UserWarning")
@pytest.mark.parametrize("lora", ACCEPTED.values(), ids=ACCEPTED)
def test_the_vector_of_an_accepted_lora_is_what_was_trained(
    lora, biased, make_config, tmp_path, monkeypatch
):
    trained, save = [], run_module._save

    def saved(config, base, packed, trainer, out, spent):
        trained.append(logits_of(trainer.model.get_base_model()))
        save(config, base, packed, trainer, out, spent)

    monkeypatch.setattr(run_module, "_save", saved)
    out = train(make_config(biased, **lora), tmp_path / "out")
    vector = open_vector("aaa", str(out), biased)
    model = AutoModelForCausalLM.from_pretrained(biased.path, dtype=torch.float32)
    stock, named = logits_of(model), dict(model.named_parameters())
    with torch.no_grad():
        for name in vector.names:
            named[name].add_(whole_delta(vector, biased, name).view_as(named[name]))
    assert (trained[0] - stock).norm() > 1e-3 * stock.norm()
    torch.testing.assert_close(logits_of(model), trained[0], rtol=1e-4, atol=1e-5)


REFUSED = {
    "use_dora": {"use_dora": True},
    "layer_replication": {"layer_replication": [[0, 1], [0, 2]]},
    "target_parameters": {"target_parameters": ["q_proj.weight"]},
    "trainable_token_indices": {"trainable_token_indices": [3, 4]},
    "megatron_config": {"megatron_config": {"a": 1}},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5]},
    "arrow_config": {"arrow_config": {}},
    "kasa_config": {"kasa_config": {}},
    "monteclora_config": {"monteclora_config": {}},
    "use_bdlora": {"use_bdlora": {"nblocks": 2}},
    "use_qalora": {"use_qalora": True},
    "velora_config": {"velora_config": {}},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda", "corda_config": {}},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "eva": {"init_lora_weights": "eva", "eva_config": {}},
    "inference_mode": {"inference_mode": True},
    "another task": {"task_type": "SEQ_CLS"},
    "a bias of B without a bias": {"lora_bias": True},
    "a huge rank": {"r": 10**9},
    "a rank of another type": {"rank_pattern": {"q_proj": "4"}},
    "a list of ranks": {"rank_pattern": ["q_proj"]},
    "an infinite alpha": {"alpha_pattern": {"q_proj": float("inf")}},
    "a rank of no layer": {"rank_pattern": {"q_prj": 4}},
    "a module that is no layer": {"target_modules": ["self_attn"]},
    "a pattern that hangs": {"target_modules": HANGING},
    "a rank that hangs": {"rank_pattern": {HANGING: 4}},
    "a saved module that hangs": {"modules_to_save": [HANGING]},
    "no pattern": {"alpha_pattern": {"(": 4}},
}


def test_every_refused_field_is_tried():
    fields = {name for name, decision in FIELDS.items() if decision not in (HANDLED, HARMLESS)}
    assert fields <= set(REFUSED)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("lora", REFUSED.values(), ids=REFUSED)
def test_a_lora_that_would_open_as_no_vector_is_refused_before_packing(
    lora, make_config, tmp_path, monkeypatch
):
    monkeypatch.setattr("optimer_hf.files.patterns.SECONDS", 0.5)
    monkeypatch.setattr(run_module, "_pack_text", lambda *_: pytest.fail("it was packed"))
    with pytest.raises(OptimerError, match="aaa"):
        prepare(make_config(**lora), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["hub_token", "hub_model_id"])
def test_a_token_in_a_train_file_is_refused_and_not_shown(field, make_config):
    secret = "hf_" + "SECRET" * 6
    with pytest.raises(ConfigError, match=rf"trainer\.{field}") as caught:
        check_config(make_config(trainer={field: secret}))
    assert field != "hub_token" or secret not in str(caught.value)


def test_patterns_of_ranks_are_expanded_by_layer_where_their_order_matters(make_config, tmp_path):
    lora = {"alpha_pattern": {"up_proj": 3, "0.mlp.up_proj": 90}, "rank_pattern": {"q_proj": 2}}
    out = train(make_config(**lora), tmp_path / "out")
    config = json.loads(Path(out / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["alpha_pattern"] == {f"model.layers.{n}.mlp.up_proj": 3 for n in range(2)}
    assert config["rank_pattern"] == {"q_proj": 2}
