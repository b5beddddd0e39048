"""Pools of two vectors of each kind, and a folder for configs of mergekit."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from optimer_hf.models.layout import ResolvedModel
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector
from tests.support.merges import N_LAYERS
from tests.support.tiny import GROUPED


@pytest.fixture(scope="module")
def pool(make_base, make_tuned, make_adapter, tmp_path_factory):
    """Return a function architecture, kind of vector, dtype -> base and two sources; made once."""
    made: dict[tuple[str, str, torch.dtype], tuple[ResolvedModel, dict[str, Path]]] = {}

    def sources(
        kind: str, vectors: str, dtype: torch.dtype
    ) -> tuple[ResolvedModel, dict[str, Path]]:
        if (kind, vectors, dtype) not in made:
            base = make_base(kind, dtype)
            if vectors == "adapter":
                paths = {name: make_adapter(base, seed) for seed, name in enumerate(("ja", "math"))}
            else:
                paths = {
                    name: make_tuned(base, kind, seed, dtype)
                    for seed, name in enumerate(("ja", "math"))
                }
            if vectors == "delta":
                folder = tmp_path_factory.mktemp("deltas")
                for name, path in paths.items():
                    extract(open_vector(name, str(path), base), base, folder / name)
                paths = {name: folder / name for name in paths}
            made[kind, vectors, dtype] = base, paths
        return made[kind, vectors, dtype]

    return sources


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_base, make_tuned):
    """A folder with a base and two fine-tunes, and paths that mergekit's short form cannot say."""
    folder = tmp_path_factory.mktemp("models")
    base = make_base("llama", torch.float32)
    (folder / "base").symlink_to(base.path)
    for name, seed in (("a", 1), ("b", 2)):
        tuned = make_tuned(base, "llama", seed, torch.float32, 0.02)
        (folder / name).symlink_to(tuned)
        (folder / f"{name}+{name}@1").symlink_to(tuned)
    return folder


@pytest.fixture
def world(models, tmp_path):
    """Return a folder of one test with the models beside the config."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    return tmp_path


@pytest.fixture(scope="module", params=["llama", "gemma"])
def folder(request, tmp_path_factory, save_model, make_tuned, make_adapter, corpus_dir) -> Path:
    """A folder with a base of five layers, two fine-tunes, an adapter, an objective and a test."""
    out = tmp_path_factory.mktemp("layered")
    torch.manual_seed(0)
    sizes = GROUPED | {"num_hidden_layers": N_LAYERS, "max_position_embeddings": 64}
    if request.param == "llama":  # mergekit knows where its head is, and infers Gemma's
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    else:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, head_dim=16, query_pre_attn_scalar=16))
    path = save_model(model.to(torch.bfloat16), "five-layers")
    base = ResolvedModel(path, "base")
    shutil.copytree(path, out / "base")
    for name, seed in (("math", 1), ("code", 2)):
        shutil.copytree(make_tuned(base, request.param, seed), out / name)
    shutil.copytree(make_adapter(base, 3), out / "lora")
    for file, name in (("obj.yaml", "aaa.search.jsonl"), ("test.yaml", "aaa.test.jsonl")):
        (out / file).write_text(f"terms: [{{text: {corpus_dir / name}}}]\n")
    return out
