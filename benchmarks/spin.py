"""How long OpenMP's threads should spin: a training step alone, and beside a busy loop.

    python benchmarks/spin.py [--counts 2000 5000 20000] [--rounds 7] [--tokens 128] [--isolate]

Trains LoRA layers of a random model with the shapes of SmolLM2-135M, in one process for each arm:
libgomp as it is, `OMP_WAIT_POLICY=PASSIVE`, and each GOMP_SPINCOUNT. The processes stay open and
take their steps in turn, arm by arm: alone, beside a process that never waits in a session of its
own (another terminal, another user), and beside one in the same session. Ratios are medians over
rounds of the pairs with libgomp as it is. `--isolate` is for a machine that others use, as root:
steps alone come before everything else, and the sessions of the benchmark before other sessions.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

SHAPES = {  # HuggingFaceTB/SmolLM2-135M
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(10**6))"
FIRST = "-20"  # of a session among others, from -20 to 19
SETTINGS = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def serve_steps(n_tokens: int) -> None:
    """Train a step for each line on stdin, and print its seconds."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from optimer_hf.models.fused_loss import fuse_loss

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES))
    fuse_loss(model)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    ids = torch.randint(SHAPES["vocab_size"], (1, n_tokens))
    for _ in sys.stdin:
        began = perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps([perf_counter() - began, torch.get_num_threads()]), flush=True)


def open_arm(environment: dict[str, str], n_tokens: int) -> subprocess.Popen[str]:
    """Start the process of an arm."""
    inherited = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    return subprocess.Popen(
        [sys.executable, __file__, "--serve", "--tokens", str(n_tokens)],
        env=inherited | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def run_first(arms: dict[str, subprocess.Popen[str]], is_first: bool) -> Iterator[None]:
    """Let the threads of all arms run before all others for a while, if `is_first`."""
    policies = ((os.SCHED_FIFO, 1), (os.SCHED_OTHER, 0)) if is_first else ()

    def schedule(policy: int, priority: int) -> None:
        for arm in arms.values():
            for thread in Path(f"/proc/{arm.pid}/task").iterdir():
                os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))

    if policies:
        schedule(*policies[0])
    yield
    if policies:
        schedule(*policies[1])


@contextlib.contextmanager
def keep_busy(*, own_session: bool, is_first: bool) -> Iterator[None]:
    """Run a process that never waits. Linux shares the cores between sessions first."""
    command = [sys.executable, "-c", BUSY]
    busy = subprocess.Popen(command, start_new_session=own_session)
    if is_first:
        Path(f"/proc/{busy.pid}/autogroup").write_text(FIRST)
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


def time_step(arm: subprocess.Popen[str]) -> float:
    """Let an arm take a step; return its seconds."""
    assert arm.stdin is not None and arm.stdout is not None
    print(file=arm.stdin, flush=True)
    seconds, n_threads = json.loads(arm.stdout.readline())
    assert n_threads > 1, "one thread never waits for another"
    return float(seconds)


def time_rounds(arms: dict[str, subprocess.Popen[str]], n_rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round by arm; the arms take turns."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(n_rounds):
        for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            times[name].append(time_step(arms[name]))
            print(f"{name}: {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return times


def show(title: str, times: dict[str, list[float]], n_tokens: int) -> None:
    """Print the table of one situation."""
    print(f"\n{title}\n| arm | seconds a step | tokens/s | speed, libgomp as it is = 1 |")
    print("|---|---|---|---|")
    reference = next(iter(times.values()))
    for name, each in times.items():
        ratio = median(first / other for first, other in zip(reference, each, strict=True))
        seconds = median(each)
        print(f"| {name} | {seconds:.2f} | {n_tokens / seconds:.0f} | {ratio:.2f} |", flush=True)


def main() -> None:
    """Run the arms and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="*", default=[2000, 5000, 20000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--busy-rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--isolate", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve_steps(options.tokens)
    environments = {"as it is": {}, "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}}
    environments |= {f"GOMP_SPINCOUNT={n}": {"GOMP_SPINCOUNT": str(n)} for n in options.counts}
    if options.isolate:
        Path("/proc/self/autogroup").write_text(FIRST)
    arms = {name: open_arm(each, options.tokens) for name, each in environments.items()}
    try:
        time_rounds(arms, 2)  # first calls are slower
        with run_first(arms, options.isolate):
            show("Alone", time_rounds(arms, options.rounds), options.tokens)
        for own, title in ((True, "another"), (False, "the same")):
            with keep_busy(own_session=own, is_first=options.isolate):
                times = time_rounds(arms, options.busy_rounds)
            show(f"Beside a busy loop in {title} session", times, options.tokens)
    finally:
        for arm in arms.values():
            arm.kill()
    return None


if __name__ == "__main__":
    main()
