"""SAEBench's own stream of random numbers, replayed: the accuracies that SAEBench 0.6.0 gives from the same seed.

SAEBench seeds torch once and draws everything from that one stream: for a dataset, in this order,

    a  the probes on all channels of the model     b  the probes on k channels, for k in the list, for each class
    c  the probes on all latents                   d  the probes on k latents

each on a training and a test set of its own (`one_vs_rest`); a probe on everything also draws its start and the order
of every epoch, so where it stops early moves all that is drawn later. With activations from its cache SAEBench skips a
and b, with `lower_vram_usage` c: the same SAE then meets other texts. Our default (fipo.evaluate) draws each set from a
generator of its own; this mode is for checking one against the other. Shapes: N texts, F features, K chosen ones.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fipo.probing import Tasks, fit_logistic, full_accuracies, mean_difference, one_vs_rest, ranked
from fipo.saebench import metric_name

Fit = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Rows [T, M, K] and labels [T, M] -> weights [T, K] and intercepts [T], as `fit_logistic`."""


def replay(
    llm_ND: Tensor,
    sae_NF: Tensor,
    train_sizes: Sequence[int],
    test_sizes: Sequence[int],
    ks: Sequence[int],
    generator: torch.Generator,
    *,
    cached: bool = False,
    lower_vram: bool = False,
    fit: Fit = fit_logistic,
) -> dict[str, list[float]]:
    """Metric -> accuracy of every class, for one dataset, in SAEBench's order of metrics.

    Rows of the pooled features are texts: training texts class by class, then test texts class by class. `generator`:
    one for all datasets of an SAE, seeded by the seed alone, `torch.Generator().manual_seed(seed)`. What is skipped
    (the model's metrics where `cached`, `sae_test_accuracy` where `lower_vram`) is not in the result. `fit`: the
    logistic regression; SAEBench's, scikit-learn's, stops a little short of the optimum.
    """
    drawn = _Stream(list(train_sizes), list(test_sizes), generator, fit)
    llm, sae = {}, {}
    if not cached:
        llm = {metric_name("llm", k): drawn.accuracies(llm_ND, k) for k in (None, *ks)}
    if not lower_vram:
        sae[metric_name("sae", None)] = drawn.accuracies(sae_NF, None)
    sparse = {metric_name("sae", k): drawn.accuracies(sae_NF, k) for k in ks}
    return {**sae, **llm, **sparse}


class _Stream:
    """The probes of one dataset, drawn one after another from one generator."""

    def __init__(self, train_sizes: list[int], test_sizes: list[int], generator: torch.Generator, fit: Fit) -> None:
        self.train_sizes, self.test_sizes, self.generator, self.fit = train_sizes, test_sizes, generator, fit

    def accuracies(self, features_NF: Tensor, k: int | None) -> list[float]:
        """Test accuracy of the probe on k features (None: on all) for every class in turn."""
        train_NF, test_NF = features_NF.split([sum(self.train_sizes), sum(self.test_sizes)])
        return [self._accuracy(train_NF, test_NF, positive, k) for positive in range(len(self.train_sizes))]

    def _accuracy(self, train_NF: Tensor, test_NF: Tensor, positive: int, k: int | None) -> float:
        train, test = (
            Tasks(*(part[None] for part in one_vs_rest(sizes, positive, self.generator)))
            for sizes in (self.train_sizes, self.test_sizes)
        )
        if k is None:
            return full_accuracies(train_NF, test_NF, train, test, self.generator).item()
        chosen_K = top_latents(train_NF, train, k)[0]
        x_MK, rows_M = train_NF[:, chosen_K][train.rows_TM[0]], test.rows_TM[0]
        weights_TK, intercept_T = self.fit(x_MK[None], train.labels_TM)
        logits_M = test_NF[:, chosen_K][rows_M].double() @ weights_TK[0].double() + intercept_T
        return ((logits_M > 0) == (test.labels_TM[0] > 0)).double().mean().item()


def top_latents(features_NF: Tensor, tasks: Tasks, k: int) -> Tensor:
    """The k features of largest mean difference of every task, [T, K], in ascending order."""
    return ranked(mean_difference(features_NF, tasks))[:, :k].sort(dim=1).values
