"""arguments.py: a run multiplies in the dtype that the machine computes in, or as asked."""

import pytest
import torch

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.training import arguments as arguments_module
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.run import prepare, train
from optimer_hf.training.trainer import build_trainer
from tests.support.training import LORA, record_of


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("multiplied", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("asked", [None, True, False])
def test_a_run_multiplies_in_bfloat16_where_the_machine_does_else_in_float32(
    make_base, corpus_dir, tmp_path, monkeypatch, multiplied, asked, lora
):
    monkeypatch.setattr(arguments_module, "compute_dtype", lambda dtype, device: multiplied)
    base = make_base("gemma", torch.bfloat16)
    config = TrainConfig(
        name="aaa",
        base_model=str(base.path),
        corpus=CorpusConfig(path=corpus_dir / "aaa.train.jsonl"),
        block_size=32,
        max_tokens=64,
        lora=lora,
        trainer={"save_strategy": "no"} | ({} if asked is None else {"bf16": asked}),
    )
    packed = prepare(config, tmp_path / "out")
    trainer = build_trainer(config, base, packed, tmp_path / "out")
    is_mixed = asked if asked is not None else multiplied == torch.bfloat16
    frozen = {p.dtype for p in trainer.model.parameters() if not p.requires_grad}
    trained = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert trainer.args.bf16 == is_mixed
    assert frozen == ({torch.bfloat16 if is_mixed else torch.float32} if lora else set())
    assert trained == {torch.float32}
    train(config, tmp_path / "out")
    expected = "bf16" if is_mixed else "no"
    assert record_of(tmp_path / "out")["training"]["mixed_precision"] == expected


def test_a_run_in_float16_does_not_also_use_bfloat16(make_config, make_base, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments_module, "compute_dtype", lambda dtype, device: dtype)
    config = make_config(trainer={"fp16": True})
    packed = prepare(config, tmp_path / "out")
    base = make_base("gemma", torch.float32)
    arguments = build_trainer(config, base, packed, tmp_path / "out").args
    assert (arguments.fp16, arguments.bf16) == (True, False)
