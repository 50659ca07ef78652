"""fipo.rows against plain matrix products: sparse and dense features, empty rows, repeated rows, any width."""

import pytest
import torch
from toys import seeded

from fipo.rows import DENSEST, Rows


def features(rows, width, share, seed=0):
    """Random numbers of which `share` is not zero."""
    on_NF = torch.rand(rows, width, generator=seeded(seed + 1)) < share
    return torch.randn(rows, width, generator=seeded(seed)) * on_NF


@pytest.mark.parametrize("share", [0.0, 0.03, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("rows", [1, 256, 600])
def test_products_and_sums_are_those_of_the_plain_rows(rows, share):
    features_NF = features(rows, 37, share)
    rows_TB = torch.randint(rows, (3, 50), generator=seeded(5))
    weights_TF, delta_TB = torch.randn(3, 37, generator=seeded(6)), torch.randn(3, 50, generator=seeded(7))
    batch = Rows(features_NF).batch(rows_TB)
    plain_TBF = features_NF[rows_TB].double()
    expected_TB = torch.einsum("tbf,tf->tb", plain_TBF, weights_TF.double())
    expected_TF = torch.einsum("tbf,tb->tf", plain_TBF, delta_TB.double())
    torch.testing.assert_close(batch.products(weights_TF).double(), expected_TB, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch.sums(delta_TB).double(), expected_TF, rtol=1e-5, atol=1e-5)


def test_mostly_zero_features_are_kept_sparse_and_others_not():
    assert Rows(features(600, 37, DENSEST / 4)).sparse is not None
    assert Rows(features(600, 37, 0.9)).sparse is None
    assert Rows(features(600, 37, DENSEST / 4).bfloat16()).sparse is None


def test_nothing_but_the_nonzeros_is_kept():
    features_NF = features(600, 400, 0.02)
    kept = Rows(features_NF).sparse
    assert len(kept.values_E) == len(kept.columns_E) == int((features_NF != 0).sum())


def test_a_batch_changes_nothing():
    features_NF = features(300, 20, 0.05)
    before_NF, rows = features_NF.clone(), Rows(features_NF)
    first, second = (rows.batch(torch.tensor([[4, 4, 9]])).products(torch.ones(1, 20)) for _ in range(2))
    assert torch.equal(features_NF, before_NF) and torch.equal(first, second)
