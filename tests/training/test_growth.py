"""growth.py: the norm along a run is that of the vector it leaves behind, at a few steps."""

import json

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.errors import ModelError
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.growth import N_NORMS, full_norm, is_due
from optimer_hf.training.run import train
from optimer_hf.vectors.delta import write_record
from tests.support.tiny import VOCABULARY, tiny_model


def mixture_of_experts() -> MixtralForCausalLM:
    """Its experts are one tensor in memory and many in a file."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return MixtralForCausalLM(config)


@pytest.mark.parametrize("kind", ["gemma", "llama", "experts"])
def test_the_norm_of_a_moved_model_is_that_of_its_flat_difference(save_model, kind, monkeypatch):
    monkeypatch.setattr("optimer_hf.models.blocks.CHUNK_ELEMENTS", 300)
    model = mixture_of_experts() if kind == "experts" else tiny_model(kind)
    base = save_model(model)
    loaded = type(model).from_pretrained(base, dtype=torch.float32)
    assert full_norm(loaded, base) == 0.0
    squares = 0.0
    with torch.no_grad():
        for parameter in loaded.parameters():
            noise = 0.01 * torch.randn_like(parameter)
            squares += noise.double().square().sum().item()
            parameter.add_(noise)
    assert full_norm(loaded, base) == pytest.approx(squares**0.5, rel=1e-4)


def test_a_base_of_another_shape_is_named(make_base):
    with pytest.raises(ModelError, match=r"holds no tensor '\S+' of shape"):
        full_norm(tiny_model("llama"), make_base("gemma").path)


@pytest.mark.parametrize(("n_steps", "every"), [(10, 1), (1000, 1), (1000, 7), (1000, 250)])
def test_a_run_notes_few_norms_evenly_and_the_last_one(n_steps, every):
    history: list[dict[str, float]] = []
    for step in range(every, n_steps + 1, every):
        history.append({"step": step})
        if is_due(history, n_steps):
            history[-1]["norm"] = 1.0
        history = json.loads(json.dumps(history))  # killed, and gone on
    noted = [entry["step"] for entry in history if "norm" in entry]
    assert len(noted) <= N_NORMS
    assert len(noted) >= min(N_NORMS - 1, n_steps // every)
    assert n_steps - noted[-1] <= max(every, n_steps / N_NORMS)
    assert noted[-1] == n_steps or every == 7


@pytest.fixture
def config(make_base, corpus_dir) -> TrainConfig:
    """A full-parameter run of 20 steps from a bfloat16 base."""
    return TrainConfig(
        name="aaa",
        base_model=str(make_base("llama", torch.bfloat16).path),
        corpus=CorpusConfig(path=corpus_dir / "aaa.train.jsonl"),
        block_size=32,
        max_tokens=640,
        trainer={"learning_rate": 3e-3, "save_steps": 5},
    )


def training_of(out) -> dict:
    return json.loads((out / "training.json").read_text(encoding="utf-8"))["training"]


@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_a_run_ends_at_the_norm_of_its_vector(config, make_base, tmp_path, kind):
    lora = {"r": 4, "target_modules": "all-linear"} if kind == "adapter" else None
    out = train(config.model_copy(update={"lora": lora}), tmp_path / "out")
    training = training_of(out)
    record = write_record(out, make_base("llama", torch.bfloat16), name="aaa", kind=kind)
    assert training["norms"][-1] == pytest.approx(record.norm, rel=1e-5)
    assert training["norm_steps"][-1] == training["n_steps"] == 20
    assert len(training["norms"]) == len(training["norm_steps"]) == N_NORMS
    assert 0 < training["norms"][0] < training["norms"][-1]


def test_a_full_run_that_was_stopped_has_the_norms_of_an_uninterrupted_one(
    config, tmp_path, monkeypatch
):
    whole = training_of(train(config, tmp_path / "whole"))
    measured = []

    def interrupted(model, base):
        measured.append(full_norm(model, base))
        if len(measured) == 10:
            raise KeyboardInterrupt
        return measured[-1]

    monkeypatch.setattr("optimer_hf.training.callback.full_norm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "stopped")
    stopped = training_of(train(config, tmp_path / "stopped"))
    assert stopped["norm_steps"] == whole["norm_steps"]
    assert stopped["norms"] == pytest.approx(whole["norms"], rel=1e-4)
    assert len(measured) < 2 * N_NORMS  # those of the checkpoint it went on from are kept
