import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimer_hf.errors import ConfigError, ModelError, OutputError
from optimer_hf.files.staging import staged_directory
from optimer_hf.merging.engines import merge
from optimer_hf.merging.mergekit_pool import (
    linear_merge_of,
    optimer_config,
    pool_of,
    pool_to_search,
    unsearched_settings,
    vanilla_config,
)
from optimer_hf.merging.mergekit_yaml import read_merge_config
from optimer_hf.merging.resident import ResidentModel
from optimer_hf.merging.writer import write_merged
from optimer_hf.models import blocks as blocks_module
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector
from tests.support.tiny import bits, ulps_apart

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


def open_pool(base: ResolvedModel, sources: dict[str, Path]) -> list:
    return [open_vector(name, str(path), base) for name, path in sources.items()]


# -- engines ---------------------------------------------------------------------------------------

# dtype of the files, `dtype` and `out_dtype` of the config
DTYPE_CASES = [
    ("bfloat16", {"dtype": "bfloat16"}),
    ("float32", {"dtype": "float32"}),
    ("bfloat16", {"dtype": "float32", "out_dtype": "bfloat16"}),
    ("float32", {"dtype": "float32", "out_dtype": "bfloat16"}),
    ("bfloat16", {"dtype": "float32"}),
    ("bfloat16", {}),
]


@pytest.mark.parametrize("vectors", ["checkpoint", "delta"])
@pytest.mark.parametrize(("stored", "dtypes"), DTYPE_CASES)
def test_the_writer_equals_mergekit_bit_for_bit(pool, kind, vectors, stored, dtypes, tmp_path):
    base, sources = pool(kind, vectors, TORCH_DTYPES[stored])
    config = optimer_config(
        str(base.path), {k: str(v) for k, v in sources.items()}, {"ja": 0.6, "math": -0.35}, "x"
    )
    config = {
        key: value for key, value in config.items() if key not in ("dtype", "out_dtype")
    } | dtypes
    native = merged_by(config, tmp_path / "native", "native")
    assert_same_bits(merged_by(config, tmp_path / "mergekit", "mergekit"), native)
    expected = TORCH_DTYPES[dtypes.get("out_dtype", dtypes.get("dtype", stored))]
    assert {tensor.dtype for tensor in native.values()} == {expected}
    assert any(
        not torch.equal(native[name].float(), tensor.float())
        for name, tensor in read_all(base.path).items()
    )


def test_a_mixed_pool_of_checkpoint_and_delta_equals_mergekit_bit_for_bit(pool, kind, tmp_path):
    base, checkpoints = pool(kind, "checkpoint", torch.bfloat16)
    _, deltas = pool(kind, "delta", torch.bfloat16)
    sources = {"a": str(checkpoints["ja"]), "b": str(deltas["math"])}
    config = optimer_config(str(base.path), sources, {"a": 0.8, "b": 0.4}, "bfloat16")
    native = merged_by(config, tmp_path / "native", "native")
    assert_same_bits(merged_by(config, tmp_path / "mergekit", "mergekit"), native)


def test_the_exported_config_of_a_float32_pool_gives_the_same_bits_from_both_engines(
    pool, tmp_path
):
    base, sources = pool("llama", "checkpoint", torch.float32)
    config = optimer_config(
        str(base.path),
        {k: str(v) for k, v in sources.items()},
        {"ja": 0.6, "math": 0.3},
        "bfloat16",
    )
    default = merged_by(config, tmp_path / "default")
    assert_same_bits(merged_by(config, tmp_path / "mergekit", "mergekit"), default)


def test_a_float32_merge_equals_task_arithmetic_of_mergekit_bit_for_bit(pool, kind, tmp_path):
    base, sources = pool(kind, "checkpoint", torch.float32)
    weights = {"ja": 0.6, "math": -0.3}
    config = optimer_config(
        str(base.path), {k: str(v) for k, v in sources.items()}, weights, "float32"
    )
    ours = merged_by(config, tmp_path / "ours", "native")
    assert_same_bits(
        merged_by(config | {"merge_method": "task_arithmetic"}, tmp_path / "theirs"), ours
    )


WEIGHTS_UP_TO_TWO = [{"ja": 0.6, "math": 0.3}, {"ja": 1.0, "math": 1.0}, {"ja": 1.2, "math": -0.8}]


@pytest.mark.parametrize("weights", WEIGHTS_UP_TO_TWO)
@pytest.mark.parametrize("vectors", ["checkpoint", "delta"])
def test_exports_for_unmodified_mergekit_are_within_one_ulp(pool, kind, vectors, weights, tmp_path):
    base, sources = pool(kind, vectors, torch.bfloat16)
    texts = {name: str(path) for name, path in sources.items()}
    ours = merged_by(
        optimer_config(str(base.path), texts, weights, "bfloat16"), tmp_path / "ours", "native"
    )
    export = vanilla_config(
        str(base.path), texts, weights, "bfloat16", are_deltas=vectors == "delta"
    )
    assert export is not None and export["merge_method"] == "linear"
    theirs = merged_by(export, tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    distance = torch.cat([ulps_apart(ours[name], theirs[name]).flatten() for name in ours])
    assert (distance <= 1).double().mean().item() >= 0.995


def test_the_delta_export_stays_within_one_ulp_where_weights_cancel(pool, tmp_path):
    base, sources = pool("gemma", "delta", torch.bfloat16)
    texts, weights = {name: str(path) for name, path in sources.items()}, {"ja": 9.0, "math": -7.0}
    ours = merged_by(
        optimer_config(str(base.path), texts, weights, "bfloat16"), tmp_path / "ours", "native"
    )
    theirs = merged_by(
        vanilla_config(str(base.path), texts, weights, "bfloat16", are_deltas=True),
        tmp_path / "theirs",
    )
    assert vanilla_config("b", texts, weights, "bfloat16", are_deltas=False) is None
    distance = torch.cat([ulps_apart(ours[name], theirs[name]).flatten() for name in ours])
    assert (distance <= 1).double().mean().item() >= 0.995


def test_an_adapter_and_its_extracted_delta_merge_alike(pool, tmp_path):
    base, sources = pool("llama", "adapter", torch.bfloat16)
    vectors = open_pool(base, sources)
    for vector in vectors:
        extract(vector, base, tmp_path / vector.name, dtype="float32")
    weights = {"ja": 0.7, "math": 0.5}
    write_merged(base, vectors, weights, tmp_path / "from-adapters", out_dtype="float32")
    write_merged(
        base,
        open_pool(base, {n: tmp_path / n for n in weights}),
        weights,
        tmp_path / "out",
        out_dtype="float32",
    )
    found, expected = read_all(tmp_path / "from-adapters"), read_all(tmp_path / "out")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


# -- the streaming writer --------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", ["checkpoint", "adapter", "delta"])
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_weights_of_zero_give_the_base_bit_for_bit(pool, kind, vectors, stored, tmp_path):
    base, sources = pool(kind, vectors, TORCH_DTYPES[stored])
    write_merged(base, open_pool(base, sources), {"ja": 0.0, "math": 0.0}, tmp_path / "out")
    assert_same_bits(read_all(tmp_path / "out"), read_all(base.path))


@pytest.mark.parametrize("engine", ["native", "mergekit"])
def test_weights_of_zero_keep_the_sign_of_negative_zeros(
    make_base, make_tuned, tokenizer, tmp_path, engine
):
    tensors = load_file(make_base("llama").path / "model.safetensors")
    for tensor in tensors.values():
        tensor.view(-1)[::3] = -0.0
    AutoModelForCausalLM.from_pretrained(make_base("llama").path).config.save_pretrained(
        tmp_path / "base"
    )
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(tmp_path / "base")
    tuned = make_tuned(ResolvedModel(tmp_path / "base", "base"), "llama", 1)
    config = optimer_config(str(tmp_path / "base"), {"v": str(tuned)}, {"v": 0.0}, "bfloat16")
    assert_same_bits(merged_by(config, tmp_path / "out", engine), tensors)


def test_a_written_model_loads_with_its_tokenizer(pool, kind, tokenizer, tmp_path):
    base, sources = pool(kind, "adapter", torch.bfloat16)
    write_merged(base, open_pool(base, sources), {"ja": 0.7, "math": 0.2}, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert_same_bits(
        {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name in Checkpoint(base.path).names
        },
        read_all(tmp_path / "out"),
    )
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("aé").input_ids == tokenizer("aé").input_ids
    )
    assert model(torch.tensor([[2, 70, 71]])).logits.isfinite().all()


def test_a_stored_copy_of_a_tied_head_stays_tied(make_base, make_adapter, tmp_path):
    made = make_base("gemma")
    shutil.copytree(made.path, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    base = ResolvedModel(tmp_path / "base", "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on adapting one half of a tied pair
        options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
        adapter = make_adapter(made, 1, **options)
    vector = open_vector("v", str(adapter), base)
    write_merged(base, [vector], {"v": 1.0}, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    embedding = loaded.get_input_embeddings().weight
    assert loaded.get_output_embeddings().weight is embedding
    assert not torch.equal(embedding, tensors["lm_head.weight"])
    resident = ResidentModel(base, [vector], dtype="bfloat16")
    resident.set_weights({"v": 1.0})
    assert torch.equal(resident.model.get_input_embeddings().weight, embedding)


def test_another_output_dtype_is_what_the_config_says_and_what_loads(pool, tmp_path):
    base, sources = pool("gemma", "checkpoint", torch.float32)
    write_merged(
        base,
        open_pool(base, sources),
        {"ja": 0.7, "math": 0.2},
        tmp_path / "out",
        out_dtype="float16",
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float16
    assert {tensor.dtype for tensor in read_all(tmp_path / "out").values()} == {torch.float16}


def test_shards_hold_the_bits_of_the_single_file_and_load(pool, kind, tmp_path):
    base, sources = pool(kind, "checkpoint", torch.bfloat16)
    weights = {"ja": 0.7, "math": 0.2}
    write_merged(base, open_pool(base, sources), weights, tmp_path / "one")
    write_merged(base, open_pool(base, sources), weights, tmp_path / "many", max_shard_size=20_000)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "many").glob("model-0*-of-*.safetensors"))) > 2
    assert_same_bits(read_all(tmp_path / "many"), read_all(tmp_path / "one"))
    one, many = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("one", "many")
    )
    assert_same_bits(many, one)


def test_small_row_blocks_give_the_same_bits_for_dense_vectors(pool, tmp_path, monkeypatch):
    base, sources = pool("gemma", "checkpoint", torch.bfloat16)
    weights = {"ja": 0.7, "math": 0.2}
    write_merged(base, open_pool(base, sources), weights, tmp_path / "whole")
    monkeypatch.setattr(blocks_module, "CHUNK_ELEMENTS", 100)
    write_merged(base, open_pool(base, sources), weights, tmp_path / "blocks")
    assert_same_bits(read_all(tmp_path / "blocks"), read_all(tmp_path / "whole"))


# -- interruptions ---------------------------------------------------------------------------------


def test_an_error_inside_a_staged_directory_leaves_nothing(tmp_path):
    def fail() -> None:
        with staged_directory(tmp_path / "out") as staging:
            (staging / "half").write_text("half", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_directory_is_refused_before_anything_is_written(pool, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"out: already exists and is not empty"):
        write_merged(base, open_pool(base, sources), {"ja": 1.0, "math": 0.0}, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_disk_that_takes_no_more_leaves_nothing_and_says_so(pool, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    vectors = open_pool(base, sources)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (30_000, limits[1])
    )  # the kernel refuses the bytes beyond, as a full disk
    try:
        with pytest.raises(
            OutputError, match=r"out: writing failed \(File too large\)\. Nothing was left behind"
        ):
            write_merged(base, vectors, {"ja": 1.0, "math": 0.0}, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


STALLING_WRITE = r"""
import sys, time
from pathlib import Path
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.merging.writer import write_merged
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.vector import CheckpointVector

class Stalling(CheckpointVector):
    def delta(self, name, rows, device):
        if name == "model.layers.1.mlp.up_proj.weight":
            sys.stdout.write("in the middle\n")  # print writes the end of the line by itself
            sys.stdout.flush()
            time.sleep(600)
        return super().delta(name, rows, device)

what, base, tuned, out = sys.argv[1], *map(Path, sys.argv[2:])
vector = open_vector("ja", str(tuned), ResolvedModel(base, "base"))
stalling = Stalling(vector.name, vector.tuned, vector.names)
if what == "merge":
    write_merged(ResolvedModel(base, "base"), [stalling], {"ja": 1.0}, out, max_shard_size=8000)
else:
    import optimer_hf.vectors.delta
    # stall in the writing that follows
    optimer_hf.vectors.delta.norms = lambda vector, base: (1.0, 0.1)
    extract(stalling, ResolvedModel(base, "base"), out, dtype=what, max_shard_size=8000)
"""


@pytest.mark.parametrize("what", ["merge", "bfloat16", "int8"])
def test_a_killed_write_leaves_no_output_and_can_be_run_again(pool, what, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    out = tmp_path / "out"
    arguments = [what, str(base.path), str(sources["ja"]), str(out)]
    command = [sys.executable, "-c", STALLING_WRITE, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first_line = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        assert first_line == "in the middle\n"
        assert process.wait(timeout=10) == -signal.SIGKILL
    assert not out.exists()
    left = list(tmp_path.rglob("*.safetensors"))
    assert left, "the process was killed before it wrote anything"
    vector = open_vector("ja", str(sources["ja"]), base)
    if what == "merge":
        write_merged(base, [vector], {"ja": 1.0}, out, max_shard_size=8000)
        assert_same_bits(read_all(out), read_all(sources["ja"]))
    else:
        extract(vector, base, out, dtype=what, max_shard_size=8000)
        assert open_vector("ja", str(out), base).names == vector.names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- merge configs ---------------------------------------------------------------------------------


def optimer_yaml(**changes) -> dict:
    models = [{"model": "./tuned", "parameters": {"weight": 0.5}}]
    return {
        "merge_method": "optimer",
        "base_model": "./base",
        "models": models,
        "dtype": "bfloat16",
    } | changes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            optimer_yaml(paramters={}),
            r"c\.yml:8: unknown field 'paramters'.*Did you mean 'parameters'\?",
        ),
        (
            optimer_yaml(models=[{"modle": "./tuned"}]),
            r"models\.0: unknown field 'modle'.*Did you mean 'model'\?",
        ),
        (
            optimer_yaml(models=[{"model": "a", "weight": 1}]),
            r"models\.0: unknown field 'weight'.*Put it under `parameters:`",
        ),
        (optimer_yaml(models=[{"parameters": {}}]), r"models\.0: field 'model' is missing"),
        (optimer_yaml(models=["./tuned"]), r"models\.0: found './tuned', expected a mapping"),
        (optimer_yaml(models=[{"model": 5}]), r"models\.0\.model: found 5, expected a path"),
        (optimer_yaml(dtype="bfloat61"), r"c\.yml:\d+: dtype: found .*Did you mean 'bfloat16'\?"),
        (
            optimer_yaml(models=[{"modle": "./tuned"}], dtyp="float32"),
            r"c\.yml:\d+: unknown field 'dtyp'.*\n.*c\.yml:\d+: models\.0: unknown field 'modle'",
        ),
        (
            {"base_model": "./base", "models": []},
            r"field 'merge_method' is missing.*merge_method: optimer",
        ),
    ],
)
def test_unknown_and_missing_fields_are_errors_with_a_suggestion(tmp_path, config, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        read_merge_config(write_config(tmp_path / "c.yml", config))


@pytest.mark.parametrize("engine", ["native", "mergekit"])
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"wieght": 1.0},
            r"c\.yml:6: models\.0\.parameters: unknown field 'wieght'.*Did you mean 'weight'\?",
        ),
        ({}, r"tuned: parameters\.weight is missing"),
        ({"weight": "x"}, r"models\.0\.parameters\.weight: found 'x', expected a number"),
    ],
)
def test_a_vector_without_its_weight_is_an_error_for_both_engines(
    tmp_path, engine, parameters, message
):
    path = write_config(
        tmp_path / "c.yml", optimer_yaml(models=[{"model": "./tuned", "parameters": parameters}])
    )
    with pytest.raises(ConfigError, match=message):
        merge(path, tmp_path / "out", engine=engine)
    assert not (tmp_path / "out").exists()


BASE = "google/gemma-3-270m"


def test_the_vector_of_base_plus_adapter_is_the_adapter(tmp_path):
    texts = [f"{BASE}+you/lora", f"{BASE}+./lora", "./a+b", BASE]
    (tmp_path / "a+b").mkdir()  # a path that exists wins
    config = {"base_model": BASE, "models": [{"model": text} for text in texts]}
    local = {"lora-2": str(tmp_path / "lora"), "a+b": str(tmp_path / "a+b")}
    expected = {"lora": "you/lora"} | local
    assert pool_to_search(config, tmp_path / "c.yml") == (BASE, expected)
    models = [{"model": "./a+b+you/lora"}]
    base, sources = pool_of({"base_model": "./a+b", "models": models}, tmp_path / "c.yml")
    assert (base, sources) == (str(tmp_path / "a+b"), {"lora": "you/lora"})


@pytest.mark.parametrize(
    ("field", "base", "model"),
    [("models.0.model", BASE, "google/other+you/lora"), ("base_model", f"{BASE}+you/lora", "a/b")],
)
def test_an_adapter_of_another_model_is_no_vector(tmp_path, field, base, model):
    path = write_config(
        tmp_path / "c.yml", optimer_yaml(base_model=base, models=[{"model": model}])
    )
    config = read_merge_config(path)
    with pytest.raises(
        ConfigError, match=rf"{field}: found .*another model than base_model.*Merge"
    ):
        pool_to_search(config, path)
    assert linear_merge_of(config, path) is None  # mergekit merges it first


def test_base_plus_adapter_is_merged_as_the_adapter_is(pool, tmp_path):
    base, sources = pool("llama", "adapter", torch.float32)
    other, _ = pool("llama", "checkpoint", torch.float32)
    weights = {"ja": 0.5, "math": -0.25}
    plain = {name: str(path) for name, path in sources.items()}
    layered = {name: f"{base.path}+{path}" for name, path in sources.items()}
    config = optimer_config(str(base.path), layered, weights, "float32")
    plain_config = optimer_config(str(base.path), plain, weights, "float32")
    found = merged_by(config, tmp_path / "a", "native")
    assert_same_bits(found, merged_by(plain_config, tmp_path / "b", "native"))
    shutil.copytree(other.path, tmp_path / "other")
    config["models"][0]["model"] = f"{tmp_path / 'other'}+{sources['ja']}"
    with pytest.raises(ConfigError, match=r"other\+.*Give --lora-merge-cache DIR"):
        merged_by(config, tmp_path / "c")


def test_a_config_without_base_or_models_is_an_error(tmp_path):
    path = tmp_path / "c.yml"
    with pytest.raises(ConfigError, match="field 'base_model' is missing"):
        pool_of({"models": [{"model": "a/b"}]}, path)
    with pytest.raises(ConfigError, match="found only the base"):
        pool_of({"base_model": "a/b", "models": [{"model": "a/b"}]}, path)
    with pytest.raises(ConfigError, match="slices: has weights for each layer"):
        pool_of({"base_model": "a/b", "slices": [{"sources": [{"model": "a/c"}]}]}, path)


def test_vectors_are_named_by_the_last_part_of_their_path(tmp_path):
    models = [{"model": text} for text in ("org/ja@main", "./x/ja", "./x/math", "org/base")]
    base, sources = pool_of({"base_model": "org/base", "models": models}, tmp_path / "c.yml")
    assert base == "org/base"
    assert sources == {
        "ja": "org/ja@main",
        "ja-2": str(tmp_path / "x/ja"),
        "math": str(tmp_path / "x/math"),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"merge_method": "ties"},
        {"tokenizer_source": "union"},
        {"models": [{"model": "./tuned", "parameters": {"weight": [0.0, 1.0]}}]},
        {"dtype": "bfloat16", "out_dtype": "float32"},
    ],
)
def test_what_only_mergekit_can_do_is_not_taken_by_the_writer(tmp_path, changes):
    path = write_config(tmp_path / "c.yml", optimer_yaml(**changes))
    assert linear_merge_of(read_merge_config(path), path) is None
    with pytest.raises(ConfigError, match="only mergekit can run"):
        merge(path, tmp_path / "out", engine="native")


def test_the_engine_follows_the_config_and_the_options(pool, tmp_path):
    from mergekit.options import MergeOptions

    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    config = optimer_config(str(base.path), {"ja": str(sources["ja"])}, {"ja": 0.5}, "bfloat16")
    path = write_config(tmp_path / "c.yml", config)
    assert merge(path, tmp_path / "a") == "native"
    assert (tmp_path / "a" / "mergekit_config.yml").read_text(encoding="utf-8") == path.read_text(
        encoding="utf-8"
    )
    assert (
        merge(path, tmp_path / "b", options=MergeOptions(quiet=True, out_shard_size=20_000))
        == "native"
    )
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert (
        merge(path, tmp_path / "c", options=MergeOptions(quiet=True, clone_tensors=True))
        == "mergekit"
    )
    assert_same_bits(read_all(tmp_path / "c"), read_all(tmp_path / "a"))


def test_paths_in_a_config_are_seen_from_its_folder(pool, tmp_path, monkeypatch):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    (tmp_path / "base").symlink_to(base.path)
    (tmp_path / "tuned").symlink_to(sources["ja"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for prefix in ("./", ""):
        models = [{"model": f"{prefix}tuned", "parameters": {"weight": 1.0}}]
        config = optimer_yaml(base_model=f"{prefix}base", models=models)
        path = write_config(tmp_path / "c.yml", config)
        for engine in ("native", "mergekit"):
            out = tmp_path / f"{engine}{len(prefix)}"
            merge(path, out, engine=engine)
            assert_same_bits(read_all(out), read_all(sources["ja"]))


def test_a_config_mergekit_refuses_is_an_error_that_names_the_file(pool, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    config = optimer_config(str(base.path), {"ja": str(sources["ja"])}, {"ja": 0.5}, "bfloat16")
    path = write_config(tmp_path / "c.yml", config | {"merge_method": "optimizer"})
    with pytest.raises(ConfigError, match=r"c\.yml:1: mergekit has no .*Did you mean 'optimer'\?"):
        merge(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_is_named_before_mergekit_asks_the_hub(pool, tmp_path):
    models = [{"model": str(tmp_path / "gone"), "parameters": {"weight": 1.0}}]
    base, _ = pool("llama", "checkpoint", torch.float32)
    config = optimer_yaml(base_model=str(base.path), models=models, merge_method="ties")
    expected = r"c\.yml:\d+: models\.0\.model: .*gone: no such file or directory\.$"
    with pytest.raises(ConfigError, match=expected):
        merge(write_config(tmp_path / "c.yml", config), tmp_path / "out")


def test_a_merge_with_a_nan_weight_is_refused(pool, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    config = optimer_config(
        str(base.path), {"ja": str(sources["ja"])}, {"ja": math.nan}, "bfloat16"
    )
    with pytest.raises(ConfigError, match=r"models\.0\.parameters\.weight: found nan"):
        merge(write_config(tmp_path / "c.yml", config), tmp_path / "out")


# -- what only mergekit does -----------------------------------------------------------------------


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


def test_filtered_weights_reach_their_tensors(pool, kind, tmp_path):
    base, sources = pool(kind, "checkpoint", torch.bfloat16)
    filtered = [{"filter": "mlp", "value": 0.5}, {"filter": "self_attn", "value": 0.25}]
    models = optimer_models(
        sources, ja={"weight": [*filtered, {"value": 0.0}]}, math={"weight": 0.125}
    )
    config = optimer_yaml(base_model=str(base.path), models=models, dtype="float32")
    found = merged_by(config | {"out_dtype": "bfloat16"}, tmp_path / "out")

    def weight_of(vector: str, name: str) -> float:
        if vector == "math":
            return 0.125
        return 0.5 if "mlp" in name else 0.25 if "self_attn" in name else 0.0

    assert_same_bits(found, expected_merge(base.path, sources, weight_of))


def test_a_gradient_list_runs_from_the_first_layer_to_the_last(pool, kind, tmp_path):
    base, sources = pool(kind, "checkpoint", torch.bfloat16)
    models = optimer_models(sources, ja={"weight": [0.0, 1.0]}, math={"weight": 0.0})
    config = optimer_yaml(base_model=str(base.path), models=models, dtype="float32")
    found = merged_by(config | {"out_dtype": "bfloat16"}, tmp_path / "out")
    expected = expected_merge(
        base.path, sources, lambda vector, name: float(vector == "ja" and ".layers.1." in name)
    )
    inside = {name: tensor for name, tensor in expected.items() if ".layers." in name}
    assert_same_bits({name: found[name] for name in inside}, inside)


def test_slices_take_layers_from_their_models(pool, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    layer = [
        {"model": str(base.path), "layer_range": [1, 2]},
        {
            "model": str(sources["ja"]),
            "layer_range": [1, 2],
            "parameters": {"weight": 0.5},
        },
    ]
    config = {
        "merge_method": "optimer",
        "base_model": str(base.path),
        "slices": [{"sources": layer}],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    found = merged_by(config, tmp_path / "out", "mergekit")
    whole = expected_merge(base.path, {"ja": sources["ja"]}, lambda vector, name: 0.5)
    name = "model.layers.{}.mlp.up_proj.weight"
    assert_same_bits({"x": found[name.format(0)]}, {"x": whole[name.format(1)]})
    assert name.format(1) not in found


def test_added_tokens_are_refused_with_the_way_and_mergekit_goes_it(
    make_base, save_model, tokenizer, tmp_path
):
    base = make_base("llama")
    model = AutoModelForCausalLM.from_pretrained(base.path)
    model.resize_token_embeddings(len(tokenizer) + 1)
    tuned = save_model(model, "larger")
    larger = AutoTokenizer.from_pretrained(tuned)
    larger.add_tokens(["<new>"])
    larger.save_pretrained(tuned)
    config = optimer_config(str(base.path), {"it": str(tuned)}, {"it": 0.5}, "bfloat16")
    with pytest.raises(ModelError, match=r"vocabularies differ.*`tokenizer:`"):
        merged_by(config, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    merged_by(config | {"tokenizer": {"source": "union"}}, tmp_path / "out", "mergekit")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.get_input_embeddings().weight.shape[0] >= len(tokenizer) + 1
    assert "<new>" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["models"][0]["parameters"].update(wieght=1), r"unknown field 'wieght'"),
        (lambda c: c.update(parameters={"normalise": True}), r"unknown field 'normalise'"),
        (lambda c: c.update(tokenizer={"sourse": "base"}), r"tokenizer: unknown field 'sourse'"),
        (lambda c: c.update(tokenizer={"source": "base", "pad": 1}), r"unknown field 'pad'"),
        (lambda c: c["models"].append("x"), r"models\.2: found 'x'"),
        (lambda c: c.update(models=5), r"models: found 5, expected a list"),
    ],
)
def test_a_key_that_mergekit_would_drop_is_refused_at_any_depth(pool, change, message, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    texts = {name: str(path) for name, path in sources.items()}
    config = optimer_config(str(base.path), texts, {"ja": 0.5, "math": 0.5}, "bfloat16")
    config["merge_method"] = "ties"
    for model in config["models"]:
        model["parameters"]["density"] = 0.5
    merged_by(config, tmp_path / "good")
    change(config)
    with pytest.raises(ConfigError, match=message):
        merged_by(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_slices_with_a_misspelt_key_are_refused(pool, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    source = {"model": str(sources["ja"]), "layer_range": [0, 2], "layer_rnage": [0, 1]}
    config = {
        "merge_method": "passthrough",
        "base_model": str(base.path),
        "slices": [{"sources": [source]}],
        "dtype": "bfloat16",
    }
    with pytest.raises(ConfigError, match=r"slices\.0\.sources\.0: unknown field 'layer_rnage'"):
        merged_by(config, tmp_path / "out")


def test_a_base_that_is_no_model_is_refused_before_anything_is_written(pool, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    shutil.copytree(base.path, tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    _, deltas = pool("llama", "delta", torch.bfloat16)
    for path, message in (
        (tmp_path / "base", "no config.json"),
        (deltas["ja"], "is a delta, not a model"),
    ):
        config = optimer_config(str(path), {"ja": str(sources["ja"])}, {"ja": 0.5}, "bfloat16")
        with pytest.raises(ModelError, match=message):
            merged_by(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("declared", [True, False])
def test_a_delta_directory_of_somebody_else_is_declared_in_the_config(pool, declared, tmp_path):
    base, sources = pool("llama", "delta", torch.bfloat16)
    shutil.copytree(sources["ja"], tmp_path / "delta")
    (tmp_path / "delta" / "vector.json").unlink()
    models = optimer_models({"ja": tmp_path / "delta"}, ja={"weight": 0.5, "delta": declared})
    config = optimer_yaml(base_model=str(base.path), models=models, dtype="float32")
    found = merged_by(config | {"out_dtype": "bfloat16"}, tmp_path / "out")
    ours = optimer_config(str(base.path), {"ja": str(sources["ja"])}, {"ja": 0.5}, "bfloat16")
    same = merged_by(ours, tmp_path / "ours", "native")
    assert all(torch.equal(bits(found[name]), bits(same[name])) for name in same) == declared


def test_an_int8_delta_is_merged_by_the_writer_and_refused_for_mergekit(pool, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    extract(open_vector("ja", str(sources["ja"]), base), base, tmp_path / "ja", dtype="int8")
    config = optimer_config(str(base.path), {"ja": str(tmp_path / "ja")}, {"ja": 0.5}, "float32")
    found = merged_by(config, tmp_path / "out")
    exact = optimer_config(str(base.path), {"ja": str(sources["ja"])}, {"ja": 0.5}, "float32")
    for name, tensor in merged_by(exact, tmp_path / "exact").items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-4)
    with pytest.raises(ModelError, match=r"an int8 delta, which mergekit cannot read"):
        merged_by(config, tmp_path / "theirs", "mergekit")


def test_an_adapter_is_refused_for_mergekit_with_the_way_round(pool, tmp_path):
    base, sources = pool("llama", "adapter", torch.bfloat16)
    config = optimer_config(str(base.path), {"ja": str(sources["ja"])}, {"ja": 0.5}, "float32")
    config["models"][0]["parameters"]["weight"] = [0.2, 0.8]
    with pytest.raises(ModelError, match=r"an adapter, which mergekit .*`optimer extract"):
        merged_by(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["base", "the base by name"])
def test_the_base_named_as_the_tokenizer_is_what_the_writer_does_anyway(pool, tmp_path, source):
    base, sources = pool("llama", "adapter", torch.bfloat16)
    config = optimer_config(str(base.path), {"ja": str(sources["ja"])}, {"ja": 0.5}, "float32")
    named = "base" if source == "base" else str(base.path)
    found = merged_by(config | {"tokenizer_source": named}, tmp_path / "out", "native")
    assert_same_bits(found, merged_by(config, tmp_path / "plain"))


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "of somebody else"])
def test_a_delta_directory_is_searched_with_our_record_only(pool, tmp_path, ours):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    extract(open_vector("ja", str(sources["ja"]), base), base, tmp_path / "ja")
    if not ours:
        (tmp_path / "ja" / "vector.json").unlink()
    models = [{"model": "./ja", "parameters": {"weight": 0.5, "delta": True}}]
    config = optimer_yaml(base_model=str(base.path), models=models)
    path = write_config(tmp_path / "c.yml", config)
    if ours:
        assert pool_to_search(config, path)[1] == {"ja": str(tmp_path / "ja")}
        return
    with pytest.raises(ConfigError, match=r"c\.yml: models: \./ja: parameters\.delta: .*extract"):
        pool_to_search(config, path)


def test_a_search_names_what_it_does_not_keep_of_a_config():
    config = optimer_yaml(
        merge_method="ties",
        parameters={"density": 0.5, "weight": 1.0},
        models=[
            {"model": "a", "parameters": {"weight": [0, 1]}},
            {"model": "b", "parameters": {"weight": 0.5, "delta": True}},
            {"model": "c", "parameters": {"weight": [{"filter": "mlp", "value": 1}], "t": 1}},
            {"model": "d"},
        ],
    )
    assert unsearched_settings(config) == [
        "merge_method: ties",
        "parameters.density",
        "models: a: parameters.weight",
        "models: c: parameters.weight",
        "models: c: parameters.t",
    ]
    assert unsearched_settings(optimer_yaml()) == []


# -- values that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["base", "vector"])
def test_values_that_are_not_finite_are_named_and_nothing_is_written(pool, tmp_path, where, value):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    broken = base.path if where == "base" else sources["math"]
    shutil.copytree(broken, tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    if where == "base":
        base = ResolvedModel(tmp_path / "broken", "broken")
        message = r"base model: tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"
    else:
        sources = sources | {"math": tmp_path / "broken"}
        message = r"vector 'math'.*tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"
    with pytest.raises(ModelError, match=message):
        write_merged(base, open_pool(base, sources), {"ja": 0.5, "math": 0.5}, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_merge_too_large_for_its_dtype_is_refused(pool, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.float32)
    weights = {"ja": 1e7, "math": 0.0}
    with pytest.raises(ModelError, match=r"too large for torch\.float16"):
        write_merged(base, open_pool(base, sources), weights, tmp_path / "out", out_dtype="float16")


def test_a_sum_that_overflows_while_its_values_do_not_is_no_error(make_base, tmp_path):
    tensors = load_file(make_base("llama", torch.float16).path / "model.safetensors")
    tensors["model.embed_tokens.weight"].fill_(6e4)  # finite, but their sum is not in float16
    shutil.copytree(make_base("llama", torch.float16).path, tmp_path / "base")
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    write_merged(ResolvedModel(tmp_path / "base", "base"), [], {}, tmp_path / "out")
    assert_same_bits(read_all(tmp_path / "out"), tensors)
