"""Follow a journey: a person types commands into a terminal, and only such as the pages show."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from huggingface_hub import constants

from optimer_hf.cli import main
from tests.support.minihub.running import HUB
from tests.support.pages import ROOT, SHELL, sections


def shown_lines() -> frozenset[str]:
    """Return every line of the shell blocks in the README and docs/, without its comment."""
    blocks = [block for section in sections() for block in section.blocks(*SHELL)]
    lines = (re.sub(r"\s+# .*", "", line.strip()) for text in blocks for line in text.splitlines())
    return frozenset(lines)


SHOWN = shown_lines()


@dataclass
class Person:
    """Somebody with a folder and an account on the local Hub, who reads the pages."""

    name: str
    folder: Path

    def sign_in(self, monkeypatch) -> None:
        """Be the one who types: in this folder, with this account."""
        token = f"hf_{self.name}_write"
        HUB.tokens.setdefault(token, {"name": self.name, "orgs": {}, "role": "write"})
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.chdir(self.folder)

    def types(self, line: str) -> Result:
        """Run a line of `optimer` that the pages show; it has to succeed."""
        assert line in SHOWN, f"no page shows: {line}"
        return self.runs(line)

    def types_in_shell(self, line: str, **options: Any) -> subprocess.Popen[str]:
        """Start a line that the pages show in a shell of its own, as a group of processes."""
        assert line in SHOWN, f"no page shows: {line}"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
        command = ["bash", "-euo", "pipefail", "-c", line]
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, start_new_session=True, **options
        )

    def runs(self, line: str, *, ok: bool = True) -> Result:
        """Run a line of `optimer`, whether a page shows it or not; it has to succeed, or not."""
        result = CliRunner().invoke(main, shlex.split(line)[1:])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert (result.exit_code == 0) == ok, f"{line}\n{result.output}"
        return result
