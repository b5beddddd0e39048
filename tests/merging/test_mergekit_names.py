"""mergekit_names.py: whether mergekit finds all tensors. The reference is plain mergekit: what it
wrote, as transformers loads it, beside what the writer wrote.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from optimer_hf.merging.engines import merge
from optimer_hf.merging.mergekit_names import list_unreadable
from optimer_hf.merging.mergekit_pool import vanilla_config
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.vectors.opening import open_vector
from tests.support.merges import run_plain_mergekit, tensors_in
from tests.support.tiny import GROUPED, SIZES, deepseek_v3, gemma3_multimodal

Edit = Callable[[str], str]
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=64, **SIZES)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**GROUPED, num_local_experts=3)
    ),
    "bloom": lambda: transformers.BloomForCausalLM(transformers.BloomConfig(**SIZES)),
    "gemma3": lambda: transformers.Gemma3ForConditionalGeneration(gemma3_multimodal()),
    "deepseek v3": lambda: transformers.DeepseekV3ForCausalLM(deepseek_v3()),
}


def same(name: str) -> str:
    return name


def policy(name: str) -> str:
    return f"policy.{name}"


def bare(name: str) -> str:
    return name.removeprefix("model.").removeprefix("transformer.")


def rename(model: Path, edit: Edit) -> None:
    file = model / "model.safetensors"
    tensors = {edit(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def save_pair(kind: str, folder: Path, of_base: Edit, of_tuned: Edit) -> tuple[Path, Path]:
    """Save a base and a fine-tune of it, and return their directories."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    for name, edit in (("base", of_base), ("tuned", of_tuned)):
        model.save_pretrained(folder / name)
        rename(folder / name, edit)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return folder / "base", folder / "tuned"


def loaded(model: Path, like: Path) -> dict[str, torch.Tensor]:
    """Return the parameters of a model as its class loads them."""
    (model / "config.json").write_text((like / "config.json").read_text())
    (architecture,) = json.loads((like / "config.json").read_text())["architectures"]
    return getattr(transformers, architecture).from_pretrained(model).state_dict()


@pytest.mark.parametrize(
    ("kind", "of_base", "of_tuned", "unread"),
    [
        ("llama", same, same, []),
        ("llama", same, policy, ["vectors.v"]),
        ("llama", same, bare, ["vectors.v"]),
        ("llama", bare, bare, ["base_model"]),
        ("gpt2", same, bare, []),  # a name that mergekit knows, too
        ("gpt2", same, policy, ["vectors.v"]),
        ("mixtral", same, same, []),  # mergekit stacks the experts
        ("bloom", same, same, []),
        ("bloom", same, policy, ["vectors.v"]),  # mergekit would write the base, and say nothing
        ("gemma3", same, same, ["base_model"]),
        ("deepseek v3", same, same, ["base_model"]),  # mergekit would leave out the experts
    ],
)
def test_what_mergekit_finds_is_known_before(kind, of_base, of_tuned, unread, tmp_path):
    base, tuned = save_pair(kind, tmp_path, of_base, of_tuned)
    vectors = [open_vector("v", str(tuned), ResolvedModel(base, "base"))]
    write_merged(ResolvedModel(base, "base"), vectors, {"v": 0.7}, tmp_path / "ours")
    kinds, dtype = {"v": "checkpoint"}, "float32"
    config = vanilla_config(str(base), {"v": str(tuned)}, {"v": 0.7}, dtype, kinds)
    try:
        run_plain_mergekit(yaml.safe_dump(config), tmp_path / "theirs")
    except RuntimeError as error:
        assert "required but not present" in str(error)
        is_made = False
    else:
        ours, theirs = (loaded(tmp_path / each, base) for each in ("ours", "theirs"))
        is_made = all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    assert list_unreadable(base, {"v": tuned}) == unread
    assert is_made == (not unread)


def test_the_tables_of_mergekit_are_read_without_it(tmp_path):
    base, tuned = save_pair("llama", tmp_path, same, same)
    code = (
        "import sys; from pathlib import Path\n"
        "from optimer_hf.merging.mergekit_names import list_unreadable\n"
        "print(list_unreadable(Path(sys.argv[1]), {'v': Path(sys.argv[2])}))\n"
        "print([name for name in ('mergekit', 'torch', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(base), str(tuned)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == "[]\n[]\n"


def test_groups_of_tensors_with_other_names_are_merged_without_mergekit(tokenizer, tmp_path):
    base, tuned = save_pair("llama", tmp_path, same, policy)
    tokenizer.save_pretrained(base)
    weight = [{"filter": "mlp", "value": 0.7}, {"value": 0.7}]
    config = {
        "merge_method": "optimer",
        "base_model": str(base),
        "models": [{"model": str(tuned), "parameters": {"weight": weight}}],
        "dtype": "float32",
    }
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config))
    assert merge(tmp_path / "merge.yml", tmp_path / "merged") == "native"
    vectors = [open_vector("v", str(tuned), ResolvedModel(base, "base"))]
    write_merged(ResolvedModel(base, "base"), vectors, {"v": 0.7}, tmp_path / "ours")
    ours, merged = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "merged")
    assert all(torch.equal(merged[name], tensor) for name, tensor in ours.items())
