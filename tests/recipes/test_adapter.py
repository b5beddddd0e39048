"""adapter.py: the sum of LoRA vectors as one adapter."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimer_hf.errors import ModelError
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.recipes.adapter import build_adapter
from optimer_hf.recipes.build import build
from optimer_hf.vectors.opening import open_vector
from tests.support.cli import optimer
from tests.support.tiny import VOCABULARY, whole_delta

TOKENS = torch.arange(3, VOCABULARY).view(4, -1)
RSLORA = {"use_rslora": True, "r": 6, "lora_alpha": 5}
PATTERNS = {
    "rank_pattern": {"layers.0.mlp.up_proj": 7, "q_proj": 2},
    "alpha_pattern": {"layers.1.mlp.up_proj": 3},
}
ONE_LAYER = {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]}
EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"]}


def write_recipe(folder: Path, base: Path, sources: dict[str, Path], weights) -> Path:
    """Write a recipe by hand, without a lock."""
    vectors = {
        name: {"source": str(source), "weight": weight}
        for (name, source), weight in zip(sources.items(), weights, strict=True)
    }
    data = {"name": "sum", "base_model": str(base), "dtype": "float32", "vectors": vectors}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"format_version": 1, **data}))
    return folder / "recipe.yaml"


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def logits_with(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits_of(PeftModel.from_pretrained(model, adapter))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([{}, {"r": 3}], id="two ranks"),
        pytest.param([RSLORA, RSLORA], id="rslora"),
        pytest.param([PATTERNS, RSLORA], id="patterns"),
        pytest.param([{"target_modules": ["q_proj"]}, {"target_modules": ["up_proj"]}], id="apart"),
        pytest.param([EMBEDDING, {}], id="embedding"),
        pytest.param([ONE_LAYER, {}, RSLORA], id="layers"),
    ],
)
def test_an_adapter_in_peft_has_the_logits_of_the_merged_model(
    make_base, make_adapter, tmp_path, options
):
    base = make_base("llama")
    sources = {f"v{i}": make_adapter(base, i, **each) for i, each in enumerate(options)}
    recipe = write_recipe(tmp_path, base.path, sources, [0.8, -0.35, 0.6][: len(sources)])
    built = build_adapter(recipe, tmp_path / "adapter")
    build(recipe, tmp_path / "model")
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    plain = logits_of(AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32))
    ours = logits_with(base.path, tmp_path / "adapter")
    assert (ours - merged).abs().max() < 1e-3 * (merged - plain).abs().max()
    assert built.rank == sum(built.ranks.values()) and "the sum is exact" in built.describe()
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == built.rank and not config["use_rslora"]
    ranks = {
        tensor.shape[1]
        for name, tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").items()
        if name.endswith(("lora_B.weight", "lora_embedding_B"))
    }
    assert ranks == {built.rank}


def test_a_vector_of_weight_0_takes_no_rank_and_may_be_of_any_kind(
    make_base, make_tuned, make_adapter, tmp_path
):
    base = make_base("llama")
    sources = {"a": make_adapter(base, 0), "whole": make_tuned(base, "llama", 1)}
    recipe = write_recipe(tmp_path, base.path, sources, [0.5, 0.0])
    assert build_adapter(recipe, tmp_path / "adapter").ranks == {"a": 4}
    nothing = write_recipe(tmp_path, base.path, sources, [0.0, 0.0])
    with pytest.raises(ModelError, match="every vector has weight 0"):
        build_adapter(nothing, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_truncation_is_the_best_of_its_rank_and_says_its_error(make_base, make_adapter, tmp_path):
    base = make_base("llama")
    sources = {"a": make_adapter(base, 0), "b": make_adapter(base, 1)}
    recipe = write_recipe(tmp_path, base.path, sources, [0.7, 0.4])
    result = optimer("build", recipe, tmp_path / "out", "--as", "adapter", "--rank", 3)
    said = re.search(r"rank 3 of 8 \(a 4 \+ b 4\); truncation leaves out ([\d.]+) %", result.output)
    build_adapter(recipe, tmp_path / "whole")
    whole, small = (open_vector("v", str(tmp_path / name), base) for name in ("whole", "out"))
    squares = lost = 0.0
    for name in whole.names:
        exact = whole_delta(whole, base, name).double()
        values = torch.linalg.svdvals(exact)
        error = (whole_delta(small, base, name).double() - exact).norm()
        assert error == pytest.approx(float(values[3:].norm()), rel=1e-4)
        squares, lost = squares + float(exact.norm() ** 2), lost + float(error**2)
    assert float(said[1]) == pytest.approx(100 * (lost / squares) ** 0.5, rel=1e-2)
    optimer("build", recipe, tmp_path / "most", "--as", "adapter", "--rank", 99)
    same = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "most")]
    assert all(torch.equal(same[0][key], same[1][key]) for key in same[0])


@pytest.mark.parametrize(
    ("options", "tensor"),
    [
        ({"modules_to_save": ["lm_head"]}, r"lm_head"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, r"norm\.weight"),
    ],
)
def test_what_is_no_product_is_refused_by_name(make_base, make_adapter, tmp_path, options, tensor):
    base = make_base("llama")
    source = make_adapter(base, 0, **options)
    file = source / "adapter_model.safetensors"
    moved = {key: value + 0.01 for key, value in load_file(file).items()}
    save_file(moved, file, {"format": "pt"})
    recipe = write_recipe(tmp_path, base.path, {"a": source}, [0.5])
    with pytest.raises(ModelError, match=rf"vector 'a' .*{tensor}.*(no factor|neither|has no)"):
        build_adapter(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_refused_by_name(make_base, make_tuned, make_adapter, tmp_path):
    base = make_base("llama")
    sources = {"a": make_adapter(base, 0), "whole": make_tuned(base, "llama", 1)}
    recipe = write_recipe(tmp_path, base.path, sources, [0.5, 0.1])
    result = optimer("build", recipe, tmp_path / "out", "--as", "adapter", ok=False)
    assert "vector 'whole'" in result.output and "is a checkpoint, and only LoRA" in result.output
    result = optimer("build", recipe, tmp_path / "out", "--rank", 4, ok=False)
    assert "--rank: goes with --as adapter" in result.output


def test_add_weighted_adapter_of_peft_scales_rslora_wrongly_and_a_build_does_not(
    make_base, make_adapter, tmp_path
):
    """https://github.com/huggingface/peft/issues/3761; when this fails, docs/how-to/lora.md says
    something that is no longer so.
    """
    base = make_base("llama")
    sources = {f"v{i}": make_adapter(base, i, **RSLORA) for i in range(2)}
    recipe = write_recipe(tmp_path, base.path, sources, [0.8, 0.3])
    build_adapter(recipe, tmp_path / "adapter")
    build(recipe, tmp_path / "model")
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    plain = logits_of(model)
    combined = PeftModel.from_pretrained(model, sources["v0"], adapter_name="v0")
    combined.load_adapter(sources["v1"], adapter_name="v1")
    combined.add_weighted_adapter(["v0", "v1"], [0.8, 0.3], "sum", combination_type="cat")
    combined.set_adapter("sum")
    theirs = logits_of(combined)
    ours = logits_with(base.path, tmp_path / "adapter")
    assert (ours - merged).norm() < 1e-4 * (theirs - merged).norm()
    assert (theirs - merged).norm() > 0.1 * (merged - plain).norm()


def test_a_built_adapter_is_a_vector_and_names_its_base(make_base, make_adapter, tmp_path):
    base = make_base("llama")
    recipe = write_recipe(tmp_path, base.path, {"a": make_adapter(base, 0)}, [0.5])
    rounded = ("--as", "adapter", "--out-dtype", "bfloat16")
    result = optimer("build", recipe, tmp_path / "out", *rounded)
    assert "rank 4 (a 4); the sum is exact" in result.output
    vector = open_vector("again", str(tmp_path / "out"), base)
    assert vector.kind == "adapter" and vector.names <= set(Checkpoint(base.path).names)
    record = json.loads((tmp_path / "out/vector.json").read_text())
    assert (record["name"], record["kind"]) == ("sum", "adapter")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.path)
    assert config["task_type"] == "CAUSAL_LM"
