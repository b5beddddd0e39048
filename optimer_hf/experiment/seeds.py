"""A recipe folder run under several seeds -> how far its results move with them.

    OUT/  seed-0/  seed-1/  ...      whole runs, each finished one skipped when it is run again
          results.md  results.json   every row's gain by seed, means, intervals over the seeds

Intervals of one run are over test items; only runs with other seeds say how much of a difference is
the luck of a training or a search. What a reader would not guess: a run of OUT/seed-0 is the
folder's own, whose seeds are moved by 0.
"""

import json
import logging
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optimer_hf.comparison.rows import AT_BEST_SCALE, titled
from optimer_hf.experiment.folder import Run, load
from optimer_hf.experiment.run import claim, finished_summary, run_recipe
from optimer_hf.files.reading import read_json
from optimer_hf.files.staging import write_text
from optimer_hf.files.text import markdown_table
from optimer_hf.scoring.units import Unit
from optimer_hf.study.config import MERGE

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

    name: str
    chosen_after_seal: bool  # in one of the runs
    gain: Spread
    merge_minus: Spread


def run_seeds(run: Run, n_seeds: int) -> str:
    """Run a recipe folder under `n_seeds` seeds into folders of `run.out`, and return the summary.

    Finished runs are kept, so that more seeds can be added later. Raises what `run_recipe` raises.
    """
    config = load(run)[0]
    unit = Unit.of(config.test or config.objective)
    runs = claimed_runs(run, n_seeds)
    for each in runs:
        logger.info("%s of %d seeds", each.out.name, n_seeds)
        if finished_summary(each) is None:
            run_recipe(each)
    results = [read_json(each.out / "results.json") for each in runs]
    rows, merges = rows_of(results), [_by_name(result)[MERGE]["weights"] for result in results]
    text = f"# {run.name}\n\n{to_markdown(rows, merges, unit)}"
    answers = {
        row["over_base"].get("verdict", "") for result in results for row in result["rows"][1:]
    }
    few = sorted(answer for answer in answers if answer.startswith("too few"))
    text += "".join(f"\nWithin a run, the sealed test has {answer}.\n" for answer in few)
    left_out = sorted(
        {name for each in results for name in _by_name(each)} - {r.name for r in rows}
    )
    if left_out:
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
    claim(run.out, {"recipe": run.name, "seeds": True} | run.budget)
    return [replace(run, out=run.out / f"seed-{seed}", seed=seed) for seed in range(n_seeds)]


def rows_of(results: Sequence[Mapping[str, Any]]) -> list[SeededRow]:
    """Return the rows that every run has, in the order of the first one, from their
    results.json.
    """
    tables = [_by_name(result) for result in results]
    return [
        SeededRow(
            name,
            any(table[name]["chosen_after_seal"] for table in tables),
            Spread([table[name]["over_base"]["difference"] for table in tables]),
            Spread([table[name]["merge_minus"]["difference"] for table in tables]),
        )
        for name in tables[0]
        if all(name in table for table in tables)
    ]


def _by_name(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return rows by name, without the scale that a seed has found."""
    scale = re.compile(rf"({AT_BEST_SCALE}), \S+$")
    return {scale.sub(r"\1", row["name"]): row for row in result["rows"]}


def to_markdown(
    rows: Sequence[SeededRow], merges: Sequence[Mapping[str, float]], unit: Unit
) -> str:
    """Return the tables of rows and of the weights found."""
    numbers = [
        [
            titled(row.name, row.chosen_after_seal),
            unit.show(row.gain.mean),
            f"{unit.show(min(row.gain.values))} ... {unit.show(max(row.gain.values))}",
            "" if row.name == MERGE else _shown(row.merge_minus, unit),
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
                "name": row.name,
                "chosen_after_seal": row.chosen_after_seal,
                "gain": _values(row.gain),
                "merge_minus": _values(row.merge_minus),
            }
            for row in rows
        ],
    }


def _values(spread: Spread) -> dict[str, Any]:
    return {"values": spread.values, "mean": spread.mean, "interval": spread.interval}
