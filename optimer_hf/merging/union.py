"""Give a base the tokens that its vectors have and it lacks (`vocabulary: union`).

A base and vectors come in. A copy of the base, in the cache, goes out: its tokenizer has the tokens
of all of them, and its embedding and head have a row for each. A row that the base lacks is the
average over the vectors that have it, as with mergekit's `tokenizer_source: union`. From then on
the copy is the base, and a merge adds w_i (v_i - base) to these rows, too: with one such vector
they are its own at any weight, and with several each gets its own at weight 1 alone.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from optimer_hf.errors import ConfigError, ModelError, VocabularyError
from optimer_hf.files.digest import digest, sha256_file
from optimer_hf.files.paths import cache_dir
from optimer_hf.files.staging import staged_directory, write_once
from optimer_hf.merging.tokenizer import complete_generation_config, open_tokenizer
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import (
    MAX_SHARD_SIZE,
    ResolvedModel,
    copy_beside_weights,
    files_beside_weights,
    files_with_role,
    tokenizer_digests,
    weight_digests,
    weights_fingerprint,
)
from optimer_hf.models.live import load_tokenizer
from optimer_hf.models.shards import write_sharded
from optimer_hf.models.ties import ties_of
from optimer_hf.models.union import UNION_FILE, AddedToken, UnionRecord, Vocabulary
from optimer_hf.models.vocabulary import write_vocabulary_size
from optimer_hf.vectors.alignment import token_row, token_tensors
from optimer_hf.vectors.opening import open_unaligned
from optimer_hf.vectors.tokens import TokensOfVector, tokens_of

logger = logging.getLogger(__name__)

FORMAT = 2  # of the copies in the cache


def open_base(
    base: ResolvedModel,
    sources: Mapping[str, str],
    tokenizer_source: str | None,
    vocabulary: Vocabulary,
) -> tuple[ResolvedModel, ResolvedModel | None]:
    """Return the base of a merge, and the model that it takes its tokenizer from (None: the base).

    `sources` are the references of the vectors. With `union`, the base is a copy with the tokens of
    all vectors, which is made once and has the right tokenizer; if no vector has other tokens, it
    is the base itself. Raises VocabularyError for a vector whose tokens cannot join.
    """
    donor = open_tokenizer(base, tokenizer_source, vocabulary)
    if vocabulary == "base":
        return base, donor
    known = load_tokenizer(base).get_vocab()
    members = [
        tokens_of(open_unaligned(name, source, base), base, known)
        for name, source in sources.items()
    ]
    root = donor or base
    union = _Union(base, root, members, known, _add_tokens(load_tokenizer(root), members))
    if not union.added and all(member.is_in_place(known) for member in members):
        return base, open_tokenizer(base, tokenizer_source)
    return ResolvedModel(_grow_once(union), base.reference, base.commit), None


# -- the union -------------------------------------------------------------------------------------


def _add_tokens(tokenizer: Any, members: Sequence[TokensOfVector]) -> Any:
    """Add the tokens of the vectors that a tokenizer lacks, vector by vector."""
    for member in members:
        known = tokenizer.get_vocab()
        infos = member.tokenizer.added_tokens_decoder
        new = [infos[member.ids[token]] for token in member.new_tokens(known)]
        if new:
            tokenizer.add_tokens(new)
    return tokenizer


@dataclass(frozen=True)
class _Union:
    """A base, the model that lends its tokenizer, the vectors, the ids of the base's tokens, and
    the tokenizer with the tokens of all.
    """

    base: ResolvedModel
    root: ResolvedModel
    members: Sequence[TokensOfVector]
    known: Mapping[str, int]
    tokenizer: Any

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The tensors of the base."""
        return Checkpoint(self.base.path)

    @cached_property
    def n_base(self) -> int:
        """Number of rows of the base; raises ModelError if embedding and head have not the same."""
        n_rows = {name: self.checkpoint.shape(name)[0] for name in token_tensors(self.checkpoint)}
        if len(set(n_rows.values())) != 1:
            raise ModelError(
                f"base_model {self.base.reference}: its tensors for tokens have {n_rows} rows, so "
                "they cannot get the same new ones. Use `vocabulary: base`."
            )
        return next(iter(n_rows.values()))

    @cached_property
    def added(self) -> dict[str, AddedToken]:
        """The tokens for which the base has no row, in the order of their ids.

        Raises ConfigError for a token of `tokenizer_source` that no vector has.
        """
        ids: dict[str, int] = self.tokenizer.get_vocab()
        lacking = [token for token in ids if self.known.get(token, self.n_base) >= self.n_base]
        added = {}
        for token in sorted(lacking, key=ids.__getitem__):
            names = [each.vector.name for each in self.members if token in each.ids]
            if not names and token not in self.known:
                raise ConfigError(
                    f"tokenizer_source: {self.root.reference}: neither the base nor a vector has a "
                    f"row for its token {token!r}. Give a vector of the study."
                )
            added[token] = AddedToken(id=ids[token], vectors=names)
        last = max((each.id for each in added.values() if each.vectors), default=-1)
        return {t: each for t, each in added.items() if each.id < max(self.n_base, last + 1)}

    @cached_property
    def n_rows(self) -> int:
        """Number of rows of embedding and head."""
        return max([self.n_base, *(each.id + 1 for each in self.added.values())])

    def new_rows(self, name: str) -> dict[int, torch.Tensor]:
        """Return the rows of a tensor that the base lacks, in float32, by id."""
        return {each.id: self._mean(name, token) for token, each in self.added.items()}

    def _mean(self, name: str, token: str) -> torch.Tensor:
        having = [member for member in self.members if token in member.ids]
        total = torch.zeros(self.checkpoint.shape(name)[1:])
        for member in having:
            number = member.ids[token]
            row = token_row(member.vector, name, number, self.checkpoint)
            if row is None and having[1:]:
                raise VocabularyError(
                    f"vector {member.vector.name!r}: has no row of its own for the token {token!r} "
                    f"in {name!r}, and {len(having) - 1} other vectors have. Save the adapter with "
                    "the embedding and the head in modules_to_save."
                )
            if row is None:
                row = self.checkpoint.read_rows(name, slice(number, number + 1))[0].float()
            total += row
        return total / max(len(having), 1)

    def key(self) -> str:
        """Return a digest of everything that decides the copy of the base."""
        import transformers

        beside = files_beside_weights(self.base.path, tokenizer=self.lender)
        giving = {name for each in self.added.values() for name in each.vectors}
        return digest(
            [
                [FORMAT, transformers.__version__, weights_fingerprint(self.base.path)],
                {name: sha256_file(file) for name, file in beside.items()},
                [
                    [vector.name, weights_fingerprint(vector.path), tokenizer_digests(vector.path)]
                    for vector in (member.vector for member in self.members)
                    if vector.name in giving
                ],
                {token: each.model_dump() for token, each in self.added.items()},
            ]
        )

    @property
    def lender(self) -> Path | None:
        """The directory that lends the tokenizer, if it is not the base's."""
        return None if self.root == self.base else self.root.path


# -- the copy --------------------------------------------------------------------------------------


def _grow_once(union: _Union) -> Path:
    """Return the cached copy of a base with more tokens, writing it first if necessary. If several
    processes need the same copy, one writes it and the others wait.
    """
    out = cache_dir() / "union" / f"{union.base.path.name}-{union.key()[:16]}"

    def write() -> None:
        logger.info(
            "%s: copying the base to %s, with %d added tokens",
            union.base.reference,
            out,
            len(union.added),
        )
        with staged_directory(out) as staging:
            _write(union, staging)

    write_once(out, UNION_FILE, write)
    return out


def _write(union: _Union, out: Path) -> None:
    _write_weights(union, out)
    copy_beside_weights(union.base.path, out, tokenizer=union.lender)
    if union.lender is not None:
        complete_generation_config(out, union.lender)
    write_vocabulary_size(out, union.n_rows)
    ids = union.tokenizer.get_vocab()
    if ids != load_tokenizer(union.root).get_vocab():  # otherwise the files are those of the root
        for file in files_with_role(out, "tokenizer", "vocabulary", "tokens").values():
            file.unlink()
        union.tokenizer.save_pretrained(out)
    if load_tokenizer(ResolvedModel(out, union.base.reference)).get_vocab() != ids:
        raise ModelError(
            f"{union.root.path}: its tokenizer cannot be saved with more tokens. Save it with "
            "transformers as a fast tokenizer (tokenizer.json)."
        )
    UnionRecord(
        base=weight_digests(union.base.path),
        fingerprint=weights_fingerprint(union.base.path),
        added=union.added,
    ).write(out / UNION_FILE)


def _write_weights(union: _Union, out: Path) -> None:
    """Write the tensors of the base with the new rows. Those with a row for each token are in
    float32 if the dtype of the base cannot hold the new rows, so that a merge rounds once.
    """
    base, ties = union.checkpoint, ties_of(union.checkpoint)
    new = {name: union.new_rows(name) for name in token_tensors(base)}
    specs = {}
    for name in base.names:
        dtype, shape = base.dtype(name), base.shape(name)
        if (rows := new.get(ties.source_of(name))) is not None:
            is_exact = all(torch.equal(row.to(dtype).float(), row) for row in rows.values())
            dtype, shape = dtype if is_exact else torch.float32, (union.n_rows, *shape[1:])
        specs[name] = dtype, shape

    def rows_of(key: str, rows: slice) -> torch.Tensor:
        name = ties.source_of(key)
        if name not in new:
            return base.read_rows(key, rows)
        dtype, shape = specs[key]
        block = torch.zeros(rows.stop - rows.start, *shape[1:], dtype=dtype)
        if rows.start < union.n_base:
            old = base.read_rows(name, slice(rows.start, min(rows.stop, union.n_base)))
            block[: len(old)] = old
        for number, row in new[name].items():
            if rows.start <= number < rows.stop:
                block[number - rows.start] = row
        return block

    write_sharded(out, "model", specs, rows_of, MAX_SHARD_SIZE)
