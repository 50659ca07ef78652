"""Compiled loops of the training step, for a processor; imported where Numba is installed (`fipo.sparse.native_for`).

What torch does in a dozen passes over large matrices is done here token by token, or row by row, while all of it is in
the cache of a core. Every sum has a fixed order, whatever the number of threads. The torch code beside each caller is
the oracle (tests/test_native.py).
"""

from fipo.native.adam import adam, squares
from fipo.native.loss import nested_error
from fipo.native.search import LONGEST, largest

__all__ = ["LONGEST", "adam", "largest", "nested_error", "squares"]
