"""shapes.py: what the headers of files tell, against what `open_vector` says."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from optimer_hf.errors import ModelError
from optimer_hf.experiment.checking import check_fields
from optimer_hf.models.headers import read_shapes
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.shapes import refuse_other_shapes
from tests.support.cli import process
from tests.support.tiny import GROUPED
from tests.support.weights import edit_weights


@pytest.fixture
def other(save_model) -> ResolvedModel:
    """A base with the names of another one, and with wider layers."""
    sizes = GROUPED | {"intermediate_size": 96, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    return ResolvedModel(save_model(model.to(torch.bfloat16), "wider"), "wider")


@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_a_vector_of_another_width_is_refused_by_its_headers(
    kind, base, other, tuned, adapter, make_tuned, make_adapter
):
    fits = {"v": str(tuned if kind == "checkpoint" else adapter)}
    refuse_other_shapes(str(base.path), fits)
    differs = make_tuned(other, "llama", 1) if kind == "checkpoint" else make_adapter(other, 1)
    for check in (
        lambda: refuse_other_shapes(str(base.path), fits | {"w": str(differs)}),
        lambda: open_vector("w", str(differs), base),
    ):
        with pytest.raises(ModelError, match=r"vector 'w'.* has shape \["):
            check()


def cut_vocabulary(tensors) -> None:
    for name in [name for name in tensors if "embed" in name or "lm_head" in name]:
        tensors[name] = tensors[name][:-1].contiguous()


def test_what_opens_passes_and_what_headers_cannot_tell_is_left_to_opening(
    base, tuned, adapter, tmp_path, other
):
    extract(open_vector("v", str(tuned), base), base, tmp_path / "delta", dtype="int8")
    damaged, quantised, in_part = (tmp_path / name for name in ("damaged", "quantised", "in_part"))
    for copy in (damaged, quantised):
        shutil.copytree(tuned, copy)
    (damaged / "model.safetensors").write_bytes(b"\xff" * 20)
    rows = edit_weights(tuned, tmp_path / "rows", cut_vocabulary)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (quantised / "config.json").write_text(json.dumps(config))
    stored = load_file(quantised / "model.safetensors")
    halves = {k: v[: len(v) // 2].contiguous() for k, v in stored.items()}
    save_file(halves, quantised / "model.safetensors")
    shutil.copytree(quantised, in_part)
    config["text_config"] = {"quantization_config": config.pop("quantization_config")}
    (in_part / "config.json").write_text(json.dumps(config))
    sources = [tuned, adapter, tmp_path / "delta", damaged, rows, quantised, in_part, "you/model"]
    refuse_other_shapes(str(base.path), {str(n): str(each) for n, each in enumerate(sources)})
    refuse_other_shapes("google/base", {"v": str(adapter)})


def test_a_stale_index_and_tensors_that_were_not_gathered_are_left_to_opening(
    base, other, tuned, tmp_path
):
    stale = tmp_path / "stale"
    shutil.copytree(tuned, stale)
    shard = "model-00001-of-00001.safetensors"
    shutil.copy(other.path / "model.safetensors", stale / shard)
    index = {"weight_map": dict.fromkeys(read_shapes(other.path), shard)}
    (stale / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_shapes(stale) == read_shapes(tuned)

    def empty(tensors):
        tensors.update({name: torch.zeros(0) for name in tensors})

    emptied = edit_weights(tuned, tmp_path / "emptied", empty)
    refuse_other_shapes(str(base.path), {"stale": str(stale), "emptied": str(emptied)})
    open_vector("stale", str(stale), base)
    with pytest.raises(ModelError, match="is empty"):
        open_vector("emptied", str(emptied), base)


def test_buffers_that_grow_with_the_context_are_left_to_opening(base, tuned, tmp_path):
    def with_mask(size):
        name = "model.layers.0.attention.bias"  # as GPT-NeoX stored it
        return lambda tensors: tensors.update({name: torch.ones(1, 1, size, size).bool()})

    short = edit_weights(base.path, tmp_path / "short", with_mask(4))
    long = edit_weights(tuned, tmp_path / "long", with_mask(8))
    refuse_other_shapes(str(short), {"long": str(long)})


def test_headers_have_the_shapes_that_safetensors_reads(base):
    stored = load_file(base.path / "model.safetensors")
    assert read_shapes(base.path) == {name: tuple(t.shape) for name, t in stored.items()}


def test_files_that_are_missing_are_named_before_the_width_of_a_vector(
    base, other, make_adapter, tmp_path
):
    study, text = tmp_path / "study.yaml", tmp_path / "gone.jsonl"
    fields = {"base_model": str(base.path), "vectors": {"w": str(make_adapter(other, 1))}}
    study.write_text(json.dumps(fields | {"objective": {"terms": [{"text": str(text)}]}}))
    assert "gone.jsonl: no such file or directory." in check_fields(study, "study")
    text.touch()
    with pytest.raises(ModelError, match=r"vector 'w'.* has shape \["):
        check_fields(study, "study")


def test_a_search_refuses_another_width_before_it_loads_a_library(
    base, other, make_adapter, corpus_dir, tmp_path
):
    study = {
        "base_model": str(base.path),
        "vectors": {"w": str(make_adapter(other, 1))},
        "objective": {"terms": [{"text": str(corpus_dir / "aaa.search.jsonl")}]},
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    code = "import sys; from optimer_hf.cli import main\n"
    code += f"sys.argv = ['optimer', 'search', {str(tmp_path / 'study.yaml')!r}, 's']\n"
    code += "import atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    ended = process("-c", code + "\nmain()")
    assert ended.returncode == 1 and "error: vector 'w': tensor" in ended.stderr
    assert "loading libraries" not in ended.stderr and ended.stderr.endswith("False\n")
