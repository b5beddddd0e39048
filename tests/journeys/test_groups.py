"""Vectors with a weight for each group of their tensors, along with everything else."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimer_hf.models.layout import ResolvedModel
from optimer_hf.recipes.record import Recipe
from optimer_hf.study.directory import load_study
from tests.support.added_tokens import END, START, save_tuned, with_tokens
from tests.support.cli import optimer
from tests.support.experiments import run_optimer

SPLITS = {
    "names": ["self_attn", "mlp", "else"],
    "layers": {"layers": 2},
    "runs": ["layers.0:1", "layers.1:2"],
    "gradient": {"gradient": 2},
    "nested": ["layers.0:1/self_attn", "layers.0:1/else", "layers.1:2"],
    "along": ["self_attn/gradient.1", "self_attn/gradient.2", "else"],
}
FOR_LORA = SPLITS | {
    "names": ["q_proj", "up_proj"],
    "nested": ["layers.0:1", "layers.1:2/q_proj", "layers.1:2/else"],
    "along": {"q_proj/gradient": 2, "up_proj/gradient": 2},
}


@pytest.fixture(scope="module")
def sources(make_base, make_tuned, make_adapter) -> dict[str, str]:
    base = make_base("llama", torch.float32)
    adapters = [make_adapter(base, seed, target_modules=["q_proj", "up_proj"]) for seed in (0, 1)]
    tuned = make_tuned(base, "llama", 3, torch.float32)
    return {"base": str(base.path), "a": str(adapters[0]), "b": str(adapters[1]), "t": str(tuned)}


def write_study(folder: Path, sources: dict[str, str], corpus_dir: Path, split, **changes) -> Path:
    vectors = {
        "math": {"source": sources["t"], "by": SPLITS[split], "bounds": [-0.5, 1.0]},
        "code": {"source": sources["b"], "by": FOR_LORA[split], "bounds": [-0.5, 1.0]},
    }
    terms = [{"text": str(corpus_dir / f"{name}.search.jsonl")} for name in ("aaa", "xyz")]
    study = {
        "base_model": sources["base"],
        "dtype": "float32",
        "vectors": vectors,
        "objective": {"terms": terms, "limit": 3},
        "search": {"n_trials": 7, "rescore_top": 0, "gradients": "never"},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study | changes), encoding="utf-8")
    return path


def scores_in(study: Path) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Return the weights and the scores of each trial, all of which have to be sound."""
    trials = load_study(study).log.trials
    assert all(trial.status == "ok" for trial in trials)
    return [
        (trial.weights, {label: term.score for label, term in trial.terms.items()})
        for trial in trials
    ]


def assert_built_scores_as_searched(study: Path, corpus_dir: Path, out: Path) -> None:
    """The model that a recipe builds scores what its trial scored, with no vectors any more."""
    optimer("build", study, out)
    best = load_study(study)
    objective = out.parent / "objective.yaml"
    terms = [{"text": str(corpus_dir / f"{name}.search.jsonl")} for name in ("aaa", "xyz")]
    objective.write_text(yaml.safe_dump({"terms": terms, "limit": 3}))
    scores = json.loads(optimer("evaluate", out, objective, "--format", "json").stdout)
    for label, term in best.best_trial.terms.items():
        assert scores[label]["score"] == pytest.approx(term.score, rel=1e-4)


@pytest.mark.parametrize("split", ["along"])
def test_a_killed_search_goes_on_and_its_model_scores_what_it_scored(
    split, sources, corpus_dir, tmp_path
):
    path = write_study(tmp_path, sources, corpus_dir, split)
    optimer("search", path, tmp_path / "whole")
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "optimer_hf", "search", str(path), str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file, deadline = killed / "trials.jsonl", time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    optimer("search", path, killed)
    assert scores_in(killed) == scores_in(tmp_path / "whole")
    assert len(scores_in(killed)[0][0]) == 7
    assert_built_scores_as_searched(killed, corpus_dir, tmp_path / "built")


@pytest.mark.parametrize("split", ["layers", "nested"])
def test_a_search_without_a_vector_and_another_objective(split, sources, corpus_dir, tmp_path):
    path = write_study(
        tmp_path,
        sources,
        corpus_dir,
        split,
        test={"terms": [{"text": str(corpus_dir / "aaa.test.jsonl"), "limit": 3}]},
        baselines={"searches": {"alone": {"without": ["math"], "n_trials": 5}}},
    )
    optimer("search", path, tmp_path / "s")
    rows = json.loads(optimer("compare", tmp_path / "s", "--format", "json").stdout)["rows"]
    (row,) = [
        row for row in rows if row["name"].startswith("search alone") or row["name"] == "alone"
    ]
    left_out = {name: w for name, w in row["weights"].items() if name.startswith("math.")}
    assert left_out and set(left_out.values()) == {0.0}

    target = tmp_path / "target.yaml"
    target.write_text(yaml.safe_dump({"terms": [{"text": str(corpus_dir / "xyz.search.jsonl")}]}))
    optimer("retarget", tmp_path / "s", target, tmp_path / "r", "--n-trials", 1)
    assert len(scores_in(tmp_path / "r")) > len(scores_in(tmp_path / "s"))


@pytest.mark.parametrize("split", ["nested", "along"])
def test_one_adapter_holds_the_groups_of_two(split, sources, corpus_dir, tmp_path):
    vectors = {
        name: {"source": sources[name], "by": FOR_LORA[split], "bounds": [-0.5, 1.0]}
        for name in "ab"
    }
    path = write_study(tmp_path, sources, corpus_dir, split, vectors=vectors)
    optimer("search", path, tmp_path / "s")
    optimer("build", tmp_path / "s", tmp_path / "adapter", "--as", "adapter")
    optimer("build", tmp_path / "s", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(sources["base"], dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).merge_and_unload()
    state = merged.state_dict()
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("split", ["names", "along"])
def test_tokens_that_the_base_lacks_join_groups(split, sources, corpus_dir, tmp_path):
    base = ResolvedModel(Path(sources["base"]), "base")
    save_tuned(base, tmp_path / "chat", with_tokens(base.path, [START, END]), seed=1)
    vectors = {
        "chat": {"source": str(tmp_path / "chat"), "by": SPLITS[split], "bounds": [-0.5, 1.0]},
        "b": {"source": sources["b"], "by": FOR_LORA[split]},
    }
    changes = {"vectors": vectors, "vocabulary": "union", "tokenizer_source": "chat"}
    path = write_study(tmp_path, sources, corpus_dir, split, **changes)
    optimer("search", path, tmp_path / "s")
    assert_built_scores_as_searched(tmp_path / "s", corpus_dir, tmp_path / "built")


def test_a_run_trains_vectors_searches_their_groups_and_attempts_at_mixtures(
    recipe_dir: Path, tmp_path: Path
):
    file = recipe_dir / "study.yaml"
    study = yaml.safe_load(file.read_text())
    study["vectors"]["aaa"]["by"] = ["self_attn", "mlp"]
    study["vectors"]["xyz"]["by"] = SPLITS["gradient"]
    study["baselines"] = {"attempts": [2]}
    file.write_text(yaml.safe_dump(study))
    out = tmp_path / "out"
    result = run_optimer("run", recipe_dir, out)
    assert result.exit_code == 0, result.output
    names = ["aaa.self_attn", "aaa.mlp", "xyz.gradient.1", "xyz.gradient.2"]
    assert list(Recipe.read(out / "recipe.yaml").weights) == names
    rows = {row["kind"] for row in json.loads((out / "results.json").read_text())["rows"]}
    assert {"attempts", "scaled_attempts"} <= rows
    assert run_optimer("run", recipe_dir, out).exit_code == 0
