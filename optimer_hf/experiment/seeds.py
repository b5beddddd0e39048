"""Run a recipe folder under several seeds, and measure how much its results depend on them.

    OUT/  seed-0/  seed-1/  ...      whole runs; finished ones are skipped the next time
          results.md  results.json   the gain of every row by seed, means, intervals over the seeds

The intervals of one run are over test items. Only runs with other seeds show how much of a
difference is due to the luck of a training or a search. The run in OUT/seed-0 has the seeds of the
folder itself.
"""

import json
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from optimer_hf.comparison.results_file import Results, read_results
from optimer_hf.comparison.rows import RowKind, mark_title, title_of
from optimer_hf.experiment.folder import Run, load_inputs
from optimer_hf.experiment.run import claim_directory, finished_summary, run_recipe
from optimer_hf.files.staging import write_text
from optimer_hf.files.text import markdown_table
from optimer_hf.scoring.formatting import Unit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spread:
    """A number for each seed."""

    values: list[float]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean over the seeds, by Student's t distribution; None for one
        seed or equal numbers.
        """
        from scipy.stats import t

        n = len(self.values)
        if len(set(self.values)) == 1:
            return None
        half = float(t.ppf(0.975, n - 1)) * statistics.stdev(self.values) / math.sqrt(n)
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class SeededRow:
    """A row of the sealed test in all runs: its gain over the base, and the merge minus the row."""

    kind: RowKind
    subject: str
    chosen_after_seal: bool  # in at least one run
    gain: Spread
    merge_minus: Spread

    @property
    def title(self) -> str:
        """Title of the row in tables, without the scale, which depends on the seed."""
        return title_of(self.kind, self.subject)


def run_seeds(run: Run, n_seeds: int) -> str:
    """Run a recipe folder under `n_seeds` seeds into folders of `run.out`, and return the summary.

    Finished runs are kept, so that more seeds can be added later. Raises what `run_recipe` raises.
    """
    config = load_inputs(run).study
    unit = Unit.of(config.test or config.objective)
    with claim_seeds(run, n_seeds) as runs:
        for each in runs:
            logger.info("%s of %d seeds", each.out.name, n_seeds)
            if finished_summary(each) is None:
                run_recipe(each)
        results = [read_results(each.out / "results.json", config) for each in runs]
        rows, merges = join_rows(results), [result.merge.weights for result in results]
        text = f"# {run.name}\n\n{to_markdown(rows, merges, unit)}{_notes(run, results, rows)}"
        write_text(run.out / "results.json", json.dumps(to_json(rows, merges), indent=2))
        write_text(run.out / "results.md", text)
    return text


@contextmanager
def claim_seeds(run: Run, n_seeds: int) -> Iterator[list[Run]]:
    """Hold `run.out` for runs under several seeds, and yield them.

    Raises OutputError if it holds something else, StudyError if another process holds it.
    """
    with claim_directory(run.out, {"recipe": run.name, "seeds": True} | run.budget):
        yield [replace(run, out=run.out / f"seed-{seed}", seed=seed) for seed in range(n_seeds)]


def join_rows(results: Sequence[Results]) -> list[SeededRow]:
    """Return the rows that are in the results of every run, in the order of the first one."""
    tables = [result.by_key for result in results]
    return [
        SeededRow(
            *key,
            any(table[key].chosen_after_seal for table in tables),
            Spread([table[key].over_base.difference for table in tables]),
            Spread([table[key].merge_minus.difference for table in tables]),
        )
        for key in tables[0]
        if all(key in table for table in tables)
    ]


def _notes(run: Run, results: Sequence[Results], rows: Sequence[SeededRow]) -> str:
    """Return what a reader has to know besides the tables, a paragraph each."""
    gains = [row.over_base for result in results for row in result.rows[1:]]
    few = sorted({gain.verdict for gain in gains if gain.has_few_items})
    text = "".join(f"\nWithin a run, the sealed test has {verdict}.\n" for verdict in few)
    everywhere = {(row.kind, row.subject) for row in rows}
    anywhere = {row.key for result in results for row in result.rows}
    if left_out := sorted(title_of(*key) for key in anywhere - everywhere):
        text += f"\nLeft out, because some runs lack them: {', '.join(left_out)}.\n"
    counted = {f"seed-{seed}" for seed in range(len(results))}
    others = sorted(path.name for path in run.out.glob("seed-*") if path.name not in counted)
    if others:
        text += f"\nIn the folder, but not counted: {', '.join(others)}.\n"
    return text


def to_markdown(
    rows: Sequence[SeededRow], merges: Sequence[Mapping[str, float]], unit: Unit
) -> str:
    """Return the table of the rows and that of the weights of the merges."""
    numbers = [
        [
            mark_title(row.title, row.chosen_after_seal),
            unit.show(row.gain.mean),
            f"{unit.show(min(row.gain.values))} ... {unit.show(max(row.gain.values))}",
            "" if row.kind == "merge" else _show(row.merge_minus, unit),
        ]
        for row in rows[1:]
    ]
    header = ["row", "gain", "smallest ... largest", "merge minus row"]
    weights = [
        [f"seed-{seed}", *(f"{weight:g}" for weight in merge.values())]
        for seed, merge in enumerate(merges)
    ]
    return (
        f"Sealed test under {len(merges)} seeds of training and search, {unit.text}. For each row: "
        "the mean, the smallest and the largest gain, and the mean of the searched merge minus the "
        "row, with its 95 % interval over the seeds (Student's t). The test items, and the vectors "
        "and models that were not trained here, are the same in every run, so the intervals do not "
        "cover their luck. Re-targeted merges are measured by the study's own objective here, and "
        "by theirs in the results.md of each run.\n\n"
        f"{markdown_table(header, numbers)}\nWeights of the merge:\n\n"
        f"{markdown_table(['seed', *merges[0]], weights)}"
    )


def _show(spread: Spread, unit: Unit) -> str:
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
