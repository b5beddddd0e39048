"""Keep norms and cosines of a pool, so that no weight is read twice for them."""

import logging
from collections.abc import Mapping
from pathlib import Path

from optimer_hf.errors import ConfigError, ModelError, OutputError
from optimer_hf.merging.geometry_file import GeometryFile
from optimer_hf.models.layout import weight_states
from optimer_hf.models.resolve import resolve_base, resolve_model
from optimer_hf.models.union import Vocabulary

logger = logging.getLogger(__name__)


def read_or_measure(
    sources: Mapping[str, str],
    base_model: str,
    dtype: str,
    path: Path,
    vocabulary: Vocabulary = "base",
    tokenizer_source: str | None = None,
) -> GeometryFile:
    """Return norms and cosines of a pool, cached in `path`; measure them again when weights
    changed.

    `tokenizer_source` is the model whose tokenizer the merges take (None: the base); with
    `vocabulary: union`, it decides which copy of the base is theirs. A valid cache is returned
    without reading weights, and without importing torch. Raises ModelError for a vector that cannot
    be merged into this base.
    """
    base = resolve_base(base_model)
    state = weight_states(base.path)
    states = {name: weight_states(resolve_model(text).path) for name, text in sources.items()}
    try:
        cached = GeometryFile.read(path)
        if (cached.base, cached.vectors) == (state, states):
            return cached
    except ConfigError as error:
        logger.debug("%s", error)
    from optimer_hf.merging.geometry import measure, open_pool
    from optimer_hf.merging.union import open_base

    base, _ = open_base(base, sources, tokenizer_source, vocabulary)
    pool, refusals = open_pool(sources, base)
    if refusals:
        raise ModelError("; ".join(refusals.values()))
    measured = measure(pool, base, dtype)
    fresh = GeometryFile(
        base=state,
        vectors=states,
        norms=measured.norms,
        cosines=[(a, b, value) for (a, b), value in measured.cosines.items()],
    )
    try:
        fresh.write(path)
    except OutputError as error:  # somebody else's study
        logger.warning("cosines are not cached: %s", error)
    return fresh
