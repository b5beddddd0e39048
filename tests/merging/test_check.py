"""check.py: what a merge wrote is the model that was promised."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from optimer_hf.errors import ModelError
from optimer_hf.merging.check import Promise, check_merged
from tests.support.merges import tensors_in, with_broken_tokenizer, without_tokenizer


def dropped(out: Path) -> None:
    write(out, {name: t for name, t in tensors_in(out).items() if "layers.1.mlp.up" not in name})


def cut(out: Path) -> None:
    write(
        out, {name: t[:-1] if "embed_tokens" in name else t for name, t in tensors_in(out).items()}
    )


def added(out: Path) -> None:
    write(out, tensors_in(out) | {"model.extra.weight": torch.zeros(2)})


def infinite(out: Path) -> None:
    write(out, {name: t / (0 if "norm" in name else 1) for name, t in tensors_in(out).items()})


def write(out: Path, found: dict[str, torch.Tensor]) -> None:
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})


def deeper(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("damage", "promise", "message"),
    [
        (dropped, {}, r"lacks 'model\.layers\.1\.mlp\.up_proj\.weight' \(1 in all"),
        (cut, {}, r"another shape for 'model\.embed_tokens\.weight'"),
        (added, {}, r"no place for 'model\.extra\.weight'"),
        (infinite, {}, r"holds NaN or infinite values"),
        (deeper, {}, r"lacks 'model\.layers\.2"),
        (without_tokenizer, {}, r"it has no tokenizer"),
        (with_broken_tokenizer, {"new_tokenizer": True}, r"the merge: .*cannot load the tokenizer"),
        (lambda out: (out / "config.json").unlink(), {}, r"no config\.json"),
        (lambda out: None, {"out_dtype": "bfloat16"}, r"written as torch\.float32, expected"),
        (lambda out: None, {"dtype": "float16"}, r"names the dtype float32, expected float16"),
        (
            lambda out: None,
            {"new_tokenizer": True, "chat_template": "{{ messages }}"},
            r"lacks the chat template",
        ),
    ],
)
def test_an_output_that_is_not_as_promised_is_refused(models, tmp_path, damage, promise, message):
    model, out = (models / "a").resolve(), tmp_path / "out"
    shutil.copytree(model, out)
    check_merged(out, Promise(model))
    damage(out)
    with pytest.raises(ModelError, match=message):
        check_merged(out, Promise(model, **promise))


def test_a_fault_that_the_source_model_has_too_is_ignored(models, tmp_path):
    shutil.copytree((models / "a").resolve(), tmp_path / "base")
    added(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "out")
    check_merged(tmp_path / "out", Promise(tmp_path / "base"))
