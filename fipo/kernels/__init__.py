"""Triton kernels of the training step, for a GPU; imported where there is one (`fipo.sparse.kernels_for`).

Each gives what the torch code beside its caller gives, up to the order of sums; tests/test_kernels.py compares them, in
Triton's interpreter where there is no GPU. Without atomics but of whole numbers: the same input gives the same bits.
"""

from fipo.kernels.adam import adam, squares
from fipo.kernels.loss import nested_error
from fipo.kernels.pairs import reduce_segments, row_products, scaled_rows, sum_rows
from fipo.kernels.search import LONGEST, largest, largest_of_batch

__all__ = [
    "LONGEST",
    "adam",
    "largest",
    "largest_of_batch",
    "nested_error",
    "reduce_segments",
    "row_products",
    "scaled_rows",
    "squares",
    "sum_rows",
]
