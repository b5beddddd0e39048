"""The tokens that a vector has rows for: those of the tokenizer beside it, or those of its base."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optimer_hf.errors import VocabularyError
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel, has_tokenizer
from optimer_hf.models.live import load_tokenizer
from optimer_hf.vectors.alignment import (
    has_own_tokens,
    n_token_rows,
    own_vocabulary,
    refuse_changed_copies,
    token_tensors,
)
from optimer_hf.vectors.forms import LowRank, OnCopy
from optimer_hf.vectors.opening import open_unaligned, open_vector
from optimer_hf.vectors.vector import AdapterVector, DistributionVector

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokensOfVector:
    """A vector with the ids of the tokens for which it has rows, and its tokenizer."""

    vector: DistributionVector
    ids: dict[str, int]
    tokenizer: Any

    def new_tokens(self, known: Mapping[str, int]) -> list[str]:
        """Return its tokens that are not in `known`, in the order of its ids."""
        return sorted(self.ids.keys() - known.keys(), key=self.ids.__getitem__)

    def without_row_in(self, base: ResolvedModel) -> list[str]:
        """Return its tokens for which a base has no row, in the order of its ids."""
        checkpoint, known = Checkpoint(base.path), load_tokenizer(base).get_vocab()
        n_rows = min(checkpoint.shape(name)[0] for name in token_tensors(checkpoint))
        lacking = (token for token in self.ids if known.get(token, n_rows) >= n_rows)
        return sorted(lacking, key=self.ids.__getitem__)

    def is_in_place(self, known: Mapping[str, int]) -> bool:
        """Whether all its tokens have the same ids there."""
        return all(known.get(token) == number for token, number in self.ids.items())


def tokens_of(
    vector: DistributionVector, base: ResolvedModel, known: Mapping[str, int]
) -> TokensOfVector:
    """Return the tokens of an unaligned vector; `known` are the ids of the base's tokens.

    Raises VocabularyError for new ones that have no rows, or that are pieces of words, for which a
    tokenizer needs more than their names.
    """
    checkpoint, has_own = Checkpoint(base.path), has_own_tokens(vector)
    tokenizer = load_tokenizer(ResolvedModel(vector.path if has_own else base.path, vector.name))
    ids = own_vocabulary(vector, base.path)
    n_rows = {name: n_token_rows(vector, name, checkpoint) for name in token_tensors(checkpoint)}
    n_base = max(checkpoint.shape(name)[0] for name in n_rows)
    if not has_own and max(n_rows.values()) > n_base:
        raise VocabularyError(
            f"vector {vector.name!r} ({vector.path}): has {max(n_rows.values())} rows for tokens, "
            f"the base has {n_base}, and no tokenizer says what the others are for. Save its "
            "tokenizer beside it."
        )
    pieces = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    for token in sorted(ids.keys() - known.keys(), key=ids.__getitem__):
        _refuse_unusable(vector, token, ids[token], n_rows, token in pieces)
    tokens = TokensOfVector(
        vector, {t: i for t, i in ids.items() if i < min(n_rows.values())}, tokenizer
    )
    _refuse_products(tokens, n_rows, known)
    refuse_changed_copies(vector, tokens.ids, checkpoint)
    return tokens


def open_with_tokens(
    name: str, source: str, base: ResolvedModel
) -> tuple[DistributionVector, TokensOfVector | None]:
    """Open a vector. If its tokens are not those of the base, return it unaligned, with them; its
    delta then has its tokenizer.
    """
    try:
        return open_vector(name, source, base), None
    except VocabularyError:
        vector = open_unaligned(name, source, base)
        if not has_tokenizer(base.path) or not has_own_tokens(vector):
            raise
    tokens = tokens_of(vector, base, load_tokenizer(base).get_vocab())
    logger.warning(
        "vector %s: its tokens are not those of the base, so its delta has a tokenizer of its own; "
        "a study or recipe needs `vocabulary: union` for it.",
        name,
    )
    return vector, tokens


def _refuse_unusable(
    vector: DistributionVector, token: str, number: int, n_rows: Mapping[str, int], is_piece: bool
) -> None:
    """Raise VocabularyError for a new token without rows, or one that is a piece of words."""
    where = f"vector {vector.name!r} ({vector.path}): its token {token!r}"
    lacking = sorted(name for name in n_rows if number >= n_rows[name])
    if lacking and (vector.kind == "adapter" or len(lacking) < len(n_rows)):
        raise VocabularyError(
            f"{where} has the id {number}, and it stores no such row of {lacking[0]!r}. Save the "
            "adapter with the embedding and the head in modules_to_save, or "
            "`save_embedding_layers=True`."
        )
    if not lacking and is_piece:
        raise VocabularyError(
            f"{where} is a piece of words and not an added token. A union takes only added tokens, "
            "such as those of a chat template."
        )


def _refuse_products(
    tokens: TokensOfVector, names: Mapping[str, int], known: Mapping[str, int]
) -> None:
    """Raise VocabularyError for factors of an embedding that had another row for a new token than
    the base, if the adapter did not save it.
    """
    vector = tokens.vector
    parts = vector.parts if isinstance(vector, AdapterVector) else {}
    for name in names:
        part, new = parts.get(name), tokens.new_tokens(known)
        if isinstance(part, LowRank) and not isinstance(part, OnCopy) and new:
            raise VocabularyError(
                f"vector {vector.name!r} ({vector.path}): adapts {name!r} by a product, has the "
                f"token {new[0]!r}, which the base lacks, and did not save the row that the "
                "product is added to. Save the adapter with `save_embedding_layers=True`."
            )
