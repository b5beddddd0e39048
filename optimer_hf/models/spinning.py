"""How long the threads of OpenMP spin for each other before they sleep.

PyTorch splits each operation among threads, and the first to finish wait for the last. By default
they spin for milliseconds (GNU, in PyTorch's wheels) or 200 ms (Intel and LLVM). If another process
is busy, it is the last thread that needs the core on which the others spin, and a run becomes many
times slower. If threads sleep at once, a run that has the machine to itself is slower by a quarter
(benchmarks/spin.py).
"""

from collections.abc import Mapping

SPINS = {  # read when the library loads
    "GOMP_SPINCOUNT": "2000",  # rounds of GNU's loop, which takes 300,000 by default
    "KMP_BLOCKTIME": "1",  # milliseconds, the shortest that is not 0
}
DECIDING = {*SPINS, "OMP_WAIT_POLICY", "KMP_LIBRARY"}


def choose_spins(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to an environment before torch is loaded in it: none if a user
    has decided how threads wait.
    """
    return {} if DECIDING & environment.keys() else dict(SPINS)
