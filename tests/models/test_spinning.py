"""spinning.py: how threads wait is set for the library, unless a user has set it."""

import pytest

from optimer_hf.models.spinning import DECIDING, SPINS, choose_spins


def test_both_libraries_get_a_bound_of_their_own():
    assert choose_spins({"PATH": "/bin", "OMP_NUM_THREADS": "2"}) == SPINS
    assert all(int(value) > 0 for value in SPINS.values())  # 0 is to sleep at once


@pytest.mark.parametrize("name", sorted(DECIDING))
def test_what_a_user_has_set_stays(name: str):
    assert choose_spins({name: "0"}) == {}
