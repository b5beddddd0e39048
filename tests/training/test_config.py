"""config.py: what a train file may say."""

import pytest

from optimer_hf.training.config import TrainConfig


def test_a_mixture_needs_shares_that_sum_to_one_and_a_budget(tmp_path):
    def config(shares, **fields):
        parts = [{"path": tmp_path / "a.jsonl", "share": share} for share in shares]
        return TrainConfig(name="m", base_model="a/b", mixture=parts, **fields)

    with pytest.raises(ValueError, match=r"the shares of the mixture sum to 0\.9, not to 1"):
        config([0.5, 0.4], max_tokens=64)
    with pytest.raises(ValueError, match="a mixture needs max_tokens"):
        config([0.5, 0.5])
    with pytest.raises(ValueError, match="exactly one of 'corpus' and 'mixture'"):
        TrainConfig(name="m", base_model="a/b")
