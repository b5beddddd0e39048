"""Measure the vectors of a pool: their sizes, the angles between them, and what a merge keeps.

Base and vectors are streamed once; no model is loaded whole. Vectors with cosines near 0 can be
added without disturbing each other (arXiv 2212.04089). The surviving share says how much of a
delta is left after the merge is rounded to its output dtype; with bfloat16 that is often less than
half.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from optimer_hf.errors import ModelError
from optimer_hf.files.reference import absolute_reference
from optimer_hf.files.text import markdown_table, signed
from optimer_hf.merging.mergekit_pool import name_sources
from optimer_hf.merging.writer import LOW_SURVIVAL, surviving_share
from optimer_hf.models.blocks import compute_ahead, row_blocks
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.resolve import resolve_base
from optimer_hf.vectors.delta import not_finite_error, warn_of_norm
from optimer_hf.vectors.forms import LowRank
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.record import read_record
from optimer_hf.vectors.vector import AdapterVector, DistributionVector, dense_rows

logger = logging.getLogger(__name__)


MODULE_GROUPS = {  # first match wins; parts of tensor names
    "head": ("lm_head", "embed_out"),
    "norm": ("norm", "ln_"),
    "embedding": ("embed", "wte", "wpe"),
    "attention": ("attn", "attention", "mixer"),
    "mlp": ("mlp", "feed_forward", "ffn", "expert", "moe"),
}


@dataclass(frozen=True)
class Geometry:
    """Sizes of the vectors of a pool and angles between them; norms are Frobenius norms."""

    norms: dict[str, float]
    relative_norms: dict[str, float]
    cosines: dict[tuple[str, str], float]
    group_norms: dict[str, dict[str, float]]
    effective_ranks: dict[str, float]
    surviving: dict[str, float]
    recorded: dict[str, bool]  # whether the vector records the sha256 of its base
    dtype: str


def open_pool(
    sources: Mapping[str, str], base: ResolvedModel
) -> tuple[list[DistributionVector], dict[str, str]]:
    """Return the vectors that can be merged into a base, and by name why others cannot."""
    pool: list[DistributionVector] = []
    refusals: dict[str, str] = {}
    for name, source in sources.items():
        try:
            pool.append(open_vector(name, source, base))
        except ModelError as error:
            refusals[name] = str(error)
    return pool, refusals


def measure(vectors: Sequence[DistributionVector], model: ResolvedModel, dtype: str) -> Geometry:
    """Return the geometry of a pool. `dtype` is the output dtype that the deltas have to survive.

    Raises ModelError for a vector with NaN or infinite values.
    """
    base = Checkpoint(model.path)
    products = _multiply(vectors, base)
    norms = products.gram.diagonal().sqrt()
    cosines = products.gram / torch.outer(norms, norms).clamp_min(1e-30)
    names = [vector.name for vector in vectors]

    def by_name(values: torch.Tensor) -> dict[str, float]:
        return dict(zip(names, values.tolist(), strict=True))

    return Geometry(
        by_name(norms),
        by_name(norms / products.base_squares.clamp_min(1e-30).sqrt()),
        {(names[i], names[j]): cosines[i, j].item() for i in range(len(names)) for j in range(i)},
        {group: by_name(squares.sqrt()) for group, squares in sorted(products.groups.items())},
        {vector.name: effective_rank(vector) for vector in vectors if vector.kind == "adapter"},
        {
            vector.name: surviving_share(base, [vector], {vector.name: 1.0}, dtype)
            for vector in vectors
        },
        {vector.name: read_record(vector.path) is not None for vector in vectors},
        dtype,
    )


def measure_sources(
    references: Sequence[str], base: str, dtype: str
) -> tuple[Geometry, dict[str, str]]:
    """Return the geometry of the vectors that can be merged into `base`, and by name why others
    cannot. Vectors and base are directories or Hub ids.
    """
    resolved = resolve_base(absolute_reference(base, Path.cwd()))
    sources = name_sources([absolute_reference(text, Path.cwd()) for text in references])
    return measure_pool(sources, resolved, dtype)


def measure_pool(
    sources: Mapping[str, str], base: ResolvedModel, dtype: str
) -> tuple[Geometry, dict[str, str]]:
    """Return the geometry of the vectors that can be merged into a base, and by name why others
    cannot. Warns of those of an unlikely size.
    """
    pool, refusals = open_pool(sources, base)
    geometry = measure(pool, base, dtype)
    for name, norm in geometry.norms.items():
        warn_of_norm(name, norm, geometry.relative_norms[name])
    return geometry, refusals


@dataclass(frozen=True)
class _Products:
    """Inner products of all pairs of vectors [n, n], their squared norms by module group [n], and
    the squared norms of the base tensors that each vector changes [n]; all in float64.
    """

    gram: torch.Tensor
    groups: dict[str, torch.Tensor]
    base_squares: torch.Tensor


def _multiply(vectors: Sequence[DistributionVector], base: Checkpoint) -> _Products:
    """Compute the inner products of vectors in one pass over them and the base."""
    names = sorted(frozenset[str]().union(*(vector.names for vector in vectors)))
    blocks = [(name, rows) for name in names for rows in row_blocks(base.shape(name))]

    def products_of(name: str, rows: slice) -> tuple[torch.Tensor, float]:
        base_rows = base.read_rows(name, rows).float()
        return _gram(vectors, name, rows, base_rows), base_rows.double().square().sum().item()

    n = len(vectors)
    gram = torch.zeros(n, n, dtype=torch.float64)
    base_squares = torch.zeros(n, dtype=torch.float64)
    groups: dict[str, torch.Tensor] = {}
    for (name, _), (products, squares) in zip(
        blocks, list(compute_ahead(products_of, blocks)), strict=True
    ):
        if not bool(products.isfinite().all()):
            vector = vectors[int((~products.diagonal().isfinite()).nonzero()[0])]
            raise not_finite_error(vector, name)
        gram += products
        groups[group_of(name)] = groups.get(group_of(name), 0) + products.diagonal()
        for i, vector in enumerate(vectors):
            if name in vector.names:
                base_squares[i] += squares
    return _Products(gram, groups, base_squares)


def _gram(
    vectors: Sequence[DistributionVector], name: str, rows: slice, base_rows: torch.Tensor
) -> torch.Tensor:
    """Return the inner products <v_i, v_j> over some rows of one tensor, float64 [n, n]."""
    flat = torch.zeros(len(vectors), base_rows.numel(), dtype=torch.float64)
    for i, vector in enumerate(vectors):
        if name in vector.names:
            flat[i] = dense_rows(vector, name, rows, base_rows).flatten()
    return flat @ flat.T


def group_of(name: str) -> str:
    """Return the module group that a tensor belongs to, by its name."""
    for group, parts in MODULE_GROUPS.items():
        if any(part in name for part in parts):
            return group
    return "other"


def effective_rank(vector: DistributionVector) -> float:
    """Return the mean effective rank of an adapter's products: the exponential of the entropy of
    their singular values (Roy & Vetterli, EUSIPCO 2007).
    """
    assert isinstance(vector, AdapterVector)
    ranks = []
    for part in vector.parts.values():
        if isinstance(part, LowRank):
            left, right = torch.linalg.qr(part.b).R, torch.linalg.qr(part.a.T).R
            values = torch.linalg.svdvals((left @ right.T).double())
            shares = values / values.sum().clamp_min(1e-300)
            ranks.append(math.exp(-torch.special.xlogy(shares, shares).sum().item()))
    return sum(ranks) / len(ranks) if ranks else 0.0


# -- tables ----------------------------------------------------------------------------------------


def to_json(geometry: Geometry, refusals: Mapping[str, str]) -> dict[str, Any]:
    """Return everything as JSON values."""
    cosines = {f"{a} {b}": value for (a, b), value in geometry.cosines.items()}
    return asdict(geometry) | {"cosines": cosines, "refused": dict(refusals)}


def to_markdown(geometry: Geometry, refusals: Mapping[str, str]) -> str:
    """Return the tables of `optimer vectors` and a list of what can be merged."""
    names = list(geometry.norms)
    if not names:
        return "\n".join(f"* {name}: cannot be merged: {why}" for name, why in refusals.items())
    parts = [_sizes(geometry)]
    if len(names) > 1:
        parts.append(_cosines(geometry))
    groups = [
        [group, *(f"{norms[name]:.4g}" for name in names)]
        for group, norms in geometry.group_norms.items()
    ]
    parts.append(markdown_table(["norm by module", *names], groups))
    parts += [
        f"* {name}: can be merged into this base{_note_on_base(geometry, name)}." for name in names
    ]
    low = [name for name in names if geometry.surviving[name] < LOW_SURVIVAL]
    if low:
        parts.append(
            f"* {', '.join(low)}: less than half of the delta survives rounding to "
            f"{geometry.dtype}; `--out-dtype float32` keeps it all."
        )
    parts += [f"* {name}: cannot be merged: {reason}" for name, reason in refusals.items()]
    return "\n".join(parts)


def _sizes(geometry: Geometry) -> str:
    """Return the table with one row for each vector."""
    rows = [
        [
            name,
            f"{norm:.4g}",
            f"{100 * geometry.relative_norms[name]:.2f} %",
            f"{geometry.effective_ranks[name]:.1f}" if name in geometry.effective_ranks else "-",
            f"{100 * geometry.surviving[name]:.0f} %",
        ]
        for name, norm in geometry.norms.items()
    ]
    survives = f"survives {geometry.dtype}"
    header = [
        "vector",
        "norm",
        "share of the norm of the tensors it changes",
        "effective rank",
        survives,
    ]
    return markdown_table(header, rows)


def _cosines(geometry: Geometry) -> str:
    """Return the table of cosines, the part below its diagonal."""
    names = list(geometry.norms)
    either = geometry.cosines | {(b, a): value for (a, b), value in geometry.cosines.items()}
    rows = [
        [a, *(signed(either[a, b], 3) for b in names[: i + 1]), *[""] * (len(names) - i - 2)]
        for i, a in enumerate(names[1:])
    ]
    return markdown_table(["cosine", *names[:-1]], rows)


def _note_on_base(geometry: Geometry, name: str) -> str:
    if geometry.recorded[name]:
        return " (same sha256, tensors and vocabulary)"
    return " (same tensors and vocabulary; no sha256 of its base is recorded)"
