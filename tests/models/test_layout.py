"""What happens to each kind of file in a model directory."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from optimer_hf.errors import HubError, ModelError
from optimer_hf.files.reference import Reference
from optimer_hf.hub.leaks import refuse_private
from optimer_hf.hub.publication import is_allowed
from optimer_hf.models.layout import (
    copy_beside_weights,
    may_fetch,
    refuse_pickled,
    tokenizer_digests,
    weight_digests,
)
from optimer_hf.models.resolve import fetch_snapshot, missing_files

# fetched: from the Hub with a model, before and besides its weights
# copied: beside a merge or a delta; digested: with the tokenizer; taken: enough for a tokenizer
# pushed: with a vector or a merged model; named: with a recipe, too
# any: may contain any text, so only tokens and secrets are looked for before a push
# pickled: named where safetensors are missing
FILES = {
    "config.json": "fetched copied pushed",
    "preprocessor_config.json": "fetched copied pushed",
    "generation_config.json": "fetched copied digested pushed",
    "tokenizer_config.json": "fetched copied digested taken pushed",
    "tokenizer.json": "fetched copied digested taken pushed any",
    "tokenizer.model": "fetched copied digested taken pushed any",
    "spiece.model": "fetched copied digested taken pushed any",
    "qwen.tiktoken": "fetched copied digested taken pushed any",
    "tekken.json": "fetched copied digested taken pushed any",
    "tokenizer.txt": "fetched copied digested taken pushed any",
    "vocab.json": "fetched copied digested taken pushed any",
    "vocab.txt": "fetched copied digested taken pushed any",
    "vocab.bpe": "fetched copied digested pushed any",
    "merges.txt": "fetched copied digested pushed any",
    "special_tokens_map.json": "fetched copied digested pushed any",
    "added_tokens.json": "fetched copied digested pushed any",
    "chat_template.jinja": "fetched copied digested pushed any",
    "chat_template.json": "fetched copied digested pushed any",
    "chat_template_tools.jinja": "fetched copied digested pushed any",
    "LICENSE": "fetched copied pushed named",
    "LICENCE.txt": "fetched copied pushed named",
    "LICENSE-MODEL.md": "fetched copied pushed named",
    "LICENSE-1.0": "fetched copied pushed named",
    "COPYING": "fetched copied pushed named",
    "NOTICE.md": "fetched copied pushed named",
    "USE_POLICY.md": "fetched copied pushed named",
    "model.safetensors": "pushed",
    "model-00001-of-00002.safetensors": "pushed",
    "vector.safetensors": "pushed",
    "vector-00001-of-00002.safetensors": "pushed",
    "adapter_model.safetensors": "pushed",
    "consolidated.safetensors": "",
    "model.fp16.safetensors": "",
    "model.safetensors.index.json": "fetched pushed",
    "vector.safetensors.index.json": "fetched pushed",
    "consolidated.safetensors.index.json": "fetched",
    "adapter_config.json": "fetched",
    "vector.json": "fetched",
    "training.json": "fetched",
    "config.4.0.0.json": "fetched",
    "anything.json": "fetched",
    "anything.txt": "fetched",
    "anything.jinja": "fetched",
    "onnx/config.json": "fetched",
    "additional_chat_templates/tools.jinja": "fetched copied digested pushed any",
    "additional_chat_templates/tools.py": "",
    "additional_chat_templates/more/tools.jinja": "fetched",
    "onnx/model.safetensors": "",
    "README.md": "",
    "image.png": "",
    "pytorch_model.bin": "pickled",
    "adapter_model.bin": "pickled",
    "model.pt": "pickled",
    "consolidated.00.pth": "pickled",
    "weights.bin": "pickled",
    "model.ckpt": "pickled",
    "weights.pkl": "pickled",
    "training_args.bin": "",
    "optimizer.pt": "",
    "scheduler.pt": "",
    "rng_state.pth": "",
    "modeling.py": "",
    "tokenizer.py": "",
    "LICENSE-check.py": "",
    "LICENSE_check.rb": "fetched",
    "chat_template.sh": "",
    "vocab.so": "",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in FILES:
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text("{}")
    return tmp_path / "model"


def files_with(mark: str) -> set[str]:
    return {name for name, marks in FILES.items() if mark in marks.split()}


def texts_below(path: Path) -> dict[str, str]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.read_text() for file in files}


def test_files_beside_the_weights_are_fetched_before_them(monkeypatch, tmp_path, folder):
    calls: list[set[str]] = []

    def download(repo_id, *, revision, local_files_only, **chosen):
        calls.append(set(filter_repo_objects(FILES, **chosen)))
        for name in calls[-1]:
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, tmp_path / "cache" / name)
        return tmp_path / "cache"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fetch_snapshot(Reference("org/model"), with_weights=False)
    assert calls == [files_with("fetched")]


def test_the_size_of_a_download_counts_the_weights_but_not_a_second_copy():
    weights = {name for name in FILES if name.endswith(".safetensors")}
    counted = files_with("fetched") | weights - {"consolidated.safetensors"}
    below = {name for name in FILES if "/" in name} - files_with("copied")
    left_out = {"LICENSE_check.rb", *below}
    assert {name for name in FILES if may_fetch(name)} == counted - left_out


def test_config_tokenizer_and_licence_are_copied_and_code_never_is(folder, tmp_path):
    (tmp_path / "out").mkdir()
    copy_beside_weights(folder, tmp_path / "out")
    assert texts_below(tmp_path / "out").keys() == files_with("copied")


def test_a_merge_may_take_its_tokenizer_from_another_model(folder, tmp_path):
    (tmp_path / "out").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", "LICENSE"):
        (other / name).write_text("other")
    copy_beside_weights(folder, tmp_path / "out", tokenizer=other)
    copied = texts_below(tmp_path / "out")
    own = files_with("copied") - files_with("digested") | {"generation_config.json"}
    assert {name for name, text in copied.items() if text == "{}"} == own
    assert copied.keys() - own == {"tokenizer.json", "chat_template.jinja"}


def test_a_tokenizer_is_identified_by_all_its_files(folder):
    assert tokenizer_digests(folder).keys() == files_with("digested")


@pytest.mark.parametrize("name", [name for name in FILES if "/" not in name])
def test_a_directory_has_a_tokenizer_if_one_can_be_read_from_it(tmp_path, name):
    (tmp_path / name).write_text("{}")
    lacking = missing_files(tmp_path, with_weights=False)
    assert lacking == ([] if name in files_with("taken") else ["tokenizer.json"])


def test_the_name_of_a_file_decides_whether_it_may_be_pushed_and_pulled():
    own = {"adapter_config.json", "vector.json"}  # what says how to read a vector
    for kind, more in (("vector", own), ("model", set())):
        allowed = {name for name in FILES if is_allowed(kind, name)}
        assert allowed == files_with("pushed") | more
    assert {name for name in FILES if is_allowed("recipe", name)} == files_with("named")


def test_a_vocabulary_may_contain_any_text_but_no_token(folder):
    path = f"{folder}/model.safetensors"
    for name in files_with("copied"):
        if name in files_with("any"):
            refuse_private(Path(name), path.encode())
        else:
            with pytest.raises(HubError, match="a path"):
                refuse_private(Path(name), path.encode())
        with pytest.raises(HubError, match="a token"):
            refuse_private(Path(name), b"hf_" + b"aB3" * 10)


@pytest.mark.parametrize("name", FILES)
def test_pickled_weights_are_named_where_safetensors_are_missing(name):
    if name in files_with("pickled"):
        with pytest.raises(ModelError, match=rf"only pickled ones \({name}\)"):
            refuse_pickled("model", [name])
    else:
        refuse_pickled("model", [name])


def test_all_weights_count_in_an_adapter_and_where_no_index_selects_some(tmp_path):
    for name in ("consolidated", "b"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    both = {"b.safetensors", "consolidated.safetensors"}
    assert weight_digests(tmp_path).keys() == both
    save_file({"c": torch.ones(1)}, tmp_path / "model.safetensors")
    assert weight_digests(tmp_path).keys() == {"model.safetensors"}
    (tmp_path / "adapter_config.json").write_text("{}")
    assert weight_digests(tmp_path).keys() == {*both, "model.safetensors", "adapter_config.json"}
