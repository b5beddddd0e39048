"""Two tokenizers -> the tokens that have other ids in the one than in the other.

Row by row an embedding is added to that of the base, whichever tokens the rows stand for. Shapes do
not show it: tokenizers of 32,000 tokens are many. Tokens that a fine-tune adds, or renames (an
unused one into `<|im_start|>`), keep the others where they are, and are no fault.
"""

import functools
from collections.abc import Mapping
from pathlib import Path

from optimer_hf.errors import ModelError
from optimer_hf.models.layout import tokenizer_files
from optimer_hf.models.loader import read_tokenizer
from optimer_hf.models.resolve import TOKENIZER_FILES


def moved_tokens(tuned: Path, base: Path) -> list[tuple[str, int, int]]:
    """Return the tokens of text with their ids in a tuned model and in its base, where they differ,
    by id; nothing where one has no tokenizer that can be read.
    """
    if not _has_tokenizer(tuned) or not _has_tokenizer(base) or _is_same_file(tuned, base):
        return []
    try:
        known = _vocabulary(base, tuple(sorted(tokenizer_files(base).items())))
        tokenizer = read_tokenizer(tuned)
    except ModelError:
        return []
    found = tokenizer.get_vocab()
    added = tokenizer.get_added_vocab()
    moved = [
        (token, found[token], number)
        for token, number in known.items()
        if found.get(token, number) != number and token not in added
    ]
    return sorted(moved, key=lambda each: each[2])


@functools.lru_cache(maxsize=1)  # all vectors of a command have one base
def _vocabulary(path: Path, state: tuple[tuple[str, str], ...]) -> Mapping[str, int]:
    """`state` is of the files: what is remembered holds for them as they are."""
    tokenizer = read_tokenizer(path)
    added = tokenizer.get_added_vocab()
    return {token: id_ for token, id_ in tokenizer.get_vocab().items() if token not in added}


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in TOKENIZER_FILES)


def _is_same_file(tuned: Path, base: Path) -> bool:
    """Whether both have the same tokenizer.json, which saves reading it twice."""
    one, other = tuned / "tokenizer.json", base / "tokenizer.json"
    if not one.is_file() or not other.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    return one.read_bytes() == other.read_bytes()
