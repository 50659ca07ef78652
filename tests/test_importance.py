"""fipo.importance: σ of a constant, halves and ranks that add up, a hook that spares evaluation, the dead clock."""

import os

import pytest
import torch
import torch.distributed as dist
import toys
from torch import nn

from fipo.config import Importance
from fipo.importance import ImportanceEMA

LATENTS = 6


def codes(seed: int, batch: int = 8) -> torch.Tensor:
    generator = toys.seeded(seed)
    on_BF = torch.rand(batch, LATENTS, generator=generator) < 0.2
    return on_BF * torch.rand(batch, LATENTS, generator=generator)


def stepped(norm: str, batches: list[torch.Tensor], decay: float = 0.9) -> ImportanceEMA:
    ema = ImportanceEMA(LATENTS, decay=decay, norm=norm)
    for codes_BF in batches:
        ema.collect(codes_BF)
        ema.commit()
    return ema


def assert_same_state(one: ImportanceEMA, other: ImportanceEMA, exact: bool = True) -> None:
    for name, value in one.state_dict().items():
        same = torch.equal if exact or not value.is_floating_point() else torch.allclose
        assert same(value, other.state_dict()[name]), name


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999])
def test_a_constant_gives_the_constant_from_the_first_step(norm, decay):
    ema = ImportanceEMA(LATENTS, decay=decay, norm=norm)
    constant_F = torch.linspace(0, 3, LATENTS)
    for _ in range(4):
        ema.collect(constant_F.expand(5, -1))
        ema.commit()
        assert torch.allclose(ema.values(), constant_F, rtol=1e-4)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_values_are_the_weighted_mean_of_the_batch_norms(norm):
    batches = [codes(seed) for seed in range(5)]
    norms = [b.mean(0) if norm == "l1" else b.pow(2).mean(0).sqrt() for b in batches]
    weights = [0.9 ** (4 - age) for age in range(5)]
    expected_F = sum(w * n for w, n in zip(weights, norms, strict=True)) / sum(weights)
    assert torch.allclose(stepped(norm, batches).values(), expected_F, rtol=1e-5)


def test_values_are_zero_before_the_first_commit():
    assert torch.equal(ImportanceEMA(LATENTS, decay=0.9).values(), torch.zeros(LATENTS))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_two_half_batches_are_one_batch(norm):
    whole = stepped(norm, [codes(1), codes(2)])
    halves = ImportanceEMA(LATENTS, decay=0.9, norm=norm)
    for codes_BF in (codes(1), codes(2)):
        halves.collect(codes_BF[:3])
        halves.collect(codes_BF[3:])
        halves.commit()
    assert_same_state(whole, halves, exact=False)


def test_commit_without_codes_moves_nothing():
    ema = stepped("l1", [codes(1)])
    ema.commit()
    assert_same_state(ema, stepped("l1", [codes(1)]))


def test_evaluation_never_changes_state_and_the_hook_can_go():
    ema, activation = ImportanceEMA(LATENTS, decay=0.9), nn.ReLU()
    handle = ema.attach(activation)

    def forward_and_commit(seed: int) -> dict[str, torch.Tensor]:
        activation(codes(seed))
        ema.commit()
        return {name: value.clone() for name, value in ema.state_dict().items()}

    first = forward_and_commit(1)
    assert first["mean_F"].any()
    activation.eval()
    second = forward_and_commit(2)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    activation.train()
    third = forward_and_commit(3)
    assert not torch.equal(third["mean_F"], first["mean_F"])
    handle.remove()
    fourth = forward_and_commit(4)
    assert all(torch.equal(value, fourth[name]) for name, value in third.items())


def test_the_hook_holds_no_graph():
    ema, activation = ImportanceEMA(LATENTS, decay=0.9), nn.ReLU()
    ema.attach(activation)
    activation(codes(1).requires_grad_())
    ema.commit()
    assert not ema.values().requires_grad


def test_dead_clock_counts_the_tokens_since_a_latent_fired():
    batches = [codes(seed, batch=3 + seed % 4) for seed in range(30)]
    ema = ImportanceEMA(LATENTS, decay=0.9)
    silent = [0] * LATENTS
    for codes_BF in batches:
        ema.collect(codes_BF)
        ema.commit()
        for latent in range(LATENTS):
            fired = any(value > 0 for value in codes_BF[:, latent].tolist())
            silent[latent] = 0 if fired else silent[latent] + codes_BF.shape[0]
        assert ema.silent_tokens_F.tolist() == silent
    assert max(silent) > 0


def test_state_round_trip_continues_bitwise():
    whole = stepped("l2", [codes(seed) for seed in range(6)])
    restored = ImportanceEMA(LATENTS, decay=0.9, norm="l2")
    restored.load_state_dict(stepped("l2", [codes(seed) for seed in range(3)]).state_dict())
    for seed in range(3, 6):
        restored.collect(codes(seed))
        restored.commit()
    assert_same_state(whole, restored)


def test_half_life_in_tokens():
    assert Importance(decay=0.5).half_life_tokens(2048) == pytest.approx(2048)
    assert Importance(decay=0.5**0.1).half_life_tokens(100) == pytest.approx(1000)
    assert Importance(decay=0.99).half_life_tokens(1000) == pytest.approx(68_967.6, rel=1e-5)
    assert Importance(decay=0.0).half_life_tokens(1000) == 0.0


def rank_main(rank: int, folder: str) -> None:
    """One of two ranks: unequal shares of the same three batches."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for norm in ("l1", "l2"):
        parts = [codes(seed)[:3] if rank == 0 else codes(seed)[3:] for seed in range(3)]
        torch.save(stepped(norm, parts).state_dict(), f"{folder}/{norm}{rank}")
    dist.destroy_process_group()


def test_two_gloo_ranks_agree_with_one_process_on_the_union(tmp_path):
    torch.multiprocessing.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    for norm in ("l1", "l2"):
        whole = stepped(norm, [codes(seed) for seed in range(3)])
        ranks = [torch.load(tmp_path / f"{norm}{rank}", weights_only=True) for rank in (0, 1)]
        for name, value in whole.state_dict().items():
            assert torch.equal(ranks[0][name], ranks[1][name]), name
            assert torch.allclose(ranks[0][name], value), name
        assert torch.equal(ranks[0]["silent_tokens_F"], whole.silent_tokens_F)


def test_what_is_discarded_leaves_no_trace():
    trackers = [ImportanceEMA(LATENTS, decay=0.9) for _ in range(2)]
    for number, tracker in enumerate(trackers):
        tracker.collect(torch.ones(4, LATENTS))
        tracker.commit()
        if number:
            tracker.collect(torch.full((4, LATENTS), torch.nan))
            tracker.discard()
        tracker.collect(torch.full((4, LATENTS), 2.0))
        tracker.commit()
    for name, value in trackers[0].state_dict().items():
        assert value.equal(trackers[1].state_dict()[name])
