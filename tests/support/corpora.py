"""Corpora of given texts."""

import json
from pathlib import Path

from optimer_hf.corpus.config import CorpusConfig


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> CorpusConfig:
    """Write one row per text, and return the corpus."""
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return CorpusConfig(path=path)
