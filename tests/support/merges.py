"""Merge configs, what an engine makes of them, and the tensors to compare with."""

from pathlib import Path

import torch
import yaml
from mergekit.architecture.auto import infer_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from optimer_hf.merging.engines import merge
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.vectors.groups import weights_of_parts
from optimer_hf.vectors.layers import layers_for
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.splitting import split_pool
from tests.support.tiny import bits

N_LAYERS = 5  # of the base that lies beside configs of mergekit
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def read_all(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.names}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def write_config(path: Path, config: dict) -> Path:
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def merged_by(config: dict, out: Path, engine: str | None = None) -> dict[str, torch.Tensor]:
    """Merge a config with an engine and return the tensors it wrote."""
    used = merge(write_config(out.with_suffix(".yml"), config), out, engine=engine)
    assert engine is None or used == engine
    return read_all(out)


def open_pool(base: ResolvedModel, sources: dict[str, Path]) -> list:
    return [open_vector(name, str(path), base) for name, path in sources.items()]


def optimer_yaml(**changes) -> dict:
    models = [{"model": "./tuned", "parameters": {"weight": 0.5}}]
    return {
        "merge_method": "optimer",
        "base_model": "./base",
        "models": models,
        "dtype": "bfloat16",
    } | changes


def optimer_models(sources: dict[str, Path], **parameters: dict) -> list[dict]:
    return [{"model": str(path), "parameters": parameters[name]} for name, path in sources.items()]


def expected_merge(base: Path, sources: dict[str, Path], weight_of) -> dict[str, torch.Tensor]:
    """Return base + sum of weight_of(vector, tensor) * (tuned - base) in float32."""
    merged = {}
    for name, tensor in read_all(base).items():
        total = torch.zeros(tensor.shape)
        for vector, path in sources.items():
            delta = Checkpoint(path).read(name).float() - tensor.float()
            total += delta * weight_of(vector, name)
        merged[name] = (total + tensor.float()).to(torch.bfloat16)
    return merged


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(path.glob("*.safetensors")) for k, v in load_file(f).items()}


def without_tokenizer(base: Path) -> None:
    for file in [*base.glob("tokenizer*"), *base.glob("special*")]:
        file.unlink()


def with_broken_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").write_text('{"x"', encoding="utf-8")


def build_study(config, weights: dict[str, float], out: Path) -> None:
    """Build what a trial of a study with these weights scores."""
    base = ResolvedModel(Path(config.base_model), "base")
    vectors = [open_vector(name, source, base) for name, source in config.sources.items()]
    parts = weights_of_parts(weights, config.groups, layers_for(config.groups, base))
    pool = split_pool(vectors, config.groups, base, idle=config.fixed)
    write_merged(base, pool, parts, out, out_dtype=config.dtype)


def run_plain_mergekit(text: str, out: Path) -> None:
    """Run a config, which lies in the working directory, with mergekit and nothing of ours."""
    LoaderCache().loaders = {}  # of another folder
    infer_architecture_info.cache_clear()
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = {"lora_merge_cache": str(out) + "-lora", "lora_merge_dtype": "float32"}
    run_merge(config, str(out), MergeOptions(quiet=True, copy_tokenizer=False, **options))
