"""A comparison as Markdown and JSON."""

from typing import Any

from optimer_hf.comparison.rows import Comparison, SealedRow
from optimer_hf.files.text import markdown_table
from optimer_hf.scoring.formatting import OF_TERMS, Unit, describe_interval, show_value
from optimer_hf.scoring.objective import Objective, gains
from optimer_hf.study.prediction import reweight

# -- tables ----------------------------------------------------------------------------------------


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the sealed-test table: gain over the base per term in percent, then
    of the objective in its unit; terms under a `limit` say how many items were scored.
    """
    labels = list(comparison.base.scores)
    objective, base = comparison.objective, comparison.base.scores
    limited = {
        term.label for term in objective.scored_terms if objective.limit_of(term) is not None
    }
    marked = [f"{x} ({len(base[x].items)} items)" if x in limited else x for x in labels]
    header = ["weights", *marked, "objective"]
    lines = []
    for row in comparison.rows:
        each = gains(row.scores, comparison.base.scores)
        if row is comparison.base:
            cells = [f"{row.scores[label].score:.4f}" for label in labels]
        else:
            cells = [OF_TERMS.show(each[label]) for label in labels]
        is_base = row is comparison.base
        value = show_value(objective, row.scores, comparison.base.scores, is_base=is_base)
        lines.append([row.marked_title, *cells, value])
    return header, lines


def verdicts(comparison: Comparison) -> list[str]:
    """Return what the sealed test says, a sentence per objective: merge against the best of the
    others.
    """
    rows: list[tuple[SealedRow, Objective | None]] = [(comparison.merge, None)]
    for name, weights in comparison.retarget.items():
        target = reweight(comparison.objective, weights)
        rows.append((comparison.row("retargeted", name), target))
    sentences = []
    for row, objective in rows:
        other = comparison.best_baseline(objective)
        interval = comparison.interval(row, other, objective)
        said = describe_interval(
            interval, Unit.of(objective or comparison.objective), is_gain=False
        )
        if objective is not None:
            said += "; the best scales are those for the study's own objective"
        sentences.append(f"{row.title} minus the best of the others ({other.title}): {said}.")
    return sentences


def to_markdown(comparison: Comparison) -> str:
    """Return table and verdicts as Markdown."""
    header, lines = table(comparison)
    notes = "\n".join(f"* {sentence}" for sentence in verdicts(comparison))
    own = " The column of the objective is by the study's own, even for re-targeted merges."
    unit = Unit.of(comparison.objective)
    mean = f" The objective is a mean in {unit.name}; a gain in it is larger when it is better."
    return (
        "Sealed test. First row: scores of the base; other rows: gain over the base "
        f"(losses relative, accuracies in points).{mean * bool(unit.name)}"
        f"{own * bool(comparison.retarget)}\n\n"
        f"{markdown_table(header, lines)}\n{notes}\n"
    )


def intervals_to_markdown(comparison: Comparison) -> str:
    """Return the paired 95 % interval of every gain over the base, in percent, as Markdown."""
    labels = list(comparison.base.scores)
    lines, kinds, few = [], set(), dict[str, str]()
    for row in comparison.rows:
        if row is not comparison.base:
            found = {label: comparison.term_interval(row, label) for label in labels}
            lines.append([row.marked_title, *map(OF_TERMS.show_interval, found.values())])
            kinds |= {interval.kind for interval in found.values() if interval.kind != "none"}
            few |= {label: i.verdict for label, i in found.items() if i.has_few_items}
    notes = [f"* Kind of the intervals: {', '.join(sorted(kinds))}."] if kinds else []
    notes += [f"* {label}: {verdict}." for label, verdict in few.items()]
    return "\n".join([markdown_table(["weights", *labels], lines), *notes]).rstrip("\n") + "\n"


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything as JSON values, with the interval of every row per term."""
    labels, unit = list(comparison.base.scores), Unit.of(comparison.objective)
    rows = []
    for row in comparison.rows:
        over_base = comparison.interval(row, comparison.base)
        rows.append(
            {
                "name": row.title,
                "kind": row.kind,
                "subject": row.subject,
                "weights": row.weights,
                "chosen_after_seal": row.chosen_after_seal,
                "value": comparison.value(row),
                "over_base": over_base.to_json(),
                "summary": f"over the base {describe_interval(over_base, unit, is_gain=True)}",
                "merge_minus": comparison.interval(comparison.merge, row).to_json(),
                "terms": {
                    label: {
                        "score": row.scores[label].score,
                        "n_items": len(row.scores[label].items),
                        "gain": comparison.term_interval(row, label).to_json(),
                    }
                    for label in labels
                },
            }
        )
    return {"rows": rows, "verdicts": verdicts(comparison)}
