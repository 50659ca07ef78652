"""fipo.reservoir against heapq, closed-form inclusion probabilities and explicit weights."""

import heapq
import math
import random

import pytest
import torch
import toys

from fipo import reservoir as reservoir_module
from fipo.reservoir import BucketQueues, PriorityReservoir


def a_res(weights: list[float], exponentials: list[float], slots: int) -> list[int]:
    """Plain A-Res (Efraimidis & Spirakis 2006) with a heap: keys log(u)/w for u = exp(-E); items, largest key first."""
    heap: list[tuple[float, int]] = []
    for item, (weight, exponential) in enumerate(zip(weights, exponentials, strict=True)):
        if weight > 0:
            key = -exponential / weight
            if len(heap) < slots:
                heapq.heappush(heap, (key, item))
            elif key > heap[0][0]:
                heapq.heapreplace(heap, (key, item))
    return [item for _, item in sorted(heap, reverse=True)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("slots", [1, 7, 64, 500])
def test_identical_to_heapq_on_the_same_keys(seed, slots):
    generator, twin = toys.seeded(seed), toys.seeded(seed)
    reservoir = PriorityReservoir(slots, ())
    weights, exponentials = [], []
    for batch in (50, 1, 99, 40):
        weights_B = torch.rand(batch, generator=toys.seeded(seed + batch)) ** 3
        weights_B[::9] = 0
        first = float(len(weights))
        reservoir.offer(first + torch.arange(batch, dtype=torch.float32), weights_B, generator)
        weights += weights_B.tolist()
        exponentials += torch.empty(batch, dtype=torch.float64).exponential_(generator=twin).tolist()
    assert reservoir.contents().tolist() == a_res(weights, exponentials, slots)


def test_inclusion_frequencies_match_the_closed_form():
    """Two of four without replacement: P(i) = w_i/W + Σ_j w_j/W · w_i/(W - w_j), within 4.5 standard errors."""
    weights, trials = [1.0, 2.0, 3.0, 10.0], 4000
    total = sum(weights)
    generator, counts = toys.seeded(), torch.zeros(4)
    items_B, weights_B = torch.arange(4.0), torch.tensor(weights)
    for _ in range(trials):
        reservoir = PriorityReservoir(2, ())
        reservoir.offer(items_B[:3], weights_B[:3], generator)
        reservoir.offer(items_B[3:], weights_B[3:], generator)
        counts[reservoir.items_R.long()] += 1
    for i, w in enumerate(weights):
        expected = w / total + sum(v / total * w / (total - v) for j, v in enumerate(weights) if j != i)
        assert abs(counts[i].item() / trials - expected) < 4.5 * math.sqrt(expected * (1 - expected) / trials)


def test_merge_of_two_is_one_over_the_union_and_order_is_irrelevant():
    generator = toys.seeded()
    items_ND = torch.randn(60, 3, generator=generator)
    keys_N = PriorityReservoir(10, (3,)).draw_keys(torch.rand(60, generator=generator), generator)
    whole, left, right, shuffled = (PriorityReservoir(10, (3,)) for _ in range(4))
    whole.merge(keys_N, items_ND)
    left.merge(keys_N[:25], items_ND[:25])
    right.merge(keys_N[25:], items_ND[25:])
    left.merge(right.keys_R, right.items_R)
    for part_N in torch.randperm(60, generator=generator).split(7):
        shuffled.merge(keys_N[part_N], items_ND[part_N])
    for other in (left, shuffled):
        assert torch.equal(whole.keys_R.sort().values, other.keys_R.sort().values)
        assert torch.equal(whole.contents(), other.contents())


@pytest.mark.parametrize("slots", [1, 30, 64])
def test_without_counting_as_on_a_gpu_it_is_the_same(slots, monkeypatch):
    generator, results = toys.seeded(), []
    batches = [
        (torch.rand(n, generator=generator).double(), torch.randn(n, 3, generator=generator)) for n in (40, 1, 99)
    ]
    for places in (reservoir_module._true_places, reservoir_module._padded_places):
        monkeypatch.setattr(reservoir_module, "_true_places", places)
        reservoir = PriorityReservoir(slots, (3,))
        for keys_N, items_ND in batches:
            reservoir.merge(keys_N, items_ND)
        results.append((reservoir.keys_R.sort().values, reservoir.contents()))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_an_item_stays_with_its_key():
    reservoir = PriorityReservoir(2, (2,))
    reservoir.merge(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([[1.0, 1.5], [3.0, 3.5], [2.0, 2.5]]))
    assert reservoir.contents().tolist() == [[3.0, 3.5], [2.0, 2.5]] and sorted(reservoir.keys_R.tolist()) == [2.0, 3.0]


def test_weight_zero_is_never_kept_and_a_short_stream_is_kept_whole():
    reservoir = PriorityReservoir(8, ())
    assert reservoir.contents().shape == (0,)
    reservoir.offer(torch.arange(5.0), torch.tensor([1.0, 0.0, 2.0, 0.0, 1e-30]), toys.seeded())
    assert sorted(reservoir.contents().tolist()) == [0.0, 2.0, 4.0]


def test_a_huge_weight_is_almost_surely_kept():
    reservoir = PriorityReservoir(1, ())
    reservoir.offer(torch.arange(100.0), torch.ones(100).index_fill(0, torch.tensor([7]), 1e9), toys.seeded())
    assert reservoir.contents().tolist() == [7.0]


def test_forward_decay_is_explicit_weight_scaling():
    decayed, plain = PriorityReservoir(5, (), half_life=3.0), PriorityReservoir(5, ())
    generator, twin = toys.seeded(), toys.seeded()
    weights_B = torch.rand(20, generator=toys.seeded(1), dtype=torch.float64)
    for offer in range(12):
        items_B = 20.0 * offer + torch.arange(20)
        decayed.offer(items_B, weights_B, generator)
        plain.offer(items_B, weights_B * 2 ** (offer / 3.0), twin)
    assert torch.allclose(decayed.keys_R, plain.keys_R) and torch.equal(decayed.items_R, plain.items_R)


def test_forward_decay_survives_a_billion_offers():
    reservoir, fresh = PriorityReservoir(5, (), half_life=1.0), PriorityReservoir(5, (), half_life=1.0)
    reservoir.offers = 10**9
    for one in (reservoir, fresh):
        one.offer(torch.arange(50.0), torch.ones(50), toys.seeded())
    assert reservoir.keys_R.isfinite().all() and torch.equal(reservoir.items_R, fresh.items_R)
    reservoir.offers += 100
    reservoir.offer(50 + torch.arange(50.0), torch.ones(50), toys.seeded(1))
    assert (reservoir.contents() >= 50).all(), "a hundred half-lives later only new items are left"


def test_state_round_trip_continues_bitwise():
    def offers(reservoir: PriorityReservoir, generator: torch.Generator, batches: range) -> None:
        for batch in batches:
            reservoir.offer(10.0 * batch + torch.arange(10), torch.ones(10), generator)

    whole, first, second = (PriorityReservoir(15, (), half_life=2.0) for _ in range(3))
    generator = toys.seeded()
    offers(first, generator, range(3))
    second.load_state_dict(first.state_dict())
    offers(second, generator, range(3, 6))
    offers(whole, toys.seeded(), range(6))
    assert torch.equal(whole.keys_R, second.keys_R) and torch.equal(whole.items_R, second.items_R)
    assert whole.offers == second.offers == 6


def assert_queues_equal_heapq(queues: BucketQueues, offered: list[list[tuple[float, int]]], held_capacity: int) -> None:
    for queue, entries in enumerate(offered):
        best = heapq.nlargest(held_capacity, entries)
        empty = held_capacity - len(best)
        assert queues.items_QC[queue].tolist() == [item for _, item in best] + [-1] * empty
        assert queues.keys_QC[queue].tolist() == [key for key, _ in best] + [-math.inf] * empty


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("count", "capacity"), [(1, 3), (5, 1), (8, 4), (64, 2)])
@pytest.mark.parametrize("case", ["random", "one bucket", "every other bucket"])
def test_bucket_queues_equal_heapq_nlargest_over_several_offers(seed, count, capacity, case):
    chance = random.Random(seed)
    queues, offered = BucketQueues(count, capacity), [[] for _ in range(count)]
    keys = chance.sample(range(-500, 500), 120)
    for start, end in ((0, 50), (50, 51), (51, 120)):
        falling = start == 51
        batch_keys = sorted(keys[start:end], reverse=True) if falling else keys[start:end]
        match case:
            case "random":
                where = [chance.randrange(count) for _ in batch_keys]
            case "one bucket":
                where = [count - 1 for _ in batch_keys]
            case _:
                where = [2 * chance.randrange((count + 1) // 2) for _ in batch_keys]
        for item, (queue, key) in enumerate(zip(where, batch_keys, strict=True), start):
            offered[queue].append((float(key), item))
        items_B = torch.arange(start, end)
        queues.offer(torch.tensor(where), torch.tensor(batch_keys).float(), items_B, ordered=falling)
        assert_queues_equal_heapq(queues, offered, capacity)


def test_bucket_queues_take_an_empty_offer():
    queues = BucketQueues(3, 2)
    queues.offer(torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert (queues.items_QC == -1).all()
