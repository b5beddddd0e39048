"""Tiny models that vLLM runs on a CPU, and what its tests share."""

import os
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from tests.support.tiny import GROUPED

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # other tests run on these cores, too
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

HEADS = GROUPED | {"head_dim": 32, "max_position_embeddings": 256}  # vLLM's CPU kernels need 32
ENGINE = {
    "name": "vllm",
    "enforce_eager": True,  # nothing is compiled
    "max_model_len": 256,
    "kv_cache_memory_bytes": 2**26,
}
needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None,
    reason="vLLM is not installed beside this package; `.ci/vllm` makes an environment that has it",
)


def engine_model(kind: str):
    """Return a 2-layer Gemma 3 text model (tied) or a Llama, tied or untied, in float32."""
    torch.manual_seed(0)
    if kind == "gemma":
        config = Gemma3TextConfig(**HEADS, sliding_window=64, query_pre_attn_scalar=16)
        model = Gemma3ForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**HEADS, tie_word_embeddings=kind == "tied llama"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def engine_processes(owner: int | None = None) -> list[psutil.Process]:
    """Return the processes of vLLM's engine that a process (None: this one) has started."""
    processes = psutil.Process(owner).children(recursive=True)
    return [each for each in processes if any("VLLM::" in part for part in each.cmdline())]


def write_generation_task(folder: Path) -> None:
    """Write a task that generates text, and one with choices, and their items."""
    rows = "".join(
        f'{{"question": "{word} {word}", "choices": [" aa", " xyz", " b"], "label": {i % 3}}}\n'
        for i, word in enumerate(("aba", "xyz", "bab", "zz", "the", "of"))
    )
    (folder / "items.jsonl").write_text(rows)
    (folder / "tiny_generate.yaml").write_text(GENERATE.format(folder=folder))
    (folder / "tiny_choice.yaml").write_text(CHOICE.format(folder=folder))


GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""
