"""Search the weights of `base + sum_i w_i v_i` after training, instead of fixing a data mixture
before it.
"""

from importlib.metadata import version

__version__ = version("optimer-hf")
