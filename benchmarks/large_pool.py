"""Large pools of LoRA vectors: searched with and without gradients, and with a screen.

    python benchmarks/large_pool.py [--vectors 16 32 64] [--forwards 40] [--seeds 3]
    python benchmarks/large_pool.py --study study.yaml     # a pool of your own, on its base

Trains a Llama of a quarter million parameters on a mixture of four made-up languages (Markov
chains of letters), and then LoRA vectors of rank 4, each on another sample of one of them. The
objective is the bits per byte of held-out text of all four. Every search may spend `--forwards`; a
trial with gradients spends what its record says that it cost, the median of them. The gain over the
base of the best trial of each search counts.
"""

import argparse
import contextlib
import json
import logging
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimer_hf.searching.loop import search
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.directory import Study
from optimer_hf.study.gradients import cost_ratio

LETTERS, LENGTH, N_LANGUAGES = "abcdefghijklmnopqrstuvwxyz ", 96, 4
N_HELD_OUT, BATCH = 24, 16
MISSED = 2  # % of the largest gain
BASE_STEPS, VECTOR_STEPS = 300, 80
ARMS: dict[str, dict[str, Any]] = {
    "without": {"gradients": "never"},
    "with gradients": {"gradients": "always"},
    "with gradients, screen 8": {"gradients": "always", "screen": 8},
    "without, screen 8": {"gradients": "never", "screen": 8},
}


def chains(n: int) -> list[np.ndarray]:
    """Return the transition probabilities [letters^2, letters] of n languages, which share half of
    their habits.
    """
    rng, shape = np.random.default_rng(0), (len(LETTERS) ** 2, len(LETTERS))
    shared = rng.gamma(0.15, size=shape)
    tables = [shared + rng.gamma(0.08, size=shape) + 1e-4 for _ in range(n)]
    return [table / table.sum(axis=1, keepdims=True) for table in tables]


def write_texts(table: np.ndarray, n: int, rng: np.random.Generator) -> list[str]:
    """Return n texts of LENGTH letters of one language."""
    letters = rng.integers(len(LETTERS), size=(n, 2))
    bounds = table.cumsum(axis=1)
    for _ in range(LENGTH - 2):
        states = letters[:, -2] * len(LETTERS) + letters[:, -1]
        drawn = (rng.random((n, 1)) > bounds[states]).sum(axis=1).clip(max=len(LETTERS) - 1)
        letters = np.column_stack([letters, drawn])
    return ["".join(LETTERS[index] for index in row) for row in letters]


def train(model: Any, tokenizer: Any, texts: Sequence[str], steps: int, rate: float) -> None:
    """Train the parameters that require gradients, on random batches."""
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        batch = ids[torch.randint(len(ids), (BATCH,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make_pool(folder: Path, n_vectors: int) -> dict[str, Any]:
    """Write base, vectors and held-out texts, and return the fields of a study."""
    vocabulary = {letter: index + 3 for index, letter in enumerate(LETTERS)}
    special = {"<pad>": 0, "</s>": 1, "<s>": 2}
    raw = Tokenizer(models.WordLevel(special | vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 256}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=32, bos_token_id=2, **shape, **heads))
    tables, rng = chains(N_LANGUAGES), np.random.default_rng(1)
    mixture = [text for table in tables for text in write_texts(table, 200, rng)]
    train(model, tokenizer, mixture, BASE_STEPS, 3e-3)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for number in range(n_vectors):
        tuned = LlamaForCausalLM.from_pretrained(folder / "base")
        torch.manual_seed(number)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        tuned = get_peft_model(tuned, lora)
        texts = write_texts(tables[number % N_LANGUAGES], 200, rng)
        train(tuned, tokenizer, texts, VECTOR_STEPS, 2e-3)
        tuned.save_pretrained(folder / f"v{number}")
    for name, table in zip("abcd", tables, strict=True):
        rows = [json.dumps({"text": text}) for text in write_texts(table, N_HELD_OUT, rng)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {
        "base_model": str(folder / "base"),
        "dtype": "float32",
        "vectors": {f"v{n}": {"source": str(folder / f"v{n}")} for n in range(n_vectors)},
        "objective": {"terms": [{"text": str(folder / f"{name}.jsonl")} for name in "abcd"]},
    }


def gains_of(study: Study) -> list[float]:
    """Return the gain of every trial over the base, in %."""
    base = study.value(study.trials[0])
    return [100 * (study.value(trial) - base) for trial in study.trials]


def compare(
    fields: dict[str, Any], n_forwards: int, seed: int, folder: Path, arms: Sequence[str]
) -> dict[str, Any]:
    """Return for every arm the gain of the best trial, what a trial with gradients costs, and the
    forwards until the best trial misses no more than MISSED % of the largest gain of all arms.
    """
    row: dict[str, Any] = {"seed": seed}
    gains, spent = {}, {}
    for arm in arms:
        choices = ARMS[arm]
        settings = {"n_trials": n_forwards, "rescore_top": 0, "seed": seed} | choices
        if choices["gradients"] == "always":
            settings["n_trials"] = n_forwards // 2
        config = StudyConfig.model_validate(fields | {"search": settings})
        study = search(config, folder / f"{arm}-{seed}")
        dear = [cost_ratio(trial) for trial in study.trials if trial.gradients]
        cost = median(dear) if dear else 1.0
        spent[arm] = np.cumsum([cost if trial.gradients else 1.0 for trial in study.trials])
        n_paid = max(int((spent[arm] <= n_forwards).sum()), 1)
        gains[arm] = gains_of(study)[:n_paid]
        row[arm] = round(max(gains[arm]), 3)
        row[f"cost {arm}"] = round(cost, 2)
    enough = (1 - MISSED / 100) * max(max(each) for each in gains.values())
    for arm, each in gains.items():
        reached = [
            float(cost) for cost, gain in zip(spent[arm], each, strict=False) if gain >= enough
        ]
        row[f"until {arm}"] = round(reached[0], 1) if reached else None
    return row


def say_medians(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> str:
    """Return the median gain of every arm, and how many forwards it takes."""
    texts = []
    for arm in arms:
        until = median(row[f"until {arm}"] or math.inf for row in rows)
        within = f"{until:g} forwards" if until < math.inf else "never"
        texts.append(f"{median(row[arm] for row in rows):.2f} {arm} ({within})")
    return "; ".join(texts)


def main() -> None:
    """Print a line for every pool and seed, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--forwards", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--study", type=Path, help="A study whose pool and objective are taken.")
    parser.add_argument("--keep", type=Path, help="Keep the studies here, and go on with them.")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print(
        f"gain over the base in % after {options.forwards} forwards (and the forwards until ",
        end="",
    )
    print(f"{MISSED} % of the largest gain of all searches or less is missed)")
    for n_vectors in options.vectors if options.study is None else [0]:
        with contextlib.ExitStack() as stack:
            folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if options.study is None:
                folder = folder / str(n_vectors)
                folder.mkdir(exist_ok=True, parents=True)
                fields = make_pool(folder, n_vectors)
            else:
                fields = StudyConfig.read(options.study).model_dump()
            rows = []
            for seed in range(options.seeds):
                rows.append(compare(fields, options.forwards, seed, folder, options.arms))
                print(f"  {json.dumps(rows[-1])}", flush=True)
        n_weights = len(StudyConfig.model_validate(fields).free)
        print(
            f"{n_weights} weights, median of {options.seeds}: {say_medians(rows, options.arms)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
