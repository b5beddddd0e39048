"""write.py: a recipe beside its lock, also when an older recipe was there and the command stops."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from optimer_hf.comparison.sealed import compare
from optimer_hf.errors import ModelError, OutputError
from optimer_hf.recipes import write
from optimer_hf.recipes.build import build, verify
from optimer_hf.recipes.from_study import recipe_of_study
from optimer_hf.recipes.record import VANILLA_CONFIG, Lock, Recipe
from optimer_hf.recipes.write import refuse_foreign_files, write_recipe
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.directory import Study
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector
from tests.support.landscapes import FunctionPool, config_of

GOLDEN = Path(__file__).parents[1] / "golden" / "0.1.0"


class Stopped(BaseException):
    """The end of a process that is killed."""


@pytest.fixture
def study(make_base, make_tuned, make_adapter, tmp_path: Path) -> Study:
    """A study over an adapter, a delta and two checkpoints, whose scores are made up."""
    base, sources = make_base("llama"), {}
    for seed, name in enumerate("yz"):
        sources[name] = make_tuned(base, "llama", seed)
    shutil.copytree(make_adapter(base, 2), tmp_path / "w")
    tuned = open_vector("x", str(make_tuned(base, "llama", 3)), base)
    extract(tuned, base, tmp_path / "x")
    sources |= {name: tmp_path / name for name in "wx"}
    config = config_of(
        base_model=str(base.path),
        vectors={name: {"source": str(sources[name])} for name in "wxyz"},
        search={"n_trials": 7, "rescore_top": 0},
    )
    return search(config, tmp_path / "s", runner=InProcess(FunctionPool))


def test_a_lock_has_the_kind_of_each_vector_and_the_dtype_of_each_delta(
    study: Study, tmp_path: Path
):
    write_recipe(study, tmp_path / "recipe.yaml", name="r")
    lock = Lock.read(tmp_path / "recipe.lock.json")
    assert lock.kinds == {"w": "adapter", "x": "delta", "y": "checkpoint", "z": "checkpoint"}
    assert lock.dtypes == {"x": "bfloat16"}


@pytest.mark.parametrize("n_written", [0, 1, 2, 3])
def test_a_recipe_whose_rewriting_was_stopped_is_whole_or_refused_and_then_mended(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_written: int
):
    path, other = tmp_path / "recipe.yaml", study.trials[1]
    first = write_recipe(study, path, name="r")
    assert other.weights != first.weights
    build(path, tmp_path / "first")
    left = iter(range(n_written))

    def stopping(function):
        def call(*arguments, **options):
            if next(left, None) is None:
                raise Stopped
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_text", stopping(write.write_text))
        patch.setattr(Lock, "write", stopping(Lock.write))
        if n_written < 3:
            with pytest.raises(Stopped):
                write_recipe(study, path, name="r", pick=other)
        else:
            write_recipe(study, path, name="r", pick=other)
    if Recipe.read(path).weights == Lock.read(path.with_suffix(".lock.json")).weights:
        assert n_written in (0, 3)
        build(path, tmp_path / "after")
        verify(path, tmp_path / "after")
    else:
        for refused in (
            lambda: build(path, tmp_path / "after"),
            lambda: verify(path, tmp_path / "first"),
        ):
            with pytest.raises(ModelError, match="`optimer recipe` was stopped"):
                refused()
    write_recipe(study, path, name="r", pick=other)
    assert Recipe.read(path).weights == other.weights
    build(path, tmp_path / "mended")
    verify(path, tmp_path / "mended")


@pytest.mark.parametrize(
    ("text", "is_ours"),
    [
        ((GOLDEN / "runs" / "tiny" / VANILLA_CONFIG).read_text(), True),  # of 0.1.0
        ("# Run: mergekit-yaml mergekit_config.yml OUT\nmodels: []\n", True),  # of the Hub
        ("# Run: it\nmodels: []\n", False),
        ("models: []\n", False),
    ],
)
def test_a_config_for_mergekit_is_replaced_only_if_it_is_ours(tmp_path, text, is_ours):
    (tmp_path / VANILLA_CONFIG).write_text(text)
    with nullcontext() if is_ours else pytest.raises(OutputError, match="not written with a"):
        refuse_foreign_files(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("names", [("recipe", "front"), ("front", "recipe"), ("a", "a.b")])
@pytest.mark.parametrize("vanilla", [False, True])
def test_recipes_in_one_folder_leave_each_others_files_alone(study, tmp_path, names, vanilla):
    folder, written = tmp_path / "r", {}
    for name, pick in zip(names, (None, 1), strict=True):
        recipe_of_study(tmp_path / "s", folder / f"{name}.yaml", pick=pick, vanilla=vanilla)
        for path, content in written.items():
            assert path.read_bytes() == content, path
        files = {path for path in folder.rglob("*") if path.is_file()}
        written |= {path: path.read_bytes() for path in files - written.keys()}
    assert (folder / "optimer.yml").exists() == ("recipe" in names)
    first, second = (Recipe.read(folder / f"{name}.yaml").weights for name in names)
    assert first != second


def test_a_recipe_is_not_written_over_the_lock_of_one_with_another_ending(study, tmp_path):
    write_recipe(study, tmp_path / "r.yaml", name="r")
    lock = (tmp_path / "r.lock.json").read_bytes()
    with pytest.raises(OutputError, match=r"would replace r\.lock\.json and the configs of r\.ya"):
        write_recipe(study, tmp_path / "r.yml", name="r", pick=study.trials[1])
    assert (tmp_path / "r.lock.json").read_bytes() == lock


@pytest.mark.parametrize("label", ["t", "q"])
def test_the_metric_of_a_sealed_term_is_on_record_if_the_objective_lacks_it(tmp_path, label):
    """Else a card could not say in which unit the term is scored."""
    objective = {"terms": [{"task": name, "metric": "loss"} for name in "tu"], "limit": 4}
    test = {"terms": [{"task": "sealed", "name": label, "metric": "bits"}]}
    config = config_of(objective=objective, test=test, search={"n_trials": 6, "rescore_top": 0})
    study = search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    evidence = write.evidence_of(study, study.best_trial, compare(study, pool=FunctionPool), None)
    own = {"q": "bits"} if label == "q" else {}
    assert evidence.scores["sealed"].metrics == own
    assert evidence.metrics == {"t": "loss", "u": "loss"} | own
    assert ("metrics" in evidence.scores["sealed"].model_dump()) == bool(own)
