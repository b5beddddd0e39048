"""Run a recipe folder under several seeds, and measure how much its results depend on them.

    OUT/  seed-0/  seed-1/  ...      whole runs; finished ones are skipped the next time, and of
                                     those only done.json and results.json are needed
          results.md  results.json   the gain of every row by seed, means, intervals over the seeds
          attempts.png               the gain of the best of R mixtures at equal cost, if asked for

The intervals of one run are over test items. Only runs with other seeds show how much of a
difference is due to chance in a training or a search. The run in OUT/seed-0 has the seeds of the
folder itself. One of the runs can be done alone, by a machine of its own.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from optimer_hf.comparison.ratio_check import check_ratios
from optimer_hf.comparison.results_file import Results, read_results
from optimer_hf.comparison.rows import OF_ATTEMPTS, mark_title, title_of
from optimer_hf.errors import OutputError
from optimer_hf.experiment.attempts_figure import write_attempts_figure
from optimer_hf.experiment.folder import Run, load_inputs
from optimer_hf.experiment.marks import DONE_FILE
from optimer_hf.experiment.run import (
    claim_directory,
    is_finished,
    mark_directory,
    run_recipe,
    seed_directory,
)
from optimer_hf.experiment.seeds_file import SeededRow, SeedResults, Spread
from optimer_hf.files.staging import write_text
from optimer_hf.files.text import markdown_table
from optimer_hf.scoring.formatting import OF_TERMS, Unit
from optimer_hf.study.directory import load_study

logger = logging.getLogger(__name__)

ATTEMPTS_FIGURE = "attempts.png"


def run_seeds(run: Run, n_seeds: int) -> str:
    """Run a recipe folder under `n_seeds` seeds into folders of `run.out`, and return the summary.

    Finished runs are kept, so that more seeds can be added later. Raises what `run_recipe` raises.
    """
    config = load_inputs(run).study
    unit = Unit.of(config.test or config.objective)
    with claim_seeds(run, n_seeds) as runs:
        for each in runs:
            logger.info("%s of %d seeds", each.out.name, n_seeds)
            if not is_finished(each, needed=("results.json",)):
                _refuse_results_alone(each)
                run_recipe(each)
        results = [read_results(each.out / "results.json", config) for each in runs]
        rows, merges = join_rows(results), [result.merge.weights for result in results]
        known = [_correlation_of(*pair) for pair in zip(runs, results, strict=True)]
        correlations = [each for each in known if each is not None]
        spread = Spread(values=correlations) if correlations else None
        text = f"# {run.name}\n\n{to_markdown(rows, merges, unit)}{terms_to_markdown(rows)}"
        text += describe_correlation(spread, len(runs)) + _notes(run, results, rows)
        if any(row.kind in OF_ATTEMPTS for row in rows):
            write_attempts_figure(rows, config, run.out / ATTEMPTS_FIGURE)
        SeedResults(merges=merges, rows=rows, rank_correlation=spread).write(
            run.out / "results.json"
        )
        write_text(run.out / "results.md", text)
    return text


@contextmanager
def claim_seeds(run: Run, n_seeds: int) -> Iterator[list[Run]]:
    """Hold `run.out` for runs under several seeds, and yield them.

    Raises OutputError if it holds something else, StudyError if another process holds it.
    """
    with claim_directory(run.out, run.claim(seeds=True)):
        yield [_under(run, seed) for seed in range(n_seeds)]


def mark_seeds(run: Run, seed: int) -> Run:
    """Mark `run.out` as that of runs under several seeds, and return the one under `seed`, for a
    process of its own. Raises OutputError if it holds something else.
    """
    mark_directory(run.out, run.claim(seeds=True))
    return _under(run, seed)


def _under(run: Run, seed: int) -> Run:
    return replace(run, out=run.out / seed_directory(seed), seed=seed)


def _refuse_results_alone(run: Run) -> None:
    """Raise OutputError if a folder has the results of other inputs and nothing to go on from, as
    those that were copied from another machine; they would be written over.
    """
    if (run.out / DONE_FILE).exists() and not (run.out / "study").exists():
        raise OutputError(
            f"{run.out}: its results are those of other inputs: the recipe folder, or a file that "
            "it names, differs here. Take the same folder as the machine that ran it, or remove "
            "the results to run this seed here."
        )


def _correlation_of(run: Run, result: Results) -> float | None:
    """Return the rank correlation of a run; older versions did not record it with the results."""
    if result.rank_correlation is None and (run.out / "study").is_dir():
        check = check_ratios(load_study(run.out / "study"))
        return None if check is None else check.correlation
    return result.rank_correlation


def join_rows(results: Sequence[Results]) -> list[SeededRow]:
    """Return the rows that are in the results of every run, in the order of the first one."""
    tables = [result.by_key for result in results]
    return [
        SeededRow(
            kind=key[0],
            subject=key[1],
            chosen_after_seal=any(table[key].chosen_after_seal for table in tables),
            gain=Spread(values=[table[key].over_base.difference for table in tables]),
            merge_minus=Spread(values=[table[key].merge_minus.difference for table in tables]),
            terms={
                label: Spread(values=[table[key].terms[label].gain.difference for table in tables])
                for label in tables[0][key].terms
                if all(label in table[key].terms for table in tables)
            },
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
    searched = [row for row in rows if row.kind == "other_search"]
    numbers = [
        [
            mark_title(row.name, row.chosen_after_seal),
            unit.show(row.gain.mean),
            f"{unit.show(min(row.gain.values))} ... {unit.show(max(row.gain.values))}",
            "" if row.kind == "merge" else _show(row.merge_minus, unit),
            *("" if row is one else _show(one.gain.minus(row.gain), unit) for one in searched),
        ]
        for row in rows[1:]
    ]
    header = ["row", "gain", "smallest ... largest", "merge minus row"]
    header += [f"{row.name}, minus row" for row in searched]
    weights = [
        [f"seed-{seed}", *(f"{weight:g}" for weight in merge.values())]
        for seed, merge in enumerate(merges)
    ]
    return (
        f"Sealed test under {len(merges)} seeds of training and search, {unit.text}. For each row: "
        "the mean, the smallest and the largest gain, and the means of the searched merges minus "
        "the row, with their 95 % intervals over the seeds (Student's t). All runs share the test "
        "items, and the vectors and models that were not trained here, so the intervals do not "
        "show how much the results depend on those. Re-targeted merges are measured by the study's "
        "own objective here, and by theirs in the results.md of each run.\n\n"
        f"{markdown_table(header, numbers)}\nWeights of the merge:\n\n"
        f"{markdown_table(['seed', *merges[0]], weights)}"
    )


def terms_to_markdown(rows: Sequence[SeededRow]) -> str:
    """Return the table of the gains on every term, means with their intervals over the seeds;
    nothing if the runs have not recorded them.
    """
    labels = list(rows[0].terms)
    if not labels:
        return ""
    numbers = [
        [
            mark_title(row.name, row.chosen_after_seal),
            *(_show(row.terms[label], OF_TERMS) if label in row.terms else "" for label in labels),
        ]
        for row in rows[1:]
    ]
    return (
        "\nThe gain over the base on every term (losses relative, accuracies in points): the mean "
        f"with its 95 % interval over the seeds.\n\n{markdown_table(['row', *labels], numbers)}"
    )


def describe_correlation(spread: Spread | None, n_seeds: int) -> str:
    """Return how well the searches predict mixtures, as a paragraph; nothing if not known."""
    if spread is None:
        return ""
    ends = ""
    if spread.interval is not None:  # of Student's t, which does not know that 1 is the most
        low, high = spread.interval
        ends = f" [{max(low, -1):.2f}, {min(high, 1):.2f}]"
    each = ", ".join(f"{value:.2f}" for value in spread.values)
    n = len(spread.values)
    seeds = "the seeds" if n == n_seeds else f"the {n} of {n_seeds} seeds that have recorded it"
    return (
        "\nRank correlation (Spearman) between what the search predicts for the ratios of the "
        f"mixtures that were trained, and what those scored on the items of the search: mean "
        f"{spread.mean:.2f}{ends} over {seeds} ({each}).\n"
    )


def _show(spread: Spread, unit: Unit) -> str:
    text = unit.show(spread.mean)
    if spread.interval is not None:
        text += f" [{', '.join(unit.telling_from_zero(end).show(end) for end in spread.interval)}]"
    return text
