"""hardware_planning.py: `optimer plan --on` for folders and studies whose base is not here."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from optimer_hf.models.resolve import resolve_tokenizer
from tests.support.experiments import run_optimer


def plan_of(*arguments: object) -> dict:
    result = run_optimer("plan", *arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def without_weights(recipe_dir: Path) -> Path:
    """Remove the weights of the base of a folder."""
    base = Path(yaml.safe_load((recipe_dir / "study.yaml").read_text())["base_model"])
    copy = recipe_dir.parent / "base"
    shutil.copytree(base, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in recipe_dir.glob("*.yaml"):
        file.write_text(file.read_text().replace(str(base), str(copy)))
    return copy


def test_a_plan_for_other_devices_has_the_work_of_the_measured_plan(
    recipe_dir: Path, tmp_path: Path
):
    measured = plan_of(recipe_dir, tmp_path / "out")
    without_weights(recipe_dir)
    planned = plan_of(recipe_dir, "--on", "2xH100")
    assert [(each["name"], each["work"]) for each in planned["stages"]] == [
        (each["name"], each["work"]) for each in measured["stages"]
    ]
    assert all(0 < each["hours"] <= each["device_hours"] for each in planned["stages"])
    assert planned["warnings"] == planned["downloads"] == []
    assert not (Path("runs") / "tiny").exists()


def test_hours_follow_from_the_devices_and_the_share_of_their_peak(recipe_dir: Path):
    def hours(*options: str) -> dict[str, float]:
        return {each["name"]: each["hours"] for each in plan_of(recipe_dir, *options)["stages"]}

    one, eight = hours("--on", "H100"), hours("--on", "8xH100")
    half, slower = hours("--on", "H100", "--mfu", "0.2"), hours("--on", "A100")
    for name in one:
        assert one[name] == pytest.approx(8 * eight[name])
        assert half[name] == pytest.approx(2 * one[name])
        assert slower[name] == pytest.approx(one[name] * 989 / 312, rel=0.6)


def test_what_does_not_fit_on_small_devices_is_a_warning(recipe_dir: Path):
    base = without_weights(recipe_dir)
    config = json.loads((base / "config.json").read_text())
    large = {"hidden_size": 8192, "intermediate_size": 32768, "num_hidden_layers": 40}
    (base / "config.json").write_text(
        json.dumps(config | large | {"layer_types": ["full_attention"] * 40})
    )
    result = run_optimer("plan", recipe_dir, "--on", "2xL4")
    assert result.exit_code == 0, result.output
    assert "| does not fit |" in result.stdout
    assert "warning: search: " in result.stdout and "Use more devices" in result.stdout
    assert "warning: train aaa: " in result.stdout


def test_only_the_weights_of_a_base_on_the_hub_are_left_there(
    published_base, recipe_dir: Path, base
):
    base_dir = str(yaml.safe_load((recipe_dir / "study.yaml").read_text())["base_model"])
    for file in recipe_dir.glob("*.yaml"):
        file.write_text(file.read_text().replace(base_dir, published_base))
    shutil.rmtree(base.path.parents[1])
    planned = plan_of(recipe_dir, "--on", "8xH100")
    assert [each["reference"] for each in planned["downloads"]] == [published_base]
    assert 0 < planned["base_bytes"] < planned["downloads"][0]["n_bytes"]  # beside a tokenizer
    here = resolve_tokenizer(published_base).path
    assert (here / "config.json").exists() and not list(here.glob("*.safetensors"))


def test_a_study_of_ready_vectors_counts_their_bytes(
    recipe_dir: Path, make_base, make_adapter, tmp_path: Path
):
    study = yaml.safe_load((recipe_dir / "study.yaml").read_text())
    adapter = make_adapter(make_base("gemma"), seed=1)
    study["vectors"] = {"here": str(adapter), "gone": "nobody/nothing-at-all"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    planned = plan_of(tmp_path / "study.yaml", "--on", "2xH100")
    assert [each["name"] for each in planned["stages"]] == ["search", "re-score"]
    assert planned["warnings"] == [
        "vector 'gone': its size is not known; as large as the base is assumed"
    ]


def test_max_steps_decide_how_long_a_training_takes(recipe_dir: Path):
    def hours(**trainer: int) -> float:
        for file in recipe_dir.glob("train-*.yaml"):
            data = yaml.safe_load(file.read_text())
            data["trainer"] = data.get("trainer", {}) | trainer
            file.write_text(yaml.safe_dump(data))
        stages = plan_of(recipe_dir, "--on", "2xH100")["stages"]
        return next(each["device_hours"] for each in stages if each["name"] == "train aaa")

    data = yaml.safe_load((recipe_dir / "train-aaa.yaml").read_text())
    once = hours(num_train_epochs=1, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    n_tokens = 50 * 3 * 2 * 4 * data["block_size"]  # steps, batches, devices, blocks
    assert hours(max_steps=50) == pytest.approx(once * n_tokens / data["max_tokens"])
    assert hours(num_train_epochs=7) == hours()


def test_a_training_of_a_whole_corpus_is_named_as_missing(recipe_dir: Path):
    for file in recipe_dir.glob("train-*.yaml"):
        data = yaml.safe_load(file.read_text())
        del data["max_tokens"]
        file.write_text(yaml.safe_dump(data))
    warnings = plan_of(recipe_dir, "--on", "2xH100")["warnings"]
    assert warnings[0] == "train aaa: has no max_tokens, so its time is not in the plan"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "8xH1000"], "Did you mean 'H100'?"),
        (["--on", "0xH100"], "expected 1 to 100,000"),
        (["--on", "H100", "--fetch"], "--on: OUT, --fetch and --seeds do not go with it"),
        (["--on", "H100", "--seeds", "2"], "--on: OUT, --fetch and --seeds"),
        (["--mfu", "0.4"], "--mfu: goes with --on"),
        (["--on", "H100", "--mfu", "1.4"], "1.4 is not in the range"),
        (["--on", "H100", "--mfu", "0"], "0.0 is not in the range"),
    ],
)
def test_options_that_do_not_go_together_are_refused(recipe_dir: Path, options, message: str):
    result = run_optimer("plan", recipe_dir, *options)
    assert result.exit_code in (1, 2)
    assert message in result.output
