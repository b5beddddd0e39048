"""A mixture of the vectors' text as a vector of the pool: trained, searched, known everywhere."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from optimer_hf.errors import ConfigError
from optimer_hf.experiment.folder import load_inputs, run_of
from optimer_hf.experiment.planning import make_plan
from optimer_hf.hub.card import Facts, recipe_facts, render
from optimer_hf.recipes.ratios import ratios_of
from optimer_hf.recipes.record import Recipe
from tests.support.experiments import run_optimer

MIX = {"mixture": {"aaa": 3, "xyz": 1}, "budget": "one"}


def change_study(recipe_dir: Path, **changes) -> None:
    """Change the vectors of a study.yaml, and other fields of it."""
    file = recipe_dir / "study.yaml"
    study = yaml.safe_load(file.read_text())
    study["vectors"] |= changes.pop("vectors", {})
    file.write_text(yaml.safe_dump(study | changes))


@pytest.fixture
def mixed_run(recipe_dir: Path, tmp_path: Path) -> Path:
    """A run with a mixture in the pool that was killed while the mixture was trained, and then
    finished.
    """
    change_study(recipe_dir, vectors={"mix": MIX})
    out = tmp_path / "out"
    command = [sys.executable, "-m", "optimer_hf", "run", str(recipe_dir), str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    mark = "vectors/mix/checkpoints/checkpoint-*/trainer_state.json"
    deadline = time.monotonic() + 120
    while not list(out.glob(mark)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, "it was killed while it trained"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    result = run_optimer("run", recipe_dir, out)
    assert result.exit_code == 0, result.output
    return out


def test_a_mixture_is_a_vector_like_any_other(mixed_run: Path, recipe_dir: Path):
    out = mixed_run
    record = json.loads((out / "vectors" / "mix" / "training.json").read_text())
    assert record["training"]["n_tokens"] == 1024, "the tokens of one vector"
    assert [part["n_tokens"] for part in record["corpus"]["parts"]] == [768, 256]
    trials = [json.loads(line) for line in (out / "study" / "trials.jsonl").open()]
    assert all(set(trial["weights"]) == {"aaa", "xyz", "mix"} for trial in trials)
    assert any(trial["weights"] == {"aaa": 0, "xyz": 0, "mix": 0.7} for trial in trials)
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert rows["uniform average"]["weights"] == {"aaa": 0.5, "xyz": 0.5, "mix": 0.0}
    assert rows["uniform sum"]["weights"] == {"aaa": 1.0, "xyz": 1.0, "mix": 0.0}
    assert any(name.startswith("mix at its best scale, ") for name in rows)
    assert "mixture (aaa 75 %, xyz 25 %) of " in (out / "report.html").read_text()
    assert json.loads((out / "ledger.json").read_text())["train"]["tokens"] == 3 * 1024

    recipe = Recipe.read(out / "recipe.yaml")
    assert recipe.mixtures == {"mix": {"aaa": 3.0, "xyz": 1.0}}
    card = render({}, Facts("t", "you/t", recipe_facts(recipe, "", {}, None)), None)
    assert "trained on a mixture: aaa 75 %, xyz 25 %" in card
    check_ratios(out, recipe, recipe_dir)
    assert run_optimer("run", recipe_dir, out).exit_code == 0


def check_ratios(out: Path, recipe: Recipe, recipe_dir: Path) -> None:
    """The weight of the mixture counts for the vectors whose text it was trained on."""
    weights = recipe.weights
    amounts = [weights["aaa"] + 0.75 * weights["mix"], weights["xyz"] + 0.25 * weights["mix"]]
    expected = [amount / sum(amounts) for amount in amounts]
    for source in (out / "study", out / "recipe.yaml"):
        shares = ratios_of(source).ratios.shares
        assert [shares.get(name, 0) for name in ("aaa", "xyz")] == pytest.approx(expected, abs=1e-5)
    files = [recipe_dir / f"train-{name}.yaml" for name in ("aaa", "xyz")]
    result = run_optimer("ratios", out, *files, "--out", out / "again.yaml")
    assert result.exit_code == 0, result.output
    assert f"mix: shared out, as it was trained on a mixture  (weight {weights['mix']:g})" in (
        result.stdout
    )
    assert yaml.safe_load((out / "again.yaml").read_text())["max_tokens"] == 2048


def test_a_plan_counts_the_training_of_a_mixture(recipe_dir: Path, tmp_path: Path):
    mixtures = {"half": {"shares": {"aaa": 1}, "budget": "one", "scale": "searched"}}
    change_study(
        recipe_dir, vectors={"mix": {"mixture": "uniform"}}, baselines={"mixtures": mixtures}
    )
    inputs = load_inputs(run_of(recipe_dir, tmp_path / "out"))
    assert inputs.study.mixtures == {"mix": {"aaa": 1.0, "xyz": 1.0}}
    plan = make_plan(inputs.study, inputs.trainings, tmp_path / "out", is_run=True)
    work = {stage.name: stage.work for stage in plan.stages}
    assert work["train mix"] == "2,048 tokens", "as many as both vectors together"
    assert work["mixtures"] == "1,024 tokens", "the mixture in the pool is no text of its own"
    assert work["scale of half: search"].startswith("8 trials of ")


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"mix": {"mixture": "searched"}}, "Run it without this vector, then give the shares"),
        ({"mix": {"mixture": "unifrom"}}, "vectors.mix.mixture"),
        ({"mix": {"mixture": {"klingon": 1}}}, "no vector is called 'klingon'"),
        ({"mix": {"mixture": {"aaa": -1, "xyz": 2}}}, "shares must be >= 0"),
        (
            {"mix": {"mixture": "uniform", "train": "train-aaa.yaml"}},
            "give exactly one of 'source'",
        ),
        ({"aaa": {"train": "train-aaa.yaml", "budget": "one"}}, "it goes with 'mixture'"),
        (
            {"one": {"mixture": "uniform"}, "two": {"mixture": {"one": 1}}},
            "'one' is a mixture itself",
        ),
        (
            {"given": {"source": "you/v"}, "mix": {"mixture": {"given": 1}}},
            "vectors.mix.mixture: vector 'given' is not trained here with max_tokens",
        ),
    ],
)
def test_a_mixture_that_cannot_be_trained_is_refused(recipe_dir, tmp_path, vectors, message):
    change_study(recipe_dir, vectors=vectors)
    result = run_optimer("run", recipe_dir, tmp_path / "out")
    assert result.exit_code == 1 and message in result.output
    assert not (tmp_path / "out").exists()


def test_runs_that_are_not_alike_cannot_be_mixed_in_the_pool(recipe_dir, tmp_path):
    change_study(recipe_dir, vectors={"mix": {"mixture": "uniform"}})
    file = recipe_dir / "train-xyz.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"block_size": 64}))
    result = run_optimer("run", recipe_dir, tmp_path / "out")
    assert result.exit_code == 1
    assert "settings of 'xyz' differ from those of 'aaa' (block_size" in result.output


@pytest.mark.parametrize("command", ["search", "plan"])
def test_a_mixture_needs_a_run(recipe_dir: Path, tmp_path: Path, command: str):
    file = recipe_dir / "study.yaml"
    study = yaml.safe_load(file.read_text())
    study["vectors"] = {"aaa": study["base_model"], "mix": {"mixture": {"aaa": 1}}}
    file.write_text(yaml.safe_dump(study))
    out = [tmp_path / "out"] if command == "search" else []
    result = run_optimer(command, file, *out)
    assert result.exit_code == 1
    assert "vectors.mix.mixture: a mixture has to be trained first. Run `optimer run`" in (
        result.output
    )


def test_a_given_mixture_without_a_record_is_named_before_anything_is_trained(recipe_dir: Path):
    """The ratios of the search need the tokens of every vector in the pool."""
    given = {"source": str(yaml.safe_load((recipe_dir / "study.yaml").read_text())["base_model"])}
    change_study(
        recipe_dir,
        vectors={"mix": {"mixture": {"aaa": 1}} | given},
        baselines={"mixtures": {"m": {"shares": "searched"}}},
    )
    with pytest.raises(ConfigError, match=r"'mix'.*does not say how many tokens"):
        load_inputs(run_of(recipe_dir))
