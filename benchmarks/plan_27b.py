"""The plans of docs/how-to/27b.md: four vectors of a model of 27 B parameters on eight H100.

    python benchmarks/plan_27b.py

Writes a recipe folder with the shapes of Gemma 3 27B (its language part) and no weights, and prints
what `optimer plan` says of it: LoRA vectors, all parameters, and scoring generated answers. A word
is a token here, so every item has the length that it says.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma3TextConfig, PreTrainedTokenizerFast

from optimer_hf.experiment.commands import plan_elsewhere
from optimer_hf.experiment.hardware_plan import HardwarePlan, hardware_to_markdown
from optimer_hf.models.devices import parse_devices

SHAPES = {  # google/gemma-3-27b-pt
    "vocab_size": 262_208,
    "hidden_size": 5376,
    "intermediate_size": 21_504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
    "sliding_window": 1024,
    "max_position_embeddings": 131_072,
}
NAMES = ("chat", "code", "ja", "math")
N_TOKENS, BLOCK, N_ITEMS, LENGTH, ANSWER = 1_000_000_000, 4096, 500, 500, 256
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TASK = {
    "task": "answers",
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "word",
    "generation_kwargs": {"until": ["."], "max_gen_toks": ANSWER},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def write_base(path: Path) -> Path:
    """Write a config without weights, and a tokenizer of whole words."""
    Gemma3TextConfig(
        **SHAPES, architectures=["Gemma3ForCausalLM"], dtype="bfloat16"
    ).save_pretrained(path)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<bos>": 2, "word": 3}, "word"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(path)
    return path


def write_recipe(folder: Path, training: dict[str, Any], *, generates: bool = False) -> Path:
    """Write a recipe folder with four vectors, each trained as `training` says."""
    folder.mkdir()
    base = str(write_base(folder / "base"))
    rows = {"search": "word " * LENGTH, "test": "word " * (LENGTH - 1) + "end"}
    for name, text in rows.items():
        lines = [json.dumps({"text": text, "number": number}) for number in range(N_ITEMS)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    for name in NAMES:
        config = {
            "name": name,
            "base_model": base,
            "corpus": {"path": str(folder / "search.jsonl")},
            "block_size": BLOCK,
            "max_tokens": N_TOKENS,
            **training,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    task = TASK | {"dataset_path": "json", "test_split": "train"}
    task["dataset_kwargs"] = {"data_files": str(folder / "search.jsonl")}
    (folder / "answers.yaml").write_text(yaml.safe_dump(task))
    term = {"task": "answers", "metric": "exact_match"} if generates else {"text": "search.jsonl"}
    study = {
        "base_model": base,
        "vectors": {name: {"train": f"{name}.yaml"} for name in NAMES},
        "objective": {"terms": [term], "include_path": str(folder)},
        "test": {"terms": [{"text": "test.jsonl"}]},
        "search": {"n_trials": 100, "rescore_top": 0},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder


def make_plans(folder: Path, devices: str = "8xH100") -> dict[str, HardwarePlan]:
    """Return the plans by their titles."""
    checkpointing = {"trainer": {"activation_checkpointing": True}}
    variants: dict[str, tuple[dict[str, Any], bool]] = {
        "LoRA": ({"lora": LORA} | checkpointing, False),
        "all parameters": (checkpointing, False),
        "LoRA, generated answers": ({"lora": LORA} | checkpointing, True),
    }
    return {
        title: plan_elsewhere(
            write_recipe(folder / str(number), training, generates=generates),
            devices,
            utilisation=0.4,
        )
        for number, (title, (training, generates)) in enumerate(variants.items())
    }


def show_plan(plan: HardwarePlan) -> str:
    """Return a plan as text, with the name of the base and not its path."""
    return hardware_to_markdown(plan.model_copy(update={"base_model": "google/gemma-3-27b-pt"}))


def show_products(plan: HardwarePlan) -> str:
    """Return how long the products alone take: no attention, and nothing computed twice."""
    flops = 6 * plan.n_parameters * N_TOKENS
    hours = flops / (0.4 * parse_devices(plan.device)[1].flops) / 3600
    return f"6 P N = {flops:.2g} FLOPs = {hours:.0f} GPU-hours"


def main() -> None:
    """Print the plans."""
    with tempfile.TemporaryDirectory() as folder:
        for title, plan in make_plans(Path(folder)).items():
            print(f"## {title}\n\n{show_plan(plan)}\n")
        print(show_products(plan))


if __name__ == "__main__":
    main()
