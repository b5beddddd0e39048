"""vanilla.py: deltas beside a config for unmodified mergekit."""

from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from optimer_hf.errors import OutputError
from optimer_hf.models.layout import weight_digests
from optimer_hf.recipes.vanilla import write_delta, write_vanilla
from optimer_hf.vectors.opening import open_vector
from tests.support.landscapes import config_of
from tests.support.recipes import change_weights


def test_an_exported_delta_is_reused_until_its_vector_is_trained_again(pool, tmp_path):
    base, sources = pool
    vector = open_vector("ja", str(sources["ja"]), base)
    out = write_delta(vector, base, tmp_path / "deltas")
    first, written = weight_digests(out), (out / "vector.json").stat().st_mtime_ns
    left = out.with_name(
        ".partial-ja.lock"
    )  # by a process that died right after it wrote the delta
    left.touch()
    assert write_delta(vector, base, tmp_path / "deltas") == out and not left.exists()
    assert (out / "vector.json").stat().st_mtime_ns == written
    change_weights(sources["ja"])
    retrained = open_vector("ja", str(sources["ja"]), base)
    assert weight_digests(write_delta(retrained, base, tmp_path / "deltas")) != first
    itself = open_vector("ja", str(out), base)
    before = weight_digests(out)
    assert write_delta(itself, base, tmp_path / "deltas") == out
    assert weight_digests(out) == before


def test_a_directory_that_is_not_ours_is_not_replaced_by_an_exported_delta(pool, tmp_path):
    base, sources = pool
    vector = open_vector("ja", str(sources["ja"]), base)
    (tmp_path / "deltas" / "ja").mkdir(parents=True)
    (tmp_path / "deltas" / "ja" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="not empty"):
        write_delta(vector, base, tmp_path / "deltas")
    assert (tmp_path / "deltas" / "ja" / "mine.txt").exists()


def test_a_vector_of_weight_0_takes_no_other_into_deltas(pool, tmp_path):
    base, sources = pool
    file = sources["it"] / "model.safetensors"
    save_file({f"policy.{name}": each for name, each in load_file(file).items()}, file)
    vectors = {name: {"source": str(sources[name])} for name in ("ja", "it")}
    config = config_of(base_model=str(base.path), vectors=vectors)
    for weight, has_deltas in ((0.0, False), (0.5, True)):
        best = SimpleNamespace(weights={"ja": 0.5, "it": weight})
        study = SimpleNamespace(config=config, best_trial=best)
        assert write_vanilla(study, tmp_path / "v.yml", deltas=tmp_path / "deltas")
        assert (tmp_path / "deltas").exists() == has_deltas
