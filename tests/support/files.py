"""A file format that the tests of files share."""

from pathlib import Path

from pydantic import Field

from optimer_hf.files.model import FileModel, VersionedFile
from optimer_hf.files.reference import (
    LocalPath,
    ReferenceText,
)


class Part(FileModel):
    source: ReferenceText
    share: float = Field(default=1.0, ge=0)


class Example(VersionedFile):
    base_model: ReferenceText
    n_trials: int = 3
    corpus: LocalPath | None = None
    parts: dict[str, Part] = Field(default_factory=dict)


def write_example(tmp_path: Path, text: str) -> Path:
    """Write a text as example.yaml and return its path."""
    path = tmp_path / "example.yaml"
    path.write_text(text, encoding="utf-8")
    return path
