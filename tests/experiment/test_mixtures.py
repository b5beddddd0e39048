"""A mixture of the vectors' text as a vector of the pool: trained, searched, known everywhere."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimer_hf.comparison.baselines import short_digest
from optimer_hf.comparison.mixtures_file import read_attempts
from optimer_hf.comparison.sealed import compare_study
from optimer_hf.errors import ConfigError
from optimer_hf.experiment.folder import load_inputs, run_of
from optimer_hf.experiment.planning import make_plan
from optimer_hf.hub.card import Facts, recipe_facts, render
from optimer_hf.recipes.ratios import ratios_of
from optimer_hf.recipes.record import Recipe
from optimer_hf.searching.one_model import score_model
from optimer_hf.study.directory import load_study
from optimer_hf.study.space import to_unit
from optimer_hf.study.surrogate import fit_surrogate
from optimer_hf.training.mixture import draw_shares
from tests.support.experiments import run_optimer
from tests.support.warm import start_optimer

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
    return run_killed(recipe_dir, tmp_path / "out", "vectors/mix")


def run_killed(recipe_dir: Path, out: Path, training: str) -> Path:
    """Run a recipe, kill the run in the middle of one training, finish it, and return `out`."""
    kill_at(recipe_dir, out, f"{training}/checkpoints/checkpoint-*/trainer_state.json")
    result = run_optimer("run", recipe_dir, out)
    assert result.exit_code == 0, result.output
    return out


def kill_at(recipe_dir: Path, out: Path, mark: str) -> None:
    """Run a recipe, and kill the run as soon as a file that matches `mark` is there."""
    start_optimer("run", recipe_dir, out).kill_when(lambda: list(out.glob(mark)))


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


def test_a_mixture_of_some_vectors_can_have_their_tokens(recipe_dir: Path, tmp_path: Path):
    part = {"aaa": 1, "xyz": 0}
    change_study(
        recipe_dir,
        vectors={"mix": {"mixture": part, "budget": "mixed"}},
        baselines={"mixtures": {"half": {"shares": part, "budget": "mixed"}}},
    )
    inputs = load_inputs(run_of(recipe_dir, tmp_path / "out"))
    assert inputs.trainings["mix"].max_tokens == inputs.trainings["aaa"].max_tokens == 1024
    plan = make_plan(inputs.study, inputs.trainings, tmp_path / "out", is_run=True)
    work = {stage.name: stage.work for stage in plan.stages}
    assert work["train mix"] == work["mixtures"] == "1,024 tokens"


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


def test_a_run_that_is_copied_to_other_machines_goes_on_where_it_was(recipe_dir, tmp_path: Path):
    baselines = {"mixtures": {"more aaa": {"shares": {"aaa": 3, "xyz": 1}}}}
    change_study(recipe_dir, vectors={"mix": MIX}, baselines=baselines)
    marks = ["study/trials.jsonl", "mixtures/*/checkpoints/checkpoint-*/trainer_state.json"]
    kept: dict[str, bytes] = {}  # what no machine may do again
    for number, mark in enumerate([*marks, None]):
        machine = tmp_path / f"machine-{number}"
        shutil.copytree(recipe_dir, machine / "tiny")
        if number:
            before = tmp_path / f"machine-{number - 1}"
            shutil.copytree(before / "out", machine / "out")
            shutil.rmtree(before)
        if mark is not None:
            kill_at(machine / "tiny", machine / "out", mark)
        else:
            result = run_optimer("run", machine / "tiny", machine / "out")
            assert result.exit_code == 0, result.output
        out = machine / "out"
        for name, content in kept.items():
            assert (out / name).read_bytes().startswith(content), name
        files = [*out.rglob("training.json"), *out.glob("study/*.jsonl")]
        whole = {str(each.relative_to(out)): each.read_bytes() for each in files}
        kept = {name: text[: text.rfind(b"\n") + 1] for name, text in whole.items()}
    assert {"mixture: more aaa", "searched merge"} <= {
        row["name"] for row in json.loads((out / "results.json").read_text())["rows"]
    }
    assert str(tmp_path) not in "".join(
        path.read_text() for path in out.glob("study/*.json*") if "base" not in path.name
    ), "no path of a machine"


# -- attempts at equal cost ------------------------------------------------------------------------


@pytest.fixture
def attempted_run(recipe_dir: Path, tmp_path: Path) -> Path:
    """A run that compares with attempts at a mixture, was killed while it trained one, and then
    finished. The search wants the language aaa, and the sealed test xyz.
    """
    study = yaml.safe_load((recipe_dir / "study.yaml").read_text())
    parts = {"objective": study["objective"], "test": study["test"]}
    for part, wanted in (("objective", "aaa"), ("test", "xyz")):
        for term in parts[part]["terms"]:
            term["weight"] = float(term["name"] == wanted)
    without = {"n_trials": 5, "rescore_top": 0, "without": ["mix"]}
    baselines = {"attempts": [4], "searches": {"no mixture": without}}
    for file in recipe_dir.glob("train-*.yaml"):
        train = yaml.safe_load(file.read_text())
        train["trainer"]["per_device_train_batch_size"] = 1  # more steps, so ratios matter
        file.write_text(yaml.safe_dump(train))
    mix = {"mix": {"mixture": "uniform"}}
    parts |= {"search": {"n_trials": 6, "rescore_top": 1}}
    change_study(recipe_dir, vectors=mix, baselines=baselines, retarget={}, **parts)
    return run_killed(recipe_dir, tmp_path / "out", "mixtures/attempt-2-of-4-*")


def test_attempts_at_a_mixture_share_the_tokens_of_the_vectors(attempted_run: Path, recipe_dir):
    out = attempted_run
    attempts = read_attempts(out / "study")
    trained = {n: [read_training(each.model) for each in known] for n, known in attempts.items()}
    vectors = [read_training(out / "vectors" / name)["n_tokens"] for name in ("aaa", "xyz")]
    assert [run["n_tokens"] for run in trained[4]] == [sum(vectors) // 4] * 4
    for known in attempts.values():
        assert known[0].shares == {"aaa": 0.5, "xyz": 0.5}
    drawn = draw_shares(["aaa", "xyz"], 4, seed=0)
    for attempt, shares, run in zip(attempts[4], drawn, trained[4], strict=True):
        whole = 32 / run["n_tokens"]  # shares are trained on in blocks of 32 tokens
        assert attempt.shares == pytest.approx(shares, abs=whole)
        parts = corpus_of(attempt.model)["parts"]
        tokens = [part["n_tokens"] for part in parts]
        assert [n / sum(tokens) for n in tokens] == pytest.approx(list(attempt.shares.values()))

    rows = check_choice(out, attempts)
    assert rows["no mixture"]["weights"]["mix"] == 0, "it was left out"
    (directory,) = (out / "study" / "searches").glob("no-mixture-*")
    trials = [json.loads(line) for line in (directory / "trials.jsonl").open()]
    assert {trial["weights"]["mix"] for trial in trials} == {0}
    ledger = json.loads((out / "ledger.json").read_text())
    assert ledger["mixtures"]["n"] == 4
    assert ledger["mixtures"]["tokens"] == sum(vectors)
    check_prediction(out, attempts)
    check_rows_without_models(out, rows)


def read_training(directory: Path) -> dict[str, int]:
    """Return what the record of a training says about its run."""
    return json.loads((directory / "training.json").read_text())["training"]


def corpus_of(directory: Path) -> dict[str, Any]:
    """Return what the record of a training says about its text."""
    return json.loads((directory / "training.json").read_text())["corpus"]


def merge_with_peft(adapter: Path, base_model: str) -> Path:
    """Merge an adapter into its base, and return the directory of the model."""
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    out = adapter.parents[1] / "merged-by-peft" / adapter.name
    merged.save_pretrained(out)
    AutoTokenizer.from_pretrained(base_model).save_pretrained(out)
    return out


def check_choice(out: Path, attempts) -> dict[str, dict]:
    """The best attempt is chosen by the items of the search, where what PEFT merges has the same
    scores; the sealed test, which wants the other language, would have chosen another one.
    """
    study = load_study(out / "study")
    (directory,) = (out / "study" / "searches").glob("attempts-4-*")
    trials = load_study(directory).trials
    assert [trial.weights for trial in trials] == [
        {f"attempt {i}": float(i == number) for i in (1, 2, 3, 4)} for number in range(5)
    ]
    found = [trial.terms["aaa"].score for trial in trials[1:]]
    searched = study.config.objective.model_copy(update={"limit": None})
    models = [merge_with_peft(each.model, study.config.base_model) for each in attempts[4]]
    scored = [score_model(str(model), searched)["aaa"].score for model in models]
    assert found == pytest.approx(scored, rel=1e-3)
    best = found.index(min(found))  # bits per byte
    sealed = [score_model(str(model), study.config.test)["xyz"].score for model in models]
    assert sealed.index(min(sealed)) != best, "the sealed test would have chosen another one"
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    row = rows["best of 4 data mixtures at equal cost"]
    assert list(row["weights"]) == [f"4 ({short_digest(str(attempts[4][best].model))})"]
    assert row["terms"]["xyz"]["score"] == pytest.approx(sealed[best], rel=1e-3)
    titles = [name for name in rows if name.startswith("best of 4 data mixtures at equal cost, at")]
    assert len(titles) == 1 and not rows[titles[0]]["chosen_after_seal"]
    return rows


def check_rows_without_models(out: Path, rows) -> None:
    """A later comparison has the rows of all attempts, with their models there or not."""
    names = {name for name in rows if name.startswith("best of ")}
    assert len(names) == 2
    for _ in range(2):
        compared = compare_study(out / "study")
        assert names <= {row.title for row in compared.rows}
        if (out / "mixtures").exists():
            (out / "mixtures").rename(out / "elsewhere")


def check_prediction(out: Path, attempts) -> None:
    """`optimer ratios` shows what the search predicts for the ratios beside what mixtures have."""
    result = run_optimer("ratios", out, "--format", "json")
    assert result.exit_code == 0, result.output
    check = json.loads(result.stdout)["check"]
    assert check["shares"] == [each.shares for each in attempts[4]]
    study = load_study(out / "study")
    points = to_unit(study.config, [{"mix": 0.0} | each.shares for each in attempts[4]])
    surrogate = fit_surrogate(study.config, study.trials)
    base = surrogate.predict(to_unit(study.config, [study.trials[0].weights]))[0][0]
    assert check["predicted"] == pytest.approx((surrogate.predict(points)[0] - base).tolist())
    (directory,) = (out / "study" / "searches").glob("attempts-4-*")
    scored = load_study(directory)
    losses = [trial.terms["aaa"].score for trial in scored.trials]
    gains = [1 - loss / losses[0] for loss in losses[1:]]
    assert check["measured"] == pytest.approx(gains)
    assert check["correlation"] == pytest.approx(spearmanr(check["predicted"], gains).statistic)
    shown = run_optimer("ratios", out).stdout
    assert "Rank correlation (Spearman, 95 %): " in shown and "over 4 mixtures." in shown


@pytest.mark.parametrize(
    ("baselines", "message"),
    [
        ({"attempts": [2, 2]}, "found 2 twice"),
        ({"attempts": [0]}, "attempts"),
        ({"attempts": [65]}, "65 attempts leave 31 tokens for each, less than a block of 32"),
        ({"searches": {"s": {"without": ["zzz"]}}}, "no searched vector is called 'zzz'"),
        ({"searches": {"s": {"without": ["aaa", "xyz"]}}}, "it leaves nothing to search"),
    ],
)
def test_attempts_that_cannot_be_made_are_refused(recipe_dir, tmp_path, baselines, message):
    change_study(recipe_dir, baselines=baselines)
    result = run_optimer("run", recipe_dir, tmp_path / "out")
    assert result.exit_code == 1 and message in result.output
    assert not (tmp_path / "out").exists()


def test_attempts_beside_a_trained_vector_that_is_in_every_merge_are_refused(
    recipe_dir: Path, tmp_path: Path
):
    aaa = yaml.safe_load((recipe_dir / "study.yaml").read_text())["vectors"]["aaa"]
    change_study(recipe_dir, vectors={"aaa": aaa | {"fixed": 0.5}}, baselines={"attempts": [2]})
    result = run_optimer("run", recipe_dir, tmp_path / "out")
    assert result.exit_code == 1 and "vector 'aaa' is trained here and fixed" in result.output


def test_a_plan_counts_attempts(recipe_dir: Path, tmp_path: Path):
    change_study(recipe_dir, baselines={"attempts": [3]})
    inputs = load_inputs(run_of(recipe_dir, tmp_path / "out"))
    plan = make_plan(inputs.study, inputs.trainings, tmp_path / "out", is_run=True)
    work = {stage.name: stage.work for stage in plan.stages}
    assert work["mixtures"] == f"{2048 // 3 * 3:,} tokens"
    assert work["best of 3 data mixtures at equal cost: search"].startswith("4 trials of ")
    assert work["scale of best of 3 data mixtures at equal cost: search"].startswith("8 trials of ")
