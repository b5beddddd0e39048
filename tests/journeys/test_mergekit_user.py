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
  - model: ./models/math
    parameters: {weight: 0.5, density: 0.4}
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


def test_the_printed_config_runs_in_mergekit_alone_and_gives_the_built_model(folder, monkeypatch):
    merger = Person("you", folder)
    merger.sign_in(monkeypatch)
    result = merger.types(SEARCH)
    printed = result.stdout
    assert printed.startswith("# Mine, and the second line of it.\n# ")
    config = yaml.safe_load(printed)
    assert [entry["model"] for entry in config["models"]] == [
        "./models/math",
        "./models/base+./my-code-lora",
        "./models/base+./more-lora",
    ]
    assert (config["merge_method"], config["base_model"]) == ("task_arithmetic", "./models/base")
    assert (config["dtype"], config["out_dtype"]) == ("float32", "bfloat16")
    (folder / "THIS.yml").write_text(printed)
    run_mergekit(re.search(r"Run: (mergekit-yaml .*)", printed)[1], folder)
    merger.runs("optimer build merge-study/recipe.yaml merged")
    ours = load_file(folder / "merged/model.safetensors")
    (file,) = (folder / "OUT").glob("*.safetensors")
    theirs = load_file(file)
    distance = torch.cat([ulps_apart(ours[name], theirs[name]).flatten() for name in ours])
    assert distance.max() <= 1 and (distance == 0).double().mean() > 0.999
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
