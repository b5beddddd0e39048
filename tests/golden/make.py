"""Make `tests/golden/VERSION`: what the installed optimer-hf writes, for later versions to read.

    python tests/golden/make.py tests/golden/0.1.0

What it holds: a base, corpora, a recipe folder, its finished run, and a vector of each kind.
`made.json` says with which versions it was made. Files name each other by absolute paths where
this version writes such; the folder in which they were made is replaced by `@GOLDEN@`, for which
`tests/support/golden.py` puts the folder where they lie. Files are not made anew: another version
gets a folder of its own.
"""

import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import yaml
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimer_hf.cli import main

PLACEHOLDER = "@GOLDEN@"
TEXTS = {".json", ".jsonl", ".yaml", ".yml", ".md", ".html"}
PACKAGES = ("optimer-hf", "torch", "transformers", "peft", "lm-eval", "smac", "mergekit", "numpy")
WORDS = {"aaa": ["aa", "ab", "ba", "aab"], "xyz": ["xx", "xy", "zz", "xyz"], "mix": ["aa", "xy"]}
TRAIN = {
    "format_version": 1,
    "block_size": 32,
    "max_tokens": 512,
    "trainer": {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "bf16": False},
}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}


def make_base(out: Path) -> None:
    """Write a one-layer Llama with tied embeddings and a byte tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3 + 256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate(["<pad>", "<eos>", "<bos>", *characters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=128,
    ).save_pretrained(out)


def make_corpora(out: Path) -> None:
    """Write documents in made-up languages, by language and split."""
    out.mkdir()
    for name, words in WORDS.items():
        rng = random.Random(name)
        for split, n_documents in (("train", 80), ("search", 6), ("test", 12)):
            lines = [
                json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(5, 20)))})
                for _ in range(n_documents)
            ]
            (out / f"{name}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_recipe(out: Path) -> None:
    """Write a recipe folder: two adapters to train, a third language kept, a sealed test and every
    kind of baseline.
    """
    out.mkdir(parents=True)

    def terms(split: str) -> list[dict[str, str]]:
        return [{"name": name, "text": f"../../corpora/{name}.{split}.jsonl"} for name in WORDS]

    for name in ("aaa", "xyz"):
        corpus = {"path": f"../../corpora/{name}.train.jsonl"}
        train = TRAIN | {"name": name, "corpus": corpus, "base_model": "../../base", "lora": LORA}
        (out / f"train-{name}.yaml").write_text(yaml.safe_dump(train), encoding="utf-8")
    study = {
        "format_version": 1,
        "base_model": "../../base",
        "vectors": {name: {"train": f"train-{name}.yaml"} for name in ("aaa", "xyz")},
        "objective": {"limit": 4, "terms": terms("search")},
        "test": {"terms": terms("test")},
        "retarget": {"only xyz": {"xyz": 1.0}},
        "search": {"n_trials": 10, "rescore_top": 2},
        "baselines": {
            "merge_methods": ["ties"],
            "random_vectors": True,
            "searches": {"at random": {"n_trials": 5, "surrogate": "random"}},
            "mixtures": {"both": {}},
        },
    }
    (out / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")


def optimer(*arguments: object) -> None:
    """Run a command of optimer."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exit_code:
        raise RuntimeError(result.output) from result.exception


def make(folder: Path) -> None:
    """Write everything into an empty folder."""
    make_base(folder / "base")
    make_corpora(folder / "corpora")
    make_recipe(folder / "recipes" / "tiny")
    run = folder / "runs" / "tiny"
    optimer("run", folder / "recipes" / "tiny", run)
    vectors = folder / "vectors"
    shutil.copytree(run / "vectors" / "aaa", vectors / "adapter")
    train = TRAIN | {"name": "full", "corpus": {"path": "corpora/xyz.train.jsonl"}}
    text = yaml.safe_dump(train | {"base_model": "./base"})
    (folder / "train-full.yaml").write_text(text, encoding="utf-8")
    optimer("train", folder / "train-full.yaml", vectors / "checkpoint")
    for dtype in ("bfloat16", "int8"):
        out = vectors / f"delta-{dtype}"
        optimer("extract", vectors / "checkpoint", out, "--base", folder / "base", "--dtype", dtype)
    for leftover in (*folder.rglob(".lock*"), *folder.rglob("*.png")):
        leftover.unlink()  # pictures are made anew, and take half of the room
    (run / "report.html").unlink()
    versions = {package: version(package) for package in PACKAGES}
    (folder / "made.json").write_text(json.dumps({"versions": versions}, indent=2) + "\n")
    for file in folder.rglob("*"):
        if file.suffix in TEXTS:
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace(str(folder), PLACEHOLDER), encoding="utf-8")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    if out.exists():
        raise SystemExit(f"{out}: exists. What an earlier version wrote is not made anew.")
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch).resolve() / "golden"
        made.mkdir()
        with contextlib.chdir(made):  # results.md names files as seen from there
            make(made)
        shutil.copytree(made, out)
