"""Fixtures for the tests of the Hub: no waiting, and a recipe with figures."""

import shutil
from pathlib import Path

import pytest

from optimer_hf.hub import client as remote
from optimer_hf.report.page import write_figures
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from tests.support import landscapes, publishing

base, name, published_base = publishing.base, publishing.name, publishing.published_base
make_recipe, make_vector = publishing.make_recipe, publishing.make_vector


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)


class FunctionPool(landscapes.FunctionPool):
    """Scores two weights."""

    def score(self, weights, asked, *, gradients=False):
        return super().score(dict(weights) | {"y": 0.0, "z": 0.0}, asked)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A real search over two vectors, and the folder of its figures."""
    folder = tmp_path_factory.mktemp("drawn")
    vectors = {name: {"source": f"a/{name}"} for name in ("v0", "v1")}
    config = landscapes.config_of(vectors=vectors, search={"n_trials": 5, "rescore_top": 0})
    study = search(config, folder / "search", runner=InProcess(FunctionPool))
    write_figures(study, folder / "figures")
    return study, folder / "figures"


@pytest.fixture
def drawn_recipe(drawn, make_recipe) -> Path:
    """The folder of a recipe of what a search found, with its figures."""
    study, figures = drawn
    folder = make_recipe("delta", tuple(study.best_trial.weights.values()))
    shutil.copytree(figures, folder / "figures")
    return folder
