"""A recipe folder under several seeds: whole runs, more seeds later, means with intervals."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from optimer_hf.comparison.ratio_check import check_ratios
from optimer_hf.comparison.results_file import read_results
from optimer_hf.experiment.seeds import (
    describe_correlation,
    join_rows,
    terms_to_markdown,
    to_markdown,
)
from optimer_hf.experiment.seeds_file import SeededRow, SeedResults, Spread
from optimer_hf.scoring.formatting import Unit
from optimer_hf.study.directory import load_study
from tests.support.experiments import run_optimer
from tests.support.landscapes import config_of


def row(
    name: str | tuple[str, str], value: float, merge: float, **weights: float
) -> dict[str, object]:
    """Return a row of a results.json: a title as 0.1.0 wrote it, or kind and subject."""
    named = {"name": name}
    if not isinstance(name, str):
        named = {"name": "", "kind": name[0], "subject": name[1]}
    return named | {
        "value": value - 1,  # what `weighted_mean` gives: no gain over the base
        "over_base": {"difference": value},
        "merge_minus": {"difference": merge - value},
        "weights": weights,
        "chosen_after_seal": False,
    }


def test_rows_are_joined_by_kind_whatever_scale_a_seed_has_found(tmp_path: Path):
    results = [
        {"rows": [row("base", 0.0, 0.2), row("x at its best scale, 0.6", 0.1, 0.2)]},
        {"rows": [row(("base", ""), 0.0, 0.4), row(("best_scale", "x"), 0.2, 0.4)]},
    ]
    results[1]["rows"].append(row("mixture, 50 : 50", 0.1, 0.4))  # one seed has no such row
    results[1]["rows"][1]["chosen_after_seal"] = True
    read = []
    for seed, result in enumerate(results):
        file = tmp_path / f"{seed}.json"
        file.write_text(json.dumps(result))
        read.append(read_results(file, config_of()))
    base, scaled = join_rows(read)
    assert (base.name, scaled.name) == ("base", "x at its best scale")
    assert scaled.gain.values == [0.1, 0.2]
    assert scaled.merge_minus.mean == pytest.approx(0.15)
    table = to_markdown([base, scaled], [{"a": 0.5}, {"a": 0.75}], Unit(100.0, "in percent"))
    cells = "| +15.00 % | +10.00 % ... +20.00 % | +15.00 % [-48.53 %, +78.53 %] |"
    assert f"| x at its best scale (chosen after the seal was opened) {cells}" in table
    raw = to_markdown([base, scaled], [{"a": 0.5}, {"a": 0.75}], Unit(1.0, "bits per byte"))
    assert "| +0.15 | +0.10 ... +0.20 |" in raw
    assert "| seed-1 | 0.75 |" in table


def test_gains_by_term_and_the_rank_correlation_have_intervals_over_the_seeds():
    spreads = {"ja": Spread(values=[0.1, 0.2]), "en": Spread(values=[-0.01, -0.01])}
    base, average = (
        SeededRow(
            kind=kind,
            subject="",
            chosen_after_seal=False,
            gain=spreads["ja"],
            merge_minus=spreads["ja"],
            terms=spreads,
        )
        for kind in ("base", "average")
    )
    table = terms_to_markdown([base, average])
    assert "| row | ja | en |" in table
    assert "| uniform average | +15.00 % [-48.53 %, +78.53 %] | -1.00 % |" in table
    text = describe_correlation(Spread(values=[0.5, 0.7]), 2)
    assert "mean 0.60 [-0.67, 1.00] over the seeds (0.50, 0.70)" in text
    assert describe_correlation(None, 2) == ""


def test_every_searched_merge_is_compared_with_every_row_under_the_same_seed():
    def gains(kind: str, subject: str, *values: float) -> SeededRow:
        spread = Spread(values=values)
        return SeededRow(
            kind=kind, subject=subject, chosen_after_seal=False, gain=spread, merge_minus=spread
        )

    rows = [
        gains("base", "", 0.0, 0.0),
        gains("alone", "mix", 0.25, 0.125),
        gains("other_search", "without mix", 0.5, 0.5),
        gains("scaled_attempts", "4", 0.25, 0.25),
        gains("merge", "", 0.5, 0.25),
    ]
    table = to_markdown(rows, [{"x": 1.0}] * 2, Unit(100.0, "in percent")).splitlines()
    assert table[2].endswith("| merge minus row | without mix, minus row |")
    half = 12.7062 * 0.0625  # Student's t with one degree of freedom
    ends = f"[{(0.3125 - half) * 100:+.2f} %, {(0.3125 + half) * 100:+.2f} %]"
    last = {line.split(" | ")[0]: line.split(" | ", 4)[-1] for line in table[4:8]}
    assert last == {
        "| mix at 1.0": f"+31.25 % {ends} |",
        "| without mix": " |",
        "| best of 4 data mixtures at equal cost, at its best scale": "+25.00 % |",
        "| searched merge": "+12.50 % [-146.33 %, +171.33 %] |",
    }


@pytest.mark.slow
def test_seeds_are_whole_runs_that_stay_when_more_are_asked_for(recipe_dir: Path, tmp_path: Path):
    file = recipe_dir / "study.yaml"
    study = yaml.safe_load(file.read_text())
    study["baselines"] = {"searches": {"random": {"surrogate": "random", "n_trials": 5}}}
    study["baselines"]["attempts"] = [4]
    file.write_text(yaml.safe_dump(study))
    short = {"max_tokens": 256, "trainer": {"per_device_train_batch_size": 1}}  # steps to learn in
    (recipe_dir / "short.yaml").write_text(
        yaml.safe_dump({"train": short, "study": {"search": {"n_trials": 5}}})
    )
    out, alone = tmp_path / "seeds", tmp_path / "alone"
    planned = run_optimer("plan", recipe_dir, out, "--short", "--seeds", "2")
    assert planned.exit_code == 0, planned.output
    assert "all 2 seeds: " in planned.stdout
    first = run_optimer("run", recipe_dir, out, "--short", "--seeds", "1")
    assert first.exit_code == 0, first.output
    assert "Memory: planned" in (out / "seed-0" / "results.md").read_text()
    kept = {path: path.stat().st_mtime_ns for path in (out / "seed-0").rglob("*") if path.is_file()}
    second = run_optimer("run", recipe_dir, out, "--short", "--seed", "1")  # by another machine
    assert second.exit_code == 0, second.output
    assert "share it: optimer push" in second.output and "seed-1" in second.output
    both = run_optimer("run", recipe_dir, out, "--short", "--seeds", "2")
    assert both.exit_code == 0, both.output
    assert kept == {
        path: path.stat().st_mtime_ns for path in (out / "seed-0").rglob("*") if path.is_file()
    }
    assert "searched merge" in both.stdout and "| seed-1 |" in both.stdout

    assert run_optimer("run", recipe_dir, alone, "--short").exit_code == 0
    results = [
        json.loads((folder / "results.json").read_text())
        for folder in (alone, out / "seed-0", out / "seed-1")
    ]
    assert results[0] == results[1] != results[2]
    studies = [
        [json.loads(line) for line in file.read_text().splitlines()]
        for seed in (0, 1)
        for file in [out / f"seed-{seed}" / "study" / "trials.jsonl"]
    ]
    assert studies[0][0]["terms"] == studies[1][0]["terms"], "the base is the same"
    assert studies[0][1]["terms"] != studies[1][1]["terms"], "the vectors are trained anew"
    tried = [
        next((out / f"seed-{seed}" / "study" / "searches").glob("random-*/trials.jsonl"))
        for seed in (0, 1)
    ]
    lasts = [json.loads(path.read_text().splitlines()[4])["weights"] for path in tried]
    assert lasts[0] != lasts[1], "a search of the baselines has another seed, too"
    summary = SeedResults.read(out / "results.json")
    table = {row.name: row for row in summary.rows}
    for name in ("searched merge", "xyz at 1.0"):
        rows = [next(r for r in result["rows"] if r["name"] == name) for result in results[1:]]
        gains = [r["over_base"]["difference"] for r in rows]
        assert table[name].gain.values == gains and gains[0] != gains[1]
        on_term = [r["terms"]["xyz"]["gain"]["difference"] for r in rows]
        assert table[name].terms["xyz"].values == on_term
        lost = [r["merge_minus"]["difference"] for r in rows]
        assert table[name].merge_minus.values == lost
    merges = [
        next(r for r in result["rows"] if r["name"] == "searched merge") for result in results
    ]
    assert summary.merges == [r["weights"] for r in merges[1:]]
    assert table["best of 4 data mixtures at equal cost"].gain.values != [0.0, 0.0]
    checks = [check_ratios(load_study(out / f"seed-{seed}")) for seed in (0, 1)]
    assert summary.rank_correlation == Spread(values=[each.correlation for each in checks])
    assert checks[0].shares != checks[1].shares, "attempts are drawn anew, too"
    assert (out / "attempts.png").exists()

    refused = run_optimer("run", recipe_dir, out, "--short")
    assert refused.exit_code == 1 and "--seeds" in refused.output
    for command in (["report"], ["compare"], ["push", "--dry-run"]):
        name, *options = command
        told = run_optimer(name, out, *["me/it"] * (name == "push"), *options)
        assert told.exit_code == 1
        assert f"It holds whole runs: give one of them, e.g. {out / 'seed-0'}." in told.output

    joined = (out / "results.md").read_text()
    for seed in (0, 1):  # what another machine has to send
        for path in (out / f"seed-{seed}").iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ("run.json", "done.json", "results.json"):
                path.unlink()
    elsewhere = tmp_path / "elsewhere"  # where no seed has been run
    for seed in (0, 1):
        shutil.copytree(out / f"seed-{seed}", elsewhere / f"seed-{seed}")
    for folder in (out, elsewhere):
        again = run_optimer("run", recipe_dir, folder, "--short", "--seeds", "2")
        assert again.exit_code == 0, again.output
        assert (folder / "results.md").read_text() == joined

    results_file = elsewhere / "seed-0" / "results.json"
    whole = json.loads(results_file.read_text())
    assert whole.pop("rank_correlation") == checks[0].correlation
    results_file.write_text(json.dumps(whole))  # as written by an older version
    assert run_optimer("run", recipe_dir, elsewhere, "--short", "--seeds", "2").exit_code == 0
    only = SeedResults.read(elsewhere / "results.json").rank_correlation
    assert only == Spread(values=[checks[1].correlation])
    assert "over the 1 of 2 seeds that have recorded it" in (elsewhere / "results.md").read_text()

    (recipe_dir / "another.txt").write_text("other inputs")
    told = run_optimer("run", recipe_dir, elsewhere, "--short", "--seeds", "2")
    assert told.exit_code == 1 and "its results are those of other inputs" in told.output
    assert json.loads(results_file.read_text()) == whole


def test_one_seed_and_all_seeds_are_not_asked_for_together(recipe_dir: Path, tmp_path: Path):
    refused = run_optimer("run", recipe_dir, tmp_path / "out", "--seeds", "2", "--seed", "1")
    assert refused.exit_code == 1
    assert "--seeds 2, --seed 1: expected one of them." in refused.output
    assert not (tmp_path / "out").exists()


def test_one_seed_does_not_go_into_the_folder_of_another_run(recipe_dir: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused = run_optimer("run", recipe_dir, out, "--short", "--seed", "1")
    assert refused.exit_code == 1 and "was not made by `optimer run`" in refused.output
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
