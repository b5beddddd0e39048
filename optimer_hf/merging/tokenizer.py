"""Choose the tokenizer of a merge and check that it fits the base.

A tokenizer brings its chat template and generation_config.json with it. The latter names the tokens
that end an answer, which differ between an instruct model and its base. Tokens of the base may lie
beyond its embedding (Gemma 3's image token does); new tokens may not, except in a union.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimer_hf.errors import ConfigError
from optimer_hf.files.digest import digest
from optimer_hf.files.paths import cache_dir
from optimer_hf.files.staging import write_text
from optimer_hf.models.layout import (
    GENERATION_CONFIG,
    ResolvedModel,
    has_tokenizer,
    tokenizer_digests,
)
from optimer_hf.models.live import load_tokenizer
from optimer_hf.models.loader import CONFIG, read_config, read_generation_config, read_settings
from optimer_hf.models.resolve import resolve_tokenizer
from optimer_hf.models.union import Vocabulary
from optimer_hf.vectors.record import read_record

EOS = "eos_token_id"
TOKEN_IDS = ("bos_token_id", EOS, "pad_token_id")
GIVE_A_MODEL = "Give a model with a tokenizer that fits, or leave tokenizer_source out."


def open_tokenizer(
    base: ResolvedModel, reference: str | None, vocabulary: Vocabulary = "base"
) -> ResolvedModel | None:
    """Return the model that a merge takes its tokenizer from, or None for the base.

    Raises ConfigError when it has no tokenizer, gives a token of the base another id, or has a new
    token beyond the embedding, which `union` enlarges; the error names the first such token.
    """
    if reference is None:
        return None
    source = resolve_tokenizer(reference)
    if not has_tokenizer(source.path):
        raise ConfigError(f"tokenizer_source: {reference}: has no tokenizer. {GIVE_A_MODEL}")
    record = read_record(source.path)
    is_delta = record is not None and record.kind == "delta"
    if is_delta and tokenizer_digests(source.path) == tokenizer_digests(base.path):
        raise ConfigError(
            f"tokenizer_source: {reference}: is a delta with the tokenizer of the base. Give the "
            "model that it was extracted from."
        )
    if not has_tokenizer(base.path):
        raise ConfigError(
            f"base_model: {base.reference}: has no tokenizer to compare tokenizer_source with. "
            "Save it beside the model."
        )
    _check_tokens(base, source, reference, vocabulary)
    return source


def scoring_tokenizer(
    base: ResolvedModel, source: ResolvedModel | None, *, apply_chat_template: bool
) -> Any:
    """Return the tokenizer to score models with: that of `source`, or of the base if None.

    Raises ConfigError when `apply_chat_template` is set and the tokenizer has no chat template.
    """
    tokenizer = load_tokenizer(source or base)
    if apply_chat_template and tokenizer.chat_template is None:
        raise ConfigError(
            f"objective.apply_chat_template: the tokenizer of {(source or base).reference} has no "
            "chat template. Set tokenizer_source in the study to a vector or a model whose "
            "tokenizer has one."
        )
    return tokenizer


def _check_tokens(
    base: ResolvedModel, source: ResolvedModel, reference: str, vocabulary: Vocabulary
) -> None:
    expected = load_tokenizer(base).get_vocab()
    ids = load_tokenizer(source).get_vocab()
    for token, number in sorted(expected.items(), key=lambda item: item[1]):
        if ids.get(token) != number:
            has = f"the id {ids[token]}" if token in ids else "no id"
            raise ConfigError(
                f"tokenizer_source: {reference}: its tokenizer gives the token {token!r} {has}, "
                f"but the base gives it {number}, so the merge would misread its input. "
                f"{GIVE_A_MODEL}"
            )
    if vocabulary == "union":
        return
    n_rows = _embedding_rows(base)
    new = {token: ids[token] for token in ids.keys() - expected.keys()}
    beyond = [token for token in sorted(new, key=new.__getitem__) if new[token] >= n_rows]
    if beyond:
        raise ConfigError(
            f"tokenizer_source: {reference}: its tokenizer gives the token {beyond[0]!r} the "
            f"id {new[beyond[0]]}, but the embedding of the base has {n_rows} rows. {GIVE_A_MODEL} "
            "With `vocabulary: union`, a merge gets the tokens of its vectors."
        )


def _embedding_rows(base: ResolvedModel) -> int:
    return int(read_config(base.path).get_text_config().vocab_size)


# -- where an answer ends --------------------------------------------------------------------------


def set_generation_config(model: Any, source: ResolvedModel) -> None:
    """Give a loaded model the generation_config.json of the model that lends the tokenizer: it says
    which tokens end an answer. If there is none, its other files say it, see `end_tokens`.
    """
    config = read_generation_config(source.path)
    if config is not None:
        model.generation_config = config
        return
    settings = model.generation_config
    settings.eos_token_id = _joined(settings.eos_token_id, end_tokens(source.path))


def complete_generation_config(model: Path, source: Path) -> None:
    """Let a model in a directory stop at the `end_tokens` of the directory that its tokenizer comes
    from, if that has no generation_config.json, as adapters have none.
    """
    if (completed := _completed_settings(model, source)) is not None:
        write_text(model / GENERATION_CONFIG, json.dumps(completed, indent=2) + "\n")


def completed_ends(model: Path, source: Path) -> Any:
    """Return the `eos_token_id` that `complete_generation_config` would write: one id or a list of
    them; None if it would write nothing.
    """
    completed = _completed_settings(model, source)
    return None if completed is None else completed[EOS]


def generation_folder(base: Path, source: Path) -> Path | None:
    """Return a folder with the generation_config.json of a merge whose tokenizer comes from
    `source`, for programs that read it there; None if it is that of the base. One that has to be
    made is kept in the cache.
    """
    if (source / GENERATION_CONFIG).exists():
        return source
    if (completed := _completed_settings(base, source)) is None:
        return None
    out = cache_dir() / "generation" / digest(completed)[:16]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / GENERATION_CONFIG, json.dumps(completed, indent=2) + "\n")
    return out


def _completed_settings(model: Path, source: Path) -> dict[str, Any] | None:
    """Return the generation config of a model with the `end_tokens` of the directory that its
    tokenizer comes from; None if that has a generation_config.json, or they are in it already.
    """
    if (source / GENERATION_CONFIG).exists():
        return None
    file, config = model / GENERATION_CONFIG, read_settings(model / CONFIG)
    text = config.get("text_config")
    named = {**(text if isinstance(text, dict) else {}), **config}
    settings = (
        read_settings(file)
        if file.exists()
        else {key: named[key] for key in TOKEN_IDS if named.get(key) is not None}
    )
    ends = _joined(settings.get(EOS), end_tokens(source))
    return None if ends == settings.get(EOS) else {**settings, EOS: ends}


def end_tokens(source: Path) -> list[int]:
    """Return the tokens that end an answer by the config.json and the tokenizer of a directory.

    Programs for fine-tuning make the end of a turn the EOS of the tokenizer, and do not always say
    so elsewhere.
    """
    own = load_tokenizer(ResolvedModel(source, source.name)).eos_token_id
    config = read_settings(source / CONFIG) if (source / CONFIG).exists() else {}
    return _as_list(_joined(config.get(EOS), [] if own is None else [own]))


def _joined(known: Any, more: Sequence[int]) -> Any:
    """Return one id or a list of ids with more of them; `known` itself if it has them all."""
    listed = _as_list(known)
    new = [token for token in more if token not in listed]
    if not new:
        return known
    joined = [*listed, *new]
    return joined if len(joined) > 1 else joined[0]


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else [*ids] if isinstance(ids, list | tuple) else [int(ids)]
