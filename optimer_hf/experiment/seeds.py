"""A recipe folder run under several seeds -> how far its results move with them.

    OUT/  seed-0/  seed-1/  ...      whole runs, each finished one skipped when it is run again
          results.md  results.json   every row's gain by seed, means, intervals over the seeds

Intervals of one run are over test items; only runs with other seeds say how much of a difference is
the luck of a training or a search. A run of OUT/seed-0 is the
folder's own, whose seeds are moved by 0.
"""

import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimer_hf.comparison.rows import RowKind, mark_title, title_of
from optimer_hf.comparison.sealed_file import kind_of_title
from optimer_hf.errors import ConfigError
from optimer_hf.experiment.folder import Run, check_folder, load, run_of
from optimer_hf.files.reading import read_json
from optimer_hf.files.staging import write_text
from optimer_hf.files.text import markdown_table
from optimer_hf.scoring.formatting import Unit
from optimer_hf.study.config import StudyConfig

if TYPE_CHECKING:
    from optimer_hf.experiment.plan import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spread:
    """Numbers by seed, and the mean with its 95 % t interval over the seeds (of one, or of equal
    numbers: nothing).
    """

    values: list[float]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean, by Student's t distribution over the seeds."""
        from scipy.stats import t

        n = len(self.values)
        if len(set(self.values)) == 1:
            return None
        half = float(t.ppf(0.975, n - 1)) * statistics.stdev(self.values) / math.sqrt(n)
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class SeededRow:
    """A row of the sealed test in all runs: gain over the base, and the merge minus it."""

    kind: RowKind
    subject: str
    chosen_after_seal: bool  # in one of the runs
    gain: Spread
    merge_minus: Spread

    @property
    def title(self) -> str:
        """The name of the row in tables, without the scale that a seed has found."""
        return title_of(self.kind, self.subject)


def run_folder(
    recipe_dir: Path,
    out: Path | None = None,
    *,
    short: bool = False,
    tokens: str | int | None = None,
    n_seeds: int | None = None,
) -> tuple[Run, str]:
    """Run a recipe folder, under `n_seeds` seeds when that is given, and return the run with its
    summary; a finished run only says so. The arguments are those of `run_of`.
    """
    run = run_of(recipe_dir, out, short=short, tokens=tokens, is_seeded=n_seeds is not None)
    check_folder(run)
    from optimer_hf.experiment.run import finished_summary, run_recipe  # takes seconds to import

    if n_seeds is not None:
        return run, run_seeds(run, n_seeds)
    done = finished_summary(run)
    if done is None:
        return run, run_recipe(run)
    logger.info("finished already, nothing to do")
    return run, done


def plan_source(
    source: Path,
    out: Path | None = None,
    *,
    short: bool = False,
    tokens: str | int | None = None,
    n_seeds: int | None = None,
    fetch: bool = False,
) -> "Plan":
    """Return the plan of a recipe folder, kept in `out`, or of a study.yaml.

    The base has to be on this disk, unless `fetch` allows downloading it. With `n_seeds` the plan
    is that of the first seed. Raises ConfigError for options that do not go with the source.
    """
    if source.is_dir():
        run = run_of(source, out, short=short, tokens=tokens, is_seeded=n_seeds is not None)
        check_folder(run)
        from optimer_hf.experiment.run import plan_run  # takes seconds to import

        _check_base(load(run).study, fetch)
        return plan_run(claimed_runs(run, n_seeds)[0] if n_seeds else run)
    if out is not None or short or tokens or n_seeds:
        raise ConfigError(f"{source}: OUT, --short, --tokens and --seeds go with a recipe folder.")
    config = StudyConfig.read(source)
    from optimer_hf.experiment.plan import plan

    _check_base(config, fetch)
    return plan(config, {}, Path.cwd(), is_run=False)


def _check_base(config: StudyConfig, fetch: bool) -> None:
    """Say what has to be downloaded; refuse that for the base, which the probe needs."""
    from optimer_hf.experiment.plan import downloads, said

    missing = downloads(config)
    for each in missing:
        logger.info("%s", said(each))
    if not fetch and any(each.reference == config.base_model for each in missing):
        raise ConfigError(
            f"{config.base_model}: is not on this disk, and the probe needs it. Add --fetch."
        )


def run_seeds(run: Run, n_seeds: int) -> str:
    """Run a recipe folder under `n_seeds` seeds into folders of `run.out`, and return the summary.

    Finished runs are kept, so that more seeds can be added later. Raises what `run_recipe` raises.
    """
    from optimer_hf.experiment.run import finished_summary, run_recipe

    config = load(run).study
    unit = Unit.of(config.test or config.objective)
    runs = claimed_runs(run, n_seeds)
    for each in runs:
        logger.info("%s of %d seeds", each.out.name, n_seeds)
        if finished_summary(each) is None:
            run_recipe(each)
    results = [read_json(each.out / "results.json") for each in runs]
    rows = rows_of(results, config)
    merges = [_by_kind(result, config)["merge", ""]["weights"] for result in results]
    text = f"# {run.name}\n\n{to_markdown(rows, merges, unit)}"
    answers = {
        row["over_base"].get("verdict", "") for result in results for row in result["rows"][1:]
    }
    few = sorted(answer for answer in answers if answer.startswith("too few"))
    text += "".join(f"\nWithin a run, the sealed test has {answer}.\n" for answer in few)
    everywhere = {(row.kind, row.subject) for row in rows}
    anywhere = {key for result in results for key in _by_kind(result, config)}
    if left_out := sorted(title_of(*key) for key in anywhere - everywhere):
        text += f"\nNot in every run, and left out: {', '.join(left_out)}.\n"
    others = sorted(
        path.name for path in run.out.glob("seed-*") if path not in [r.out for r in runs]
    )
    if others:
        text += f"\nThere, and not counted: {', '.join(others)}.\n"
    write_text(run.out / "results.json", json.dumps(to_json(rows, merges), indent=2))
    write_text(run.out / "results.md", text)
    return text


def claimed_runs(run: Run, n_seeds: int) -> list[Run]:
    """Take `run.out` for runs under several seeds, and return them. Raises OutputError for one that
    holds something else.
    """
    from optimer_hf.experiment.run import claim

    claim(run.out, {"recipe": run.name, "seeds": True} | run.budget)
    return [replace(run, out=run.out / f"seed-{seed}", seed=seed) for seed in range(n_seeds)]


def rows_of(results: Sequence[Mapping[str, Any]], config: StudyConfig) -> list[SeededRow]:
    """Return the rows that every run of a study has, in the order of the first one, from their
    results.json.
    """
    tables = [_by_kind(result, config) for result in results]
    return [
        SeededRow(
            *key,
            any(table[key]["chosen_after_seal"] for table in tables),
            Spread([table[key]["over_base"]["difference"] for table in tables]),
            Spread([table[key]["merge_minus"]["difference"] for table in tables]),
        )
        for key in tables[0]
        if all(key in table for table in tables)
    ]


def _by_kind(
    result: Mapping[str, Any], config: StudyConfig
) -> dict[tuple[RowKind, str], Mapping[str, Any]]:
    """Return the rows of a results.json by kind and subject, which 0.1.0 did not write."""
    rows = {}
    for row in result["rows"]:
        kind, subject = (
            (row["kind"], row["subject"]) if "kind" in row else kind_of_title(row["name"], config)
        )
        rows[kind, subject] = row
    return rows


def to_markdown(
    rows: Sequence[SeededRow], merges: Sequence[Mapping[str, float]], unit: Unit
) -> str:
    """Return the tables of rows and of the weights found."""
    numbers = [
        [
            mark_title(row.title, row.chosen_after_seal),
            unit.show(row.gain.mean),
            f"{unit.show(min(row.gain.values))} ... {unit.show(max(row.gain.values))}",
            "" if row.kind == "merge" else _shown(row.merge_minus, unit),
        ]
        for row in rows[1:]
    ]
    header = ["row", "gain", "smallest ... largest", "merge minus row"]
    weights = [
        [f"seed-{seed}", *(f"{weight:g}" for weight in found.values())]
        for seed, found in enumerate(merges)
    ]
    return (
        f"Sealed test under {len(merges)} seeds of training and search, {unit.text}: mean, "
        "smallest and largest; and the searched merge minus the row, mean with its 95 % interval "
        "over the seeds (Student's t). Test items, and vectors and models that are given, are the "
        "same in every run, so their luck is not in the intervals. Re-targeted merges are measured "
        "by the study's own objective here; results.md of every run has theirs.\n\n"
        f"{markdown_table(header, numbers)}\nWeights of the merge:\n\n"
        f"{markdown_table(['seed', *merges[0]], weights)}"
    )


def _shown(spread: Spread, unit: Unit) -> str:
    text = unit.show(spread.mean)
    if spread.interval is not None:
        text += f" [{', '.join(map(unit.show, spread.interval))}]"
    return text


def to_json(rows: Sequence[SeededRow], merges: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return everything as JSON values."""
    return {
        "merges": list(merges),
        "rows": [
            {
                "name": row.title,
                "kind": row.kind,
                "subject": row.subject,
                "chosen_after_seal": row.chosen_after_seal,
                "gain": _values(row.gain),
                "merge_minus": _values(row.merge_minus),
            }
            for row in rows
        ],
    }


def _values(spread: Spread) -> dict[str, Any]:
    return {"values": spread.values, "mean": spread.mean, "interval": spread.interval}
