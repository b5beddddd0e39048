"""References to models: what they lead to, and what is wrong where they lead to nothing."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from optimer_hf.errors import ConfigError, ModelError
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.layout import ResolvedModel, weight_digests
from optimer_hf.models.live import empty_model
from optimer_hf.models.resolve import resolve_base, resolve_model, resolve_tokenizer
from tests.support.hub import publish_files
from tests.support.tiny import tiny_model


def test_a_directory_is_used_as_it_is_and_called_by_its_last_part(make_base):
    base = make_base("llama")
    assert resolve_model(str(base.path)) == ResolvedModel(base.path, base.path.name)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"gone: no such file or directory, nor a Hub id"):
        resolve_model(str(tmp_path / "gone"))


def test_a_file_that_is_not_a_model_is_refused_with_what_was_expected(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(
        ModelError, match=r"expected a directory, a GGUF file or a Hub id, found a \.bin file"
    ):
        resolve_model(str(tmp_path / "weights.bin"))


@pytest.mark.parametrize("text", ["no-such-org/no-such-model", "hf://no-such-org/no-such-model@v1"])
def test_a_hub_model_that_cannot_be_fetched_is_refused_with_advice(text):
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
def test_an_incomplete_cache_offline_is_refused_with_the_files_that_it_lacks(
    cached, without, sharded, named, reference
):
    cached(*without, sharded=sharded)
    with pytest.raises(
        ModelError, match=rf"me/tuned at commit {COMMIT} .*lacks {named}.*HF_HUB_OFFLINE is set"
    ):
        resolve_model(reference)


def test_a_complete_cache_is_enough_offline(cached):
    path = cached(sharded=True)
    assert resolve_model("me/tuned") == ResolvedModel(path, "me/tuned", COMMIT)
    assert resolve_tokenizer("me/tuned").path == path


def test_a_cache_without_a_tokenizer_is_refused(cached):
    cached("tokenizer*")
    with pytest.raises(ModelError, match=rf"has no tokenizer in the cache at commit {COMMIT}"):
        resolve_base("me/tuned")
    with pytest.raises(ModelError, match=r"me/tuned at commit .*lacks tokenizer\.json"):
        resolve_tokenizer("me/tuned")


def test_a_directory_that_lacks_shards_of_its_index_names_them(cached):
    path = cached("model-00001-of*", "model-00002-of*", sharded=True)
    with pytest.raises(ModelError, match=r"missing shard model-00001.*, model-00002.* \(2 of"):
        empty_model(ResolvedModel(path, "local"))


def test_a_damaged_record_of_a_vector_is_named(make_base, tmp_path):
    shutil.copytree(make_base("llama").path, tmp_path / "base")
    (tmp_path / "base" / "vector.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"vector\.json: found a list, expected a mapping"):
        resolve_base(str(tmp_path / "base"))


def test_a_name_that_is_too_long_is_not_a_model():
    with pytest.raises(ModelError, match="no such file or directory"):
        resolve_model("/" + "x" * 300)


@pytest.mark.parametrize("sharded", [False, True])
def test_only_weights_that_are_read_are_fetched_and_counted(
    hub, make_base, name, sharded, tmp_path, monkeypatch
):
    source = make_base("llama")
    if sharded:
        write_merged(source, [], {}, tmp_path / "shards", max_shard_size=30_000)
        source = ResolvedModel(tmp_path / "shards", "shards")
    files: dict[str, bytes | Path] = {path.name: path for path in source.path.iterdir()}
    more = ("consolidated.safetensors", "onnx/model.safetensors", "onnx/x.safetensors")
    reference = publish_files(f"alice/{name}", files | {each: each.encode() for each in more})
    model = resolve_model(reference)
    assert weight_digests(model.path) == weight_digests(source.path)
    assert (len(weight_digests(source.path)) > 1) == sharded
    fetched = {str(p.relative_to(model.path)) for p in model.path.rglob("*") if p.is_file()}
    assert not fetched & set(more)
    assert resolve_base(reference) == model
    hub.log.clear()
    assert resolve_model(reference) == model and hub.log == []  # all of a commit is in the cache
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(reference) == model
    (model.path / sorted(weight_digests(model.path))[-1]).unlink()
    with pytest.raises(ModelError, match="cannot be fetched"):
        resolve_model(reference)


def test_an_adapter_and_a_repository_without_an_index_are_fetched_whole(
    hub, make_base, make_adapter, name
):
    adapter = make_adapter(make_base("llama"), 1)
    files: dict[str, bytes | Path] = {p.name: p for p in adapter.iterdir() if p.suffix != ".md"}
    model = resolve_model(publish_files(f"alice/{name}", files))
    assert weight_digests(model.path) == weight_digests(adapter)
    weights = make_base("llama").path / "model.safetensors"
    model = resolve_model(publish_files(f"alice/{name}-2", {"consolidated.safetensors": weights}))
    assert weight_digests(model.path).keys() == {"consolidated.safetensors"}


@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(hub, name, file):
    reference = publish_files(f"alice/{name}", {"config.json": b"{}", file: b"x"})
    message = rf"{reference}: has no safetensors weights.*{file}.*save_pretrained"
    with pytest.raises(ModelError, match=message):
        resolve_model(reference)
