"""directory.py: which directories are taken for a study."""

import pytest

from optimer_hf.errors import OutputError, StudyError
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.directory import load_study, lock_directory
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
