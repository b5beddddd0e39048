"""Rows of an embedding stand for tokens: a vector whose tokens have other ids is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from optimer_hf.errors import VocabularyError
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.vectors.opening import open_vector


def with_tokenizer(source: Path, out: Path, change) -> Path:
    shutil.copytree(source, out)
    file = out / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return out


def swap_two(content) -> None:
    tokens = content["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]


def turn_round(content) -> None:
    tokens = content["model"]["vocab"]
    text = sorted(tokens, key=tokens.__getitem__)[3:]
    tokens |= dict(zip(text, [tokens[token] for token in reversed(text)], strict=True))


def rename_unused(content) -> None:
    tokens = content["model"]["vocab"]
    tokens["<|im_start|>"] = tokens.pop("~")


def add_special(content) -> None:
    content["added_tokens"].append(
        {
            **content["added_tokens"][0],
            "id": len(content["model"]["vocab"]),
            "content": "<|im_end|>",
        }
    )


def write_otherwise(content) -> None:
    content["truncation"] = None


@pytest.fixture(scope="module")
def base(make_base) -> ResolvedModel:
    return make_base("llama", torch.float32)


@pytest.fixture(scope="module")
def tuned(base, make_tuned) -> Path:
    return make_tuned(base, "llama", 1, torch.float32)


@pytest.mark.parametrize("change", [swap_two, turn_round])
@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_a_vector_whose_tokens_have_other_ids_is_refused(
    base, tuned, make_adapter, tmp_path, kind, change
):
    source = with_tokenizer(tuned, tmp_path / "tuned", change)
    if kind == "adapter":
        adapter = shutil.copytree(make_adapter(base, 1), tmp_path / "adapter")
        shutil.copy(source / "tokenizer.json", adapter)
        shutil.copy(source / "tokenizer_config.json", adapter)
        source = adapter
    with pytest.raises(VocabularyError, match=r"gives the token '.' the id \d+, that of the base"):
        open_vector("v", str(source), base)


@pytest.mark.parametrize("change", [rename_unused, add_special, write_otherwise])
def test_tokens_that_are_added_or_renamed_leave_the_others_in_place(base, tuned, tmp_path, change):
    source = with_tokenizer(tuned, tmp_path / "tuned", change)
    assert open_vector("v", str(source), base).names


def test_a_fine_tune_without_a_readable_tokenizer_is_accepted(base, tuned, tmp_path):
    for number, files in enumerate(
        (["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"])
    ):
        source = shutil.copytree(tuned, tmp_path / str(number))
        for file in files:
            (source / file).unlink()
        assert open_vector("v", str(source), base).names
