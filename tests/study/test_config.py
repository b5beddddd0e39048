"""The fields of a study file, in YAML and in Python."""

import os
import re
from pathlib import Path

import pytest

from optimer_hf.errors import ConfigError
from optimer_hf.study.config import TRACKERS, StudyConfig

FIELDS = {"base_model": "a/base", "objective": {"terms": [{"task": "t"}]}}


def test_a_text_is_the_source_of_a_vector_in_yaml_and_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vectors = {"math": "you/math", "code": "./code", "ja": {"source": "you/ja", "fixed": 1.0}}
    file = tmp_path / "study.yaml"
    file.write_text(
        "base_model: a/base\nobjective: {terms: [{task: t}]}\n"
        "vectors: {math: you/math, code: ./code, ja: {source: you/ja, fixed: 1.0}}"
    )
    config = StudyConfig.read(file)
    assert config == StudyConfig(**FIELDS, vectors=vectors)
    assert config.vectors["math"].source == "you/math"
    assert config.vectors["code"].source == str(tmp_path / "code")
    assert config.free == {"math": (0.0, 1.5), "code": (0.0, 1.5)}
    in_full = {n: {"source": v} if isinstance(v, str) else v for n, v in vectors.items()}
    assert config.digest() == StudyConfig(**FIELDS, vectors=in_full).digest()


def test_a_path_object_is_local_even_if_it_looks_like_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = StudyConfig(
        base_model=Path("a/base"), objective=FIELDS["objective"], vectors={"w": Path("a/w")}
    )
    assert config.base_model == os.fspath(tmp_path / "a" / "base")
    assert config.vectors["w"].source == os.fspath(tmp_path / "a" / "w")


def test_a_tool_that_the_trainer_does_not_report_to_is_refused_when_the_file_is_read(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        "base_model: a/base\nvectors: {w: a/w}\nobjective: {terms: [{task: t}]}\n"
        "search:\n  report_to: [tensorboard, wanbd]\n"
        "baselines: {searches: {other: {report_to: [paper]}}}\n"
    )
    expected = r"Expected one of azure_ml, .*tensorboard, trackio, wandb\."
    with pytest.raises(ConfigError) as caught:
        StudyConfig.read(file)
    first, second = str(caught.value).splitlines()
    said = r"study\.yaml:5: search\.report_to\.1: found 'wanbd'\. Did you mean 'wandb'\? "
    assert re.search(said + expected, first)
    place = r"study\.yaml:6: baselines\.searches\.other\.report_to\.0: "
    assert re.search(place + "found 'paper'. " + expected, second)


def test_every_tool_of_the_trainer_is_known():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(TRACKERS) >= INTEGRATION_TO_CALLBACK.keys()


def test_what_is_neither_a_source_nor_fields_is_refused_by_name(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("base_model: a/b\nobjective: {terms: [{task: t}]}\nvectors: {math: 3}")
    with pytest.raises(ConfigError, match=r"study.yaml:3: vectors\.math: found 3"):
        StudyConfig.read(file)
