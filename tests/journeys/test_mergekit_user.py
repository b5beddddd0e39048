"""A mergekit YAML goes in and comes back with its weights found; mergekit alone runs it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.journeys import Person
from tests.support.tiny import ulps_apart

SEARCH = "optimer search my-merge.yml merge-study --objective objective.yaml"
CONFIG = """\
# Mine, and the second line of it.
merge_method: ties
base_model: ./models/base
models:
  - model: ./models/math   # the best of mine
    parameters: {weight: 0.5, density: 0.4}   # by hand
  - model: ./models/base+./my-code-lora
    parameters: {weight: 0.3}
  - model: ./more-lora
parameters: {normalize: true}
dtype: bfloat16
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_base, make_tuned, make_adapter, corpus_dir) -> Path:
    out = tmp_path_factory.mktemp("merger")
    base = make_base("llama")
    shutil.copytree(base.path, out / "models/base")
    shutil.copytree(make_tuned(base, "llama", 1), out / "models/math")
    shutil.copytree(make_adapter(base, 2), out / "my-code-lora")
    shutil.copytree(make_adapter(base, 3, use_rslora=True), out / "more-lora")
    shutil.copy(corpus_dir / "xyz.search.jsonl", out / "held_out.jsonl")
    (out / "my-merge.yml").write_text(CONFIG)
    (out / "objective.yaml").write_text("terms: [{text: held_out.jsonl}]\n")
    return out


def run_mergekit(command: str, folder: Path) -> None:
    program, *words = command.split()
    path = str(Path(sys.executable).with_name(program))
    done = subprocess.run([path, *words], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_mergekit_makes(printed: str, folder: Path, built: Path) -> None:
    """Run what `optimer search` printed as it says, and compare with a built model."""
    (folder / "THIS.yml").write_text(printed)
    assert_command_makes(re.search(r"Run: (mergekit-yaml .*)", printed)[1], folder, built)


def assert_command_makes(command: str, folder: Path, built: Path) -> None:
    shutil.rmtree(folder / "OUT", ignore_errors=True)
    run_mergekit(command, folder)
    ours = load_file(built / "model.safetensors")
    (file,) = (folder / "OUT").glob("*.safetensors")
    theirs = load_file(file)
    distance = torch.cat([ulps_apart(ours[name], theirs[name]).flatten() for name in ours])
    assert (distance <= 1).double().mean() > 0.9999 and (distance == 0).double().mean() > 0.999


def test_the_printed_config_runs_in_mergekit_alone_and_gives_the_built_model(folder, monkeypatch):
    merger = Person("you", folder)
    merger.sign_in(monkeypatch)
    result = merger.types(SEARCH)
    printed = result.stdout
    assert printed.startswith("# Mine, and the second line of it.\n# ")
    assert "./models/math   # the best of mine\n" in printed and "}   # by hand\n" in printed
    config = yaml.safe_load(printed)
    assert [entry["model"] for entry in config["models"]] == [
        "./models/math",
        "./models/base+./my-code-lora",
        "./models/base+./more-lora",
    ]
    assert (config["merge_method"], config["base_model"]) == ("task_arithmetic", "./models/base")
    assert (config["dtype"], config["out_dtype"]) == ("float32", "bfloat16")
    merger.runs("optimer build merge-study/recipe.yaml merged")
    assert_mergekit_makes(printed, folder, folder / "merged")
    assert not list(folder.rglob("deltas"))


def test_a_search_says_in_one_sentence_what_it_leaves_alone(folder, monkeypatch, caplog):
    merger = Person("you", folder)
    merger.sign_in(monkeypatch)
    merger.runs(SEARCH)
    (said,) = [r.message for r in caplog.records if "one weight is searched" in r.message]
    assert said.endswith(
        "Ignored: merge_method: ties, parameters.normalize, "
        "models: ./models/math: parameters.density"
    )


STUDY = """\
base_model: ./models/base
vectors:
  math:
    source: ./models/math
    bounds: [-1.5, 1.5]
    by: [self_attn, mlp, else]
  code: {source: ./my-code-lora, bounds: [-1.5, 1.5], by: {layers: 2}}
  more: {source: ./more-lora, fixed: 0.25}
objective: {terms: [{text: held_out.jsonl, limit: 4}]}
test: {terms: [{text: sealed.jsonl, limit: 4}]}
search: {n_trials: 10, rescore_top: 0}
baselines: {random_vectors: true, merge_methods: [ties]}
"""


def test_weights_by_group_are_searched_published_and_run_in_mergekit_alone(
    folder, monkeypatch, corpus_dir
):
    merger = Person("you", folder)
    merger.sign_in(monkeypatch)
    shutil.copy(corpus_dir / "xyz.test.jsonl", folder / "sealed.jsonl")
    (folder / "study.yaml").write_text(STUDY)
    printed = merger.runs("optimer search study.yaml groups").stdout
    config = yaml.safe_load(printed)
    math, code, more = (entry["parameters"]["weight"] for entry in config["models"])
    assert [each.get("filter") for each in math] == ["self_attn", "mlp", None]
    assert (len(code), more) == (2, 0.25)  # a gradient with a value for each layer
    merger.runs("optimer build groups/recipe.yaml split")
    merger.runs("optimer verify groups/recipe.yaml split")
    assert_mergekit_makes(printed, folder, folder / "split")
    merger.runs("optimer merge groups/optimer.yml native")
    ours, theirs = (load_file(folder / f"{out}/model.safetensors") for out in ("split", "native"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    trials = merger.runs("optimer trials groups --format csv").stdout
    assert "math.self_attn" in trials and "code.layers.2" in trials
    compared = merger.runs("optimer compare groups").stdout
    for row in ("math at 1.0", "code at its best scale", "random vectors of equal norm", "ties"):
        assert row in compared
    merger.runs("optimer report groups report.html")
    assert "self_attn" in (folder / "report.html").read_text(encoding="utf-8")
    said = merger.runs("optimer recipe groups recipe/recipe.yaml").stderr
    command = re.search(r"with mergekit alone: (mergekit-yaml .*)", said)[1]
    assert_command_makes(command, folder, folder / "split")
    merger.runs("optimer search study.yaml groups --n-trials 11")  # resumes
