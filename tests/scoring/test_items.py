"""items.py: which items a limit leaves."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from optimer_hf.scoring.items import spread_indices


@given(st.integers(1, 500), st.none() | st.integers(1, 600))
def test_spread_gives_distinct_items_in_order_with_even_gaps(n_items, limit):
    chosen = spread_indices(n_items, limit)
    assert len(chosen) == min(n_items, limit or n_items)
    assert chosen == sorted(set(chosen)) and chosen[0] >= 0 and chosen[-1] < n_items
    gaps = np.diff(chosen)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_spread_takes_the_same_share_of_every_source():
    chosen = spread_indices(300, 30)
    assert [sum(start <= index < start + 100 for index in chosen) for start in (0, 100, 200)] == [
        10,
        10,
        10,
    ]
