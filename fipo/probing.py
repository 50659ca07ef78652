"""Sparse probing: how well do k latents tell the classes of labelled text apart?

The protocol of SAEBench's `sparse_probing` (Karvonen et al. 2025), written anew. Of every text the codes are averaged
over its content tokens. Each class is a binary task, one against the rest: its texts, and as many drawn evenly from
the other classes. The k latents with the largest difference of class means are chosen on the training texts, and a
logistic regression (L2, C = 1, not standardised) is fitted to them; its accuracy on the test texts is the score. The
same with the channels of the language model in place of latents is the baseline. Besides, a probe on all latents:
AdamW with early stopping on the test texts, as SAEBench defines it, hence optimistic.

Shapes: N texts, M = 2P rows of a task, T tasks (classes) of a dataset, F features, K chosen features.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Tasks(NamedTuple):
    """The one-vs-rest tasks of one split of a dataset: row T belongs to class T."""

    rows_TM: Tensor
    """Numbers of the texts, positives and negatives mixed."""
    labels_TM: Tensor
    """1 for the class, 0 for the rest."""


def one_vs_rest(class_sizes: list[int], positive: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows [2P] and labels [2P] of one task over texts numbered class by class.

    All P texts of the positive class; of each other class ceil(P / (C-1)) drawn without replacement, mixed and cut to
    P; then everything mixed. The draws are one randperm a class, one for the negatives, one for the mixing.
    """
    starts = [sum(class_sizes[:index]) for index in range(len(class_sizes))]
    positives = class_sizes[positive]
    share = math.ceil(positives / (len(class_sizes) - 1))
    drawn = [
        start + torch.randperm(size, generator=generator)[:share]
        for index, (start, size) in enumerate(zip(starts, class_sizes, strict=True))
        if index != positive
    ]
    negatives = torch.cat(drawn)
    negatives = negatives[torch.randperm(len(negatives), generator=generator)[:positives]]
    rows = torch.cat([starts[positive] + torch.arange(positives), negatives])
    labels = torch.cat([torch.ones(positives), torch.zeros(len(negatives))])
    mixed = torch.randperm(len(rows), generator=generator)
    return rows[mixed], labels[mixed]


class SparseProbes(NamedTuple):
    """What probes on a few features found."""

    right: dict[int, Tensor]
    """k -> is the probe on the k best features right on each test row? [T, M], bool."""
    chosen_TK: Tensor
    """The features of the largest k, best first."""
    difference_TK: Tensor
    """Their mean over the class less that over the rest."""


def mean_difference(features_NF: Tensor, tasks: Tasks) -> Tensor:
    """Mean over positives - mean over negatives of every feature, [T, F]; the means are rounded to the features'
    format, as SAEBench's are."""
    means = []
    for side in (1, 0):
        member_TM = (tasks.labels_TM == side).float()
        weights_TN = torch.zeros(tasks.rows_TM.shape[0], features_NF.shape[0])
        weights_TN.scatter_(1, tasks.rows_TM, member_TM / member_TM.sum(1, keepdim=True))
        means.append((weights_TN @ features_NF.float()).to(features_NF.dtype))
    return means[0] - means[1]


def ranked(difference_TF: Tensor) -> Tensor:
    """Features in the order in which probes take them, largest difference of either sign first, [T, F]."""
    return difference_TF.abs().argsort(dim=1, descending=True, stable=True)


def fit_logistic(x_TMK: Tensor, y_TM: Tensor, c: float = 1.0, tolerance: float = 1e-10) -> tuple[Tensor, Tensor]:
    """Weights [T, K] and intercepts [T] of T logistic regressions at once, by damped Newton steps in float64.

    Minimises  Σ_m log(1 + exp(-s_m f_m)) + ‖w‖² / (2 c)  with s = ±1 and an intercept that is not penalised: the
    objective of scikit-learn's LogisticRegression(C=c). Convex, so the optimum does not depend on the solver.
    """
    x_TMK = torch.cat([x_TMK.double(), torch.ones_like(x_TMK[..., :1], dtype=torch.float64)], dim=-1)
    y_TM = y_TM.double()
    tasks, _, width = x_TMK.shape
    ridge_K = torch.full((width,), 1 / c, dtype=torch.float64, device=x_TMK.device)
    ridge_K[-1] = 0.0

    def loss(w_TK: Tensor) -> Tensor:
        margin_TM = torch.einsum("tmk,tk->tm", x_TMK, w_TK) * (2 * y_TM - 1)
        return torch.nn.functional.softplus(-margin_TM).sum(1) + 0.5 * (ridge_K * w_TK * w_TK).sum(1)

    w_TK = torch.zeros(tasks, width, dtype=torch.float64, device=x_TMK.device)
    value_T = loss(w_TK)
    for _ in range(100):
        p_TM = torch.einsum("tmk,tk->tm", x_TMK, w_TK).sigmoid()
        gradient_TK = torch.einsum("tmk,tm->tk", x_TMK, p_TM - y_TM) + ridge_K * w_TK
        hessian_TKK = torch.einsum("tmk,tm,tml->tkl", x_TMK, p_TM * (1 - p_TM), x_TMK) + ridge_K.diag()
        step_TK = torch.linalg.solve(hessian_TKK + 1e-10 * torch.eye(width, dtype=torch.float64), gradient_TK)
        decrement_T = (gradient_TK * step_TK).sum(1)
        size_T = torch.ones_like(value_T)
        for _ in range(30):
            new_T = loss(w_TK - size_T[:, None] * step_TK)
            worse_T = new_T > value_T - 0.25 * size_T * decrement_T + 1e-12 * value_T.abs()
            if not worse_T.any():
                break
            size_T = torch.where(worse_T, size_T / 2, size_T)
        w_TK = w_TK - size_T[:, None] * step_TK
        value_T = loss(w_TK)
        if bool((decrement_T <= tolerance * (1 + value_T)).all()):
            break
    return w_TK[:, :-1], w_TK[:, -1]


def sparse_probes(train_NF: Tensor, test_NF: Tensor, train: Tasks, test: Tasks, ks: tuple[int, ...]) -> SparseProbes:
    """A probe on the k best features for every k and task. Ranked once for all k."""
    difference_TF = mean_difference(train_NF, train)
    best_TK = ranked(difference_TF)[:, : max(ks)]
    right = {}
    for k in ks:
        chosen_TK = best_TK[:, :k]
        weights_TK, intercept_T = fit_logistic(_columns(train_NF, train.rows_TM, chosen_TK), train.labels_TM)
        x_TMK = _columns(test_NF, test.rows_TM, chosen_TK).double()
        logits_TM = torch.einsum("tmk,tk->tm", x_TMK, weights_TK) + intercept_T[:, None]
        right[k] = (logits_TM > 0) == (test.labels_TM > 0)
    return SparseProbes(right, best_TK, difference_TF.gather(1, best_TK))


def _columns(features_NF: Tensor, rows_TM: Tensor, columns_TK: Tensor) -> Tensor:
    """features[rows, columns] a task, [T, M, K]."""
    return features_NF[rows_TM[:, :, None], columns_TK[:, None, :]]


def full_accuracies(train_NF: Tensor, test_NF: Tensor, train: Tasks, test: Tasks, generator: torch.Generator) -> Tensor:
    """Best test accuracy [T] of a linear probe on all features, as SAEBench defines it.

    AdamW, rate 0.01, batches of 250, at most 100 epochs; a task stops after 10 epochs without a better test accuracy.
    The tasks of a dataset train side by side; each has its own weights, order and stop. With one task the generator is
    drawn from as SAEBench draws. The gradient of the mean logistic loss is (sigmoid(z) - y) x / B.
    """
    tasks, rows = train.rows_TM.shape
    dtype, bound = train_NF.dtype, 1 / math.sqrt(train_NF.shape[1])
    weights_TF = torch.empty(tasks, train_NF.shape[1], dtype=dtype)
    torch.nn.init.kaiming_uniform_(weights_TF, a=math.sqrt(5), generator=generator)  # as nn.Linear starts
    bias_T = torch.empty(tasks, dtype=dtype).uniform_(-bound, bound, generator=generator)
    optimizer = torch.optim.AdamW([weights_TF, bias_T], lr=0.01)
    best_T, waited_T = torch.zeros(tasks), torch.zeros(tasks)
    weights_TF.grad, bias_T.grad = torch.zeros_like(weights_TF), torch.zeros_like(bias_T)
    space_BF = torch.empty(min(250, rows), train_NF.shape[1], dtype=dtype)  # fresh memory costs more than the copy
    for _ in range(100):
        open_O = (waited_T < 10).nonzero()[:, 0]  # a task that has stopped may drift: it is not looked at again
        if not len(open_O):
            break
        order_OM = torch.stack([torch.randperm(rows, generator=generator) for _ in open_O])
        for part_OB in order_OM.split(250, dim=1):
            for task, part_B in zip(open_O.tolist(), part_OB, strict=True):
                x_BF = torch.index_select(train_NF, 0, train.rows_TM[task, part_B], out=space_BF[: len(part_B)])
                error_B = (x_BF @ weights_TF[task] + bias_T[task]).sigmoid() - train.labels_TM[task, part_B].to(dtype)
                torch.mv(x_BF.T, error_B / len(error_B), out=weights_TF.grad[task])
                bias_T.grad[task] = error_B.mean()
            optimizer.step()
        logits_TM = (test_NF @ weights_TF.T + bias_T).T.gather(1, test.rows_TM)
        accuracy_T = ((logits_TM > 0) == (test.labels_TM > 0)).float().mean(1)
        better_T = (accuracy_T > best_T) & (waited_T < 10)
        best_T = torch.where(better_T, accuracy_T, best_T)
        waited_T = torch.where(better_T, 0, waited_T + 1)
    return best_T.double()
