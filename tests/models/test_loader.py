"""Code that comes with a model: it is refused by name before anything runs, and never copied."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from optimer_hf.errors import ModelError
from optimer_hf.merging.engines import merge
from optimer_hf.models.layout import ResolvedModel, copy_beside_weights
from optimer_hf.models.live import empty_model, load_model, load_tokenizer
from optimer_hf.models.loader import (
    describe_loading,
    model_with_adapter,
    read_adapter_config,
    read_config,
    read_generation_config,
    read_model,
)
from optimer_hf.models.resolve import resolve_base, resolve_model, resolve_tokenizer
from tests.support.tiny import VOCABULARY, tiny_model

CODE = "import pathlib\npathlib.Path({marker!r}).touch()\nclass Evil:\n    pass\n"
AUTO_MAP = {
    "AutoConfig": "evil.Evil",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", None],
    "AutoProcessor": "evil.Evil",
}


@pytest.fixture
def copied(make_base, tmp_path):
    """Return a function that copies a tiny Llama and sets keys of one of its JSON files."""

    def copy(file: str = "config.json", name: str = "model", **settings: object) -> Path:
        path = tmp_path / name
        shutil.copytree(make_base("llama").path, path)
        data = json.loads((path / file).read_text()) if (path / file).exists() else {}
        (path / file).write_text(json.dumps(data | settings))
        return path

    return copy


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """A file that the code of a model makes, with somebody who answers "y" to every question."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    return tmp_path / "code-ran"


LOADERS = {
    "base": lambda path: resolve_base(str(path)),
    "reference": lambda path: resolve_model(str(path)),
    "tokenizer_source": lambda path: resolve_tokenizer(str(path)),
    "config": read_config,
    "model": lambda path: load_model(ResolvedModel(path, "m"), torch.float32),
    "empty model": lambda path: empty_model(ResolvedModel(path, "m")),
    "tokenizer": lambda path: load_tokenizer(ResolvedModel(path, "m")),
    "adapter config": read_adapter_config,
    "adapter": lambda path: model_with_adapter(tiny_model("llama"), path),
}


# -- code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS.keys())
@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("config.json", {"model_type": "evil"}),
        ("config.json", {}),  # transformers has the architecture itself
        ("tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"}),
        ("processor_config.json", {}),
        ("adapter_config.json", {"peft_type": "LORA"}),
    ],
)
def test_a_model_that_names_code_is_refused_and_the_code_does_not_run(
    copied, marker, load, file, settings
):
    path = copied(file, auto_map=AUTO_MAP, **settings)
    (path / "evil.py").write_text(CODE.format(marker=str(marker)))
    with pytest.raises(ModelError, match=rf"{file}: `auto_map` names code in the model"):
        load(path)
    assert not marker.exists()


def test_code_in_another_repository_is_refused(copied):
    path = copied(auto_map={"AutoConfig": "some-org/some-repo--evil.Evil"})
    with pytest.raises(ModelError, match=r"`auto_map` names code .*some-org/some-repo--evil"):
        resolve_tokenizer(str(path))


def test_an_alternative_config_that_transformers_would_read_is_checked_too(copied):
    path = copied(configuration_files=["config.4.0.0.json"])
    (path / "config.4.0.0.json").write_text('{"auto_map": {"AutoConfig": "evil.Evil"}}')
    with pytest.raises(ModelError, match=r"config\.4\.0\.0\.json: `auto_map` names code"):
        read_config(path)


@pytest.mark.parametrize(
    ("file", "settings", "named"),
    [
        ("config.json", {"attn_implementation": "some-org/kernel"}, "some-org/kernel"),
        ("config.json", {"_attn_implementation": "sdpa|some-org/kernel:f"}, "some-org/kernel"),
        ("config.json", {"experts_implementation": {"": "some-org/kernel"}}, "some-org/kernel"),
        ("adapter_config.json", {"megatron_config": {"a": 1}, "megatron_core": "evil"}, "evil"),
    ],
)
def test_kernels_and_modules_that_a_config_names_are_refused(copied, file, settings, named):
    with pytest.raises(ModelError, match=rf"{file}: names code to load .*{named}"):
        resolve_model(str(copied(file, **settings)))


@pytest.mark.parametrize("engine", ["native", "mergekit"])
@pytest.mark.parametrize("role", ["base_model", "model", "tokenizer"])
def test_optimer_merge_refuses_models_that_name_code(copied, marker, tmp_path, engine, role):
    path = copied(auto_map=AUTO_MAP)
    (path / "evil.py").write_text(CODE.format(marker=str(marker)))
    used = {
        key: str(path if key == role else copied(name=f"good-{key}"))
        for key in ("base_model", "model", "tokenizer")
    }
    (tmp_path / "merge.yml").write_text(
        json.dumps(
            {
                "merge_method": "optimer" if engine == "native" else "task_arithmetic",
                "base_model": used["base_model"],
                "models": [{"model": used["model"], "parameters": {"weight": 0.5}}],
                "tokenizer_source": used["tokenizer"],
            }
        )
    )
    with pytest.raises(ModelError, match="`auto_map` names code"):
        merge(tmp_path / "merge.yml", tmp_path / "out")
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_code_beside_a_model_is_not_copied(copied, tmp_path):
    path = copied()
    for name in ("tokenizer_evil.py", "tokenizer.pyc", "vocab.so", "chat_template.sh", "model.py"):
        (path / name).write_text("")
    (path / "qwen.tiktoken").write_text("")
    out = tmp_path / "out"
    out.mkdir()
    copy_beside_weights(path, out)
    names = {file.name for file in out.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "tokenizer_config.json", "qwen.tiktoken"}
    assert {Path(name).suffix for name in names} == {".json", ".tiktoken"}


# -- damage ----------------------------------------------------------------------------------------

DAMAGED = {
    "empty": b"",
    "list": b"[1]",
    "text": b"hello",
    "null": b"null",
    "not UTF-8": b'{"a": "\xff"}',
    "deep": b'{"a": ' * 100_000,
    "long number": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_damaged_config_is_named(copied, file, content):
    path = copied()
    (path / file).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{file}: (cannot be read as JSON|found .* expected)"):
        resolve_model(str(path))
    if file == "generation_config.json":
        with pytest.raises(ModelError, match=file):
            read_generation_config(path)


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_tokenizer_is_named(copied, content):
    path = copied()
    (path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(ResolvedModel(path, "m"))


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": {}},
        {"max_new_tokens": "many"},
        {"do_sample": []},
        {"stop_strings": 3},
        {"watermarking_config": 7},
        {"cache_implementation": "evil"},
    ],
)
def test_a_generation_config_with_other_types_is_read_or_named(copied, settings):
    path = copied("generation_config.json", **settings)
    try:
        read_generation_config(path)
    except ModelError as error:
        assert "generation_config.json" in str(error)


@pytest.mark.parametrize(
    ("key", "number"),
    [
        ("num_labels", 10_000_000),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -(10**9)),
        ("vocab_size", 2**40),
        ("hidden_size", 2**62),
        ("num_attention_heads", 10**8),
        ("max_position_embeddings", 10**12),
    ],
)
def test_a_config_with_an_absurd_number_is_refused_before_anything_is_built(copied, key, number):
    with pytest.raises(ModelError, match=rf"{key}: found .*, expected at most"):
        empty_model(ResolvedModel(copied(**{key: number}), "m"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "32"),
        ("hidden_size", [32]),
        ("num_hidden_layers", None),
        ("rope_theta", "fast"),
        ("hidden_act", "evil"),
        ("dtype", "float33"),
        ("torch_dtype", 7),
        ("rope_scaling", {"rope_type": "evil"}),
        ("quantization_config", {"quant_method": "evil"}),
        ("architectures", 3),
        ("id2label", [1]),
        ("vocab_size", -1),
        ("num_attention_heads", 0),
        ("num_hidden_layers", 3),  # its weights are not in the file
        ("vocab_size", 2**20),
        ("intermediate_size", 2**20),
    ],
)
def test_a_config_that_does_not_fit_is_refused_or_changes_nothing(copied, key, value):
    path = copied(**{key: value})
    expected = load_model(resolve_base(str(copied(name="good"))), torch.float32)
    try:
        model = read_model(path, dtype=torch.float32)
    except ModelError as error:
        assert str(path) in str(error)
        return
    ids = torch.arange(3, 30).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_a_missing_weight_is_named_and_not_filled_at_random(copied):
    with pytest.raises(ModelError, match=r"lacks the tensor 'model\.layers\.2\..*9 in all"):
        read_model(copied(num_hidden_layers=3))


def test_a_config_that_names_another_weights_file_is_refused(make_base, tmp_path):
    shutil.copytree(make_base("llama").path, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    settings = json.loads(config.read_text()) | {"transformers_weights": "other.safetensors"}
    config.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="`transformers_weights` names a weights file"):
        resolve_base(str(tmp_path / "base"))


def test_a_class_that_transformers_lacks_is_loaded_as_a_causal_model(make_base, tmp_path):
    shutil.copytree(make_base("llama").path, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    named = {"architectures": ["LlamaForCausalLMWithValueHead"]}  # TRL's
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    assert describe_loading(tmp_path / "base").missing == frozenset()


KINDS = {
    "t5": (
        lambda: transformers.T5Config(
            vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
        ),
        "is a t5 model, which reads its input with an encoder",
    ),
    "clip": (
        lambda: transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ),
        "is a clip_vision_model model, which does not write text",
    ),
}


@pytest.mark.parametrize("load", [read_model, lambda path: empty_model(ResolvedModel(path, "m"))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_does_not_continue_a_text_is_refused_by_its_kind(tmp_path, kind, load):
    make, named = KINDS[kind]
    transformers.AutoModel.from_config(make()).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=named):
        load(tmp_path / "model")
