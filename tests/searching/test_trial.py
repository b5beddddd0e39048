"""trial.py, faults.py: which failures are the fault of the weights."""

import errno
import shutil

import numpy as np
import pytest
import torch
from distributed.comm import CommClosedError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from optimer_hf.errors import ConfigError, EvaluationError, ModelError
from optimer_hf.searching import trial as pool_module
from optimer_hf.searching.one_model import score_model
from optimer_hf.searching.trial import ResidentPool, run_trial
from optimer_hf.study.config import StudyConfig, VectorConfig
from optimer_hf.study.trials import Candidate
from tests.support.landscapes import config_of, failing_at


def caused_by(cause: Exception) -> Exception:
    error = ValueError("the task cannot be scored")
    error.__cause__ = cause
    return error


NO_FAULT_OF_WEIGHTS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
    RuntimeError("can't start new thread"),
    MemoryError(),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EMFILE, "Too many open files"),
    ConnectionResetError("reset by peer"),
    TimeoutError("the Hub did not answer"),
    FileNotFoundError("items.jsonl"),
    ModuleNotFoundError("No module named 'sacrebleu'"),
    SafetensorError("Error while deserializing header"),
    CommClosedError("the worker is gone"),
    caused_by(MemoryError()),
    ExceptionGroup("two", [ValueError("no"), MemoryError()]),
]


FAULT_OF_WEIGHTS = [
    EvaluationError("the score of item 0 is not a finite number"),
    OverflowError("math range error"),
    ZeroDivisionError("float division by zero"),
    FloatingPointError("invalid value"),
    ValueError("generation stopped at a token that is none"),
    RuntimeError("probability tensor contains either `inf`, `nan` or element < 0"),
    np.linalg.LinAlgError("singular"),
    KeyError("resps"),
    AssertionError("no"),
]


@pytest.mark.parametrize("error", NO_FAULT_OF_WEIGHTS, ids=repr)
def test_what_is_not_the_fault_of_the_weights_is_tried_twice_and_raised(error, monkeypatch):
    freed = []
    monkeypatch.setattr(pool_module, "collect_memory", lambda: freed.append(True))
    config = config_of()
    asked = (Candidate(3, "x", dict.fromkeys("wxyz", 0.1)), [])
    assert run_trial(failing_at({0: error})(config), *asked).status == "ok"
    with pytest.raises(EvaluationError, match=r"trial 3: .*, twice\."):
        run_trial(failing_at({0: error, 1: error})(config), *asked)
    assert len(freed) == 2


@pytest.mark.parametrize("error", FAULT_OF_WEIGHTS, ids=repr)
def test_what_the_weights_break_is_a_crashed_trial(error):
    asked = (Candidate(3, "x", dict.fromkeys("wxyz", 0.1)), [])
    crashed = run_trial(failing_at({0: error})(config_of()), *asked)
    assert crashed.status == "crashed" and not crashed.is_blameless


# -- models larger than one device -----------------------------------------------------------------


@pytest.fixture
def config(make_base, make_adapter, corpus_dir, kind) -> StudyConfig:
    base = make_base(kind, torch.float32)
    return StudyConfig.model_validate(
        {
            "base_model": str(base.path),
            "vectors": {f"v{seed}": str(make_adapter(base, seed)) for seed in (1, 2)},
            "objective": {"terms": [{"text": str(corpus_dir / "aaa.search.jsonl"), "limit": 4}]},
            "search": {"rescore_top": 0},
        }
    )


def test_a_trial_scores_the_same_wherever_the_model_lies(config):
    asked = config.objective.asked_terms("search")
    weights = {"v1": 0.7, "v2": -0.2}
    whole = ResidentPool(config).score(weights, asked)
    layers = {"model.layers.0": "cpu", "model.layers.1": "disk", "model.rotary_emb": "cpu"}
    rest = {"model.embed_tokens": "cpu", "model.norm": "disk", "lm_head": "cpu"}
    for device_map in ("auto", {"": "disk"}, layers | rest):
        spread = ResidentPool(config.model_copy(update={"device_map": device_map}))
        assert spread._evaluator._lm._likelihoods is not None  # a head elsewhere is plain, too
        scored = spread.score(weights, asked)
        assert scored.terms == whole.terms and scored.n_tokens == whole.n_tokens > 0


def test_a_model_spread_over_devices_is_evaluated_as_a_whole_one(config):
    whole = score_model(config.base_model, config.objective)
    assert score_model(config.base_model, config.objective, device_map={"": "disk"}) == whole


def test_a_device_map_with_a_part_that_the_model_lacks_is_an_error_with_its_name(config):
    wrong = config.model_copy(update={"device_map": {"": "cpu", "model.layer.1": "disk"}})
    with pytest.raises(
        ConfigError, match=r"no part 'model\.layer\.1'\. Did you mean 'model\.layers\.1'"
    ):
        ResidentPool(wrong)


def test_a_batch_that_does_not_fit_is_no_fault_of_the_weights(config, caplog):
    """The real model, and a real trial: only the device that lacks memory is not real."""
    asked = config.objective.asked_terms("search")
    pool = ResidentPool(config)
    expected = pool.score({"v1": 0.5, "v2": 0.5}, asked).terms
    sizes = []

    def refuse(_, args, options) -> None:
        sizes.append(options["input_ids"].numel())
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    pool._engine.lm.model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    candidate = Candidate(3, "smac", {"v1": 0.5, "v2": 0.5})
    most = 300
    trial = run_trial(pool, candidate, asked)
    assert sizes[0] == sizes[1] > most >= sizes[-1]  # once more, then less
    assert trial.status == "ok"
    for label, term in expected.items():
        values = [value for value, _ in trial.terms[label].items]
        assert values == pytest.approx([value for value, _ in term.items], rel=1e-3)
    most = 1
    with pytest.raises(EvaluationError, match=r"trial 3: OutOfMemoryError: CUDA out of memory"):
        run_trial(pool, candidate, asked)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("too little"), RuntimeError("not implemented"), TypeError("x")]
)
@pytest.mark.parametrize("place", ["derivatives", "differentiate"])
def test_gradients_that_cannot_be_had_give_way_to_a_plain_trial(config, monkeypatch, place, error):
    pool = ResidentPool(config)
    asked = config.objective.asked_terms("search")
    plain = pool.score({"v1": 0.5}, asked)
    calls = []

    def fail(*_):
        calls.append(place)
        raise error

    owner = pool._engine if place == "derivatives" else pool._evaluator
    monkeypatch.setattr(owner, place, fail)
    monkeypatch.setattr(pool_module, "collect_memory", lambda: calls.append("collected"))
    assert pool.score({"v1": 0.5}, asked).terms == plain.terms
    assert not calls  # collecting takes longer than some trials
    for _ in range(2):
        scored = pool.score({"v1": 0.5}, asked, gradients=True)
        assert scored.terms == plain.terms
        assert scored.gradients == {}
    assert calls == [place, "collected"]  # the next trial does not try again


def test_a_vector_that_is_not_finite_ends_the_search_with_its_name(config, tmp_path):
    """Otherwise each trial that has the vector would crash, as if its weights were at fault."""
    broken = tmp_path / "broken"
    shutil.copytree(config.vectors["v2"].source, broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    name = next(name for name in sorted(tensors) if "lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    vectors = config.vectors | {"v2": VectorConfig(source=str(broken))}
    pool = ResidentPool(config.model_copy(update={"vectors": vectors}))
    asked = config.objective.asked_terms("search")
    assert run_trial(pool, Candidate(1, "anchor", {"v1": 1.0}), asked).status == "ok"
    with pytest.raises(ModelError, match=r"vector 'v2': its delta holds NaN"):
        run_trial(pool, Candidate(2, "anchor", {"v2": 1.0}), asked)


def test_a_vector_of_an_unlikely_size_is_named_before_the_first_trial(
    config, tmp_path, caplog, kind
):
    factors = {f"zero-{kind}": 0.0, f"huge-{kind}": 1e4}  # each warning is given once a process
    for name, factor in factors.items():
        shutil.copytree(config.vectors["v2"].source, tmp_path / name)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        scaled = {key: t * factor if "lora_B" in key else t for key, t in tensors.items()}
        save_file(scaled, tmp_path / name / "adapter_model.safetensors")
    added = {name: VectorConfig(source=str(tmp_path / name)) for name in factors}
    for _ in range(2):
        ResidentPool(config.model_copy(update={"vectors": config.vectors | added}))
    zero, huge = (record.message for record in caplog.records)
    assert zero.startswith(f"vector zero-{kind}: it is zero and moves nothing")
    assert huge.startswith(f"vector huge-{kind}: its delta is larger than the base tensors it")
