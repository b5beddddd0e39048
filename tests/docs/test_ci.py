"""What CI runs is what the README tells people to run."""

import re
import shlex

from tests.support.pages import ROOT


def test_ci_runs_the_two_commands_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assignments = re.findall(r"^\w+_command=.*$", script, flags=re.MULTILINE)
    commands = dict(shlex.split(line)[0].split("=", 1) for line in assignments)
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert sorted(commands) == ["demo_command", "test_command"]
    for command in commands.values():
        assert command in lines
