"""Find tokens that have different ids in two tokenizers, and write the size of a vocabulary.

A merge adds embeddings row by row, whichever tokens the rows stand for. Shapes do not reveal a
mismatch, since many tokenizers have 32,000 tokens. Tokens that a fine-tune adds or renames (an
unused one to `<|im_start|>`) do not move the others, so they are fine.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from optimer_hf.errors import ModelError
from optimer_hf.files.staging import write_text
from optimer_hf.models.layout import has_tokenizer, tokenizer_digests
from optimer_hf.models.loader import CONFIG, read_config, read_settings, read_tokenizer


def find_moved_tokens(tuned: Path, base: Path) -> list[tuple[str, int, int]]:
    """Return text tokens whose ids differ, as (token, id in the tuned model, id in the base).

    They are sorted by id. The list is empty if either model has no readable tokenizer.
    """
    if not has_tokenizer(tuned) or not has_tokenizer(base) or _is_same_file(tuned, base):
        return []
    try:
        known = _vocabulary(base, tuple(sorted(tokenizer_digests(base).items())))
        tokenizer = read_tokenizer(tuned)
    except ModelError:
        return []
    ids = tokenizer.get_vocab()
    added = tokenizer.get_added_vocab()
    moved = [
        (token, ids[token], number)
        for token, number in known.items()
        if ids.get(token, number) != number and token not in added
    ]
    return sorted(moved, key=lambda each: each[2])


@functools.lru_cache(maxsize=1)  # all vectors of a command have one base
def _vocabulary(path: Path, state: tuple[tuple[str, str], ...]) -> Mapping[str, int]:
    """Return the ids of text tokens; `state` is part of the cache key, to notice changed files."""
    tokenizer = read_tokenizer(path)
    added = tokenizer.get_added_vocab()
    return {token: id_ for token, id_ in tokenizer.get_vocab().items() if token not in added}


def _is_same_file(tuned: Path, base: Path) -> bool:
    """Whether both have the same tokenizer.json, so nothing needs to be compared."""
    one, other = tuned / "tokenizer.json", base / "tokenizer.json"
    if not one.is_file() or not other.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    return one.read_bytes() == other.read_bytes()


def write_vocabulary_size(path: Path, n_rows: int) -> None:
    """Write the number of rows into config.json, where the class of the model looks for it."""
    settings = read_settings(path / CONFIG)
    inner = settings.get("text_config")
    for place in (settings, inner) if isinstance(inner, dict) else (settings,):
        if place is inner or "vocab_size" in place or not isinstance(inner, dict):
            place["vocab_size"] = n_rows
    write_text(path / CONFIG, json.dumps(settings, indent=2))
    if read_config(path).get_text_config().vocab_size != n_rows:
        raise ModelError(
            f"{path / CONFIG}: nothing says where its class reads the size of the vocabulary. Use "
            "`vocabulary: base`."
        )
