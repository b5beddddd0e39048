"""The public face: what `import optimer_hf as optimer` offers, what it costs, and what it takes."""

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import optimer_hf as optimer
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.searching.runner import InProcess
from tests.support.landscapes import FunctionPool, config_of, with_test

ROOT = Path(__file__).parents[1]
PACKAGE = Path(optimer.__file__).parent
FUNCTIONS = [name for name in optimer.__all__ if inspect.isfunction(getattr(optimer, name))]


def test_importing_the_package_loads_no_library_and_takes_no_time():
    code = (
        "import sys, time; started = time.process_time(); import optimer_hf; "
        "print(time.process_time() - started, len(dir(optimer_hf)), "
        "*{'torch', 'numpy', 'pydantic', 'click'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds, n_names, *loaded = result.stdout.split()
    assert loaded == [] and float(seconds) < 0.2
    assert int(n_names) > len(optimer.__all__)


def test_every_name_is_there_and_known_to_editors():
    for name in optimer.__all__:
        assert getattr(optimer, name).__name__ == name
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.asname: node.module for node in block.body for alias in node.names}
    assert typed == optimer._MODULES
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        _ = optimer.serach


def test_the_reference_describes_every_name():
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^::: optimer_hf\.(?:\w+\.)+(\w+)$", page, flags=re.M))
    assert set(optimer.__all__) <= described | set(re.findall(r"`optimer\.(\w+)`", page))


def test_no_module_takes_the_place_of_a_public_name():
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert modules.isdisjoint(optimer.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_path_may_be_a_text_or_a_path_object(name):
    parameters = inspect.signature(getattr(optimer, name)).parameters
    for parameter in parameters.values():
        if parameter.name in ("out", "directory", "path", "model", "base", "source", "tuned"):
            assert re.search(r"Any(Path|Model)|PathLike", str(parameter.annotation)), parameter


# -- a search --------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_search_takes_a_config_its_fields_or_its_file(here):
    config = config_of(search={"n_trials": 6, "rescore_top": 0})
    config.write("study.yaml")
    fields = json.loads(config.model_dump_json())
    for out, given in {
        "a": config,
        "b": fields,
        "c": "study.yaml",
        "d": Path("study.yaml"),
    }.items():
        study = optimer.search(given, out, runner=InProcess(FunctionPool))
        assert study.trials[-1].weights == optimer.load_study(Path(out)).trials[-1].weights
    with pytest.raises(optimer.ConfigError, match=r"StudyConfig: vectors\.w\.sauce|unknown field"):
        optimer.search(fields | {"vectors": {"w": {"sauce": "x"}}}, "e")
    with pytest.raises(optimer.ConfigError, match="mergekit YAML"):
        optimer.search(config, "e", objective="objective.yaml")
    with pytest.raises(optimer.ConfigError, match="test: goes with the path of a mergekit YAML"):
        optimer.search(config, "e", test="objective.yaml")
    with pytest.raises(TypeError, match="expected a StudyConfig"):
        optimer.search(3, "e")


def test_a_search_names_a_field_that_does_nothing_and_goes_on(here, caplog):
    fields = json.loads(config_of(search={"n_trials": 3, "rescore_top": 0}).model_dump_json())
    fields["search"]["rescore_limit"] = 9
    optimer.search(fields, "s", runner=InProcess(FunctionPool))
    (line,) = [line for line in caplog.messages if "does nothing" in line]
    assert line.startswith("StudyConfig: search.rescore_limit: does nothing where rescore_top is 0")


def test_a_study_is_given_as_one_or_as_its_directory(here):
    study = optimer.search(with_test(), "s", runner=InProcess(FunctionPool))
    assert optimer.predict("s", {"u": 1.0}) == optimer.predict(study, {"u": 1.0})
    compared = optimer.compare("s", pool=FunctionPool)
    assert compared.merge.weights == study.best_weights
    page = optimer.write_report(Path("s"), "report.html", vectors=False)
    assert page == Path("report.html") and page.is_file()


def brevity(model, tokenizer, limit):
    return [float(next(model.parameters()).sum()), 1.0]


def test_from_a_base_and_two_vectors_to_a_verified_model(here, make_base, make_tuned, corpus_dir):
    base = make_base("llama")
    for seed, name in enumerate(("math", "code")):
        Path(name).symlink_to(make_tuned(base, "llama", seed))
    text = str(corpus_dir / "aaa.search.jsonl")
    study = optimer.search(
        optimer.StudyConfig(
            base_model=base.path,
            dtype="float32",
            vectors={"math": "./math", "code": Path("code")},
            objective={
                "terms": [
                    {"text": text, "limit": 2},
                    {"function": "brevity", "higher_is_better": True, "weight": 0},
                ]
            },
            search={"n_trials": 4, "rescore_top": 0},
        ),
        "my-study",
        functions={"brevity": brevity},
    )
    assert set(study.best_weights) == {"math", "code"}
    recipe = optimer.write_recipe(study, "recipe.yaml")
    assert recipe.name == "my-study" and recipe.weights == study.best_weights
    assert optimer.build(recipe, "merged") == Path("merged")
    optimer.verify(recipe, Path("merged"))
    optimer.verify("recipe.yaml", "merged")
    scores = optimer.evaluate("merged", {"terms": [{"text": text, "limit": 2}]}, dtype="float32")
    (label,) = scores
    assert scores[label].score == pytest.approx(study.best_trial.terms[label].score, rel=1e-4)
    changed = recipe.model_copy(update={"name": "other"})
    with pytest.raises(optimer.ConfigError, match="differs from its file, or has none"):
        optimer.build(changed, "merged2")
    record = optimer.extract("math", base, "delta", dtype="float32")
    opened = optimer.open_vector("m", Path("delta"), str(base.path))
    assert repr(opened).startswith("DeltaVector('m', ") and record.name == "delta"
    resident = optimer.ResidentModel(str(base.path), [opened], dtype="float32")
    resident.set_weights({"m": 1.0})
    name = Checkpoint(base.path).names[0]
    tuned = Checkpoint(Path("math")).read(name)
    assert (resident.model.state_dict()[name] - tuned).abs().max() < 1e-5
