"""Functions of files: how they are named, loaded, checked and kept out of what is shared."""

from pathlib import Path

import pytest
import torch

from optimer_hf.errors import ConfigError, EvaluationError, HubError
from optimer_hf.files.model import list_absent_files
from optimer_hf.files.paths import drop_folders
from optimer_hf.hub.untrusted import _check_study
from optimer_hf.scoring.functions import (
    collect_functions,
    digest_function,
    score_by_function,
)
from optimer_hf.scoring.objective import ObjectiveFile

METRICS = """
def answers(model, tokenizer, limit):
    return [1.0, 2.0][:limit]

def norms(model, tokenizer, limit):
    return model["norm"]
"""


@pytest.fixture
def objective(tmp_path):
    """Return a function that reads an objective file with one term, beside my_metrics.py."""
    (tmp_path / "my_metrics.py").write_text(METRICS, encoding="utf-8")

    def read(function: str) -> ObjectiveFile:
        text = f"terms: [{{function: '{function}', higher_is_better: true}}]"
        (tmp_path / "objective.yaml").write_text(text, encoding="utf-8")
        return ObjectiveFile.read(tmp_path / "objective.yaml")

    return read


def test_a_function_is_found_beside_the_file_that_names_it(objective, tmp_path):
    read = objective("my_metrics.py:answers")
    (term,) = read.terms
    assert term.label == "answers" and term.function == f"{tmp_path / 'my_metrics.py'}:answers"
    (function,) = collect_functions([read], None).values()
    score = score_by_function(term, function, None, None, 1)
    assert [value for value, _ in score.items] == [1.0] and score.higher_is_better
    read.write(tmp_path / "copy.json")
    assert '"./my_metrics.py:answers"' in (tmp_path / "copy.json").read_text()
    assert list_absent_files(tmp_path / "objective.yaml", read.model_dump()) == ""


def test_a_file_with_a_dataclass_of_quoted_types_is_loaded(objective, tmp_path):
    read = objective("my_metrics.py:answers")
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    text += f"@dataclass\nclass Answer:\n    value: float\n{METRICS}"
    (tmp_path / "my_metrics.py").write_text(text, encoding="utf-8")
    assert collect_functions([read], None)


def test_a_function_that_yields_runs_without_gradients_and_is_named_in_errors(objective):
    (term,) = objective("my_metrics.py:answers").terms

    def answers(model, tokenizer, limit):
        yield float(torch.is_grad_enabled())
        if limit is None:
            raise KeyError("no limit")

    assert score_by_function(term, answers, None, None, 1).items == [(0.0, 1.0)]
    with pytest.raises(
        EvaluationError, match=r"function 'answers' failed with KeyError: 'no limit'"
    ):
        score_by_function(term, answers, None, None, None)


def test_changed_code_has_another_digest(objective, tmp_path):
    (term,) = objective("my_metrics.py:answers").terms
    before = digest_function(term)
    (tmp_path / "my_metrics.py").write_text(METRICS + "\n", encoding="utf-8")
    assert before != digest_function(term) is not None
    assert digest_function(objective("answers").terms[0]) is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("my_metrics.py:answer", "has no function 'answer'. Did you mean 'answers'?"),
        ("other.py:answers", "other.py: no such file"),
        ("answers", "Name its file, as in `function: my_metrics.py:answers`"),
    ],
)
def test_a_function_that_is_not_there_is_refused(objective, function, message):
    with pytest.raises(EvaluationError, match=r"term 'answers?'") as raised:
        collect_functions([objective(function)], None)
    assert message in str(raised.value)


def test_a_file_that_cannot_be_imported_says_why(objective, tmp_path):
    read = objective("my_metrics.py:answers")
    (tmp_path / "my_metrics.py").write_text("import nothing_of_this_name", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"cannot be imported .ModuleNotFoundError"):
        collect_functions([read], None)


@pytest.mark.parametrize("function", ["a/b", "metrics:answers", "x.py:1"])
def test_a_name_that_is_none_is_refused(objective, function):
    with pytest.raises(ConfigError, match=r"FILE\.py:NAME"):
        objective(function)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda *_: 0.5, "returned 0.5. A scoring function gets"),
        (lambda *_: [], "returned []. "),
        (lambda *_: ["a"], "returned ['a']"),
        (lambda *_: [1.0, float("nan")], "returned [1.0, nan]"),
        (lambda *_: 1 / 0, "failed with ZeroDivisionError: division by zero. A scoring"),
    ],
)
def test_an_error_names_the_function_and_what_it_must_return(objective, function, message):
    (term,) = objective("my_metrics.py:answers").terms
    with pytest.raises(EvaluationError, match="function 'answers'") as raised:
        score_by_function(term, function, None, None, None)
    assert message in str(raised.value)
    assert "returns a finite number for each item" in str(raised.value)


def test_a_fault_of_the_machine_passes(objective):
    (term,) = objective("my_metrics.py:answers").terms

    def full(*_):
        raise MemoryError

    with pytest.raises(MemoryError):
        score_by_function(term, full, None, None, None)


def test_a_function_leaves_this_machine_without_its_file():
    shared = drop_folders({"function": "../my/my_metrics.py:brevity", "text": "./a.jsonl"})
    assert shared == {"function": "brevity", "text": "a.jsonl"}


@pytest.mark.parametrize("function", ["my_metrics.py:answers", "/tmp/x.py:f", "x.py"])
def test_a_study_from_others_that_names_code_is_refused(tmp_path: Path, function):
    terms = f"terms: [{{function: '{function}', higher_is_better: true}}]"
    text = f"base_model: a/b\nvectors: {{w: a/w}}\nobjective: {{{terms}}}\n"
    (tmp_path / "study.json").write_text("{}", encoding="utf-8")
    import json

    import yaml

    (tmp_path / "study.json").write_text(json.dumps(yaml.safe_load(text)), encoding="utf-8")
    with pytest.raises(HubError, match="Code from others is never run"):
        _check_study(tmp_path)
