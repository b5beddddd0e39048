"""Training whose parameters are spread over processes: the numbers of one process, kill and resume,
and what is refused.
"""

import json
import subprocess
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest
import torch
from safetensors.torch import load_file

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.errors import ConfigError, OutputError
from optimer_hf.models.live import empty_model
from optimer_hf.training.checkpoints import refuse_other_processes
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.run import train, train_and_record
from optimer_hf.training.sharding import FLAGS, check_sharding, refuse_unpassable
from tests.support.sharding import environment, sharded_command, write_accelerate_config

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
SAVED = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
ALL_LOAD = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
WAYS = {  # architecture and LoRA
    "full, tied": ("gemma", None),
    "full, untied": ("llama", None),
    "lora, tied": ("gemma", LORA),
    "lora, untied": ("llama", LORA),
    "lora on an untied head": ("llama", LORA | {"target_modules": ["q_proj", "lm_head"]}),
    "saved untied head": ("llama", LORA | {"modules_to_save": ["lm_head"]}),
    "saved tied embedding": ("gemma", LORA | SAVED),
}


OPTIONS = {  # variables that accelerate passes to the processes
    "every process loads": ALL_LOAD,
    "activation checkpointing": {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
    "weights kept after forward": {"FSDP_RESHARD_AFTER_FORWARD": "false"},
    "one group": {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"},
}
MIXED = {"full, bfloat16": None, "lora, bfloat16": LORA}


@pytest.fixture(scope="module")
def make_config(make_base, corpus_dir):
    """Return a function -> TrainConfig of a short float32 run with a batch per process."""

    def config(kind: str, lora: dict | None, batch_size: int, **trainer) -> TrainConfig:
        return TrainConfig(
            name="aaa",
            base_model=str(make_base(kind, torch.float32).path),
            corpus=CorpusConfig(path=corpus_dir / "aaa.train.jsonl"),
            block_size=32,
            max_tokens=32 * 24,
            lora=lora,
            trainer={
                "learning_rate": 1e-3 if lora is None else 1e-2,
                "bf16": False,
                "save_strategy": "no",
                "per_device_train_batch_size": batch_size,
            }
            | trainer,
        )

    return config


@pytest.fixture(scope="module")
def sharded(make_config, tmp_path_factory):
    """The directory of all runs that need no process of their own, by name."""
    folder = tmp_path_factory.mktemp("sharded")
    runs = {
        name: (ALL_LOAD if name == "saved tied embedding" else {}, make_config(*way, 2))
        for name, way in WAYS.items()
    }
    runs |= {name: (given, make_config("gemma", None, 2)) for name, given in OPTIONS.items()}
    runs |= {name: ({}, make_config("gemma", lora, 2, bf16=True)) for name, lora in MIXED.items()}
    for name, (_, config) in runs.items():
        config.write(folder / f"{name}.yaml")
    cases = [
        (given, str(folder / f"{name}.yaml"), str(folder / name))
        for name, (given, _) in runs.items()
    ]
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    wait(launch(folder, folder / "cases.json"), seconds=600)
    return folder


def launch(folder: Path, *words: object, kind: str = "FSDP") -> subprocess.Popen[str]:
    """Start two processes that share a model."""
    accelerate = write_accelerate_config(folder / "accelerate.yaml", kind)
    return subprocess.Popen(
        sharded_command(accelerate, *words),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(process: subprocess.Popen[str], seconds: float = 300) -> str:
    """Wait for sharded processes, and return what they printed to stderr."""
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # takes the two processes with it, should they wait for each other
        pytest.fail(process.communicate()[1][-3000:])
    assert process.returncode == 0, said[-3000:]
    return said


def training_of(out: Path) -> dict:
    return json.loads((out / "training.json").read_text(encoding="utf-8"))["training"]


def tensors_in(out: Path) -> dict[str, torch.Tensor]:
    (file,) = out.glob("*model.safetensors")
    return load_file(file)


def assert_same_run(out: Path, expected: Path) -> None:
    """Check that two runs have the same losses, norms, files and tensors."""
    ours, theirs = training_of(out), training_of(expected)
    assert len(theirs["losses"]) == len(theirs["norms"]) == 6
    for numbers in ("losses", "norms"):
        assert ours[numbers] == pytest.approx(theirs[numbers], rel=1e-4, abs=1e-6)
    assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}
    found, wanted = tensors_in(out), tensors_in(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    for file in ("config.json", "adapter_config.json"):
        assert (out / file).exists() == (expected / file).exists()
        if (out / file).exists():
            assert settings_in(out / file) == settings_in(expected / file)


def settings_in(file: Path) -> dict:
    settings = json.loads(file.read_text(encoding="utf-8"))
    if "target_modules" in settings:  # PEFT keeps them as a set
        settings["target_modules"] = sorted(settings["target_modules"])
    return settings


# -- the numbers of one process --------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_a_sharded_run_gives_the_vector_of_one_process(sharded, make_config, tmp_path, name):
    assert_same_run(sharded / name, train(make_config(*WAYS[name], 4), tmp_path / "one"))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_fsdp_change_no_number(sharded, name):
    assert_same_run(sharded / name, sharded / "full, tied")


@pytest.mark.parametrize("name", MIXED)
def test_a_sharded_run_in_bfloat16_adds_up_in_float32(sharded, make_config, tmp_path, name):
    one = train(make_config("gemma", MIXED[name], 4, bf16=True), tmp_path / "one")
    ours, theirs = training_of(sharded / name), training_of(one)
    assert ours["mixed_precision"] == theirs["mixed_precision"] == "bf16"
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=2e-3)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=2e-2)
    assert {tensor.dtype for tensor in tensors_in(sharded / name).values()} == {torch.float32}
    # a loss in bfloat16 would have 3 digits
    assert any(torch.tensor(loss).bfloat16().item() != loss for loss in ours["losses"])


@pytest.mark.parametrize("name", ["full, tied", "full, untied", "lora, tied", "lora, untied"])
def test_zero3_gives_the_vector_of_one_process(make_config, tmp_path, name):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    make_config(*WAYS[name], 2).write(tmp_path / "two.yaml")
    words = "train", tmp_path / "two.yaml", tmp_path / "two"
    wait(launch(tmp_path, *words, kind="DeepSpeed"))
    train_and_record(make_config(*WAYS[name], 4), tmp_path / "one")
    assert_same_run(tmp_path / "two", tmp_path / "one")


# -- kill and go on --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "lora"), [("gemma", None), ("llama", LORA)], ids=["full", "lora"])
def test_a_killed_sharded_run_resumes_to_the_same_vector(make_config, tmp_path, kind, lora):
    config = make_config(kind, lora, 2, save_strategy="steps", save_steps=2)
    config.write(tmp_path / "two.yaml")
    words = "train", tmp_path / "two.yaml", tmp_path / "two"
    process = launch(tmp_path, *words)
    checkpoint = tmp_path / "two" / "checkpoints" / "checkpoint-2"
    end = monotonic() + 120
    while not (checkpoint / "sealed.json").exists():
        assert process.poll() is None, process.communicate()
        assert monotonic() < end, "the run wrote no checkpoint in time"
        sleep(0.005)
    for each in psutil.Process(process.pid).children(recursive=True):
        each.kill()
    process.kill()
    process.communicate()
    assert not (tmp_path / "two" / "training.json").exists()
    assert "resuming from checkpoint-" in wait(launch(tmp_path, *words))
    train_and_record(make_config(kind, lora, 4), tmp_path / "one")
    assert_same_run(tmp_path / "two", tmp_path / "one")


ONE, TWO = ["rng_state.pth"], ["rng_state_0.pth", "rng_state_1.pth"]  # as transformers calls them
FSDP_FILES, DEEPSPEED_FILES = ["pytorch_model_fsdp_0/x", *TWO], ["global_step2/x", *TWO]


@pytest.mark.parametrize(
    ("files", "sharding", "n_processes", "message"),
    [
        (FSDP_FILES, None, 1, "2 processes, sharded with FSDP, .* 1 process, not sharded"),
        (FSDP_FILES, "DeepSpeed", 2, "sharded with FSDP, and .* sharded with DeepSpeed"),
        (DEEPSPEED_FILES, "FSDP", 2, "sharded with DeepSpeed, and .* sharded with FSDP"),
        (ONE, "FSDP", 1, "not sharded, and .* sharded with FSDP"),
        (FSDP_FILES, "FSDP", 4, "2 processes, .* 4 processes, sharded with FSDP"),
        (TWO, None, 1, "2 processes, not sharded, .* 1 process, not sharded"),
        (ONE, None, 2, "1 process, not sharded, .* 2 processes, not sharded"),
    ],
)
def test_a_run_does_not_resume_from_checkpoints_of_another_kind(
    tmp_path, files, sharding, n_processes, message
):
    for name in files:
        file = tmp_path / "checkpoint-2" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    with pytest.raises(OutputError, match=rf"checkpoint-2: .*{message}\. Start it as before, or"):
        refuse_other_processes(tmp_path, sharding, n_processes)


@pytest.mark.parametrize(
    ("files", "sharding", "n_processes"),
    [(ONE, None, 1), (TWO, None, 2), (FSDP_FILES, "FSDP", 2), (DEEPSPEED_FILES, "DeepSpeed", 2)],
)
def test_a_run_resumes_from_its_own_checkpoints(tmp_path, files, sharding, n_processes):
    for name in files:
        file = tmp_path / "checkpoint-2" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    refuse_other_processes(tmp_path, sharding, n_processes)


# -- what is refused -------------------------------------------------------------------------------

FSDP = {FLAGS["FSDP"]: "true", "FSDP_VERSION": "2"}
REFUSED = {
    "fsdp 1": (FSDP | {"FSDP_VERSION": "1"}, "found FSDP version 1, expected fsdp_version: 2"),
    "no version": ({FLAGS["FSDP"]: "true"}, "found FSDP version 1, expected fsdp_version: 2"),
    "whole checkpoints": (
        FSDP | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
        "found fsdp_state_dict_type: FULL_STATE_DICT, expected SHARDED_STATE_DICT",
    ),
    "a policy that does not exist": (
        FSDP | {"FSDP_AUTO_WRAP_POLICY": "WRAP"},
        "FSDP: Invalid auto wrap policy: WRAP",
    ),
    "tensor parallel": (
        FSDP | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
        "found a parallelism_config that divides layers",
    ),
    "megatron": ({FLAGS["Megatron-LM"]: "true"}, "found Megatron-LM, expected FSDP"),
}


@pytest.mark.parametrize(("variables", "message"), REFUSED.values(), ids=REFUSED)
def test_a_way_to_shard_that_cannot_work_is_refused_before_anything_is_loaded(
    make_config, tmp_path, monkeypatch, variables, message
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("accelerate.PartialState", None)
    with pytest.raises(ConfigError, match=rf"^train config 'aaa': accelerate launch: {message}"):
        train(make_config("gemma", None, 2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_deepspeed_that_is_not_installed_is_named(make_config, monkeypatch):
    monkeypatch.setenv(FLAGS["DeepSpeed"], "true")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="DeepSpeed is not installed"):
        check_sharding(make_config("gemma", None, 2))


def test_sharding_that_accelerate_ignores_is_refused(make_config, tmp_path, monkeypatch):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"FSDP needs GPUs, and accelerate found none \(NO\)"):
        train(make_config("gemma", None, 2), tmp_path / "out")
    assert not (tmp_path / "out" / "training.json").exists()


@pytest.mark.parametrize(
    ("lora", "reason"),
    [(LORA | SAVED, "modules_to_save that are tied"), (None, "the saved buffer 'model.scale'")],
)
def test_what_one_process_cannot_pass_to_the_others_is_refused(
    make_config, make_base, monkeypatch, lora, reason
):
    for name, value in (FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}).items():
        monkeypatch.setenv(name, value)
    model = empty_model(make_base("gemma", torch.float32))
    if lora is None:
        model.model.register_buffer("scale", torch.ones(1))
    config = make_config("gemma", lora, 2)
    with pytest.raises(ConfigError, match=f"cannot pass on {reason}"):
        refuse_unpassable(config, model)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    refuse_unpassable(config, model)
