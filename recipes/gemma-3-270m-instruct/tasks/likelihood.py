"""The score of the likelihood tasks: bits per byte of the reference solution, item by item."""

from collections.abc import Mapping, Sequence


def bits_per_byte(
    doc: Mapping[str, str], results: Sequence[tuple[float, bool]]
) -> dict[str, tuple[float, int]]:
    """Return the log-likelihood of a solution in nats and its UTF-8 bytes; lm-eval divides sums.

    The end of the turn is in the likelihood and not in the bytes.
    """
    log_likelihood, _is_greedy = results[0]
    return {"bits_per_byte": (log_likelihood, len(doc["solution"].encode()))}
