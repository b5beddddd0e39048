"""`accelerate launch` with a config that shards, on CPUs.

accelerate shards only on accelerators: on a CPU it ignores the config. Run as a module, this makes
that one choice as it is made on a GPU. Everything after it is the code that runs there: FSDP2 or
DeepSpeed ZeRO-3, over gloo. `-m tests.support.sharding train FILE OUT` is that command of optimer.
With a JSON file of (variables of accelerate, train file, OUT), it does all these runs in the same
processes.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_cpu_ram_efficient_loading": True,
}
ZERO3 = {"zero_stage": 3, "zero3_init_flag": True, "gradient_clipping": 1.0}


def write_accelerate_config(path: Path, kind: str = "FSDP") -> Path:
    """Write an accelerate config that shards over two processes, with FSDP or DeepSpeed."""
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kind.upper(),
        **({"fsdp_config": FSDP2} if kind == "FSDP" else {"deepspeed_config": ZERO3}),
        "mixed_precision": "no",
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": 2,
        "main_process_port": 0,
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def sharded_command(config: Path, *words: object) -> list[str]:
    """Return a command that runs this module in the processes of an accelerate config."""
    launch = ["accelerate.commands.launch", "--config_file", config]
    return [sys.executable, "-m", *map(str, [*launch, "-m", "tests.support.sharding", *words])]


def environment() -> dict[str, str]:
    """Return an environment without a GPU, in which this module can be imported."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }


def shard_on_cpus() -> None:
    """Let accelerate take FSDP or DeepSpeed for processes on CPUs."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    make = AcceleratorState.__init__

    def make_sharded(
        self: Any,
        mixed_precision: str | None = None,
        *args: Any,
        fsdp_plugin: Any = None,
        deepspeed_plugin: Any = None,
        **options: Any,
    ) -> None:
        plugins = {"fsdp_plugin": fsdp_plugin, "deepspeed_plugin": deepspeed_plugin}
        make(self, mixed_precision, *args, **plugins, **options)
        if self.distributed_type != DistributedType.MULTI_CPU:
            return
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
        elif deepspeed_plugin is not None:
            from deepspeed import comm

            comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
            deepspeed_plugin.set_mixed_precision(mixed_precision)
            deepspeed_plugin.select(_from_accelerator_state=True)
            self.deepspeed_plugins = deepspeed_plugin
            self._mixed_precision = "no"
            self.distributed_type = DistributedType.DEEPSPEED
        PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = make_sharded


def train_all(cases: list[tuple[Mapping[str, str], str, str]]) -> None:
    """Do several runs, each with its own variables of accelerate."""
    from optimer_hf.training.config import TrainConfig
    from optimer_hf.training.run import train

    given = dict(os.environ)
    for variables, file, out in cases:
        os.environ.update(variables)
        train(TrainConfig.read(Path(file)), Path(out))
        for name in variables:
            os.environ.pop(name)
            os.environ.update({name: given[name]} if name in given else {})


if __name__ == "__main__":
    shard_on_cpus()
    if sys.argv[1].endswith(".json"):
        train_all(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    else:
        from optimer_hf.cli import main

        main()
