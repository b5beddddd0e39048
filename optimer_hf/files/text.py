"""Values as text: Markdown tables, slugs, the first line of an error, `did you mean`."""

import difflib
import html
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # the file itself was not fetched


def field_path(where: Sequence[str | int]) -> str:
    """Return the place of a field in a file as dotted text."""
    return ".".join(str(part) for part in where)


def prefix_field(where: Sequence[str | int], message: str) -> str:
    """Return a message with the field that it is about in front."""
    return f"{field_path(where)}: {message}" if where else message


def quote(value: Any) -> str:
    """Return the repr of a value for a message, shortened if the value is large."""
    limited = reprlib.Repr()
    limited.maxlevel, limited.maxdict, limited.maxlist = 3, 3, 5
    limited.maxstring = limited.maxother = 80
    return limited.repr(value)


def summarize_numbers(numbers: Mapping[str, float], *, most: int = 6) -> str:
    """Return named numbers for a repr: at most `most` of them, then how many more there are."""
    parts = [f"{name} {value:.4g}" for name, value in list(numbers.items())[:most]]
    if len(numbers) > most:
        parts.append(f"... {len(numbers) - most} more")
    return ", ".join(parts)


def did_you_mean(name: str, known: list[str]) -> str:
    """Return ` Did you mean 'x'?`, or a list of the known names if none is similar."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(sorted(known))}." if len(known) <= 30 else ""


def show_seconds(seconds: float) -> str:
    """Return a time in words, in the units that people use for it: 4.2 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def signed(value: float, digits: int) -> str:
    """Return a number with its sign, but never as -0.00."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def count(n: int, what: str) -> str:
    """Return a number with its noun, which gets an s unless there is one of it."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


# -- tables ----------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def html_table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table for a notebook, with every text escaped."""

    def row(cells: Sequence[str], first: str, other: str) -> str:
        tags = [first, *[other] * (len(cells) - 1)]
        marked = (f"<{t}>{html.escape(c)}</{t}>" for t, c in zip(tags, cells, strict=True))
        return f"<tr>{''.join(marked)}</tr>"

    body = "".join(row(cells, "th", "td") for cells in rows)
    return (
        f"<table><caption>{html.escape(caption)}</caption><thead>{row(header, 'th', 'th')}</thead>"
        f"<tbody>{body}</tbody></table>"
    )


# -- writing ---------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """Turn a name into one that is safe for a file or directory."""
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in name).strip("-") or "unnamed"


def first_line(error: BaseException) -> str:
    """Return the message of a library's error in one line; of several mistakes, the first."""
    if isinstance(error, ValidationError):
        mistake = error.errors()[0]
        return f"{prefix_field(mistake['loc'], mistake['msg'])}; found {quote(mistake['input'])}"
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def show_shares(shares: Mapping[str, float]) -> str:
    """Return shares, which need not sum to 1, as text in percent."""
    total = sum(shares.values())
    return ", ".join(f"{name} {100 * share / total:.3g} %" for name, share in shares.items())
