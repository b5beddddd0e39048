"""What a GPU does with this package: training, trials and merges; a table for each.

    python benchmarks/gpu.py [--seconds 300] [--arms "stock;ours"] [--profile]

The model has the shape of Gemma 3 270M and random weights, which changes no time. Training is timed
on blocks of 512 tokens, 16 a step, in bfloat16 mixed precision, and each arm in its own process:

* stock: transformers' Trainer and its loss, without capture or compilation
* liger: the same with Liger's kernels, if Liger is installed
* ours: as `optimer train` does it, and then with single switches off or on

`ms` is the mean of the second half of the steps, after all choices are made; `start` are the
seconds before, with loading. MFU counts the FLOPs of PaLM's formula (no gradients of frozen
weights). Peaks are of memory allocated.

A trial sets the weights of four LoRA vectors and scores 500 texts, about 33,000 tokens. The merge
is shown beside a copy of the same tensors, which is what the memory of the device allows.

With --profile, three more steps of each arm are profiled, and the kernels that took longest listed.

Where there is no GPU, everything is done once with a tiny model, to see that it runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

IS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if IS_GPU else "cpu"
BLOCK, BATCH = (512, 16) if IS_GPU else (32, 2)
N_STEPS = 40 if IS_GPU else 12
N_PROFILED, N_KERNELS = 3, 30
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
COMPILED = {"torch_compile": True}
ARMS: dict[str, dict[str, Any]] = {  # name -> fields of a train file, or who trains; in order
    "stock": {"by": "stock"},
    "ours": {"trainer": COMPILED},
    "ours, not compiled": {},
    "liger": {"by": "liger"},
    "ours, not captured": {"cuda_graph": False, "trainer": COMPILED},
    "ours, stock loss": {"head": "stock"},
    "ours, neither": {"cuda_graph": False},
}


def write_model(folder: Path) -> None:
    """Write a model of random weights."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape: dict[str, Any] = {
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "vocab_size": 262144,
        "sliding_window": 512,
        "max_position_embeddings": 32768,
    }
    if not IS_GPU:
        shape |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        shape |= {"vocab_size": 512, "head_dim": 16, "query_pre_attn_scalar": 16}
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(18)]
    shape["layer_types"] = kinds[: shape["num_hidden_layers"]]
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape))
    model.to(torch.bfloat16).save_pretrained(folder)


def random_blocks(n: int, n_vocabulary: int) -> "np.ndarray[Any, Any]":
    """Return packed blocks [n, 2, BLOCK] of documents of random length."""
    generator = np.random.default_rng(0)
    blocks = np.empty((n, 2, BLOCK), dtype=np.int32)
    blocks[:, 0] = generator.integers(5, n_vocabulary, (n, BLOCK))
    for positions in blocks[:, 1]:
        start = 0
        while start < BLOCK:
            stop = min(BLOCK, start + int(generator.integers(BLOCK // 8, BLOCK)))
            positions[start:stop] = np.arange(stop - start)
            start = stop
    return blocks


# -- training --------------------------------------------------------------------------------------


def train_arm(name: str, is_lora: bool, folder: Path, n_profiled: int) -> dict[str, Any]:
    """Train with one arm, profile some more steps, and return its row."""
    from transformers import AutoConfig, TrainerCallback

    from optimer_hf.corpus.config import CorpusConfig
    from optimer_hf.models.flops import training_flops
    from optimer_hf.models.sizes import measure_sizes
    from optimer_hf.training.callback import utilisation
    from optimer_hf.training.config import TrainConfig
    from optimer_hf.training.packing import PackedCorpus

    class Times(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.profiler = torch.profiler.profile()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if IS_GPU and state.global_step in (N_STEPS // 2, N_STEPS):  # steps may overlap
                torch.cuda.synchronize()
            self.ends.append(perf_counter())
            if n_profiled and state.global_step == N_STEPS:
                self.profiler.start()

    n_steps = N_STEPS + n_profiled
    options = dict(ARMS[name])
    by = options.pop("by", "ours")
    trainer_options = {
        "per_device_train_batch_size": BATCH,
        "save_strategy": "no",
        "logging_steps": N_STEPS // 2,
        **options.pop("trainer", {}),
    }
    config = TrainConfig(
        format_version=1,
        name="benchmark",
        base_model=str(folder / "base"),
        corpus=CorpusConfig(path=Path("none")),
        block_size=BLOCK,
        max_tokens=n_steps * BATCH * BLOCK,
        lora=LORA if is_lora else None,
        trainer=trainer_options,
        **options,
    )
    n_vocabulary = AutoConfig.from_pretrained(folder / "base").vocab_size
    packed = PackedCorpus(random_blocks(n_steps * BATCH, n_vocabulary), "")
    started, times = perf_counter(), Times()
    with tempfile.TemporaryDirectory() as out:
        trainer = build_ours(config, packed, Path(out), folder)
        if by != "ours":
            trainer = build_stock(config, packed, Path(out), folder, is_liger=by == "liger")
        trainer.add_callback(times)
        if IS_GPU:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    if n_profiled:
        list_kernels(times.profiler)
    half = N_STEPS // 2
    ms = 1e3 * (times.ends[N_STEPS - 1] - times.ends[half - 1]) / (N_STEPS - half)
    rate = BATCH * BLOCK / ms * 1e3
    flops = training_flops(measure_sizes(trainer.model), BLOCK)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    speed = getattr(trainer, "speed", None)
    return {
        "arm": name,
        "mode": "LoRA" if is_lora else "full",
        "ms": round(ms, 1),
        "tokens/s": round(rate),
        "MFU": round(utilisation(rate, flops, device_name(), 1) or 0, 3) or None,
        "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 1) if IS_GPU else None,
        "start": round(times.ends[half - 1] - started, 1),
        "loss": round(losses[-1], 4),
        "speed": None if speed is None else speed.model_dump(),
    }


def list_kernels(profiler: Any) -> None:
    """Print milliseconds and calls per step of the kernels that took longest."""
    if IS_GPU:
        torch.cuda.synchronize()
    profiler.stop()
    kernels = [each for each in profiler.key_averages() if each.device_type.name == "CUDA"]
    kernels.sort(key=lambda each: -each.self_device_time_total)
    total = sum(each.self_device_time_total for each in kernels) / 1e3 / N_PROFILED
    print(f"{total:9.2f} ms a step on the device", file=sys.stderr)
    for each in kernels[:N_KERNELS]:
        ms = each.self_device_time_total / 1e3 / N_PROFILED
        print(f"{ms:9.3f} ms {each.count / N_PROFILED:6.0f} x {each.key[:110]}", file=sys.stderr)


def build_ours(config: Any, packed: Any, out: Path, folder: Path) -> Any:
    """Return the Trainer of `optimer train`."""
    from optimer_hf.models.resolve import resolve_model
    from optimer_hf.training.trainer import build_trainer

    return build_trainer(config, resolve_model(str(folder / "base")), packed, out)


def build_stock(config: Any, packed: Any, out: Path, folder: Path, *, is_liger: bool) -> Any:
    """Return the Trainer of transformers, with a model and an adapter of its own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, default_data_collator

    from optimer_hf.training.arguments import training_arguments

    arguments = training_arguments(config, out)
    arguments.use_liger_kernel = is_liger
    dtype = "auto" if config.lora else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    if config.lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config.lora))
    return Trainer(
        model=model, args=arguments, train_dataset=packed, data_collator=default_data_collator
    )


def device_name() -> str:
    """Return the name of the device."""
    return torch.cuda.get_device_name() if IS_GPU else "CPU"


# -- trials ----------------------------------------------------------------------------------------


def time_trials(folder: Path) -> dict[str, Any]:
    """Return the milliseconds of a trial and of its parts."""
    from optimer_hf.searching.engine import _TransformersEngine
    from optimer_hf.searching.trial import ResidentPool
    from optimer_hf.study.config import StudyConfig

    write_tokenizer(folder / "base")
    write_adapters(folder / "base", [folder / f"vector-{number}" for number in range(4)])
    write_texts(folder / "texts.jsonl", 500 if IS_GPU else 20)
    config = StudyConfig.model_validate(
        {
            "base_model": str(folder / "base"),
            "vectors": {f"v{n}": str(folder / f"vector-{n}") for n in range(4)},
            "objective": {"terms": [{"text": str(folder / "texts.jsonl"), "name": "texts"}]},
        }
    )
    pool, asked = ResidentPool(config), config.objective.asked_terms("search")
    rows = []
    for number in range(6):
        weights = {f"v{n}": 0.1 * (number + n) for n in range(4)}
        merge = clock(partial(pool._engine.set_weights, weights))
        started = perf_counter()
        scored = pool.score(weights, asked)
        rows.append((perf_counter() - started, merge, scored.seconds["forward"]))
    whole, merge, forward = np.median(rows[1:], axis=0)
    assert isinstance(pool._engine, _TransformersEngine)
    tensors = list(pool._engine._resident.parameters.values())
    copies = [torch.empty_like(tensor) for tensor in tensors]
    clock(lambda: torch._foreach_copy_(copies, tensors))
    copy = np.median([clock(lambda: torch._foreach_copy_(copies, tensors)) for _ in range(5)])
    return {
        "tokens": scored.n_tokens,
        "trial ms": round(1e3 * whole, 1),
        "forward ms": round(1e3 * forward, 1),
        "merge ms": round(1e3 * merge, 1),
        "copy ms": round(1e3 * copy, 2),
        "tensors": len(tensors),
        "MB": round(sum(tensor.nbytes for tensor in tensors) / 1e6),
    }


def clock(run: Callable[[], Any]) -> float:
    """Return the seconds that something takes on the device."""
    for wait in (True, False):
        if IS_GPU:
            torch.cuda.synchronize()
        if wait:
            started = perf_counter()
            run()
    return perf_counter() - started


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2}
    vocabulary = special | {letter: 3 + n for n, letter in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)


def write_adapters(base: Path, folders: list[Path]) -> None:
    """Write random LoRA adapters of all linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **LORA))
    for folder in folders:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.02)
        model.save_pretrained(folder, save_embedding_layers=False)


def write_texts(file: Path, n: int) -> None:
    """Write texts of 20 to 110 letters."""
    generator = np.random.default_rng(0)
    texts = [
        "".join(generator.choice(list("abcdefgh "), generator.integers(20, 111))) for _ in range(n)
    ]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))


# -- all -------------------------------------------------------------------------------------------


def run_arms(
    folder: Path, pairs: list[tuple[str, str]], until: float, *options: str
) -> Iterator[Any]:
    """Yield a row for each arm, each from its own process, one at a time; what would begin after
    the limit is left out.

    The processes start together, since importing takes longer than timing; each waits for its turn.
    """
    waiting = [(name, mode, start_arm(folder, name, mode, *options)) for name, mode in pairs]
    for name, mode, process in waiting:
        if perf_counter() > until:
            process.kill()
            print(f"left out: {name}, {mode}", file=sys.stderr)
            continue
        output, errors = process.communicate("go\n")
        lines = [line for line in output.splitlines() if line.startswith("{")]
        if lines:
            yield json.loads(lines[-1])
            if options:
                print(f"{name}, {mode}\n{errors[errors.rfind('a step on the device') - 12 :]}")
        else:
            print(f"{name}, {mode}: {errors[-1500:]}", file=sys.stderr)


def start_arm(folder: Path, name: str, mode: str, *options: str) -> "subprocess.Popen[str]":
    """Start the process of an arm, which waits for a line before it does anything."""
    command = [sys.executable, __file__, "--arm", name, "--mode", mode, "--folder", str(folder)]
    command += options
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def show_table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    keys = [key for key in rows[0] if key != "speed"]
    lines = [f"| {' | '.join(keys)} |", f"|{' --- |' * len(keys)}"]
    lines += [f"| {' | '.join(str(row.get(key)) for key in keys)} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Run all parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--arms", default="all", help="names, separated by ';'")
    parser.add_argument("--modes", default="LoRA,full")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        from optimer_hf.training import captured  # noqa: F401

        sys.stdin.readline()
        is_lora, folder = options.mode == "LoRA", options.folder
        is_trial = options.arm == "trial"
        n_profiled = N_PROFILED if options.profile else 0
        if is_trial:
            row = time_trials(folder)
        else:
            row = train_arm(options.arm, is_lora, folder, n_profiled)
        print(json.dumps(row))
        return
    until = perf_counter() + options.seconds
    print(device_name(), torch.__version__, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder / "base")
        arms = list(ARMS) if options.arms == "all" else options.arms.split(";")
        pairs = [(arm, mode) for arm in arms for mode in options.modes.split(",")]
        trials: list[dict[str, Any]] = []
        rows: list[dict[str, Any]] = []
        profile = ["--profile"] if options.profile else []
        for row in run_arms(folder, [("trial", "LoRA"), *pairs], until, *profile):
            (rows if "arm" in row else trials).append(row)
            print(json.dumps(row), flush=True)
    for table in filter(None, (trials, rows)):
        print(f"\n{show_table(table)}")


if __name__ == "__main__":
    main()
