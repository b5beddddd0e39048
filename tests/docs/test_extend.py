"""The samplers and baselines of the page "Extend it", installed as a package would install them."""

import hashlib
import inspect
import re
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from optimer_hf.cli import main
from optimer_hf.comparison.sealed import compare
from optimer_hf.errors import ConfigError, StudyError
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.config import StudyConfig
from tests.support.landscapes import FunctionPool, TellingPool, config_of, no_pool, with_test
from tests.support.pages import sections

(PAGE,) = (section for section in sections() if section.name == "docs/how-to/extend.md")


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """A folder on the path with the modules of the page and the metadata of a package."""
    folder = tmp_path / "site"
    info = folder / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    for text in PAGE.blocks("python"):
        if (name := re.match(r"# (my_[a-z]+)\.py\n", text)) is not None:
            (folder / f"{name[1]}.py").write_text(text, encoding="utf-8")
            monkeypatch.delitem(sys.modules, name[1], raising=False)
    (block,) = PAGE.blocks("toml")
    groups = tomllib.loads(block)["project"]["entry-points"]
    lines = [
        line
        for group, entries in groups.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n", "utf-8")
    monkeypatch.syspath_prepend(folder)
    return folder


def with_plugins(**fields):
    return with_test(
        search={"n_trials": 14, "rescore_top": 2, "sampler": "near-the-best"},
        baselines={"plugins": ["by-own-gain"]},
        **fields,
    )


def test_an_installed_sampler_chooses_and_an_installed_baseline_is_a_row(installed, tmp_path):
    study = search(with_plugins(), tmp_path / "s", runner=InProcess(TellingPool))
    origins = {trial.origin for trial in study.trials}
    assert "sampler near-the-best" in origins and "surrogate" not in origins
    comparison = compare(study, pool=TellingPool)
    (row,) = (row for row in comparison.rows if row.kind == "plugin")
    assert row.subject == "by-own-gain" and sum(row.weights.values()) == pytest.approx(1, abs=1e-5)
    assert search(with_plugins(), tmp_path / "s", runner=InProcess(no_pool)).trials


def test_a_resumed_search_asks_the_sampler_for_the_same_weights(installed, tmp_path):
    whole = search(with_plugins(), tmp_path / "a", runner=InProcess(FunctionPool))
    begun = search(with_plugins(), tmp_path / "b", runner=InProcess(FunctionPool))
    lines = begun.log.path.read_text("utf-8").splitlines(keepends=True)
    begun.log.path.write_text("".join(lines[:9]), "utf-8")
    again = search(with_plugins(), tmp_path / "b", runner=InProcess(FunctionPool))
    assert [t.weights for t in again.trials] == [t.weights for t in whole.trials]


def test_a_sampler_is_part_of_what_a_study_is_and_its_absence_changes_nothing(installed):
    plain, named = config_of(), with_plugins()
    assert "sampler" not in plain.identity["search"]
    assert named.identity["search"]["sampler"] == "near-the-best"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": {"sampler": "near-the-bset"}}, "Did you mean 'near-the-best'"),
        ({"baselines": {"plugins": ["by-gain"]}}, "baselines.plugins: found 'by-gain'"),
    ],
)
def test_what_is_not_installed_is_refused_before_anything_is_opened(
    installed, tmp_path, change, message
):
    with pytest.raises(ConfigError, match=message):
        search(config_of(**change), tmp_path / "s", runner=InProcess(no_pool))
    file = tmp_path / "study.yaml"
    config_of(**change).write(file)
    result = CliRunner().invoke(main, ["validate", str(file)])
    assert result.exit_code == 1 and message in result.output and str(file) in result.output


def test_a_search_takes_the_function_of_a_caller(tmp_path):
    asked = []

    def corner(request):
        asked.append(request)
        return {name: high for name, (_, high) in request.bounds.items()}

    config = config_of(search={"n_trials": 8, "rescore_top": 1, "total": [0, 1]})
    study = search(config, tmp_path / "s", runner=InProcess(FunctionPool), ask=corner)
    assert {trial.origin for trial in study.trials[6:]} == {"sampler corner"}
    assert sum(study.trials[6].weights.values()) == pytest.approx(1, abs=1e-3)
    first = asked[0]
    assert first.number == 6 and len(first.trials) == len(first.values) == 6
    assert first.values[0] == 0.0  # the base
    assert StudyConfig.read(study.directory / "study.json").search.sampler is None


def halfway(request):
    return {name: (low + high) / 2 for name, (low, high) in request.bounds.items()}


def cut_after(study, n_lines):
    lines = study.log.path.read_text("utf-8").splitlines(keepends=True)
    study.log.path.write_text("".join(lines[:n_lines]), "utf-8")


def test_a_search_goes_on_only_with_the_function_that_began_it(tmp_path):
    def corner(request):
        return {name: high for name, (_, high) in request.bounds.items()}

    config = config_of(search={"n_trials": 8, "rescore_top": 1})
    study = search(config, tmp_path / "s", runner=InProcess(FunctionPool), ask=halfway)
    digest = hashlib.sha256(inspect.getsource(halfway).encode()).hexdigest()
    named = f"{__name__}:halfway (sha256 of its source {digest})"
    assert study.read_inputs()["sampler"] == named
    cut_after(study, 7)
    for other, text in ((corner, "corner"), (None, "this is the surrogate")):
        with pytest.raises(StudyError, match=rf"halfway \(sha256 .*{text}.*Go on with the same"):
            search(config, tmp_path / "s", runner=InProcess(FunctionPool), ask=other)
    again = search(config, tmp_path / "s", runner=InProcess(FunctionPool), ask=halfway)
    assert len(again.trials) == 8
    plain = search(config, tmp_path / "plain", runner=InProcess(FunctionPool))
    assert "sampler" not in plain.read_inputs()


def test_a_function_without_source_is_said_to_be_unknown(tmp_path, caplog):
    exec_globals = {"__name__": "shell"}
    exec(
        "def near(request):\n    return {n: low for n, (low, _) in request.bounds.items()}",
        exec_globals,
    )
    config = config_of(search={"n_trials": 7, "rescore_top": 0})
    study = search(config, tmp_path / "s", runner=InProcess(FunctionPool), ask=exec_globals["near"])
    assert study.read_inputs()["sampler"] == "shell:near (source not known)"
    cut_after(study, 6)
    search(config, tmp_path / "s", runner=InProcess(FunctionPool), ask=exec_globals["near"])
    assert "shell:near (source not known) is the same as before is not known" in caplog.text


def test_another_code_after_the_surrogate_is_said(tmp_path, caplog):
    config = config_of(search={"n_trials": 8, "rescore_top": 0})
    study = search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    cut_after(study, 7)
    search(config, tmp_path / "s", runner=InProcess(FunctionPool), ask=halfway)
    assert "the surrogate chose weights so far, and now" in caplog.text


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (lambda request: None, "returned None. Expected a weight for each of w, x, y, z"),
        (lambda request: {"w": 1}, "Expected a weight for each of w, x, y, z"),
        (lambda request: dict.fromkeys("wxyz", float("nan")), "w: nan, but its bounds are"),
        (lambda request: dict.fromkeys("wxyz", 99), "w: 99, but its bounds are 0 and 1.5"),
        (lambda request: 1 / 0, "failed with ZeroDivisionError: division by zero. A sampler gets"),
    ],
)
def test_an_error_of_a_sampler_names_it_and_what_it_must_return(tmp_path, sampler, message):
    with pytest.raises(StudyError, match="sampler '<lambda>'") as raised:
        search(config_of(), tmp_path / "s", runner=InProcess(FunctionPool), ask=sampler)
    assert message in str(raised.value)
