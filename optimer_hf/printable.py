"""Make untrusted text safe to print on a terminal.

Names, licences and error messages come from other people's files and servers. Control characters
in them could change the window title, overwrite earlier output or reverse the direction of a line.
"""

import functools
import logging
import re

INVISIBLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def make_visible(text: str) -> str:
    """Escape control and direction characters as \\uXXXX, which JSON and YAML can read back.

    Tabs and line ends stay as they are.
    """
    return INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class VisibleFormatter(logging.Formatter):
    """Formats log records as `make_visible` text."""

    def format(self, record: logging.LogRecord) -> str:
        return make_visible(super().format(record))


@functools.cache
def warn_once(log: logging.Logger, message: str) -> None:
    """Log a warning the first time only: a run may open the same model many times."""
    log.warning("%s", message)
