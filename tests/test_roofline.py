"""benchmarks/roofline.py: operations and bytes are those that a hand counts."""

import pytest
import torch
from torch.nn.functional import embedding_bag, linear

from benchmarks.roofline import (
    BYTES_EFFICIENCY,
    FLOP_EFFICIENCY,
    H100,
    H200,
    LAUNCH_SECONDS,
    Cost,
    card_here,
    counted,
)


def test_products_count_by_flop_and_type():
    wide, low = torch.ones(3, 4), torch.ones(3, 4).bfloat16()
    assert counted(lambda: wide @ wide.T) == Cost(flop_32=2 * 3 * 4 * 3, kernels=1)
    assert counted(lambda: low @ low.T) == Cost(flop=2 * 3 * 4 * 3, kernels=1)


def test_a_backward_pass_counts_too():
    x, weight = torch.ones(5, 4), torch.ones(4, 6, requires_grad=True)
    assert counted(lambda: (x @ weight).sum().backward()).flop_32 == 2 * (2 * 5 * 4 * 6)


def test_what_inference_mode_leaves_whole_is_taken_apart():
    def work():
        with torch.inference_mode():
            linear(torch.ones(2, 8), torch.ones(3, 8))

    assert counted(work).flop_32 == 2 * 2 * 8 * 3


def test_other_operations_count_by_bytes_and_views_not_at_all():
    x = torch.ones(10, 10)
    assert counted(lambda: x + x.T) == Cost(moved=3 * 400, kernels=1)
    assert counted(lambda: x.add_(x)) == Cost(moved=3 * 400, kernels=1), "read twice, written once"
    assert counted(lambda: x.view(5, 20).T) == Cost()


def test_gathers_count_the_rows_they_touch():
    table_RD, places_N = torch.ones(1000, 4), torch.tensor([1, 1, 7])
    assert counted(lambda: table_RD[places_N]) == Cost(moved=2 * 3 * 16 + 3 * 8, kernels=1)
    ends = torch.tensor([0, 2])
    found = counted(lambda: embedding_bag(places_N, table_RD, ends, mode="sum"))
    assert 3 * 16 < found.moved < 300, "not the table of 16,000 bytes"


def test_fused_adam_reads_four_and_writes_three():
    weight = torch.zeros(100, requires_grad=True)
    optimizer = torch.optim.Adam([weight], fused=True)
    weight.grad = torch.ones(100)
    optimizer.step()
    assert counted(optimizer.step).moved == pytest.approx(400 * 7, abs=100)


def test_times_follow_the_binding_limit():
    both = Cost(flop=H100.flops, moved=H100.bytes, kernels=10)
    assert both.roofline(H100) == 2
    assert both.roofline(H200) == 1 + H100.bytes / H200.bytes < 2, "as many operations, more bytes a second"
    assert both.predicted(H100) == pytest.approx(1 / FLOP_EFFICIENCY + 1 / BYTES_EFFICIENCY)
    assert Cost(flop=1, kernels=1000).predicted(H100) == 1000 * LAUNCH_SECONDS
    assert Cost(flop=1).plus(Cost(flop=2), 3).times(2) == Cost(flop=14)


@pytest.mark.parametrize(("name", "card"), [("NVIDIA H200", H200), ("NVIDIA H100 80GB HBM3", H100), (None, H100)])
def test_rooflines_are_of_the_card_that_is_here(name, card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert card_here() is card
