"""A short run on a tiny base."""

import pytest
import torch

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.training.config import TrainConfig
from tests.support.training import FAST, LORA


@pytest.fixture
def make_config(make_base, corpus_dir):
    """Return a function fields -> TrainConfig of a short float32 LoRA run on a tiny base."""

    def config(
        kind: str = "gemma", *, lora=LORA, trainer=FAST, max_tokens: int = 192, **fields
    ) -> TrainConfig:
        base = make_base(kind, torch.float32)
        fields = {"corpus": CorpusConfig(path=corpus_dir / "aaa.train.jsonl")} | fields
        return TrainConfig(
            name="aaa",
            base_model=str(base.path),
            block_size=32,
            max_tokens=max_tokens,
            lora=lora,
            trainer=trainer,
            **fields,
        )

    return config
