"""A finished search on a made-up landscape."""

import pytest

from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.directory import Study
from tests.support.landscapes import FunctionPool, config_of


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Study:
    return search(
        config_of(), tmp_path_factory.mktemp("study") / "s", runner=InProcess(FunctionPool)
    )
