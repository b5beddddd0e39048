"""Write a comparison as Markdown."""

from optimer_hf.comparison.result import Comparison, say_left_out, table, verdicts
from optimer_hf.files.text import markdown_table
from optimer_hf.scoring.formatting import OF_TERMS, Unit


def to_markdown(comparison: Comparison) -> str:
    """Return the table, the verdicts and what was left out as Markdown."""
    header, lines = table(comparison)
    sentences = [*verdicts(comparison), *say_left_out(comparison)]
    notes = "\n".join(f"* {sentence}" for sentence in sentences)
    own = " The last column is the study's own objective, even for re-targeted merges."
    unit = Unit.of(comparison.objective)
    mean = f" The objective is a mean in {unit.name}; larger gains are better."
    return (
        "Sealed test. The first row has the scores of the base, the others their gains over it "
        f"(losses: relative; accuracies: in points).{mean * bool(unit.name)}"
        f"{own * bool(comparison.retarget)}\n\n"
        f"{markdown_table(header, lines)}\n{notes}\n"
    )


def intervals_to_markdown(comparison: Comparison) -> str:
    """Return the paired 95 % intervals of all gains over the base, in percent, as Markdown."""
    labels = list(comparison.base.scores)
    lines, kinds, few = [], set(), dict[str, str]()
    for row in comparison.rows:
        if row is not comparison.base:
            intervals = {label: comparison.term_interval(row, label) for label in labels}
            lines.append([row.marked_title, *map(OF_TERMS.show_interval, intervals.values())])
            kinds |= {interval.kind for interval in intervals.values() if interval.kind != "none"}
            few |= {label: i.verdict for label, i in intervals.items() if i.has_few_items}
    notes = [f"* Kind of the intervals: {', '.join(sorted(kinds))}."] if kinds else []
    notes += [f"* {label}: {verdict}." for label, verdict in few.items()]
    return "\n".join([markdown_table(["weights", *labels], lines), *notes]).rstrip("\n") + "\n"
