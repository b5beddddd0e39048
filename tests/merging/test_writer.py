"""Merges on disk: the bits, the files, and what a failed write leaves."""

import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimer_hf.errors import ModelError, OutputError
from optimer_hf.files.staging import staged_directory
from optimer_hf.merging.mergekit_pool import (
    optimer_config,
    vanilla_config,
)
from optimer_hf.merging.resident import ResidentModel
from optimer_hf.merging.shared_pool import SharedPool
from optimer_hf.merging.writer import write_merged
from optimer_hf.models import blocks as blocks_module
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.names import views_in
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector
from tests.support.merges import (
    TORCH_DTYPES,
    assert_same_bits,
    merged_by,
    open_pool,
    read_all,
)
from tests.support.tiny import GROUPED, qwen35_multimodal, ulps_apart

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


@pytest.mark.parametrize("weights", [*WEIGHTS_UP_TO_TWO, {"ja": 9.0, "math": -7.0}])
@pytest.mark.parametrize("vectors", ["checkpoint", "delta"])
def test_exports_for_unmodified_mergekit_are_within_one_ulp(pool, kind, vectors, weights, tmp_path):
    base, sources = pool(kind, vectors, torch.bfloat16)
    texts = {name: str(path) for name, path in sources.items()}
    ours = merged_by(
        optimer_config(str(base.path), texts, weights, "bfloat16"), tmp_path / "ours", "native"
    )
    export = vanilla_config(
        str(base.path), texts, weights, "bfloat16", dict.fromkeys(texts, vectors)
    )
    assert export is not None
    assert export["merge_method"] == {"delta": "linear"}.get(vectors, "task_arithmetic")
    theirs = merged_by(export, tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
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
    tensors, expected = read_all(tmp_path / "from-adapters"), read_all(tmp_path / "out")
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-6)


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


def test_the_parts_of_a_multimodal_model_are_said_to_have_the_output_dtype(save_model, tmp_path):
    """Their class loads the language part alone, whose own dtype counts then."""
    model = transformers.Qwen3_5ForConditionalGeneration(qwen35_multimodal())
    base = ResolvedModel(save_model(model.to(torch.bfloat16), "multimodal"), "base")
    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["torch_dtype"] = "bfloat16"
    (base.path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_merged(base, [], {}, tmp_path / "out", out_dtype="float32")
    for cls in (AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        assert cls.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_only_the_parts_of_a_config_get_the_output_dtype_at_any_depth(make_base, tmp_path):
    shutil.copytree(make_base("llama").path, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    written = {"dtype": "bfloat16"}
    deep = {"text_config": {"torch_dtype": "bfloat16"}, "quantization_config": written}
    others = {"thinker_config": deep, "vision_config": {"depth": 1}, "notes": written}
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | others))
    base = ResolvedModel(tmp_path / "base", "base")
    write_merged(base, [], {}, tmp_path / "out", out_dtype="float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32"
    assert config["thinker_config"] == {
        "text_config": {"dtype": "float32"},
        "quantization_config": written,
    }
    assert (config["vision_config"], config["notes"]) == ({"depth": 1}, written)


def test_a_merge_keeps_every_chat_template(make_base, tmp_path):
    source = make_base("llama")
    shutil.copytree(source.path, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    tokenizer.save_pretrained(tmp_path / "base")
    write_merged(ResolvedModel(tmp_path / "base", "base"), [], {}, tmp_path / "out")
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.chat_template == {"default": "plain", "tool_use": "with tools"}


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
from optimer_hf.merging.shared_pool import SharedPool
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
    optimer_hf.vectors.delta.measure_norms = lambda vector, base: (1.0, 0.1)
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


ROUTED = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
WIDE_PARTS = {  # class, its config, the dtype, and what transformers keeps in float32 then
    "router of GLM 4.5": (
        "Glm4MoeForCausalLM",
        lambda: transformers.Glm4MoeConfig(**GROUPED, **ROUTED, head_dim=8),
        "bfloat16",
        "e_score_correction_bias",
    ),
    "router of DeepSeek V3": (
        "DeepseekV3ForCausalLM",
        lambda: transformers.DeepseekV3Config(
            **GROUPED, **ROUTED, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8
        ),
        "float16",
        "e_score_correction_bias",
    ),
    "norms of gpt-oss": (
        "GptOssForCausalLM",
        lambda: transformers.GptOssConfig(
            **GROUPED, head_dim=8, num_local_experts=3, num_experts_per_tok=2
        ),
        "float16",
        "norm",
    ),
    "router of HunYuan": (
        "HunYuanMoEV1ForCausalLM",
        lambda: transformers.HunYuanMoEV1Config(
            **GROUPED, head_dim=8, num_experts=3, moe_topk=2, moe_intermediate_size=16
        ),
        "bfloat16",
        "mlp.gate.wg.weight",
    ),
}


@pytest.fixture(params=WIDE_PARTS.values(), ids=WIDE_PARTS.keys())
def wide_part(request, tmp_path):
    """A base in float32, a fine-tune, an adapter, the dtype and what is kept in float32."""
    name, config, dtype, kept = request.param
    torch.manual_seed(0)
    model = getattr(transformers, name)(config())
    for folder in ("base", "tuned"):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(0.1 * torch.rand_like(tensor))
        model.save_pretrained(tmp_path / folder)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    return ResolvedModel(tmp_path / "base", "base"), dtype, kept


@pytest.mark.parametrize("source", ["tuned", "adapter"])
@pytest.mark.parametrize("held", ["as asked", "float32"])
def test_what_a_class_keeps_in_float32_is_not_rounded(
    wide_part, source, held, tmp_path, monkeypatch
):
    base, dtype, kept = wide_part
    origin = tmp_path / ("tuned" if source == "tuned" else "base")
    cls = transformers.AutoModelForCausalLM  # as transformers loads and saves it in that dtype
    cls.from_pretrained(origin, dtype=TORCH_DTYPES[dtype]).save_pretrained(tmp_path / "expected")
    expected = read_all(tmp_path / "expected")
    vectors = open_pool(base, {"v": tmp_path / source})
    write_merged(base, vectors, {"v": 1.0}, tmp_path / "out", out_dtype=dtype)
    written = read_all(tmp_path / "out")
    wide = [name for name in expected if kept in name]
    assert wide
    assert {expected[name].dtype for name in wide} == {torch.float32}
    for name in wide:
        assert torch.equal(written[name], expected[name]), name
    assert {str(written[name].dtype) for name in written.keys() - {*wide}} == {f"torch.{dtype}"}

    chosen = TORCH_DTYPES[dtype] if held == "as asked" else torch.float32
    monkeypatch.setattr("optimer_hf.merging.resident.compute_dtype", lambda dtype, device: chosen)
    resident = ResidentModel(base, vectors, dtype=dtype)
    resident.set_weights({"v": 1.0})
    views = views_in(Checkpoint(base.path), resident.model)
    for name, tensor in views.items():
        assert torch.equal(tensor.float(), written[name].float()), name
    pool = SharedPool(base, vectors, dtype=dtype, device="cpu")
    assert_same_bits(dict(pool.merged_tensors({"v": 1.0})), {n: written[n] for n in pool.names})
