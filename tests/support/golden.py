"""Files as an earlier version wrote them, see `tests/golden/make.py`."""

import shutil
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if (path / "made.json").exists())
PLACEHOLDER = "@GOLDEN@"  # the folder in which they were made


def copy_golden(version: str, out: Path) -> Path:
    """Copy the files of a version to `out`, and let them name `out` as their folder."""
    shutil.copytree(GOLDEN / version, out)
    for file in out.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            text = file.read_text(encoding="utf-8")
            if PLACEHOLDER in text:
                file.write_text(text.replace(PLACEHOLDER, str(out)), encoding="utf-8")
    return out


@pytest.fixture(scope="module", params=VERSIONS)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files of an earlier version, to be read and not changed."""
    return copy_golden(request.param, tmp_path_factory.mktemp("golden") / request.param)
