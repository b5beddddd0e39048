"""A table of the page as values: cells, rows and columns. The template makes HTML of it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A cell: its text, a value to sort by (None: the text), what the mouse shows, and a link."""

    text: str
    value: float | None = None
    hint: str = ""
    link: str | None = None

    @property
    def is_number(self) -> bool:
        """Whether the cell is set as a number."""
        return self.value is not None


@dataclass(frozen=True)
class Row:
    """Cells, the first of which names the row; `part` marks the merge and the best baseline."""

    cells: list[Cell]
    part: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a caption and the heads of its columns. `groups` names neighbouring columns
    together, as names and numbers of columns, from the left.
    """

    caption: str
    heads: list[Cell]
    rows: list[Row]
    is_sortable: bool = False
    groups: Sequence[tuple[str, int]] = ()


def head(text: str, hint: str = "", *, is_number: bool = True) -> Cell:
    """Return the head of a column."""
    return Cell(text, 0.0 if is_number else None, hint)
