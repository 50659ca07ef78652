"""Levels: which latents a level has, and how its cuts are drawn."""

import math

import pytest
import torch

from fipo.levels import cuts, latent_levels, ranks, spare_share
from fipo.method import Levels
from tests import toys

FIXED = Levels(order="fixed", shares=(0.25, 0.5, 1.0), drawn=False, short_power=1.0, favour=(0.0, 0.0, 0.0))
SHARES = (0.125, 0.25, 0.5, 1.0)


def test_levels_follow_the_rank_in_importance_or_the_index():
    sigma_F = torch.rand(16, generator=toys.seeded())
    ranked = sorted(range(16), key=sigma_F.tolist().__getitem__, reverse=True)
    expected = [0] * 16
    for rank, latent in enumerate(ranked):
        expected[latent] = 0 if rank < 4 else 1 if rank < 8 else 2
    by_importance = Levels(shares=FIXED.shares)
    assert latent_levels(ranks(by_importance, sigma_F), [0.25, 0.5]).tolist() == expected
    assert latent_levels(ranks(FIXED, sigma_F), [0.25, 0.5]).tolist() == [0] * 4 + [1] * 4 + [2] * 8


def test_equally_important_latents_keep_their_order():
    assert ranks(Levels(), torch.tensor([1.0, 2.0, 1.0, 2.0])).tolist() == [2, 0, 3, 1]


def test_a_share_below_one_latent_still_gives_the_first_level_one():
    levels_F = latent_levels(torch.arange(16), [0.001, 0.002, 0.5])
    assert levels_F[0] == 0 and levels_F[1:8].tolist() == [2] * 7 and levels_F[8:].tolist() == [3] * 8


@pytest.mark.parametrize("latents", [16, 3072, 16384])
def test_fixed_cuts_are_the_shares_to_the_latent(latents):
    """Wherever the power is, as a number or as the tensor of a step."""
    for way in (0.0, 0.3, torch.tensor(0.7)):
        found = cuts(FIXED, way, toys.seeded())
        counts = latent_levels(torch.arange(latents), found).bincount().tolist()
        assert counts == [latents // 4, latents // 4, latents // 2]


def test_drawn_cuts_lie_between_their_own_share_and_the_next_evenly_in_the_logarithm():
    for seed in range(20):
        drawn = torch.rand((), generator=toys.seeded(seed)).item()
        found = cuts(Levels(shares=SHARES), 1.0, toys.seeded(seed))
        pairs = zip(SHARES[:-1], SHARES[1:], found, strict=True)
        ways = [math.log(cut / own) / math.log(following / own) for own, following, cut in pairs]
        assert ways == pytest.approx([drawn] * 3, abs=1e-5)  # one draw for all


def test_any_two_latents_are_at_times_in_different_levels():
    """Neighbours in rank, from the first cut's share on, which fixed cuts would leave together."""
    generator, rank_F = toys.seeded(), torch.arange(64)
    apart = torch.zeros(63, dtype=torch.bool)
    for _ in range(600):
        apart |= latent_levels(rank_F, cuts(Levels(shares=SHARES), 1.0, generator)).diff() > 0
    assert apart[8:].all() and not apart[:7].any()


def test_a_power_takes_the_cuts_up():
    levels = Levels(shares=SHARES, drawn=False, short_power=0.5)
    assert cuts(levels, 1.0, toys.seeded()) == pytest.approx([0.125, 0.25, 0.5])
    assert cuts(levels, 0.0, toys.seeded()) == pytest.approx([0.125**0.5, 0.5, 0.5**0.5])
    assert cuts(levels, torch.tensor(0.5), toys.seeded()) == pytest.approx([0.125**0.75, 0.25**0.75, 0.5**0.75])


def test_fixed_cuts_take_no_chance_and_drawn_ones_one_number():
    given, other = toys.seeded(), toys.seeded()
    cuts(FIXED, 1.0, given)
    assert given.get_state().equal(other.get_state())
    cuts(Levels(), 1.0, given)
    torch.rand((), generator=other)
    assert given.get_state().equal(other.get_state())


def test_the_budget_is_spare_up_to_a_shortage():
    shares = spare_share(Levels(short=(0.25, 0.75)), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert shares.tolist() == [1.0, 1.0, 0.5, 0.0, 0.0]
