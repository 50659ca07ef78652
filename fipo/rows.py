"""Products with a few rows of a matrix at a time, one set of rows and one weight vector a task.

    z_TB = <x_row, w_T>          g_TF = Σ_B δ_TB x_row          x_row: row rows_TB[t, b] of features_NF

Pooled codes are mostly zeros (a text lights a few hundred of many thousand latents), and then only what is not zero is
kept and touched: a step costs its nonzeros, not its width. Other features are multiplied as they are. Shapes: N rows,
F features, T tasks, B rows of a batch, E nonzeros of a batch.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

DENSEST = 0.2
"""Share of nonzeros from which copying whole rows is as quick."""


class Batch(Protocol):
    """Rows [T, B] of the matrix."""

    def products(self, weights_TF: Tensor) -> Tensor:
        """z [T, B]."""
        ...

    def sums(self, delta_TB: Tensor) -> Tensor:
        """g [T, F]."""
        ...


class Rows:
    """A matrix [N, F] of which rows are taken."""

    def __init__(self, features_NF: Tensor) -> None:
        self.features_NF = features_NF
        self.sparse = _sparse(features_NF)

    def batch(self, rows_TB: Tensor) -> Batch:
        """These rows; a row may stand in several places."""
        return _DenseBatch(self.features_NF, rows_TB) if self.sparse is None else self.sparse.batch(rows_TB)


class _SparseRows:
    """Values and columns of the nonzeros, row by row, and where each row begins."""

    def __init__(self, features_NF: Tensor) -> None:
        parts = [part_PF.nonzero(as_tuple=True) for part_PF in features_NF.split(256)]
        values = [part_PF[place] for part_PF, place in zip(features_NF.split(256), parts, strict=True)]
        self.values_E = torch.cat(values)
        self.columns_E = torch.cat([columns.int() for _, columns in parts])
        self.counts_N = torch.cat(
            [torch.bincount(rows, minlength=256) for rows, _ in parts] or [torch.zeros(0, dtype=torch.int64)]
        )[: len(features_NF)]
        self.starts_N = self.counts_N.cumsum(0) - self.counts_N
        self.width = features_NF.shape[1]

    def batch(self, rows_TB: Tensor) -> "_SparseBatch":
        counts_B = self.counts_N[rows_TB.flatten()]
        ends_B = counts_B.cumsum(0)
        places_E = torch.arange(int(ends_B[-1])) + (
            self.starts_N[rows_TB.flatten()] - ends_B + counts_B
        ).repeat_interleave(counts_B)
        task_T = torch.arange(len(rows_TB)) * self.width
        cells_E = self.columns_E[places_E] + task_T.repeat_interleave(counts_B.view_as(rows_TB).sum(1))
        return _SparseBatch(self.values_E[places_E], cells_E, counts_B.view_as(rows_TB), self.width)


class _SparseBatch:
    def __init__(self, values_E: Tensor, cells_E: Tensor, counts_TB: Tensor, width: int) -> None:
        self.values_E, self.cells_E, self.counts_TB, self.width = values_E, cells_E, counts_TB, width
        self.starts_B = counts_TB.flatten().cumsum(0) - counts_TB.flatten()

    def products(self, weights_TF: Tensor) -> Tensor:
        z_B1 = embedding_bag(
            self.cells_E, weights_TF.view(-1, 1), self.starts_B, mode="sum", per_sample_weights=self.values_E
        )
        return z_B1.view_as(self.counts_TB)

    def sums(self, delta_TB: Tensor) -> Tensor:
        terms_E = self.values_E * delta_TB.flatten().repeat_interleave(self.counts_TB.flatten())
        zeros = torch.zeros(len(delta_TB) * self.width)
        return zeros.scatter_add_(0, self.cells_E, terms_E).view(len(delta_TB), self.width)


class _DenseBatch:
    """Task by task: the rows of one fit the processor's cache, those of all do not."""

    def __init__(self, features_NF: Tensor, rows_TB: Tensor) -> None:
        self.rows = [features_NF[rows_B] for rows_B in rows_TB]

    def products(self, weights_TF: Tensor) -> Tensor:
        return torch.stack([rows_BF @ weights_F for rows_BF, weights_F in zip(self.rows, weights_TF, strict=True)])

    def sums(self, delta_TB: Tensor) -> Tensor:
        return torch.stack([delta_B @ rows_BF for rows_BF, delta_B in zip(self.rows, delta_TB, strict=True)])


def _sparse(features_NF: Tensor) -> _SparseRows | None:
    if features_NF.dtype != torch.float32 or features_NF.device.type != "cpu":
        return None
    sample_NF = features_NF[:: max(1, len(features_NF) // 256)]
    return _SparseRows(features_NF) if (sample_NF != 0).float().mean() < DENSEST else None
