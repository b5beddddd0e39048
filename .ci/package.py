"""Install a built package alone, and run it away from the sources: python package.py FILE"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHECK = """
import sys
from importlib.resources import files

import optimer_hf

assert optimer_hf.__file__.startswith(sys.argv[1]), optimer_hf.__file__
for name in sys.argv[2:]:
    assert files("optimer_hf").joinpath(name).is_file(), name
"""
SHIPPED = ["report/report.html.jinja", "hub/model_card.md.jinja", "schemas/study.json", "py.typed"]

package = str(Path(sys.argv[1]).resolve())
with tempfile.TemporaryDirectory() as alone:
    options = ["-q", "--no-deps", "--no-build-isolation", "--target", alone]
    for arguments in (
        ["-m", "pip", "install", *options, package],
        ["-m", "optimer_hf", "--version"],
        ["-c", CHECK, alone, *SHIPPED],
    ):
        environment = os.environ | {"PYTHONPATH": alone}
        subprocess.run([sys.executable, *arguments], check=True, cwd="/", env=environment)
