"""Regular expressions that somebody wrote -> which names they match, in a process with limits.

One short pattern can keep `re` busy for years, and nothing in this process could stop it. So
patterns go to a child that has a second or two and little memory; only what came back in time is
used here, or given to a library that compiles it again.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from optimer_hf.errors import ConfigError

SECONDS = 5.0  # of all patterns of a file together; 10,000 names of a model take a hundredth
MEMORY = 2**30  # bytes of address space
CHILD = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), int(sys.argv[1])))
except (ImportError, OSError, ValueError):
    pass  # a system without such a limit; the time is bounded all the same
given = json.load(sys.stdin)
patterns = [re.compile(pattern) for pattern in given["patterns"]]
json.dump([[bool(p.match(name)) for name in given["names"]] for p in patterns], sys.stdout)
"""


def matches(patterns: Sequence[str], names: Sequence[str], where: str) -> list[list[bool]]:
    """Return by pattern and name whether `re.match` finds one at the start of the other.

    Raises ConfigError for what is no regular expression, and for one that takes too long.
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
            f"(first: {patterns[0][:80]!r}). Write the names out, or a simpler pattern."
        ) from None
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        raise ConfigError(
            f"{where}: not a usable regular expression among {[p[:80] for p in patterns[:3]]} "
            f"({reason}). Mend it, or write the names out."
        )
    found: list[list[bool]] = json.loads(run.stdout)
    return found


def is_literal(text: str) -> bool:
    """Whether a text is a dotted name, perhaps anchored (^, $), perhaps with its dots escaped."""
    return re.fullmatch(r"\^?(?:[A-Za-z0-9_-]|\\?\.)+\$?", text) is not None


def ends_with(name: str, literal: str) -> bool:
    r"""Whether a name ends with a literal at a dot, as `(.*\.)?(literal)$` finds it: a dot that is
    not escaped stands for any character, and after `^` the name begins there, too.
    """
    letters = re.findall(r"\\\.|[^^$]", literal)
    tail, rest = name[-len(letters) :], name[: -len(letters)]
    if len(tail) != len(letters) or (literal.startswith("^") and rest):
        return False
    is_equal = all(
        letter == "." or letter[-1] == char for letter, char in zip(letters, tail, strict=True)
    )
    return is_equal and (not rest or rest.endswith("."))
