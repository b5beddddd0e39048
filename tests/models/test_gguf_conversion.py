"""A GGUF file, read back as a directory of safetensors."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimer_hf.errors import ModelError, OutputError
from optimer_hf.files.digest import sha256_file
from optimer_hf.files.paths import cache_dir
from optimer_hf.models.gguf_conversion import convert_gguf
from optimer_hf.models.gguf_record import ConversionRecord
from optimer_hf.models.resolve import resolve_model
from tests.support.gguf import write_llama
from tests.support.tiny import tiny_model

NAMES_OF_MATRICES = {
    "attn_q.weight": "self_attn.q_proj",
    "attn_k.weight": "self_attn.k_proj",
    "attn_v.weight": "self_attn.v_proj",
    "ffn_up.weight": "mlp.up_proj",
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory, gguf_file) -> Path:
    out = tmp_path_factory.mktemp("converted") / "float32"
    convert_gguf(gguf_file, out, dtype="float32")
    return out


def test_a_gguf_file_in_f32_keeps_its_weights_bit_for_bit(converted):
    tensors = load_file(converted / "model.safetensors")
    expected = tiny_model("llama").state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def values_of_q4_1(blocks: np.ndarray) -> np.ndarray:
    """Blocks of 20 bytes: a float16 scale and minimum, and 32 numbers of four bits."""
    scale, least = (blocks[:, at : at + 2].copy().view("<f2").astype("f4") for at in (0, 2))
    numbers = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return scale * numbers + least


def values_of_q8_0(blocks: np.ndarray) -> np.ndarray:
    """Blocks of 34 bytes: a float16 scale, and 32 signed bytes."""
    return blocks[:, :2].copy().view("<f2").astype("f4") * blocks[:, 2:].view("i1")


@pytest.mark.parametrize(
    ("stored", "n_bytes", "values_of"), [("Q4_1", 20, values_of_q4_1), ("Q8_0", 34, values_of_q8_0)]
)
def test_quantised_matrices_have_the_values_that_their_blocks_say(
    tmp_path, tokenizer, stored, n_bytes, values_of
):
    """Blocks of 32 numbers by the layout in ggml's ggml-common.h. Rows of queries and keys come
    back from the order in which llama.cpp keeps them.
    """
    model = tiny_model("llama")
    kind = GGMLQuantizationType[stored]
    file = write_llama(tmp_path / "q.gguf", model, tokenizer, kind)
    convert_gguf(file, tmp_path / "out", dtype="float32")
    tensors, checked = load_file(tmp_path / "out" / "model.safetensors"), set()
    for tensor in GGUFReader(file).tensors:
        name = NAMES_OF_MATRICES.get(tensor.name.rpartition("blk.0.")[2])
        if name is None:
            continue
        shape = tensor.shape[::-1].tolist()
        values = values_of(np.asarray(tensor.data).reshape(-1, n_bytes)).reshape(shape)
        if n_heads := {"q": 4, "k": 2}.get(name.rpartition(".")[2][0]):
            pairs = values.reshape(n_heads, shape[0] // n_heads // 2, 2, shape[1])
            values = pairs.swapaxes(1, 2).reshape(shape)
        converted = tensors[f"model.layers.0.{name}.weight"].numpy()
        np.testing.assert_array_equal(converted, values.astype("f4"), err_msg=name)
        checked.add(name)
    assert checked == set(NAMES_OF_MATRICES.values())


def test_a_converted_model_loads_and_gives_the_logits_of_the_original(converted):
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)(ids).logits
        expected = tiny_model("llama")(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


def test_a_converted_tokenizer_splits_and_joins_text_as_the_original(converted, tokenizer):
    loaded = AutoTokenizer.from_pretrained(converted)
    text = "The cat, über 日本!"
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert loaded.decode(ids) == text
    assert (loaded.bos_token, loaded.eos_token) == ("<bos>", "<eos>")


def test_the_record_of_a_conversion_has_digests_and_names_the_gguf_file(converted, gguf_file):
    record = ConversionRecord.read(converted / "conversion.json")
    assert record.source == "tiny.gguf"
    assert record.source_sha256 == sha256_file(gguf_file)
    assert record.dtype == "float32"
    assert record.sha256 == {"model.safetensors": sha256_file(converted / "model.safetensors")}
    assert "not the original weights" in record.note


def test_no_file_of_a_conversion_names_a_path_of_this_machine_or_a_quantisation(
    converted, gguf_file
):
    for path in converted.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert str(gguf_file.parent) not in text, path.name
        assert "quantization" not in text, path.name


def test_the_default_dtype_is_bfloat16(gguf_file, tmp_path):
    convert_gguf(gguf_file, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors["lm_head.weight"], tiny_model("llama").lm_head.weight.bfloat16())


def test_a_gguf_reference_is_converted_into_the_cache_once(gguf_file):
    first = resolve_model(str(gguf_file))
    assert first.reference == "tiny.gguf"
    assert first.path.is_relative_to(cache_dir())
    before = (first.path / "conversion.json").stat().st_mtime_ns
    assert resolve_model(str(gguf_file)) == first
    assert (first.path / "conversion.json").stat().st_mtime_ns == before


def test_several_processes_that_need_one_file_share_one_conversion(
    gguf_file, monkeypatch, tmp_path
):
    monkeypatch.setenv("OPTIMER_CACHE", str(tmp_path / "fresh"))
    with ThreadPoolExecutor(4) as executor:  # a lock is held by a file, not by a process
        models = list(executor.map(resolve_model, [str(gguf_file)] * 4))
    assert len(set(models)) == 1
    assert (models[0].path / "conversion.json").exists()
    left = {path.name for path in models[0].path.parent.iterdir()}
    assert left <= {models[0].path.name, f".{models[0].path.name}.lock"}


def test_another_file_of_the_same_name_is_another_conversion(gguf_file, tmp_path, tokenizer):
    other = write_llama(tmp_path / gguf_file.name, tiny_model("llama", seed=1), tokenizer)
    assert resolve_model(str(other)).path != resolve_model(str(gguf_file)).path


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 a zip archive"])
def test_a_file_with_the_wrong_magic_is_refused_and_nothing_is_left_behind(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.gguf: not a GGUF file \(its first four bytes"):
        convert_gguf(path, tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["model.gguf"]


def test_a_gguf_file_of_an_unknown_architecture_is_refused_and_nothing_is_left_behind(tmp_path):
    writer = GGUFWriter(tmp_path / "odd.gguf", "no-such-architecture")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"odd\.gguf: transformers cannot read this GGUF file"):
        convert_gguf(tmp_path / "odd.gguf", tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["odd.gguf"]


def test_a_truncated_gguf_file_is_refused_and_nothing_is_left_behind(gguf_file, tmp_path):
    whole = gguf_file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"cut\.gguf: this GGUF file is cut short or damaged"):
        convert_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["cut.gguf"]


def test_an_output_directory_with_files_is_refused_and_left_alone(gguf_file, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="already exists and is not empty"):
        convert_gguf(gguf_file, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
