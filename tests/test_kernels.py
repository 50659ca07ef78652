"""fipo.kernels against the torch code that they stand for: on a GPU where there is one, else in an interpreter."""

import copy
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytest.importorskip("triton")

from fipo import kernels, reconstruction, search, sparse, train, update  # noqa: E402
from fipo.config import LSH, Optimiser, RunConfig  # noqa: E402
from fipo.graphs import Beside, StepGraphs  # noqa: E402
from fipo.state import build_state  # noqa: E402
from fipo.train import compute, numbers_of, padded, plan_of, train_step  # noqa: E402

needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
TINY = torch.finfo(torch.bfloat16).tiny


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=toys.seeded(seed)).to(DEVICE)


def numbers(count: int, below: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(below, (count,), generator=toys.seeded(seed)).to(DEVICE)


@pytest.fixture
def by_kernels(monkeypatch):
    """The torch code asks for kernels on this device too, or for nothing."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(reconstruction, "native_for", lambda *_given: None)
        for module in (reconstruction, search, sparse, update):
            monkeypatch.setattr(module, "kernels_for", lambda _tensor: kernels if on else None)

    return switch


# Sums over pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 256, 300])
def test_sum_rows_sums_every_segment_in_float32(dtype, width):
    """Segments of 0 to about 20 pairs; 31 of them, the last one empty."""
    rows_RD, row_N, weight_N = drawn(50, width).to(dtype), numbers(200, 50), drawn(200, seed=1)
    order_N, ends_S = sparse.grouped(numbers(200, 30, seed=2), 31)
    expected = torch.zeros(31, width, dtype=torch.float64, device=DEVICE)
    owner_N = torch.arange(31, device=DEVICE).repeat_interleave(ends_S.diff())
    expected.index_add_(0, owner_N, weight_N[order_N, None].double() * rows_RD[row_N[order_N]].double())
    for out in (torch.float32, torch.bfloat16):
        found = kernels.sum_rows(rows_RD, row_N[order_N], weight_N[order_N], ends_S, out)
        assert found.dtype == out and not found[30].any()
        assert torch.allclose(found.double(), expected, atol=1e-5, rtol=1e-5 if out == torch.float32 else 1e-2)


@pytest.mark.parametrize("count", [0, 1, 16, 151])
def test_row_products_are_inner_products(count):
    left_RD, right_RD, left_N, right_N = drawn(9, 300), drawn(20, 300, seed=1), numbers(count, 9), numbers(count, 20, 1)
    found = kernels.row_products(left_RD, left_N, right_RD, right_N)
    expected = (left_RD[left_N].double() * right_RD[right_N].double()).sum(1)
    assert found.shape == (count,) and torch.allclose(found.double(), expected, atol=1e-4)


@pytest.mark.parametrize("how", ["sum", "max"])
def test_reduce_segments(how):
    values_N = drawn(300).abs()
    order_N, ends_S = sparse.grouped(numbers(300, 5), 7)
    found = kernels.reduce_segments(values_N[order_N], ends_S, how)
    parts = [values_N[order_N][a:b] for a, b in ends_S.unfold(0, 2, 1).tolist()]
    expected = [0.0 if not len(part) else (part.sum() if how == "sum" else part.max()).item() for part in parts]
    assert len(parts[0]) > 32 and found.tolist() == pytest.approx(expected, rel=1e-6)


# The largest


@pytest.mark.parametrize("columns", [1, 5, 200, 1000, 4096])
@pytest.mark.parametrize("k", [1, 7, 64])
def test_largest_finds_the_k_largest_each_once_and_the_first_of_equals(columns, k):
    k = min(k, columns)
    for values_BF in (drawn(6, columns), drawn(6, columns).round(), torch.zeros(2, columns, device=DEVICE)):
        keys_BF = values_BF.bfloat16().view(torch.int16)
        found_BK = kernels.largest(keys_BF, k)
        expected_BK = keys_BF.int().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        assert torch.equal(found_BK, expected_BK)


@pytest.mark.parametrize("floor", [-1.0, 0.0, 0.9, 2.0, 1e30])
@pytest.mark.parametrize(("shape", "count"), [((8, 100), 40), ((5, 3000), 300), ((3, 50), 150), ((1, 1), 1)])
def test_largest_of_batch_keeps_all_ties_whatever_the_floor(floor, shape, count):
    values_BF = drawn(*shape).bfloat16()
    key = torch.tensor(floor, dtype=torch.bfloat16, device=DEVICE).view(torch.int16)
    places, found = kernels.largest_of_batch(values_BF.view(torch.int16), count, key)
    flat = values_BF.float().flatten()
    least = flat.topk(count).values.min().clamp_min(TINY)
    expected = (flat >= least).nonzero().squeeze(1)
    assert found == len(expected) and len(places) == count + count // 8
    assert torch.equal(places[:found], expected[: len(places)]) and (places < flat.numel()).all()


def test_what_is_no_normal_number_is_not_kept():
    """Bits 127 are the largest number below the normal ones; of four numbers, two are positive and normal."""
    keys_BF = torch.tensor([[127, 128, -5, 16_000]], dtype=torch.int16, device=DEVICE)
    places, found = kernels.largest_of_batch(keys_BF, 4, torch.zeros((), dtype=torch.int16, device=DEVICE))
    assert found == 2 and places[:2].tolist() == [1, 3]


def test_of_more_ties_than_there_is_room_for_the_last_are_missing():
    keys_BF = torch.ones(4, 100, dtype=torch.bfloat16, device=DEVICE).view(torch.int16)
    places, found = kernels.largest_of_batch(keys_BF, 16, torch.zeros((), dtype=torch.int16, device=DEVICE))
    assert found == 400 and places.tolist() == list(range(18))


# Loss and update


def some_codes(behind: int, batch: int = 7) -> sparse.Codes:
    """Tokens of 0 to about 20 pairs with 40 latents; the third has none. So many zeros stand behind them."""
    keep_BF = torch.rand(batch, 40, generator=toys.seeded(1)) < 0.3
    keep_BF[2:3] = False
    token_N, latent_N = keep_BF.nonzero(as_tuple=True)
    found = torch.tensor(len(token_N))
    fill = torch.arange(behind)
    token_N, latent_N = torch.cat([token_N, fill % batch]), torch.cat([latent_N, fill % 40])
    values_N = torch.rand(len(token_N), generator=toys.seeded(2)) * (torch.arange(len(token_N)) < found)
    given = (part.to(DEVICE) for part in (values_N, token_N, latent_N))
    return sparse.pairs(*given, batch, 40, found.to(DEVICE) if behind else None)


def error_and_gradients(codes: sparse.Codes, levels: int, s, plain: float, robust: float):
    """L_rec, x - x̂ and the gradients of values, decoder and bias."""
    values_N = codes.values_N.clone().requires_grad_()
    dec_FD, bias_D = (drawn(40, 300, seed=3) / 17).requires_grad_(), drawn(300, seed=4).requires_grad_()
    level_F = torch.arange(40, device=DEVICE) % levels if levels > 1 else None
    given = codes._replace(values_N=values_N), dec_FD, bias_D, drawn(codes.batch, 300, seed=5)
    loss, residual_BD = reconstruction.reconstruction_error(*given, level_F, levels, s, plain, robust)
    return loss, residual_BD, *torch.autograd.grad(2 * loss, (values_N, dec_FD, bias_D))


@pytest.mark.parametrize("levels", [1, 5])
@pytest.mark.parametrize(("s", "plain", "robust"), [(0.0, 0.0, 0.0), (0.5, 0.0, 1.0), (1.0, 0.3, 0.5)])
@pytest.mark.parametrize("behind", [0, 50])
def test_nested_error_and_its_gradient(levels, s, plain, robust, behind, by_kernels):
    codes = some_codes(behind)
    by_kernels(False)
    expected = error_and_gradients(codes, levels, s, plain, robust)
    by_kernels(True)
    for hold in (s, torch.tensor(s, device=DEVICE)):
        found = error_and_gradients(codes, levels, hold, plain, robust)
        real_N = codes.values_N > 0
        for ours, theirs in zip(found, expected, strict=True):
            ours, theirs = (part[real_N] if part.shape == real_N.shape else part for part in (ours, theirs))
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 31, 32, 33, 65])
def test_every_token_is_in_the_gradients(batch, by_kernels):
    """Of the bias too, which is added up in parts of the batch."""
    found = []
    for on in (True, False):
        by_kernels(on)
        found.append(error_and_gradients(some_codes(0, batch), 2, 0.5, 0.0, 1.0))
    assert all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6) for ours, theirs in zip(*found, strict=True))


def test_activations_may_be_of_any_layout(by_kernels):
    by_kernels(True)
    codes, dec_FD, bias_D, x_BD = some_codes(0), drawn(40, 300), drawn(300, seed=1), drawn(7, 300, seed=2)
    found = [reconstruction.reconstruction_error(codes, dec_FD, bias_D, x)[1] for x in (x_BD, x_BD.T.contiguous().T)]
    assert torch.equal(*found)
    assert torch.equal(*(kernels.scaled_rows(x, drawn(7), torch.float32) for x in (x_BD, x_BD.T.contiguous().T)))


def test_no_pair_has_a_bag_beyond_the_last(monkeypatch, by_kernels):
    """Which 16 bits might not hold: those that belong to no token have one bag, behind all others."""
    seen = []

    def grouped(group_N, groups):
        seen.append((group_N.max().item(), groups))
        return sparse.grouped(group_N, groups)

    by_kernels(True)
    monkeypatch.setattr(kernels.loss, "grouped", grouped)
    error_and_gradients(some_codes(50), 5, 0.5, 0.0, 1.0)
    assert seen == [(35, 35)]


def test_rows_are_scaled_and_rounded_once():
    rows_FD, factor_F = drawn(9, 300), drawn(9, seed=1)
    found = kernels.scaled_rows(rows_FD, factor_F, torch.bfloat16)
    expected = (rows_FD * factor_F[:, None]).bfloat16()
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found, expected, rtol=0 if GPU else 2**-7, atol=0), "the interpreter cuts off"


@pytest.mark.parametrize("name", ["run_6", "topk"])
def test_the_update_is_that_of_torch(name, by_kernels):
    """Three updates with the same gradients, one of them clipped; then one not finite, which changes nothing."""
    states = []
    for on in (True, False):
        by_kernels(on)
        state = build_state(toys.run_config(name), 0, torch.zeros(toys.WIDTH), 1.0, DEVICE)
        weights = list(state.sae.parameters())
        for step, size in enumerate((1e-3, 1e3, 1.0, float("nan"))):
            for place, weight in enumerate(weights):
                weight.grad = size * drawn(*weight.shape, seed=10 * step + place)
            before = [weight.detach().clone() for weight in weights]
            terms = [torch.zeros((), device=DEVICE)] * 4
            if size == size:
                update.update(state.sae, state.optimizer, terms, state.faults, step, 0.01, 1.0)
                assert all((new != old).any() for new, old in zip(weights, before, strict=True))
                assert torch.allclose(state.sae.dec_FD.norm(dim=1), torch.ones(toys.LATENTS, device=DEVICE))
            elif on:
                update.update(state.sae, state.optimizer, terms, state.faults, step, 0.01, 1.0)
                assert all(torch.equal(new, old) for new, old in zip(weights, before, strict=True))
                assert state.faults.found_5.tolist() == [False] * 4 + [True]
                update.update(state.sae, state.optimizer, terms, state.faults, step, 0.01, 1.0)
        states.append([*weights, *(state.optimizer.state[weight]["exp_avg_sq"] for weight in weights)])
    for ours, theirs in zip(*states, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


# The step


@pytest.mark.parametrize("name", ["run_6", "topk"])
@pytest.mark.parametrize("autocast", [False, True])
def test_steps_by_kernels_are_steps_without(name, autocast, by_kernels):
    """Weights and statistics after four steps."""
    config = toys.run_config(name, optimiser=Optimiser(autocast=autocast))
    found = []
    for on in (True, False):
        by_kernels(on)
        state = build_state(config, 0, torch.zeros(toys.WIDTH), 1.0, DEVICE)
        state.graphs = None
        for acts_BD in toys.activations(4):
            report = train_step(state, acts_BD.to(DEVICE))
        codes_BF = report.codes.dense()
        found.append((codes_BF, *state.sae.parameters(), state.importance.values(), report.residual_BD))
    assert (found[0][0] > 0).any()
    for ours, theirs in zip(*found, strict=True):
        near = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-4, "atol": 1e-5}  # bfloat16 has 8 bits
        assert torch.allclose(ours.detach(), theirs.detach(), **near)


@pytest.mark.parametrize("name", ["run_6", "topk"])
def test_what_a_recording_is_given_makes_no_difference(name):
    """Pairs that are filled up, and the schedules' numbers as tensors: the same step, to rounding."""
    config = toys.run_config(name)
    if config.lsh is not None:
        config = replace(config, lsh=replace(config.lsh, partners=2))
    states = [build_state(config, 0, torch.zeros(toys.WIDTH), 1.0, DEVICE) for _ in range(2)]
    for state in states:
        state.graphs = None
        for acts_BD in toys.activations(2):
            train_step(state, acts_BD.to(DEVICE))
    acts_BD = toys.activations(1, seed=5)[0].to(DEVICE)
    if config.lsh is not None:
        assert len(padded(states[0])) > len(states[0].pairs_P2) > 0
    plan, plain = plan_of(states[0], len(acts_BD)), numbers_of(states[0])
    tensors = train.Numbers(*(torch.tensor(number, device=DEVICE) for number in plain))
    compute(states[0], plan, plain, acts_BD, states[0].pairs_P2)
    compute(states[1], plan, tensors, acts_BD, padded(states[1]))
    one, other = (state.state_dict() for state in states)
    assert all(torch.allclose(one[key].double(), other[key].double(), rtol=1e-6, atol=1e-9) for key in one)


RECORDED = {
    "run_6": {},
    "settling": {"levels": replace(toys.run_config("run_6").levels, decoder_only=0.9)},
    "topk": {"aux_weight": 0.03},
    "batchtopk": {"architecture": "batchtopk", "aux_weight": 0.03},
}
"""Steps that are recorded: with every part, with the decoder alone learning nearly all the time, and without levels."""


def sparse_config(name: str, **changes: Any) -> RunConfig:
    return toys.run_config("run_6" if name in ("run_6", "settling") else "topk", **RECORDED[name], **changes)


@pytest.mark.parametrize("name", list(RECORDED))
def test_what_is_recorded_copies_nothing_from_the_processor(name, by_kernels, monkeypatch):
    """A recording of torch.tensor(number, device="cuda") is an error."""
    by_kernels(True)
    config = sparse_config(name, optimiser=Optimiser())
    state = build_state(config, 0, torch.zeros(toys.WIDTH), 1.0, DEVICE)
    first, second = (acts_BD.to(DEVICE) for acts_BD in toys.activations(2))
    state.step = 6
    plan = plan_of(state, len(first))
    assert plan.frozen == (name == "settling")
    numbers = train.Numbers(*(torch.full((), number, device=DEVICE) for number in numbers_of(state)))
    compute(state, plan, numbers, first, padded(state))

    def refuse(given, *_settings, **_named):
        assert isinstance(given, torch.Tensor), "a copy from the processor"
        return given

    monkeypatch.setattr(torch, "as_tensor", refuse)
    monkeypatch.setattr(torch, "tensor", refuse)
    compute(state, plan, numbers, second, padded(state))


def run_without_recording(_graphs, step, _plan, tensors, numbers, _generator):
    return step(*tensors, *(torch.full((), number, device=DEVICE) for number in numbers))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dead", [100, 10**6])
@pytest.mark.parametrize("name", list(RECORDED))
def test_recorded_steps_equal_steps_bit_by_bit(name, dead, monkeypatch):
    """Two latents are silent, in the end dead or not; memory that nobody holds is written over between the steps."""
    config = sparse_config(name, steps=40, optimiser=Optimiser())
    config = replace(
        config,
        workload=replace(config.workload, dead_tokens=dead),
        reservoir=config.reservoir if dead == 10**6 else None,
        lsh=replace(config.lsh or LSH(), partners=2, refresh_every=7) if config.lsh else None,
    )
    found, recorded = [], 0
    for record in (True, False):
        if not record:
            monkeypatch.setattr(StepGraphs, "run", run_without_recording)
        state = build_state(config, 0, torch.zeros(toys.WIDTH), 1.0, "cuda")
        state.sae.enc_bias_F.data[[2, 3]] = -100.0
        for acts_BD in toys.activations(30):
            report = train_step(state, acts_BD.cuda())
            assert len([torch.ones(toys.LATENTS, device="cuda") for _ in range(2000)]) == 2000
        assert state.importance.silent_tokens_F.max() > 20 * toys.BATCH
        assert (report.terms.auxiliary > 0) == (dead == 100 and name != "settling")
        recorded += len(state.graphs._recorded)
        found.append(state.state_dict() | {"loss": report.terms.total.clone(), "residual": report.residual_BD.clone()})
    assert recorded > 0
    assert [key for key in found[0] if not torch.equal(found[0][key], found[1][key])] == []


def test_a_gpu_is_asked_for_dead_latents_when_it_is_waited_for_and_has_places_for_all_that_will_be():
    """One latent was silent for 100 tokens at first, five for 40, the others never; a step has 16, 300 are dead."""
    config = toys.run_config("run_6", workload=toys.workload(dead_tokens=300))
    state, asked = build_state(config, 0, torch.zeros(toys.WIDTH), 1.0), []
    first_F = torch.zeros(toys.LATENTS, dtype=torch.int64)
    first_F[3], first_F[5:10] = 100, 40
    silent_F = None

    class OnGpu:
        device = SimpleNamespace(type="cuda")

        def __ge__(self, least):
            asked.append(state.step)
            return silent_F >= least

        def __len__(self):
            return toys.LATENTS

    state.importance.silent_tokens_F = OnGpu()
    places, dead = [], []
    for state.step in range(40):
        silent_F = torch.where(first_F > 0, first_F + toys.BATCH * state.step, 0)
        places.append(train.dead_places(state, toys.BATCH))
        dead.append(int((silent_F >= 300).sum()))
    assert asked == [0, 16, 32] and places == [1] * 16 + [8] * 24
    assert dead[12:14] == [0, 1] and dead[16:18] == [1, 6] and dead[-1] == 6


def test_places_for_dead_latents_are_resumed():
    """They are asked for now and then alone: a run that goes on in between must know them."""
    config = toys.run_config("run_6")
    states = [build_state(config, 0, torch.zeros(toys.WIDTH), 1.0) for _ in range(2)]
    states[0].dead_places = 8
    states[1].load_state_dict(states[0].state_dict())
    assert states[1].dead_places == 8


@pytest.mark.parametrize("partners", [2, None])
def test_pairs_that_nobody_reads_are_in_no_recording(partners):
    config = toys.run_config("run_6", penalty=None, lsh=LSH(partners=partners), optimiser=Optimiser())
    state = build_state(config, 0, torch.zeros(toys.WIDTH), 1.0)
    train_step(state, toys.activations(1)[0])
    assert len(state.pairs_P2) > 0 and train.recordable(state) and padded(state).shape == (0, 2)


@pytest.mark.parametrize("places", [2, 5, toys.LATENTS])
def test_more_places_than_dead_latents_change_nothing(places):
    state = build_state(
        toys.run_config("run_6", workload=toys.workload(dead_tokens=300)), 0, torch.zeros(toys.WIDTH), 1.0
    )
    x_BD, residual_BD = toys.activations(2)
    state.importance.silent_tokens_F[[7, 3]] = torch.tensor([300, 900])
    found = []
    for some in (2, places):
        state.sae.zero_grad()
        loss = train.dead_loss(state, x_BD, residual_BD, some)
        loss.backward()
        found.append((loss, state.sae.enc_FD.grad, state.sae.dec_FD.grad, state.sae.enc_bias_F.grad))
    assert found[0][0] > 0 and found[0][1].abs().sum(1).nonzero().flatten().tolist() == [3, 7]
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-8) for one, other in zip(*found, strict=True))
    state.importance.silent_tokens_F.zero_()
    assert train.dead_loss(state, x_BD, residual_BD, places) == 0


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_notices_dead_latents_at_the_step_at_which_a_processor_does():
    config = toys.run_config("run_6", steps=40, optimiser=Optimiser())
    seen = {}
    for device in ("cpu", "cuda"):
        state = build_state(config, 0, torch.zeros(toys.WIDTH), 1.0, device)
        state.sae.enc_bias_F.data[[2, 3]] = -100.0
        batches = (acts_BD.to(device) for acts_BD in toys.activations(6))  # a recording's next step writes over it
        seen[device] = [train_step(state, acts_BD).terms.auxiliary.item() > 0 for acts_BD in batches]
    assert seen["cpu"] == seen["cuda"] and True in seen["cpu"] and not seen["cpu"][0]


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_training_follows_a_processor_s():
    config = toys.run_config("run_6", steps=40)
    states = [build_state(config, 0, torch.zeros(toys.WIDTH), 1.0, device) for device in ("cpu", "cuda")]
    config_lsh = replace(config, lsh=None, penalty=None, reservoir=None, levels=replace(config.levels, drawn=False))
    for state in states:  # what draws from generators, which differ by device, is off
        state.config, state.reservoir = config_lsh, None
    for acts_BD in toys.activations(20):
        reports = [train_step(state, acts_BD.to(state.sae.dec_FD.device)) for state in states]
    assert reports[1].fvu == pytest.approx(reports[0].fvu, rel=1e-3)
    assert torch.allclose(states[1].sae.dec_FD.cpu(), states[0].sae.dec_FD, atol=1e-3)


@pytest.mark.gpu
@needs_gpu
def test_states_trained_beside_one_another_are_those_trained_alone():
    """Products large enough to need memory of their own, and all of them at once: each lane begins by waiting."""
    found, batches = [], toys.activations(24, batch=4096, width=256)
    text = replace(toys.workload().text, buffer_tokens=4096)
    sizes = {"batch_tokens": 4096, "train_tokens": 4096 * 40, "latents": 2048, "k": 32, "dead_tokens": 20_000}
    workload = toys.workload(text=text, **sizes)
    configs = [
        replace(sparse_config(name, optimiser=Optimiser()), workload=workload) for name in ("run_6", "batchtopk")
    ]
    configs[0] = replace(configs[0], lsh=replace(configs[0].lsh, partners=2))
    for beside in (False, True):
        states = [build_state(config, 0, torch.zeros(256), 1.0, "cuda") for config in [*configs, configs[0]]]
        lanes = [Beside(torch.device("cuda", 0) if beside else None) for _ in states]
        for acts_BD in (acts_BD.cuda() for acts_BD in batches):
            for lane, state in zip(lanes, states, strict=True):
                lane.fork()
                with lane.work():
                    torch.cuda._sleep(10**7)
                    train_step(state, acts_BD)
            for lane in lanes:
                lane.join()
        assert all(state.graphs._recorded for state in states)
        found.append([state.state_dict() for state in states])
    for alone, together in zip(*found, strict=True):
        assert [key for key in alone if not torch.equal(alone[key], together[key])] == []


@pytest.mark.gpu
@needs_gpu
def test_work_beside_the_rest_waits_for_what_was_before_and_is_waited_for():
    beside, values = Beside(torch.device("cuda", 0)), torch.zeros(4, device="cuda")
    torch.cuda._sleep(10**8)
    values += 1
    beside.fork()
    with beside.work():
        torch.cuda._sleep(10**8)
        values *= 5
    beside.join()
    values += 1
    assert values.tolist() == [6.0] * 4


def test_what_cublas_works_in_is_a_recording_s_own(monkeypatch):
    """A twin of the one before: it is let go before and after each recording, and after one that failed nothing is
    left to be joined."""
    log = []

    @contextmanager
    def recording(_graph, **_pool):
        log.append("record")
        yield

    graph = SimpleNamespace(register_generator_state=lambda _generator: None, pool=lambda: 1)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: log.append("clear"), raising=False)
    graphs = StepGraphs()
    graphs._record(lambda: None, "a", toys.seeded())
    assert log == ["clear", "record", "clear"]
    monkeypatch.setattr(graphs.beside, "join", lambda: log.append("join"))
    with pytest.raises(ZeroDivisionError):
        graphs._record(lambda: 1 // 0, "b", toys.seeded())
    assert log[3:] == ["clear", "record", "join"] and set(graphs._recorded) == {"a"}


def test_a_copy_has_no_recordings():
    graphs = StepGraphs()
    graphs._met.add("a")
    copied = copy.deepcopy({"graphs": graphs})["graphs"]
    assert copied is not graphs and copied._met == set() and copied.device is graphs.device


def test_recordings_of_another_shape_begin_anew(monkeypatch):
    """Which step is run at once, recorded, replayed; recording itself is left out."""
    graphs, log = StepGraphs(), []

    def record(step, plan, _generator):
        log.append(f"record {plan}")
        graph = SimpleNamespace(replay=lambda: log.append(f"replay {plan}"))
        graphs._recorded[plan] = graph, step(*graphs._tensors, *graphs._numbers)

    monkeypatch.setattr(graphs, "_record", record)

    def run(plan, rows):
        return graphs.run(
            lambda x, one: (log.append(f"step {one:.0f}"), x.shape[0])[1],
            plan,
            [torch.zeros(rows)],
            [1.0],
            toys.seeded(),
        )

    assert [run("a", 3), run("a", 3), run("a", 3), run("b", 3), run("b", 4), run("b", 4)] == [3, 3, 3, 3, 4, 4]
    first = ["step 1", "record a", "step 1", "replay a", "replay a"]
    assert log == [*first, "step 1", "step 1", "record b", "step 1", "replay b"] and set(graphs._recorded) == {"b"}
