"""fipo.data.buffer: every row once an epoch, in seeded order, from a pool that never grows; exact resume from both
kinds of source."""

import pytest
import torch
from toys import seeded

from fipo.data import shards
from fipo.data.buffer import LiveSource, ShuffleBuffer, StoredSource
from fipo.data.harvest import Chunk
from fipo.data.store import open_or_harvest
from fipo.errors import UserError

ROWS, CAPACITY, BATCH = 96, 40, 8


def rows_NLD():
    """Row n holds n in layer 0 and -n in layer 1."""
    number_N = torch.arange(float(ROWS))
    return torch.stack([number_N, -number_N], dim=1)[:, :, None].repeat(1, 1, 3)


def produce(skip=0):
    for start in range(skip, ROWS, 13):
        acts_NLD = rows_NLD()[start : start + 13]
        yield Chunk(acts_NLD, torch.arange(len(acts_NLD)), torch.arange(len(acts_NLD)))


@pytest.fixture(params=["stored", "live"])
def make_source(request, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 30)

    def stored():
        return StoredSource(open_or_harvest({"rows": ROWS}, produce, tokens=ROWS))

    return {"stored": stored, "live": lambda: LiveSource(produce)}[request.param]


def make_buffer(source, seed=0):
    return ShuffleBuffer(source, CAPACITY, BATCH, seeded(seed))


def numbers(batch_BLD):
    assert batch_BLD.shape == (BATCH, 2, 3) and torch.equal(batch_BLD[:, 0], -batch_BLD[:, 1])
    return batch_BLD[:, 0, 0].int().tolist()


def test_every_row_is_served_once_an_epoch(make_source):
    """What was served and what the pool still holds is what was read: no row lost, none doubled."""
    buffer = make_buffer(make_source())
    served = []
    for _ in range(40):  # more than three epochs
        served += numbers(buffer.next_batch())
        held = buffer.pool_RLD[: buffer.filled, 0, 0].int().tolist()
        assert buffer.filled == CAPACITY - BATCH and [place % ROWS for place in buffer.places_R[:32].tolist()] == held
        read = [place % ROWS for place in range(len(served) + len(held))]
        assert sorted(served + held) == sorted(read)


def test_batches_mix_the_pool(make_source):
    batch = numbers(make_buffer(make_source()).next_batch())
    assert batch != sorted(batch) and max(batch) > 2 * BATCH


def test_order_depends_on_the_seed_alone(make_source):
    def order(seed):
        buffer = make_buffer(make_source(), seed)
        return [numbers(buffer.next_batch()) for _ in range(20)]

    assert order(0) == order(0) != order(1)


def test_pool_is_allocated_once(make_source):
    buffer = make_buffer(make_source())
    buffer.fill()
    place, size = buffer.pool_RLD.data_ptr(), buffer.pool_RLD.shape
    for _ in range(30):
        buffer.next_batch()
    assert buffer.pool_RLD.data_ptr() == place and buffer.pool_RLD.shape == size == (CAPACITY, 2, 3)


def test_a_batch_stays_as_it_was_when_the_pool_moves_on(make_source):
    buffer = make_buffer(make_source())
    first = buffer.next_batch()
    before = first.clone()
    for _ in range(10):
        buffer.next_batch()
    assert torch.equal(first, before)


@pytest.mark.parametrize("steps", [0, 1, 7, 8, 12, 13, 25])  # 7 and 8: the end of the first epoch lies in the pool
def test_resume_is_bitwise(make_source, steps):
    straight = make_buffer(make_source())
    straight.fill()
    for _ in range(steps):
        straight.next_batch()
    state = {name: value.clone() for name, value in straight.state_dict().items()}
    resumed = make_buffer(make_source(), seed=5)
    resumed.load_state_dict(state)
    for _ in range(30):
        assert torch.equal(resumed.next_batch(), straight.next_batch())


def test_saving_changes_nothing(make_source):
    watched, other = make_buffer(make_source()), make_buffer(make_source())
    for _ in range(15):
        watched.state_dict()
        assert torch.equal(watched.next_batch(), other.next_batch())


def test_state_holds_rows_only_where_the_source_cannot_read_them_again(make_source):
    buffer = make_buffer(make_source())
    buffer.next_batch()
    stored = isinstance(buffer.source, StoredSource)
    assert ("pool_NLD" in buffer.state_dict()) == (not stored)
    if not stored:
        assert buffer.state_dict()["pool_NLD"].shape == (CAPACITY - BATCH, 2, 3)


def test_pool_larger_than_the_text(make_source):
    buffer = ShuffleBuffer(make_source(), 2 * ROWS, BATCH, seeded())
    held = buffer.fill()[:, 0, 0].int().tolist()
    assert sorted(held) == sorted([*range(ROWS), *range(ROWS)])


def test_live_source_asks_the_model_only_for_what_is_left():
    asked = []

    def watched(skip):
        asked.append(skip)
        return produce(skip)

    buffer = make_buffer(LiveSource(watched))
    buffer.next_batch()
    resumed = make_buffer(LiveSource(watched))
    resumed.load_state_dict(buffer.state_dict())
    resumed.next_batch()
    assert asked == [0, 0, CAPACITY]


def test_live_source_without_text_is_told():
    with pytest.raises(UserError, match="no content token is left to train on"):
        LiveSource(lambda _skip: iter(())).take(1)
