"""directory.py: which directories are taken for a study."""

import json

import pytest

from optimer_hf.errors import OutputError, StudyError
from optimer_hf.files.staging import write_text
from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.searching.study_file import read_study
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.directory import load_study, lock_directory, open_study
from optimer_hf.study.trials import Candidate
from tests.support.landscapes import FunctionPool, config_of, no_pool_for


def test_a_study_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="file: cannot create this directory"):
        search(config_of(), tmp_path / "file", runner=InProcess(no_pool_for("the study")))


def test_a_directory_with_foreign_files_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(StudyError, match="is not empty and holds no study"):
        search(config_of(), tmp_path, runner=InProcess(no_pool_for("the study")))


def test_what_a_process_killed_at_the_very_start_left_is_no_obstacle(tmp_path):
    (tmp_path / ".partial-study.json").write_text("{")
    assert search(
        config_of(search={"n_trials": 2, "rescore_top": 0}),
        tmp_path,
        runner=InProcess(FunctionPool),
    ).is_finished


def test_loading_a_directory_without_a_study_says_how_to_make_one(tmp_path):
    with pytest.raises(StudyError, match=r"holds no study .*\. Run `optimer search"):
        load_study(tmp_path)


def test_a_lock_is_free_again_when_its_holder_is_done(tmp_path):
    for _ in range(2):
        with lock_directory(tmp_path / "s"):
            pass


TASK = {"task": "t", "metric": "loss", "hash_range": [0.0, 0.5]}
DOCUMENT = {"split_by": "document"}


def test_a_study_from_before_the_field_keeps_its_split_and_its_identity(tmp_path):
    given = config_of(objective={"terms": [TASK]})
    assert given.identity["objective"]["split_by"] == "document"
    old = given.identity
    del old["objective"]["split_by"]
    record = given.model_dump(mode="json")
    del record["objective"]["split_by"]
    (tmp_path / "study.json").write_text(json.dumps(record))
    for config in (given, StudyConfig.read_record(tmp_path / "study.json")):
        opened = open_study(config, tmp_path).config
        assert opened.objective.split_by == "prompt"
        assert opened.identity == old
    (tmp_path / "trials.jsonl").write_text("")
    named = config_of(objective={"terms": [TASK], "split_by": "document"})
    assert open_study(named, tmp_path).config.objective.split_by == "document"  # without trials


@pytest.mark.parametrize(
    ("asked", "split"), [({}, "prompt"), ({"split_by": "prompt"}, "prompt"), (DOCUMENT, None)]
)
def test_a_study_of_a_mergekit_yaml_keeps_its_split(asked, split, tmp_path):
    merge = {"merge_method": "task_arithmetic", "base_model": "a/b"}
    models = [{"model": f"a/{name}", "parameters": {"weight": 1}} for name in "wx"]
    write_text(tmp_path / "m.yml", json.dumps(merge | {"models": models}))
    for name, part in (("search", [0.0, 0.5]), ("sealed", [0.5, 1.0])):
        terms = [{"task": "t", "metric": "loss", "hash_range": part}]
        write_text(tmp_path / name, json.dumps({"terms": terms} | asked))
    files = {"objective": tmp_path / "search", "test": tmp_path / "sealed"}
    given = read_study(tmp_path / "m.yml", **files)
    record = given.model_dump(mode="json")
    for part in files:
        del record[part]["split_by"]
    (tmp_path / "s").mkdir()
    write_text(tmp_path / "s/study.json", json.dumps(record))
    old = StudyConfig.read_record(tmp_path / "s/study.json")
    base = Candidate(0, "base", dict.fromkeys("wx", 0.0))
    trial = base.to_trial({"t": TermScore([(1.0, 1.0)], False)}, {}, 1, {})
    write_text(tmp_path / "s/trials.jsonl", f"{trial.to_json()}\n")
    if split is None:
        with pytest.raises(StudyError, match=r"these fields differ: objective\.split_by"):
            open_study(given, tmp_path / "s")
        return
    opened = open_study(given, tmp_path / "s").config
    assert opened.objective.split_by == opened.test.split_by == split
    assert opened.identity == old.identity


def test_a_new_study_records_its_split_where_there_is_one(tmp_path):
    given = config_of(objective={"terms": [TASK]})
    for directory, config in ((tmp_path / "split", given), (tmp_path / "whole", config_of())):
        opened = open_study(config, directory).config
        recorded = StudyConfig.read_record(directory / "study.json")
        assert recorded == opened and recorded.digest() == config.digest()
    assert '"split_by": "document"' in (tmp_path / "split/study.json").read_text()
    assert "split_by" not in (tmp_path / "whole/study.json").read_text()
