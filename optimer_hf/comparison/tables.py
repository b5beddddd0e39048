"""A comparison as Markdown and JSON."""

from typing import Any

from optimer_hf.comparison.result import Comparison, table, verdicts
from optimer_hf.files.text import markdown_table
from optimer_hf.scoring.formatting import OF_TERMS, Unit, describe_interval


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
