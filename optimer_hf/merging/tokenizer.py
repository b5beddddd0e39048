"""Whose tokenizer a merge has: a reference comes in, a model directory whose tokenizer fits the
base goes out.

A tokenizer brings its chat template and generation_config.json, with the tokens that end an answer:
those of an instruct model differ from its base's. What a reader would not guess: a token of the
base may lie beyond its embedding (Gemma 3's image token does), so only new ones may not.
"""

from pathlib import Path
from typing import Any

from optimer_hf.errors import ConfigError
from optimer_hf.models.layout import ResolvedModel, tokenizer_files
from optimer_hf.models.live import loaded_tokenizer
from optimer_hf.models.loader import read_config, read_generation_config
from optimer_hf.models.resolve import TOKENIZER_FILES, resolve_tokenizer
from optimer_hf.vectors.record import read_record

GIVE_A_MODEL = "Give a model with its tokenizer beside it, or leave tokenizer_source out."


def opened_tokenizer(base: ResolvedModel, reference: str | None) -> ResolvedModel | None:
    """Return the model whose tokenizer a merge has; None for the base's, which needs no check.

    Raises ConfigError where there is no tokenizer, and for one that gives a token of the base
    another id or has a token beyond the embedding, naming the first.
    """
    if reference is None:
        return None
    source = resolve_tokenizer(reference)
    if not any((source.path / name).exists() for name in TOKENIZER_FILES):
        raise ConfigError(f"tokenizer_source: {reference}: has no tokenizer. {GIVE_A_MODEL}")
    record = read_record(source.path)
    is_delta = record is not None and record.kind == "delta"
    if is_delta and tokenizer_files(source.path) == tokenizer_files(base.path):
        raise ConfigError(
            f"tokenizer_source: {reference}: a delta, which has the tokenizer of the base. Give "
            "the model it was extracted from."
        )
    if not any((base.path / name).exists() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"base_model: {base.reference}: has no tokenizer, whose tokens those of "
            f"tokenizer_source could be compared with. Save it beside the model."
        )
    _check_tokens(base, source, reference)
    return source


def scoring_tokenizer(
    base: ResolvedModel, source: ResolvedModel | None, *, apply_chat_template: bool
) -> Any:
    """Return the tokenizer that models are scored with: that of `source`, None for the base's.

    Raises ConfigError when a chat template is asked for and it has none.
    """
    tokenizer = loaded_tokenizer(source or base)
    if apply_chat_template and tokenizer.chat_template is None:
        raise ConfigError(
            f"objective.apply_chat_template: the tokenizer of {(source or base).reference} has no "
            "chat template. A study names a vector or a model whose tokenizer has one as "
            "tokenizer_source."
        )
    return tokenizer


def tokenizer_path(reference: str | None) -> Path | None:
    """Return the directory of a tokenizer that is not the base's, unchecked; None for that."""
    return None if reference is None else resolve_tokenizer(reference).path


def _check_tokens(base: ResolvedModel, source: ResolvedModel, reference: str) -> None:
    expected = loaded_tokenizer(base).get_vocab()
    found = loaded_tokenizer(source).get_vocab()
    for token, number in sorted(expected.items(), key=lambda item: item[1]):
        if found.get(token) != number:
            has = f"the id {found[token]}" if token in found else "no id"
            raise ConfigError(
                f"tokenizer_source: {reference}: its tokenizer gives the token {token!r} {has}, "
                f"that of the base {number}: the merge would read other tokens than it was trained "
                f"on. {GIVE_A_MODEL}"
            )
    n_rows = _embedding_rows(base)
    new = {token: found[token] for token in found.keys() - expected.keys()}
    beyond = [token for token in sorted(new, key=new.__getitem__) if new[token] >= n_rows]
    if beyond:
        raise ConfigError(
            f"tokenizer_source: {reference}: its tokenizer gives the token {beyond[0]!r} the "
            f"id {new[beyond[0]]}, but the embedding of the base has {n_rows} rows. {GIVE_A_MODEL}"
        )


def _embedding_rows(base: ResolvedModel) -> int:
    return int(read_config(base.path).get_text_config().vocab_size)


def take_generation_config(model: Any, source: ResolvedModel) -> None:
    """Let a live model end its answers as a model directory says, where it has a
    generation_config.json.
    """
    found = read_generation_config(source.path)
    if found is not None:
        model.generation_config = found
