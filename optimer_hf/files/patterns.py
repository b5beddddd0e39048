"""Match untrusted regular expressions in a child process with limits.

One short pattern can keep `re` busy for years, and nothing in this process could stop it. So the
patterns first run in a child that has a few seconds and little memory. Only a pattern that returns
in time is used here or passed to a library that compiles it again.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from optimer_hf.errors import ConfigError

SECONDS = 5.0  # for all patterns in a file; 10,000 tensor names take a hundredth of that
MEMORY = 2**30  # bytes of address space
CHILD = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), int(sys.argv[1])))
except (ImportError, OSError, ValueError):
    pass  # this system has no such limit; the time limit still holds
given = json.load(sys.stdin)
patterns = [re.compile(pattern) for pattern in given["patterns"]]
json.dump([[bool(p.match(name)) for name in given["names"]] for p in patterns], sys.stdout)
"""


def matches(patterns: Sequence[str], names: Sequence[str], where: str) -> list[list[bool]]:
    """Return, for each pattern and name, whether `re.match` matches the start of the name.

    Raises ConfigError if a pattern is not a regular expression or takes too long.
    """
    command = [sys.executable, "-I", "-S", "-c", CHILD, str(MEMORY)]
    given = json.dumps({"patterns": list(patterns), "names": list(names)})
    try:
        run = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{where}: its patterns take longer than {SECONDS:g} s to match {len(names):,} names "
            f"(first: {patterns[0][:80]!r}). List the names, or use a simpler pattern."
        ) from None
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        raise ConfigError(
            f"{where}: not a usable regular expression among {[p[:80] for p in patterns[:3]]} "
            f"({reason}). Fix it, or list the names."
        )
    is_match: list[list[bool]] = json.loads(run.stdout)
    return is_match


def is_literal(text: str) -> bool:
    """Whether a text is a dotted name; it may have anchors (^, $) and escaped dots."""
    return re.fullmatch(r"\^?(?:[A-Za-z0-9_-]|\\?\.)+\$?", text) is not None


def ends_with(name: str, literal: str) -> bool:
    r"""Whether `(.*\.)?(literal)$` matches a name, without running the pattern.

    A dot that is not escaped stands for any character. After `^` the whole name must match.
    """
    letters = re.findall(r"\\\.|[^^$]", literal)
    tail, rest = name[-len(letters) :], name[: -len(letters)]
    if len(tail) != len(letters) or (literal.startswith("^") and rest):
        return False
    is_equal = all(
        letter == "." or letter[-1] == char for letter, char in zip(letters, tail, strict=True)
    )
    return is_equal and (not rest or rest.endswith("."))
