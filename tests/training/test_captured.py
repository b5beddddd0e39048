"""captured.py: a run gives the same numbers however its steps are computed."""

import itertools
import json
import shutil

import pytest
import torch

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.training import captured
from optimer_hf.training.captured import StepClock, repeated_layers
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.run import train
from tests.support.tiny import tiny_model

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and not HAS_GPU, reason="torch.compile needs a compiler"
)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture
def run(make_base, corpus_dir, tmp_path):
    """A function that trains for 16 steps and returns the content of training.json."""
    base = make_base("llama")

    def run(name: str, *, lora=None, trainer=None, **fields) -> dict:
        config = TrainConfig(
            name="aaa",
            base_model=str(base.path),
            corpus=CorpusConfig(path=corpus_dir / "aaa.train.jsonl"),
            block_size=32,
            max_tokens=32 * 32,
            lora=lora,
            trainer={
                "learning_rate": 1e-2,
                "per_device_train_batch_size": 2,
                "bf16": False,
                **(trainer or {}),
            },
            **fields,
        )
        out = train(config, tmp_path / name)
        return json.loads((out / "training.json").read_text())["training"]

    return run


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_run_records_how_it_was_computed(run, lora):
    speed = run("plain", lora=lora)["speed"]
    assert speed["head"] == ("blocked" if not HAS_GPU else speed["head"])
    assert speed["cuda_graph"] == HAS_GPU
    assert speed["compiled"] is False  # it is far too short
    assert speed["tokens_per_second"] > 0


@pytest.mark.filterwarnings("ignore")  # those of torch, from within the compiler
@needs_compiler
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_compiled_layers_train_the_same_vector(run, lora):
    plain = run("plain", lora=lora)
    compiled = run("compiled", lora=lora, trainer={"torch_compile": True})
    assert compiled["speed"]["compiled"]
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert compiled["norms"] == pytest.approx(plain["norms"], rel=1e-3)


@pytest.mark.filterwarnings("ignore")
@needs_compiler
@pytest.mark.parametrize("is_faster", [True, False])
def test_a_long_run_is_compiled_and_stays_so_if_that_is_faster(run, monkeypatch, is_faster):
    plain = run("never", trainer={"torch_compile": False})
    times = itertools.chain([1.0], itertools.repeat(0.5 if is_faster else 2.0))
    monkeypatch.setattr(captured, "WORTH_COMPILING", 0.0)
    monkeypatch.setattr(captured, "WARM_UP", 1)
    monkeypatch.setattr(captured, "TIMED", 2)
    monkeypatch.setattr(StepClock, "seconds", lambda self: next(times))
    monkeypatch.setattr(captured, "can_pay", lambda device: True)
    tried = run("tried")
    assert tried["speed"]["compiled"] == is_faster
    assert tried["losses"] == pytest.approx(plain["losses"], rel=1e-4)


def test_the_layers_of_a_model_are_found_under_wrappers():
    from peft import LoraConfig, get_peft_model

    model = tiny_model("gemma")
    layers = list(model.model.layers)
    assert list(repeated_layers(model)) == layers
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    assert list(repeated_layers(adapted)) == layers
    assert list(repeated_layers(torch.nn.Linear(2, 2))) == []


# -- on a GPU --------------------------------------------------------------------------------------

OPTIONS = {
    "one batch a step": {},
    "three batches a step, the last step smaller": {"gradient_accumulation_steps": 3},
    "a smaller last batch": {"per_device_train_batch_size": 3},
    "no clipping": {"max_grad_norm": 0},
    "bfloat16": {"bf16": True},
}


@needs_gpu
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_captured_step_gives_the_numbers_of_a_plain_one(run, options, lora):
    options = {"torch_compile": False, **options}
    plain = run("plain", lora=lora, trainer=options, cuda_graph=False, head="blocked")
    captured = run("captured", lora=lora, trainer=options, head="blocked")
    assert captured["speed"]["cuda_graph"] and not plain["speed"]["cuda_graph"]
    rel = 1e-3 if options.get("bf16") else 1e-4
    assert captured["losses"] == pytest.approx(plain["losses"], rel=rel)
    assert captured["norms"] == pytest.approx(plain["norms"], rel=1e-3)


@needs_gpu
def test_dropout_differs_from_replay_to_replay(run):
    lora = LORA | {"lora_dropout": 0.5}
    captured = run("captured", lora=lora, trainer={"max_steps": 30, "num_train_epochs": 9})
    plain = run("plain", lora=LORA, trainer={"max_steps": 30, "num_train_epochs": 9})
    assert captured["speed"]["cuda_graph"]
    assert captured["losses"] != pytest.approx(plain["losses"], rel=1e-3)
    assert captured["losses"][-1] < captured["losses"][0]


@needs_gpu
def test_a_model_that_waits_for_the_device_is_trained_without_a_graph(run, monkeypatch):
    plain = run("plain", cuda_graph=False, head="blocked")
    stock = captured.CapturedTrainer.compute_loss

    def waits(self, model, inputs, **options):
        loss = stock(self, model, inputs, **options)
        return loss + 0 * loss.item()

    monkeypatch.setattr(captured.CapturedTrainer, "compute_loss", waits)
    waiting = run("waiting", head="blocked")
    assert waiting["speed"]["cuda_graph"] is False
    assert waiting["losses"] == pytest.approx(plain["losses"], rel=1e-4)


@needs_gpu
@pytest.mark.parametrize("head", ["stock", "blocked", "liger"])
def test_every_loss_trains_the_same_vector(run, head):
    if head == "liger":
        pytest.importorskip("liger_kernel")
    expected = run("expected", head="stock", cuda_graph=False)
    other = run("other", head=head)
    assert other["speed"]["head"] == head
    assert other["losses"] == pytest.approx(expected["losses"], rel=1e-3)


@needs_gpu
def test_a_batch_size_is_found_and_recorded(run, monkeypatch):
    monkeypatch.setattr("optimer_hf.training.batch_size.LEAST_STEPS", 4)
    found = run("found", trainer={"per_device_train_batch_size": "auto"})
    size = found["speed"]["batch_size"]
    assert size in (1, 2, 4, 8)
    assert found["n_steps"] == 32 // size
