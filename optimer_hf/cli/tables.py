"""Print Markdown: with drawn tables on a terminal, as it is into a file or a pipe."""

import re
import sys
from itertools import groupby
from typing import TYPE_CHECKING

from optimer_hf.cli.options import echo
from optimer_hf.cli.stdout import result_stream
from optimer_hf.printable import make_visible

if TYPE_CHECKING:
    from rich.table import Table


WIDEST = 100_000  # characters of a line


def echo_markdown(text: str, *, err: bool = False) -> None:
    """Print Markdown on stdout or stderr. On a terminal its tables and headings are drawn by rich;
    all other lines stay as they are.
    """
    stream = sys.stderr if err else result_stream()
    if not stream.isatty():
        echo(text, err=err)
        return
    from rich.console import Console
    from rich.measure import Measurement
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    lines = make_visible(text).splitlines()
    for is_table, group in groupby(lines, key=lambda line: line.startswith("|")):
        if is_table:
            rows = [_cells(line) for line in group]
            table = _draw_table(rows, least=console.width // 4)
            unlimited = console.options.update_width(WIDEST)
            needed = Measurement.get(console, unlimited, table).minimum
            width = max(console.width, needed)
            Console(file=stream, highlight=False, width=width).print(table)
            continue
        for line in group:
            is_heading = line.startswith("#")
            shown = line.lstrip("# ") if is_heading else line
            console.print(Text(shown, style="bold" if is_heading else ""))


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|").removesuffix("|")
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inner)]


def _draw_table(rows: list[list[str]], *, least: int) -> "Table":
    """Return a table of rich. Columns of numbers are aligned at the right and not broken, and the
    names in the first column get `least` characters if they need them. On a terminal that is too
    narrow for every number and word, lines are longer than it, and nothing is left out.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    header, body = rows[0], [row for row in rows[1:] if set("".join(row)) != {"-"}]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, title in enumerate(header):
        column = [row[index] for row in body if index < len(row) and row[index]]
        is_numeric = bool(column) and all(re.match(r"[-+\[]?[\d.]", cell) for cell in column)
        longest = max(map(len, (title, *column)), default=0)
        needed = max(map(len, column)) if is_numeric else min(longest, least) * (index == 0)
        table.add_column(
            Text(title),
            justify="right" if is_numeric else "left",
            overflow="fold",
            min_width=needed,
        )
    for row in body:
        table.add_row(*map(Text, row))
    return table
