"""engine.py, vllm_options.py: what is refused before an engine starts; no vLLM is needed."""

import pytest
import yaml

from optimer_hf.errors import ConfigError, StudyError
from optimer_hf.scoring.vllm_options import sampling_settings
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.searching.workers import Workers
from tests.support.cli import optimer
from tests.support.landscapes import FunctionPool, config_of


@pytest.fixture
def no_vllm(monkeypatch):
    """A machine without vLLM."""
    monkeypatch.setattr("optimer_hf.scoring.vllm_options.find_spec", lambda name: None)


def test_vllm_without_its_extra_is_refused_before_a_model_is_looked_for(no_vllm, tmp_path):
    with pytest.raises(ConfigError, match=r"engine: vllm is not installed.*optimer-hf\[vllm\]"):
        search(config_of(engine="vllm"), tmp_path / "s")  # its base does not exist
    assert not (tmp_path / "s" / "trials.jsonl").exists()


def test_a_run_in_vllm_without_its_extra_trains_nothing(no_vllm, recipe_dir, tmp_path):
    study = yaml.safe_load((recipe_dir / "study.yaml").read_text())
    (recipe_dir / "study.yaml").write_text(yaml.safe_dump(study | {"engine": "vllm"}))
    result = optimer("run", recipe_dir, tmp_path / "out", ok=False)
    assert result.exit_code == 1
    assert "engine: vllm is not installed" in result.output
    assert not (tmp_path / "out" / "vectors").exists()


def test_evaluate_in_vllm_without_its_extra_is_refused(no_vllm, tmp_path, corpus_dir):
    objective = tmp_path / "objective.yaml"
    objective.write_text(f"terms:\n  - text: {corpus_dir}/aaa.test.jsonl\n")
    result = optimer("evaluate", tmp_path / "nothing", objective, "--engine", "vllm", ok=False)
    assert result.exit_code == 1
    assert "engine: vllm is not installed" in result.output


def test_vllm_in_many_processes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"runs all trials in one engine.*tensor_parallel_size"):
        search(config_of(engine="vllm"), tmp_path / "s", runner=Workers(n_workers=2))


def pool_of_version(number: int):
    """Return a pool whose engine is vLLM of some version."""

    class Pool(FunctionPool):
        inputs = {"base_model": "0", "engine": f"vllm 0.{number}.0"}

    return Pool


def test_another_version_of_the_engine_does_not_go_on_with_a_study(tmp_path):
    config = config_of(engine="vllm", search={"n_trials": 8, "rescore_top": 1})
    longer = config_of(engine="vllm", search={"n_trials": 9, "rescore_top": 1})
    search(config, tmp_path / "s", runner=InProcess(pool_of_version(32)))
    before = (tmp_path / "s" / "trials.jsonl").read_bytes()
    with pytest.raises(
        StudyError, match=r"vllm 0\.32\.0 scored its trials, and this is vllm 0\.33"
    ):
        search(longer, tmp_path / "s", runner=InProcess(pool_of_version(33)))
    assert (tmp_path / "s" / "trials.jsonl").read_bytes() == before
    search(longer, tmp_path / "s", runner=InProcess(pool_of_version(32)))


@pytest.mark.parametrize(
    ("generation", "temperature"),
    [
        ({"until": ["a"]}, 0.0),
        ({"do_sample": False, "temperature": 0.0}, 0.0),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": None}, 0.0),
    ],
)
def test_an_answer_is_the_likeliest_unless_a_temperature_is_given(generation, temperature):
    settings = sampling_settings(generation)
    assert settings["temperature"] == temperature
    assert isinstance(settings["seed"], int)  # so that a trial can be repeated
