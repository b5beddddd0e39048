"""Merging against the floor of memory and disk, and against mergekit, side by side in one run.

    python benchmarks/merge.py [--rounds 3] [--scratch DIR] [--only NAME ...] [--device cuda]

Builds its own inputs (random weights in the shapes of Gemma 3 270M, four tuned checkpoints, four
LoRA adapters), runs every merge in a process of its own, whose seconds exclude starting Python,
importing and loading compiled code, and prints ratios of medians. Anonymous memory is sampled from
/proc while it runs (Linux). The floor is reading every input once and writing the output once, with
plain reads and writes, in the same run: files come from the page cache for all alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch

N_VECTORS = 4
BASE_STD, DELTA_STD = 0.03, 3e-4  # as measured on the real base and real vectors
WEIGHTS = [0.7, 0.4, -0.2, 0.3]
LARGE = (262_144, 5_376)  # the embedding of Gemma 3 27B
CHUNK = 2**23


# -- inputs ----------------------------------------------------------------------------------------


def gemma_config() -> Any:
    """Return the config of Gemma 3 270M."""
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2_048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        tie_word_embeddings=True,
    )


def gemma_shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors of Gemma 3 270M, the tied head once."""
    from transformers import Gemma3ForCausalLM

    with torch.device("meta"):
        model = Gemma3ForCausalLM(gemma_config())
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def write_model(out: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """Write base (seed 0) or tuned weights (base plus a little) in bfloat16, block by block."""
    from optimer_hf.models.shards import write_sharded

    out.mkdir(parents=True)
    config = gemma_config()
    config.architectures = ["Gemma3ForCausalLM"]
    config.save_pretrained(out)

    def rows_of(name: str, rows: slice) -> torch.Tensor:
        columns = shapes[name][1:]
        where = zlib.crc32(f"{name}:{rows.start}".encode()) % 2**31
        size = (rows.stop - rows.start, *columns)
        base = torch.randn(size, generator=torch.Generator().manual_seed(where)) * BASE_STD
        if seed:
            noise = torch.Generator().manual_seed(where + seed)
            base += torch.randn(size, generator=noise) * DELTA_STD
        return base.bfloat16()

    specs = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    write_sharded(out, "model", specs, rows_of, 10**12)


def write_adapter(out: Path, base: Path, seed: int) -> None:
    """Write a LoRA adapter of rank 16 on all linear layers, its B not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    adapted.save_pretrained(out, save_embedding_layers=False)


# -- one merge in a process of its own -------------------------------------------------------------


def child(kind: str, base: Path, sources: list[Path], out: Path, device: str) -> float:
    """Run one merge and return its seconds."""
    if kind == "native":
        return merge_natively(base, sources, out, device)
    if kind == "torch":
        with plain_torch():
            return merge_natively(base, sources, out, device)
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    dtype = "float32" if kind == "mergekit-float32" else "bfloat16"
    adapters = (sources[0] / "adapter_config.json").exists()
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "models": [
                {
                    "model": f"{base}+{source}" if adapters else str(source),
                    "parameters": {"weight": weight},
                }
                for source, weight in zip(sources, WEIGHTS, strict=True)
            ],
            "dtype": dtype,
            "out_dtype": "bfloat16",
        }
    )
    with tempfile.TemporaryDirectory(dir=out.parent) as cache:
        options = MergeOptions(
            quiet=True, copy_tokenizer=False, write_model_card=False, lora_merge_cache=cache
        )
        started = perf_counter()
        run_merge(config, str(out), options)
        seconds = perf_counter() - started
        copies = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
    print(json.dumps({"copies": copies}))
    return seconds


def merge_natively(base: Path, sources: list[Path], out: Path, device: str) -> float:
    """Run one merge of optimer and return its seconds, without those of imports."""
    from optimer_hf.merging.kernel import add_weighted
    from optimer_hf.merging.writer import write_merged
    from optimer_hf.models.layout import ResolvedModel
    from optimer_hf.vectors.opening import open_vector

    add_weighted(torch.ones(1), [torch.ones(1)], [1.0])  # loads what was compiled: 0.4 s
    if any((source / "adapter_config.json").exists() for source in sources):
        import peft  # noqa: F401
    started = perf_counter()
    model = ResolvedModel(base, base.name)
    pool = [open_vector(source.name, str(source), model) for source in sources]
    weights = dict(zip((vector.name for vector in pool), WEIGHTS, strict=True))
    write_merged(model, pool, weights, out, device=device)
    return perf_counter() - started


@contextmanager
def plain_torch() -> Iterator[None]:
    """Make merges on the CPU use torch operations instead of numba's loops, which give the same
    bits.
    """
    from optimer_hf.merging import kernel

    def add_in_one_pass(base: Any, deltas: Any, weights: Any, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(kernel.add_in_steps(base, deltas, weights, out.dtype))

    with patch.object(kernel, "add_in_one_pass", add_in_one_pass):
        yield


def run_child(
    kind: str, base: Path, sources: list[Path], out: Path, device: str
) -> dict[str, float]:
    """Run `child` in a fresh process; return seconds, peak anonymous memory it took for the merge,
    and peak resident memory, both in bytes.
    """
    command = [sys.executable, __file__, "--child", kind, str(out), device, str(base)]
    process = subprocess.Popen(
        [*command, *map(str, sources)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    anonymous = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            break
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        anonymous = max(anonymous, int(fields.get("RssAnon", "0 kB").split()[0]) * 1024)
        time.sleep(0.005)
    stdout, stderr = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{kind}: {stderr[-2000:]}")
    figures: dict[str, float] = {"anonymous": anonymous}
    for line in stdout.splitlines():
        if line.startswith("{"):
            figures |= json.loads(line)
    return figures


def child_main(arguments: list[str]) -> None:
    """Run one merge, print seconds and memory."""
    kind, out, device, base, *sources = arguments
    seconds = child(kind, Path(base), [Path(source) for source in sources], Path(out), device)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "resident": int(peak.split()[1]) * 1024}))


# -- the floor, and what is measured ---------------------------------------------------------------


def read_and_write(files: list[Path], n_bytes: int, out: Path) -> float:
    """Return the seconds of reading files once and writing n_bytes, with plain reads and writes."""
    buffer = memoryview(bytearray(CHUNK))
    started = perf_counter()
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    with open(out, "wb", buffering=0) as opened:
        for start in range(0, n_bytes, CHUNK):
            opened.write(buffer[: min(CHUNK, n_bytes - start)])
    seconds = perf_counter() - started
    out.unlink()
    return seconds


def weights_of(directory: Path) -> Path:
    """Return the weights file of a model or adapter."""
    return next(directory.glob("*.safetensors"))


def repeat(rounds: int, *arms: Callable[[], dict[str, float]]) -> list[dict[str, float]]:
    """Run the arms in turn and return the median of every figure of each."""
    by_arm: list[list[dict[str, float]]] = [[] for _ in arms]
    for _ in range(rounds):
        for runs, arm in zip(by_arm, arms, strict=True):
            runs.append(arm())
    return [
        {key: statistics.median(run[key] for run in runs) for key in runs[0]} for runs in by_arm
    ]


class Inputs:
    """Everything the measurements read, made when it is first asked for."""

    def __init__(self, scratch: Path, device: str, rounds: int) -> None:
        self.scratch, self.device, self.rounds = scratch, device, rounds

    def models(self, name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[Path, list[Path]]:
        """Return base and tuned checkpoints of these shapes."""
        folder = self.scratch / name
        paths = [folder / "base", *(folder / f"v{i}" for i in range(1, N_VECTORS + 1))]
        for seed, path in enumerate(paths):
            if not path.exists():
                write_model(path, shapes, seed)
        return paths[0], paths[1:]

    def adapters(self, base: Path) -> list[Path]:
        """Return LoRA adapters of a base."""
        paths = [self.scratch / f"adapter{i}" for i in range(1, N_VECTORS + 1)]
        for seed, path in enumerate(paths):
            if not path.exists():
                write_adapter(path, base, seed)
        return paths

    def merge(self, kind: str, base: Path, sources: list[Path]) -> dict[str, float]:
        """Run one merge and remove what it wrote."""
        import shutil

        out = self.scratch / f"out-{kind}"
        shutil.rmtree(out, ignore_errors=True)
        os.sync()  # what others left to be written is not part of it
        measured = run_child(kind, base, sources, out, self.device)
        shutil.rmtree(out)
        return measured

    def floor(self, base: Path, sources: list[Path]) -> dict[str, float]:
        """Read the inputs and write the output once, without a merge."""
        files = [weights_of(path) for path in (base, *sources)]
        n_bytes = files[0].stat().st_size
        os.sync()
        return {"seconds": read_and_write(files, n_bytes, self.scratch / "floor.bin")}


def checkpoints(inputs: Inputs) -> dict[str, Any]:
    """Base + 4 checkpoints of 268 M parameters against the floor and mergekit."""
    base, tuned = inputs.models("small", gemma_shapes())
    floor, ours, plain, fast, exact = repeat(
        inputs.rounds,
        lambda: inputs.floor(base, tuned),
        lambda: inputs.merge("native", base, tuned),
        lambda: inputs.merge("torch", base, tuned),
        lambda: inputs.merge("mergekit-bfloat16", base, tuned),
        lambda: inputs.merge("mergekit-float32", base, tuned),
    )
    print("\nbase + 4 checkpoints, bfloat16, shapes of Gemma 3 270M")
    line("read + write floor", floor, floor)
    line("optimer", ours, floor)
    line("optimer without numba", plain, floor)
    line("mergekit task_arithmetic, bfloat16", fast, floor)
    line("mergekit task_arithmetic, float32", exact, floor)
    print(f"  without numba / with {plain['seconds'] / ours['seconds']:.2f}x")
    by_engine = {"floor": floor, "optimer": ours, "optimer_without_numba": plain}
    return by_engine | {"mergekit_bfloat16": fast, "mergekit_float32": exact}


def adapters(inputs: Inputs) -> dict[str, Any]:
    """Base + 4 LoRA adapters against mergekit's base+adapter references."""
    base, _ = inputs.models("small", gemma_shapes())
    sources = inputs.adapters(base)
    floor, ours, theirs = repeat(
        inputs.rounds,
        lambda: inputs.floor(base, sources),
        lambda: inputs.merge("native", base, sources),
        lambda: inputs.merge("mergekit-bfloat16", base, sources),
    )
    print("\nbase + 4 LoRA adapters (r 16), bfloat16")
    line("read + write floor", floor, floor)
    line("optimer", ours, floor)
    line("mergekit, base+adapter", theirs, floor)
    print(f"  mergekit / optimer {theirs['seconds'] / ours['seconds']:.1f}x; ", end="")
    print(f"full copies mergekit wrote: {theirs['copies'] / 1e9:.2f} GB")
    return {"floor": floor, "optimer": ours, "mergekit": theirs}


def large(inputs: Inputs) -> dict[str, Any]:
    """Peak memory on one tensor of 262,144 x 5,376 with 4 checkpoint vectors."""
    base, tuned = inputs.models("large", {"model.embed_tokens.weight": LARGE})
    floor, ours = repeat(
        1, lambda: inputs.floor(base, tuned), lambda: inputs.merge("native", base, tuned)
    )
    print(f"\none tensor of {LARGE[0]:,} x {LARGE[1]:,}, 4 checkpoint vectors")
    line("read + write floor", floor, floor)
    line("optimer", ours, floor)
    return {"floor": floor, "optimer": ours}


def switch(inputs: Inputs) -> dict[str, Any]:
    """`set_weights` with 4 dense vectors and with 4 LoRA vectors, against memory copies."""
    from optimer_hf.merging.resident import ResidentModel
    from optimer_hf.models.checkpoint import Checkpoint
    from optimer_hf.models.layout import ResolvedModel
    from optimer_hf.vectors.opening import open_vector

    base, tuned = inputs.models("small", gemma_shapes())
    model = ResolvedModel(base, "base")
    seconds_by_kind: dict[str, Any] = {}
    print(f"\nset_weights on Gemma 3 270M's shapes, {inputs.device}")
    for kind, sources in (("dense", tuned), ("LoRA", inputs.adapters(base))):
        pool = [open_vector(source.name, str(source), model) for source in sources]
        resident = ResidentModel(model, pool, dtype="bfloat16", device=inputs.device)
        weights = dict(zip((vector.name for vector in pool), WEIGHTS, strict=True))
        names = frozenset[str]().union(*(vector.names for vector in pool))
        moved = Checkpoint(base).n_bytes(names)
        held = sum(vector.n_bytes for vector in resident.vectors)

        def set_weights(resident: Any = resident, weights: Any = weights) -> dict[str, float]:
            started = perf_counter()
            resident.set_weights(weights)
            synchronize(inputs.device)
            return {"seconds": perf_counter() - started}

        def without_numba(
            set_weights: Callable[[], dict[str, float]] = set_weights,
        ) -> dict[str, float]:
            with plain_torch():
                return set_weights()

        def copy(n_bytes: int = moved + held) -> dict[str, float]:
            return copy_bytes(n_bytes, inputs.device)

        set_weights()
        ours, plain, copies = repeat(
            max(9, inputs.rounds),
            set_weights,
            without_numba,
            copy,
        )
        seconds_by_kind[kind] = ours | {"copies": copies["seconds"], "held_bytes": held}
        seconds_by_kind[kind]["without_numba"] = plain["seconds"]
        print(
            f"  4 {kind:5} vectors {ours['seconds']:.3f} s, "
            f"{ours['seconds'] / copies['seconds']:.2f}x a copy of base and pool "
            f"(pool {held / 1e6:,.0f} MB, copied in {copies['seconds']:.3f} s); "
            f"without numba / with {plain['seconds'] / ours['seconds']:.2f}x"
        )
        del resident, pool
    ratio = seconds_by_kind["dense"]["held_bytes"] / seconds_by_kind["LoRA"]["held_bytes"]
    print(f"  pool of 4 dense / 4 LoRA vectors: {ratio:.0f}x the memory")
    return seconds_by_kind


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device != "cpu":
        torch.cuda.synchronize()


def copy_bytes(n_bytes: int, device: str) -> dict[str, float]:
    """Copy n_bytes of memory once, in pieces of at most 256 MiB, to warm memory."""
    piece = 2**28
    source = torch.ones(piece, dtype=torch.uint8, device=device)
    target = torch.zeros(piece, dtype=torch.uint8, device=device)
    synchronize(device)
    started = perf_counter()
    for start in range(0, n_bytes, piece):
        size = min(piece, n_bytes - start)
        target[:size].copy_(source[:size])
    synchronize(device)
    return {"seconds": perf_counter() - started}


def accuracy(inputs: Inputs) -> dict[str, Any]:
    """Share of bfloat16 outputs that are the float64 sum correctly rounded."""
    from optimer_hf.merging.writer import merge_rows
    from optimer_hf.models.checkpoint import Checkpoint
    from optimer_hf.models.layout import ResolvedModel
    from optimer_hf.vectors.forms import LowRank, to_dense
    from optimer_hf.vectors.opening import open_vector

    base, tuned = inputs.models("small", gemma_shapes())
    model, checkpoint = ResolvedModel(base, "base"), Checkpoint(base)
    errors = {}
    print("\naccuracy, bfloat16 output against float64")
    for kind, sources in (("dense", tuned), ("LoRA", inputs.adapters(base))):
        pool = [open_vector(source.name, str(source), model) for source in sources]
        weights = dict(zip((vector.name for vector in pool), WEIGHTS, strict=True))
        right = total = 0
        for name in sorted(pool[0].names):
            rows = slice(0, min(256, checkpoint.shape(name)[0]))
            base_rows = checkpoint.read_rows(name, rows)
            exact = base_rows.double()
            for vector in pool:
                delta = vector.delta(name, rows, "cpu")
                if isinstance(delta, LowRank):
                    product = delta.scale * (delta.b.double() @ delta.a.double())
                else:
                    product = to_dense(delta, base_rows).double()
                exact += weights[vector.name] * product
            merged = merge_rows(base_rows, name, rows, pool, weights, torch.bfloat16)
            right += int((merged == exact.to(torch.bfloat16)).sum())
            total += merged.numel()
        errors[kind] = right / total
        print(f"  4 {kind:5} vectors {100 * right / total:.3f} % of {total:,} correctly rounded")
    return errors


def line(name: str, found: dict[str, float], floor: dict[str, float]) -> None:
    """Print one row."""
    memory = ""
    if "anonymous" in found:
        memory = (
            f"  anonymous {found['anonymous'] / 1e6:6,.0f} MB, resident "
            f"{found['resident'] / 1e6:6,.0f} MB"
        )
    ratio = found["seconds"] / floor["seconds"]
    print(f"  {name:36} {found['seconds']:7.2f} s  {ratio:5.2f}x{memory}")


MEASUREMENTS = {
    function.__name__: function for function in (checkpoints, adapters, large, switch, accuracy)
}


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--child"]:
        child_main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="Keeps the inputs (24 GB with `large`).")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(options.scratch or Path(folder), options.device, options.rounds)
        print(f"threads {torch.get_num_threads()}, {options.rounds} rounds, medians")
        measured = {name: MEASUREMENTS[name](inputs) for name in options.only}
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
