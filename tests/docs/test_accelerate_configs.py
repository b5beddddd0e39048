"""The accelerate configs in docs/how-to/gpus.md: accelerate reads them, and we accept them."""

import os
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.sharding import check_sharding, requested_sharding

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "gpus.md"
CONFIGS = {
    block.splitlines()[0].removeprefix("# accelerate: "): block
    for block in re.findall(r"```yaml\n(# accelerate: .*?)```", PAGE.read_text(), re.DOTALL)
}


def test_the_page_has_a_config_for_1_8_and_16_gpus():
    assert set(CONFIGS) == {"1 GPU", "8 GPUs", "16 GPUs", "8 GPUs, DeepSpeed"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_passes_accelerate_and_our_check(name, tmp_path, monkeypatch):
    file = tmp_path / "accelerate.yaml"
    file.write_text(CONFIGS[name], encoding="utf-8")
    words = ["--config_file", str(file), "--machine_rank", "0", "-m", "optimer_hf", "train"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    n_gpus, n_machines = int(name.split()[0]), yaml.safe_load(CONFIGS[name])["num_machines"]
    assert args.use_fsdp != args.use_deepspeed and args.mixed_precision == "bf16"
    assert (args.num_processes, args.num_machines) == (n_gpus, n_machines)
    if args.use_deepspeed:
        assert args.zero_stage == 3
        return  # the rest needs DeepSpeed
    environment = prepare_multi_gpu_env(args)
    assert args.nproc_per_node == str(n_gpus // n_machines)
    for variable in environment.keys() - os.environ.keys():
        monkeypatch.setenv(variable, environment[variable])
    assert requested_sharding() == "FSDP"
    corpus = CorpusConfig(path="math.jsonl")
    check_sharding(TrainConfig(name="math", base_model="google/gemma-3-270m", corpus=corpus))
