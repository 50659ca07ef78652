"""fipo.lsh: collision statistics against the closed form, pairs against brute force, autocast against float32."""

import math

import pytest
import torch
import toys

from fipo import lsh
from fipo.config import LSH
from fipo.lsh import bucket_numbers, candidate_pairs, collision_probability

DEFAULT = LSH()


def unit(rows_FD: torch.Tensor) -> torch.Tensor:
    return rows_FD / rows_FD.norm(dim=1, keepdim=True)


def rows(latents: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    return unit(torch.randn(latents, width, generator=toys.seeded(seed)))


def clustered(latents: int, width: int = 64) -> torch.Tensor:
    """Random directions in groups of four whose members have cosines from about 0.4 to 0.95."""
    generator = toys.seeded(3)
    centres_FD = rows(latents // 4, width, 4).repeat_interleave(4, 0)
    noise_FD = unit(torch.randn(latents, width, generator=generator))
    return unit(centres_FD + (0.2 + torch.rand(latents, 1, generator=generator)) * noise_FD)


def two_rows(angle: float) -> torch.Tensor:
    result_FD = torch.zeros(2, 8)
    result_FD[0, 0] = 1
    result_FD[1, 0], result_FD[1, 1] = math.cos(angle), math.sin(angle)
    return result_FD


def found(unit_FD: torch.Tensor, seed: int = 0, priority_F: torch.Tensor | None = None, **changes):
    settings = dict(tables=4, bits=2, capacity=unit_FD.shape[0], min_cosine=0.0, autocast=False) | changes
    priority_F = torch.arange(unit_FD.shape[0]).float() if priority_F is None else priority_F
    return candidate_pairs(unit_FD, priority_F, generator=toys.seeded(seed), **settings)


@pytest.mark.parametrize("angle", [0.1, 0.8, math.pi / 2, 2.5, 3.1])
def test_bits_agree_with_probability_one_minus_angle_over_pi(angle):
    draws = 20_000
    planes_DTS = torch.randn(8, draws, 1, generator=toys.seeded(1))
    bits_FT = bucket_numbers(two_rows(angle), planes_DTS, autocast=False)
    expected = 1 - angle / math.pi
    agreement = (bits_FT[0] == bits_FT[1]).double().mean().item()
    assert abs(agreement - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)


@pytest.mark.parametrize("angle", [0.3, 1.0, 1.6])
@pytest.mark.parametrize(("tables", "bits"), [(1, 4), (4, 3), (16, 5)])
def test_collision_probability_matches_monte_carlo(angle, tables, bits):
    draws = 4000
    planes_DTS = torch.randn(8, draws * tables, bits, generator=toys.seeded(2))
    buckets_FT = bucket_numbers(two_rows(angle), planes_DTS, autocast=False).unflatten(1, (draws, tables))
    met = (buckets_FT[0] == buckets_FT[1]).any(1).double().mean().item()
    expected = collision_probability(torch.tensor(math.cos(angle), dtype=torch.float64), tables, bits).item()
    assert abs(met - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)


def test_collision_probability_is_exact_where_it_is_small():
    for cos in (-0.9, -0.5, 0.0, 0.1):
        exact = collision_probability(torch.tensor(cos, dtype=torch.float64), 4, 20).item()
        expected = 4 * (1 - math.acos(cos) / math.pi) ** 20  # to first order
        assert exact == pytest.approx(expected, rel=1e-4)
        assert collision_probability(torch.tensor(cos), 4, 20).item() == pytest.approx(exact, rel=1e-4)


def test_collision_probability_at_the_ends():
    cos = torch.tensor([1.0 + 1e-6, 1.0, -1.0, -1.0 - 1e-6], dtype=torch.float64)
    assert torch.allclose(collision_probability(cos, 4, 3), torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("latents", [512, 2048])
def test_comparing_in_bfloat16_loses_no_pair(latents):
    """Nor does it let one through: the cosine that decides is that of float32."""
    unit_FD = clustered(latents)
    exact, rounded = (found(unit_FD, bits=0, tables=1, min_cosine=0.3, autocast=how) for how in (False, True))
    assert len(exact) > 100 and torch.equal(exact, rounded)


@pytest.mark.parametrize("least", [-1.0, -0.2, 0.0, 0.2])
def test_autocast_finds_the_same_pairs_of_any_sign(least):
    unit_FD = rows(60)
    exact, rounded = (found(unit_FD, bits=0, tables=1, min_cosine=least, autocast=how) for how in (False, True))
    assert len(exact) > 100 and torch.equal(exact, rounded)


def test_bucket_numbers_are_the_signs_as_binary_digits():
    planes_DTS = torch.randn(16, 3, 4, generator=toys.seeded())
    buckets_FT = bucket_numbers(rows(10), planes_DTS, autocast=False)
    for latent, row in enumerate(rows(10)):
        for table in range(3):
            digits = [int(row @ planes_DTS[:, table, bit] > 0) for bit in range(4)]
            assert buckets_FT[latent, table].item() == sum(d << s for s, d in enumerate(digits))


@pytest.mark.parametrize("latents", [512, 2048])
def test_recall_of_the_default_settings_for_cosines_of_a_half_and_more(latents):
    """After two refreshes, at least 93 % of the pairs that all-pairs brute force finds, and no more missed than p(cos)
    predicts of twice the tables: a pair once found stays."""
    unit_FD = clustered(latents)
    cos_FF = (unit_FD @ unit_FD.T).triu(1)
    close_P2 = (cos_FF >= 0.5).nonzero()
    bits = 5  # the default's for 2,049 to 4,096 latents
    expected = collision_probability(cos_FF[cos_FF >= 0.5], 2 * DEFAULT.tables, bits).mean().item()
    settings = dict(tables=DEFAULT.tables, bits=bits, capacity=DEFAULT.capacity, min_cosine=DEFAULT.min_cosine)
    first_P2 = found(unit_FD, seed=1, autocast=True, **settings)
    candidates = found(unit_FD, seed=2, autocast=True, held_P2=first_P2, **settings)
    hits = set(map(tuple, candidates.tolist()))
    recall = sum(tuple(pair) in hits for pair in close_P2.tolist()) / len(close_P2)
    assert len(close_P2) >= latents // 2
    assert recall >= 0.93 and recall >= expected - 0.03


@pytest.mark.parametrize("min_cosine", [0.0, 0.3])
def test_pairs_are_ordered_distinct_and_close(min_cosine):
    unit_FD = rows(60)
    pairs_P2 = found(unit_FD, min_cosine=min_cosine)
    pairs = list(map(tuple, pairs_P2.tolist()))
    assert len(pairs) > 50 and len(set(pairs)) == len(pairs) and pairs == sorted(pairs)
    assert all(0 <= i < j < 60 for i, j in pairs)
    assert ((unit_FD[pairs_P2[:, 0]] * unit_FD[pairs_P2[:, 1]]).sum(1) >= min_cosine - 1e-6).all()


@pytest.mark.parametrize(("tables", "bits"), [(1, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("min_cosine", [-2.0, 0.25])
def test_with_room_for_all_the_pairs_are_those_that_share_a_bucket(tables, bits, min_cosine):
    unit_FD = rows(40)
    buckets_FT = bucket_numbers(unit_FD, torch.randn(16, tables, bits, generator=toys.seeded(7)), autocast=False)
    expected = [
        [i, j]
        for i in range(40)
        for j in range(i + 1, 40)
        if (buckets_FT[i] == buckets_FT[j]).any() and unit_FD[i] @ unit_FD[j] >= min_cosine
    ]
    candidates = found(unit_FD, seed=7, tables=tables, bits=bits, min_cosine=min_cosine)
    assert candidates.tolist() == expected and len(expected) > 10


def test_a_full_bucket_keeps_the_latents_of_highest_priority():
    same_FD = rows(1).repeat(9, 1)
    priority_F = torch.tensor([3.0, 9.0, 1.0, 8.0, 2.0, 7.0, 0.0, 4.0, 5.0])
    candidates = found(same_FD, priority_F=priority_F, capacity=3)
    assert candidates.tolist() == [[1, 3], [1, 5], [3, 5]]


@pytest.mark.parametrize("partners", [1, 2, 5])
def test_partners_are_the_dearest_rows_of_higher_priority(partners):
    """By what Ω makes them pay, not by the cosine alone."""
    unit_FD = rows(40)
    priority = torch.randperm(40, generator=toys.seeded(5)).tolist()
    pairs = found(unit_FD, seed=7).tolist()
    above = [[] for _ in range(40)]
    for i, j in pairs:
        lower, upper = (i, j) if priority[j] > priority[i] else (j, i)
        cost = (unit_FD[i] @ unit_FD[j]).item() ** 2 * (priority[upper] / (priority[upper] + priority[lower]))
        above[lower].append((cost, [min(lower, upper), max(lower, upper)]))
    expected = sorted(pair for one in above for _, pair in sorted(one, reverse=True)[:partners])
    limited = found(unit_FD, seed=7, priority_F=torch.tensor(priority).float(), partners=partners)
    assert limited.tolist() == expected and len(expected) < len(pairs)


def test_by_default_buckets_grow_in_number_with_the_dictionary():
    bits = {latents: DEFAULT.bits_of(latents) for latents in (1, 128, 129, 1024, 3072, 4096, 4097, 16_384)}
    assert bits == {1: 0, 128: 0, 129: 1, 1024: 3, 3072: 5, 4096: 5, 4097: 6, 16_384: 7}
    assert LSH(bits=3).bits_of(16_384) == 3 and LSH(capacity=16).bits_of(64) == 2


def test_pairs_held_stay_until_they_are_no_longer_close():
    """Whatever the new planes find; of all, old and new, the closest partners are kept."""
    unit_FD, close, far = rows(40), [3, 17], [5, 9]
    unit_FD[17] = torch.nn.functional.normalize(unit_FD[3] + unit_FD[17], dim=0)
    unit_FD[9] = -unit_FD[5]
    held_P2 = torch.tensor([close, far])
    never = dict(tables=1, bits=14, capacity=2, min_cosine=0.2)
    assert found(unit_FD, **never).tolist() == []
    assert found(unit_FD, held_P2=held_P2, **never).tolist() == [close]
    new = found(unit_FD, min_cosine=0.2).tolist()
    assert found(unit_FD, min_cosine=0.2, held_P2=held_P2).tolist() == sorted(new + [close] * (close not in new))
    one_each = found(unit_FD, min_cosine=0.2, held_P2=held_P2, partners=1).tolist()
    assert [pair for pair in one_each if pair[0] == 3] == [close] and len(one_each) < len(new)


def test_refreshes_add_up_to_the_closest_partner_of_every_row():
    """One refresh of few tables finds a part of all pairs; twenty, each holding what was found, nearly all."""
    unit_FD = clustered(512)
    priority_F = torch.arange(512).float()
    every = found(unit_FD, priority_F=priority_F, tables=1, bits=0, min_cosine=0.3, partners=1)
    shares, held_P2 = [], None
    for seed in range(20):
        held_P2 = found(unit_FD, seed, priority_F, tables=2, bits=5, min_cosine=0.3, partners=1, held_P2=held_P2)
        shares.append(len(set(map(tuple, held_P2.tolist())) & set(map(tuple, every.tolist()))) / len(every))
    assert shares[0] < 0.7 and shares[-1] > 0.98


def test_partners_of_nobody_are_none():
    assert found(torch.eye(6), min_cosine=0.5, partners=2).shape == (0, 2)


def test_no_close_pair_gives_an_empty_list():
    pairs_P2 = found(torch.eye(6), min_cosine=0.5)
    assert pairs_P2.shape == (0, 2) and pairs_P2.dtype == torch.int64


def test_the_generator_alone_decides_the_planes():
    unit_FD = rows(200)
    one, same, other = (found(unit_FD, seed=seed, bits=5) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_planes_are_redrawn_at_every_refresh():
    generator, unit_FD = toys.seeded(), rows(200)
    keywords = dict(tables=2, bits=5, capacity=50, min_cosine=0.0, generator=generator, autocast=False)
    first, second = (candidate_pairs(unit_FD, torch.ones(200), **keywords) for _ in range(2))
    assert not torch.equal(first, second)


def share_of_codes_changed_by_autocast(device: str) -> float:
    unit_FD = rows(1024, 256).to(device)
    planes_DTS = torch.randn(256, 16, 5, generator=toys.seeded(1)).to(device)
    exact_FT = bucket_numbers(unit_FD, planes_DTS, autocast=False)
    return (bucket_numbers(unit_FD, planes_DTS, autocast=True) != exact_FT).double().mean().item()


def test_autocast_leaves_99_percent_of_the_codes_as_they_are():
    assert 0 < share_of_codes_changed_by_autocast("cpu") <= 0.01, "0 would mean that autocast is not on"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_autocast_leaves_99_percent_of_the_codes_as_they_are_on_a_gpu():
    assert 0 < share_of_codes_changed_by_autocast("cuda") <= 0.01


@pytest.mark.parametrize("at_once", [3, 8])
def test_tables_served_together_find_the_same_pairs(at_once, monkeypatch):
    unit_FD, priority_F = rows(200), torch.rand(200, generator=toys.seeded(1))
    given = {"priority_F": priority_F, "capacity": 12, "bits": 3, "min_cosine": 0.2, "partners": 2}
    one_by_one = found(unit_FD, **given)
    monkeypatch.setattr(lsh, "tables_at_once", lambda *_: at_once)
    assert torch.equal(found(unit_FD, **given), one_by_one) and len(one_by_one) > 50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_pairs_of_the_cpu():
    unit_FD = rows(200)
    priority_F = torch.arange(200.0)
    gpu = found(unit_FD.cuda(), priority_F=priority_F.cuda(), capacity=20, bits=3, min_cosine=0.3)
    cpu = found(unit_FD, priority_F=priority_F, capacity=20, bits=3, min_cosine=0.3)
    assert torch.equal(gpu.cpu(), cpu)
