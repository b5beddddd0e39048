"""study_file.py: an error about a term is put at the file and the line of that term."""

import json

import pytest

from optimer_hf.errors import EvaluationError
from optimer_hf.recipes.from_search import search_study
from optimer_hf.scoring.evaluator import Evaluator
from optimer_hf.scoring.items import check_disjoint
from optimer_hf.searching.runner import InProcess
from optimer_hf.searching.study_file import study_of_merge_config
from tests.support.tiny import tiny_model

MERGE = "merge_method: task_arithmetic\nbase_model: a/b\nmodels:\n"
MERGE += "".join(f"- {{model: a/{name}, parameters: {{weight: 1}}}}\n" for name in "wx")
STUDY = "base_model: a/b\nvectors: {w: a/w, x: a/x}\n"
TEXTS = {"one": ["first"], "two": ["second", "third"], "more": ["third", "fourth"], "none": [""]}
FINE = "{text: two.jsonl, name: t}"
EMPTY = "{text: none.jsonl, name: t}"


@pytest.fixture
def pool_of(tokenizer):
    """Return what opens the tasks of a study, as a pool does."""

    def open_tasks(config):
        objectives = [config.objective, config.test]
        evaluator = Evaluator(tiny_model().eval(), tokenizer, objectives)
        check_disjoint(*objectives, evaluator.tasks)
        pytest.fail("nothing was wrong with the terms")

    return open_tasks


@pytest.mark.parametrize("has_files", [True, False])
@pytest.mark.parametrize(
    ("searched", "sealed", "is_of_test", "message"),
    [
        (FINE, "{text: more.jsonl, name: t}", True, "1 of its 2 items are items of the search"),
        (FINE, EMPTY, True, "holds no text"),
        (EMPTY, FINE.replace("two", "more"), False, "holds no text"),
        (FINE, "{text: more.jsonl, name: t, hash_range: [0.999999, 1]}", True, "no item of"),
        (FINE, "{function: 'm.py:f', name: t, higher_is_better: true}", True, "no function 'f'"),
    ],
)
def test_an_error_is_put_at_the_term_of_the_objective_or_of_the_test(
    has_files, searched, sealed, is_of_test, message, tmp_path, pool_of
):
    (tmp_path / "m.py").write_text("")
    for name, texts in TEXTS.items():
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(rows)
    objective = f"terms:\n  - {{text: one.jsonl}}\n  - {searched}\n"
    test = f"terms:\n  - {sealed}\n"
    study, files = tmp_path / "study.yaml", {}
    if has_files:
        study.write_text(MERGE)
        files = {name: tmp_path / f"{name}.yaml" for name in ("objective", "test")}
        files["objective"].write_text(objective)
        files["test"].write_text(test)
        place = "test.yaml:2" if is_of_test else "objective.yaml:3"
    else:
        indented = (text.replace("\n", "\n  ").rstrip(" ") for text in (objective, test))
        study.write_text("{}objective:\n  {}test:\n  {}".format(STUDY, *indented))
        place = f"study.yaml:{9 if is_of_test else 6}"
    with pytest.raises(EvaluationError) as raised:
        search_study(study, tmp_path / "s", runner=InProcess(pool_of), **files)
    named = f"{tmp_path / place}: {'test ' * is_of_test}term 't': "
    assert str(raised.value).startswith(named) and message in str(raised.value)


def test_a_field_that_does_nothing_is_named_in_the_objective_or_in_the_test(tmp_path, caplog):
    for name in ("one", "two", "more"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "first"}\n')
    merge, files = tmp_path / "merge.yml", [tmp_path / f"{name}.yaml" for name in ("aim", "sealed")]
    merge.write_text(MERGE)
    last = "{text: more.jsonl, rescore_only: true}"
    template = "apply_chat_template: true\n"
    files[0].write_text(f"terms:\n- {{text: one.jsonl}}\n{template}")
    files[1].write_text(f"{template}terms:\n- {{text: two.jsonl}}\n- {last}\n")
    study_of_merge_config(merge, *files)
    assert [line.partition(": does nothing ")[0] for line in caplog.messages] == [
        f"{files[1]}:4: test.terms.1.rescore_only",
        f"{files[0]}:3: objective.apply_chat_template",
    ]


def test_an_error_about_no_term_of_the_file_has_no_line(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "first"}\n')
    study = tmp_path / "study.yaml"
    study.write_text(STUDY + "objective: {terms: [{text: one.jsonl, name: t}]}\n")

    def fails(config):
        raise EvaluationError("test term 't': is not of this study")

    with pytest.raises(EvaluationError, match=r"^test term 't': is not"):
        search_study(study, tmp_path / "s", runner=InProcess(fails))


@pytest.mark.parametrize("label", ["t", "it's"])
def test_an_error_of_a_worker_is_put_at_the_term(tmp_path, label):
    (tmp_path / "one.jsonl").write_text('{"text": "first"}\n')
    study = tmp_path / "study.yaml"
    study.write_text(f'{STUDY}objective:\n  terms:\n  - {{text: one.jsonl, name: "{label}"}}\n')

    def fails(config):
        raise EvaluationError(f"worker 3: term {label!r}: no text")

    with pytest.raises(EvaluationError) as raised:
        search_study(study, tmp_path / "s", runner=InProcess(fails))
    assert str(raised.value).startswith(f"{study}:5: worker 3: term {label!r}: no text")
