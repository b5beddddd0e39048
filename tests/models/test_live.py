"""Models as they are loaded: errors name the model, and slow dtypes are avoided."""

import platform
import shutil

import pytest
import torch

from optimer_hf.errors import ModelError
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.live import compute_dtype, empty_model, load_model, load_tokenizer


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("config.json", '{"model_type": "klingon"}', "model"),
        ("tokenizer.json", "{", "tokenizer"),
    ],
)
def test_a_model_that_transformers_cannot_load_is_named(make_base, tmp_path, file, text, what):
    path = tmp_path / "base"
    shutil.copytree(make_base("llama").path, path)
    (path / file).write_text(text)
    load = load_tokenizer if what == "tokenizer" else empty_model
    with pytest.raises(ModelError, match=rf"base: transformers cannot load the {what} \("):
        load(ResolvedModel(path, "base"))
    if what == "model":
        with pytest.raises(ModelError, match="transformers cannot load the model"):
            load_model(ResolvedModel(path, "base"), torch.float32)


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize(
    ("dtype", "flag"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")], ids=["bf16", "fp16"]
)
def test_sixteen_bits_are_multiplied_in_float32_where_the_processor_has_no_kernels(
    monkeypatch, dtype, flag, supported
):
    name = f"_is_mkldnn_{flag}_supported"
    monkeypatch.setattr(torch.ops.mkldnn, name, lambda: supported, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert compute_dtype(dtype, "cpu") == (dtype if supported else torch.float32)
    assert compute_dtype(torch.float32, "cpu") == torch.float32


@pytest.mark.parametrize(
    ("machine", "avx512", "amx", "expected"),
    [
        ("x86_64", False, False, torch.float32),  # AVX-512 alone: oneDNN emulates
        ("AMD64", False, False, torch.float32),
        ("x86_64", True, False, torch.bfloat16),
        ("x86_64", False, True, torch.bfloat16),
        ("aarch64", False, False, torch.bfloat16),
    ],
)
def test_bfloat16_is_multiplied_in_float32_where_it_would_be_emulated(
    monkeypatch, machine, avx512, amx, expected
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert compute_dtype(torch.bfloat16, "cpu") == expected


def test_a_build_without_mkldnn_multiplies_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert compute_dtype(torch.bfloat16, "cpu") == torch.float32
    assert compute_dtype(torch.float32, "cpu") == torch.float32


@pytest.mark.parametrize("supported", [True, False])
def test_an_old_gpu_multiplies_bfloat16_in_float32(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    expected = torch.bfloat16 if supported else torch.float32
    assert compute_dtype(torch.bfloat16, "cuda") == expected
    assert compute_dtype(torch.float16, "cuda") == torch.float16
