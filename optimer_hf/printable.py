"""Text of anybody's -> text that a terminal shows and does not obey.

Names, licences and error messages come from files and servers of others. Control characters in them
could set the title of a window, move the cursor over what was printed, or turn the direction of a
line around.
"""

import functools
import logging
import re

INVISIBLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def make_visible(text: str) -> str:
    """Return a text with control and direction characters as \\uXXXX, which JSON and YAML read
    back; tabs and line ends stay.
    """
    return INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class VisibleFormatter(logging.Formatter):
    """Formats log records as `make_visible` text."""

    def format(self, record: logging.LogRecord) -> str:
        return make_visible(super().format(record))


@functools.cache
def warn_once(log: logging.Logger, message: str) -> None:
    """Say what a run meets many times, as a model is opened many times, and a user reads once."""
    log.warning("%s", message)
