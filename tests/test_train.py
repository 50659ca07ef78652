"""fipo.train and fipo.randomness: the step as a whole. Resume is bitwise, measuring is free, phases hold."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys

from fipo import levels as fipo_levels
from fipo import objective, reconstruction, train
from fipo.checkpoint import load_tensors, save_tensors
from fipo.config import LSH, Levels, Optimiser, Penalty, RunConfig
from fipo.errors import UserError
from fipo.metrics import max_cosines, quality
from fipo.randomness import generator_for
from fipo.schedules import active_latents, first_decoder_only, learning_rate, order_share, penalty_share, stop_gradient
from fipo.sparse import Codes
from fipo.state import TrainState
from fipo.train import loss_terms, numbers_of, plan_of, step_order, train_step

REFERENCE = json.loads((Path(__file__).parent / "fixtures" / "saelens.json").read_text(encoding="utf-8"))["losses"]
FIXED = {
    "order": "fixed",
    "drawn": False,
    "short_power": 1.0,
    "favour": (0.0, 0.0, 0.0),
    "robust": 0.0,
    "decoder_only": 0.0,
}
MATRYOSHKA = Levels(**FIXED, shares=(0.25, 0.5, 1.0), stop_gradient=0.0)
PLAIN = Levels(**FIXED, shares=(0.25, 1.0), stop_gradient=1.0, plain=1.0)
RUNS = ["run_0", "run_3", "run_6", "jumprelu", "topk"]


def run(state: TrainState, batches: list[torch.Tensor]) -> TrainState:
    for acts_BD in batches:
        train_step(state, acts_BD)
    return state


def snapshot(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in state.state_dict().items()}


def terms_of(state: TrainState, x_BD: torch.Tensor, pre_BF: torch.Tensor | None, codes: Codes | torch.Tensor):
    """The terms of the state's next step."""
    plan, numbers = plan_of(state, len(x_BD)), numbers_of(state)
    order = step_order(state, numbers)
    return loss_terms(state, plan, numbers, x_BD, pre_BF, codes, order, state.pairs_P2)


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def with_long_dead(state: TrainState, latents: list[int]) -> TrainState:
    """Silence these latents for good, as if they had long been."""
    state.sae.enc_bias_F.data[latents] = -100.0
    state.importance.silent_tokens_F[latents] = 10**6
    return state


# The loss


@pytest.mark.parametrize("name", RUNS)
def test_terms_are_the_ones_switched_on_and_sum_to_the_total(name):
    state = with_long_dead(toys.fresh(toys.run_config(name)), [2, 3])
    for acts_BD in toys.activations(2):
        terms = train_step(state, acts_BD).terms
    assert terms.total.item() == pytest.approx(sum(term.item() for term in terms), rel=1e-6)
    on = {field for field, term in terms._asdict().items() if term > 0}
    expected = {
        "run_0": {"sparsity"},
        "run_3": {"sparsity", "orthogonality"},
        "run_6": {"auxiliary", "orthogonality"},
        "jumprelu": {"sparsity"},
        "topk": set(),
    }
    assert on == {"reconstruction"} | expected[name]


def test_the_optimiser_sees_the_sum_of_the_terms(monkeypatch):
    """Gradients of one step equal those of the terms added by hand."""
    config = toys.run_config("run_3")
    config = replace(config, optimiser=replace(config.optimiser, clip=1e9))
    state, twin = run(toys.fresh(config), toys.activations(2)), run(toys.fresh(config), toys.activations(2))
    (acts_BD,) = toys.activations(1, seed=8)
    monkeypatch.setattr(state.sae, "project_decoder_gradient", lambda: None)
    train_step(state, acts_BD)
    sae, share = twin.sae, penalty_share(config, 2)
    codes_BF = (acts_BD @ sae.enc_FD.T + sae.enc_bias_F).relu()
    loss = (acts_BD - codes_BF @ sae.dec_FD - sae.dec_bias_D).pow(2).mean()
    loss = loss + share * 0.01 * (codes_BF.sum(1).mean())
    omega = objective.orthogonality(sae.dec_FD, twin.importance.values(), twin.pairs_P2)
    loss = loss + share * 0.3 * omega
    twin.optimizer.zero_grad()
    loss.backward()
    assert torch.allclose(sae.enc_FD.grad, state.sae.enc_FD.grad, atol=1e-6)
    along_FD = 0.01 * share * codes_BF.detach().mean(0)[:, None] * sae.dec_FD.detach()
    assert torch.allclose(sae.dec_FD.grad + along_FD, state.sae.dec_FD.grad, atol=1e-6), "L1 also pulls at the norm"


def test_reports_measure_the_step_s_batch():
    state = toys.fresh(toys.run_config("topk", optimiser=Optimiser(k_start=1.0, autocast=False)))
    (acts_BD,) = toys.activations(1)
    with torch.no_grad():
        state.sae.train()
        x_hat_BD, codes_BF = state.sae(acts_BD), state.sae.encode(acts_BD)
    report = train_step(state, acts_BD)
    assert report.fvu == pytest.approx(((acts_BD - x_hat_BD).pow(2).sum() / acts_BD.pow(2).sum()).item(), rel=1e-5)
    assert report.l0 == (codes_BF > 0).sum().item() / toys.BATCH
    assert not any(term.requires_grad for term in report.terms) and not report.residual_BD.requires_grad


# Nothing outside the state matters


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_bitwise_and_a_fresh_run_is_not(name, tmp_path):
    """12 steps = 7 + save + load into a fresh state + 5; the split is between two refreshes of the pairs."""
    config, batches = toys.run_config(name, steps=12), toys.activations(12)
    dead = [1, 5, 6, 9]
    whole = run(with_long_dead(toys.fresh(config), dead), batches)
    first = run(with_long_dead(toys.fresh(config), dead), batches[:7])
    save_tensors(tmp_path / "state.safetensors", first.state_dict())
    second = toys.fresh(config)
    second.load_state_dict(load_tensors(tmp_path / "state.safetensors"))
    assert not differing(snapshot(first), snapshot(second))
    run(second, batches[7:])
    assert not differing(snapshot(whole), snapshot(second))
    without = run(toys.fresh(config), batches[7:])
    assert {"sae.dec_FD", "sae.enc_FD", "adam.dec_FD.exp_avg", "importance.mean_F", "step"} <= set(
        differing(snapshot(whole), snapshot(without))
    )
    if name in ("run_3", "run_6"):
        assert len(first.pairs_P2) > 5, "else the pairs would not be tested"


def test_state_dict_of_a_fresh_state_loads():
    config = toys.run_config("run_6")
    state, other = toys.fresh(config), toys.fresh(replace(config, seed=7))
    other.load_state_dict(snapshot(state))
    assert not differing(snapshot(run(state, toys.activations(3))), snapshot(run(other, toys.activations(3))))


@pytest.mark.parametrize("name", RUNS)
def test_measuring_does_not_change_training(name):
    config, batches, held_out = toys.run_config(name), toys.activations(12), toys.activations(2, seed=9)
    plain, measured = toys.fresh(config), toys.fresh(config)
    for acts_BD in batches:
        train_step(plain, acts_BD)
        for _ in range(2):
            quality(measured.sae, held_out)
        report = train_step(measured, acts_BD)
        for _ in range(2):
            assert report.fvu > 0 and report.l0 > 0
            quality(measured.sae, held_out)
            max_cosines(measured.sae.dec_FD)
            measured.importance.values()
            measured.state_dict()
            measured.sae(held_out[0])  # in training mode, as a step leaves it
        assert not differing(snapshot(plain), snapshot(measured))


def test_two_equal_runs_are_bitwise_equal_and_other_seeds_are_not():
    config, batches = toys.run_config("run_6"), toys.activations(5)
    one, same, other = (run(toys.fresh(c), batches) for c in (config, config, replace(config, seed=43)))
    assert not differing(snapshot(one), snapshot(same))
    assert not torch.equal(one.sae.dec_FD, other.sae.dec_FD)


def test_every_purpose_has_a_stream_of_its_own():
    purposes = [(42, "init", 0), (42, "init", 1), (42, "train", 0), (43, "init", 0), (42, "init"), (4, "2", "init", 0)]
    draws = {purpose: torch.rand(4, generator=generator_for(*purpose)) for purpose in purposes}
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == len(purposes)
    assert torch.equal(draws[42, "init", 0], torch.rand(4, generator=generator_for(42, "init", 0)))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    run(toys.fresh(toys.run_config("run_6")), toys.activations(4))
    assert torch.equal(before, torch.get_rng_state())


def test_a_fresh_sae_does_not_start_at_a_planted_dictionary_of_the_same_seed():
    """The trap of METHOD 4b: truth drawn from the run's own seed."""
    truth_FD = torch.randn(toys.LATENTS, toys.WIDTH, generator=torch.Generator().manual_seed(42))
    truth_FD /= truth_FD.norm(dim=1, keepdim=True)
    overlap_F = (toys.fresh(toys.run_config("run_0")).sae.dec_FD @ truth_FD.T).amax(1)
    assert overlap_F.mean() < 0.85 and overlap_F.max() < 0.999


# Weights


@pytest.mark.parametrize("name", RUNS)
def test_decoder_rows_have_unit_norm_after_every_step(name):
    state = toys.fresh(toys.run_config(name))
    for acts_BD in toys.activations(12):
        before_FD = state.sae.dec_FD.detach().clone()
        train_step(state, acts_BD)
        assert torch.allclose(state.sae.dec_FD.norm(dim=1), torch.ones(toys.LATENTS), atol=1e-6)
        assert not torch.equal(before_FD, state.sae.dec_FD)


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu", "relu"])
def test_last_phase_leaves_the_encoder_bitwise_and_trains_the_decoder(architecture):
    config = toys.run_config("run_6", architecture=architecture, levels=Levels(shares=(0.5, 1.0), decoder_only=0.25))
    batches = toys.activations(12)
    state = run(toys.fresh(config), batches[:9])
    assert first_decoder_only(config) == 9
    encoder = [name for name, _ in state.sae.named_parameters() if name not in ("dec_FD", "dec_bias_D")]
    before = snapshot(state)
    for acts_BD in batches[9:]:
        report = train_step(state, acts_BD)
        assert report.terms.sparsity == 0 and report.terms.auxiliary == 0 and report.terms.orthogonality > 0
        squared = report.residual_BD.pow(2).mean()
        assert report.terms.reconstruction > 1.01 * squared, "by levels"
    changed = differing(before, snapshot(state))
    assert len(encoder) >= 2 and not {f"sae.{name}" for name in encoder} & set(changed)
    assert {"sae.dec_FD", "sae.dec_bias_D"} <= set(changed)


def test_plain_mixes_in_the_unlevelled_reconstruction():
    def reconstruction(plain: float) -> float:
        levels = replace(MATRYOSHKA, stop_gradient=1.0, plain=plain)
        state = toys.fresh(toys.run_config("topk", levels=levels))
        return train_step(state, toys.activations(1)[0]).terms.reconstruction.item()

    assert reconstruction(0.3) == pytest.approx(0.7 * reconstruction(0.0) + 0.3 * reconstruction(1.0))
    plain, topk = (toys.fresh(toys.run_config("topk", **part)) for part in ({"levels": PLAIN}, {}))
    for state in (plain, topk):
        train_step(state, toys.activations(1)[0])
    assert torch.allclose(plain.sae.dec_FD, topk.sae.dec_FD, atol=1e-6), "no stop-gradient is left"


def test_a_loss_that_is_not_finite_stops_before_the_update():
    state = run(toys.fresh(toys.run_config("run_3")), toys.activations(3))
    before = snapshot(state)
    bad_BD = toys.activations(1, seed=4)[0]
    bad_BD[3, 2] = torch.inf
    with pytest.raises(UserError, match=r"step 3: the loss is not finite \(reconstruction, sparsity\)"):
        train_step(state, bad_BD)
    after = snapshot(state)
    changed = differing(before, after)
    assert not [name for name in changed if name.startswith(("sae.", "adam.", "importance.", "reservoir."))]


@pytest.mark.parametrize("name", ["run_3", "run_6", "jumprelu", "topk"])
def test_a_batch_that_is_not_finite_leaves_no_trace_in_what_follows(name):
    """Whoever catches the error may go on: weights, moments and σ are as if the batch had never been."""
    config, good = toys.run_config(name), toys.activations(3)
    bad_BD = toys.activations(1, seed=4)[0]
    bad_BD[3, 2] = torch.nan
    state = run(toys.fresh(config), good[:2])
    with pytest.raises(UserError, match="the loss is not finite"):
        train_step(state, bad_BD)
    before = snapshot(run(toys.fresh(config), good[:2]))
    touched = [name for name in differing(before, snapshot(state)) if name.startswith(("sae.", "adam.", "importance."))]
    assert not touched
    train_step(state, good[2])
    assert all(value.isfinite().all() for value in snapshot(state).values() if value.is_floating_point())


def test_a_state_whose_encoder_never_learned_resumes(tmp_path):
    config = toys.run_config("run_6", steps=12, levels=Levels(shares=(0.5, 1.0), decoder_only=0.99))
    whole, first = (run(toys.fresh(config), toys.activations(12)[:stop]) for stop in (12, 5))
    save_tensors(tmp_path / "state.safetensors", first.state_dict())
    second = toys.fresh(config)
    second.load_state_dict(load_tensors(tmp_path / "state.safetensors"))
    assert not differing(snapshot(whole), snapshot(run(second, toys.activations(12)[5:])))
    for other, name in ((config, "dec_FD"), (toys.run_config("run_6", steps=12), "enc_FD")):
        tensors = run(toys.fresh(other), toys.activations(5)).state_dict()
        with pytest.raises(UserError, match=f"tensor adam.{name}.exp_avg is missing"):
            toys.fresh(other).load_state_dict(
                {key: value for key, value in tensors.items() if f"adam.{name}" not in key}
            )


def test_gradients_are_clipped():
    config = toys.run_config("topk", optimiser=Optimiser(autocast=False, clip=0.01))
    state = toys.fresh(config)
    train_step(state, [100 * batch for batch in toys.activations(1)][0])
    moments = [state.optimizer.state[p]["exp_avg"] for p in state.sae.parameters()]
    norm = torch.stack([moment.norm() for moment in moments]).norm() / (1 - 0.9)
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("clip", [0.01, 1e9])
def test_the_step_is_adam_s_after_clipping(clip):
    """The scale that fused Adam divides by leaves what clipping and a plain Adam leave."""
    config = toys.run_config("topk", optimiser=Optimiser(autocast=False, clip=clip))
    state = toys.fresh(config)
    free = toys.fresh(replace(config, optimiser=Optimiser(autocast=False, clip=1e9)))
    for acts_BD in toys.activations(3):
        free.load_state_dict(snapshot(state))
        train_step(free, acts_BD)
        gradient_FD, before_FD = free.sae.enc_FD.grad, state.sae.enc_FD.detach().clone()
        free.sae.dec_FD.data.copy_(state.sae.dec_FD)  # the rows of which the gradient loses its part along them
        free.sae.project_decoder_gradient()
        norm = torch.stack([p.grad.norm() for p in free.sae.parameters()]).norm()
        gradient_FD = gradient_FD * (clip / norm).clamp_max(1)
        old = state.optimizer.state[state.sae.enc_FD]
        mean_FD, square_FD = (old[m].clone() if old else torch.zeros(()) for m in ("exp_avg", "exp_avg_sq"))
        train_step(state, acts_BD)
        mean_FD = (0.9 * mean_FD + 0.1 * gradient_FD) / (1 - 0.9**state.step)
        square_FD = (0.999 * square_FD + 0.001 * gradient_FD.pow(2)) / (1 - 0.999**state.step)
        moved_FD = learning_rate(config, state.step - 1) * mean_FD / (square_FD.sqrt() + 1e-8)
        assert torch.allclose(state.sae.enc_FD, before_FD - moved_FD, atol=1e-6)
    assert (norm > 0.01).all()


def test_autocast_is_close_to_float32():
    config, batches = toys.run_config("run_6"), toys.activations(6)
    exact = run(toys.fresh(config), batches)
    cast = run(toys.fresh(replace(config, optimiser=Optimiser(autocast=True))), batches)
    assert not torch.equal(exact.sae.dec_FD, cast.sae.dec_FD)
    cosines_F = (exact.sae.dec_FD * cast.sae.dec_FD).sum(1)
    assert cosines_F.mean() > 0.99 and cast.sae.dec_FD.dtype == torch.float32


# Rivals and controls


def with_reference_weights(state: TrainState) -> dict[str, torch.Tensor]:
    """Load the tensors on which SAELens' losses were computed; returns them."""
    tensors = {name: torch.tensor(value) for name, value in REFERENCE["tensors"].items()}
    tensors["enc_FD"] = tensors.pop("enc_DF").T
    for name in ("enc_FD", "enc_bias_F", "dec_FD", "dec_bias_D"):
        getattr(state.sae, name).data.copy_(tensors[name])
    return tensors


@pytest.mark.parametrize("name", ["relu", "topk", "batchtopk", "matryoshka", "jumprelu"])
def test_loss_and_gradients_equal_those_of_saelens(name):
    """Its loss sums over D and over the levels where ours averages, and its gradients are ours times D and M.

    The gradient to the encoder of jumprelu is that of the kept codes in both; thresholds are not compared, since
    SAELens' estimate multiplies the step by the threshold where ours multiplies it by the pre-activation.
    """
    expected, levels = REFERENCE["classes"][name], 3 if name == "matryoshka" else 1
    workload = toys.workload(latents=12, k=3, sparsity_penalty=REFERENCE["sparsity"] / 6)
    state = toys.fresh(
        toys.run_config(
            "run_0",
            workload=workload,
            architecture="batchtopk" if name == "matryoshka" else name,
            levels=MATRYOSHKA if levels > 1 else None,
            optimiser=Optimiser(autocast=False, penalty_warmup=0.0),
        ),
        width=6,
    )
    x_BD = with_reference_weights(state)["x_BD"]
    sae = state.sae.train()
    pre_BF = sae.pre_codes(x_BD)
    codes_BF = sae.activation(pre_BF)
    assert (codes_BF > 0).sum().item() / len(x_BD) == expected["l0"]
    terms, _ = terms_of(state, x_BD, pre_BF, codes_BF)
    scale = 6 * levels
    reconstruction = sum(value for part, value in expected["losses"].items() if "mse" in part)
    assert scale * terms.reconstruction.item() == pytest.approx(reconstruction, rel=1e-5)
    assert scale * terms.total.item() == pytest.approx(expected["loss"], rel=1e-5)
    terms.total.backward()
    ours = {"enc_DF": sae.enc_FD.grad.T, "enc_bias_F": sae.enc_bias_F.grad, "dec_FD": sae.dec_FD.grad}
    for name, value in expected["gradients"].items():
        assert torch.allclose(scale * ours[name], torch.tensor(value), rtol=1e-4, atol=1e-5), name


def test_a_penalty_of_every_third_step_has_three_times_its_weight():
    """The sum over three steps of frozen weights is that of a penalty of every step."""
    sums = {}
    for every in (1, 3):
        state = toys.fresh(toys.run_config("run_3", penalty=Penalty(weight=0.3, every=every)))
        state.config = replace(state.config, optimiser=Optimiser(autocast=False, penalty_warmup=0.0))
        state.pairs_P2 = torch.combinations(torch.arange(toys.LATENTS))
        x_BD, terms = state.sae.standardise(toys.activations(1)[0]), []
        for state.step in (3, 4, 5):
            pre_BF, codes = state.sae.training_codes(x_BD, 3)
            terms.append(terms_of(state, x_BD, pre_BF, codes)[0].orthogonality.item())
        assert [term > 0 for term in terms] == [every == 1, every == 1, True]
        sums[every] = sum(terms)
    assert sums[3] == pytest.approx(sums[1])


def test_ortsae_is_the_penalty_in_force():
    state = toys.fresh(toys.run_config("topk", penalty=Penalty(kind="ortsae", weight=0.5, chunk=4, every=1)))
    dec_FD = state.sae.dec_FD.detach().clone()
    order_F = torch.randperm(toys.LATENTS, generator=generator_for(42, "train", 0))
    expected = 0.5 * penalty_share(state.config, 0) * objective.chunked_orthogonality(dec_FD, order_F, 4)
    report = train_step(state, toys.activations(1)[0])
    assert report.terms.orthogonality.item() == pytest.approx(expected.item()) and expected > 0
    assert not len(state.pairs_P2), "its pairs are not mined"


@pytest.mark.parametrize("architecture", ["relu", "batchtopk"])
def test_a_frozen_decoder_stays_bitwise_and_the_rest_learns(architecture, tmp_path):
    config = toys.run_config("run_0", architecture=architecture, frozen_decoder=True)
    state, batches = toys.fresh(config), toys.activations(12)
    before = snapshot(state)
    run(state, batches[:7])
    changed = differing(
        {name: value for name, value in before.items() if name.startswith("sae.")},
        {name: value for name, value in snapshot(state).items() if name.startswith("sae.")},
    )
    assert "sae.dec_FD" not in changed and {"sae.enc_FD", "sae.enc_bias_F", "sae.dec_bias_D"} <= set(changed)
    assert torch.equal(before["sae.dec_FD"], snapshot(toys.fresh(replace(config, frozen_decoder=False)))["sae.dec_FD"])
    save_tensors(tmp_path / "state.safetensors", state.state_dict())
    resumed = toys.fresh(config)
    resumed.load_state_dict(load_tensors(tmp_path / "state.safetensors"))
    assert not differing(snapshot(run(state, batches[7:])), snapshot(run(resumed, batches[7:])))


# Schedules


def test_learning_rate_rises_stays_and_falls():
    config = toys.run_config("run_0", steps=100, optimiser=Optimiser(warmup=0.1, decay=0.2))
    rates = [learning_rate(config, step) / 0.01 for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:81] == pytest.approx([1.0] * 71)
    assert rates[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])


def test_learning_rate_of_the_schedule_is_adam_s():
    """A first step of Adam moves each weight by the rate, whatever its gradient."""
    for warmup, rate in ((0.0, 0.01), (0.1, 0.001)):
        state = toys.fresh(toys.run_config("run_0", steps=100, optimiser=Optimiser(warmup=warmup)))
        before_FD = state.sae.enc_FD.detach().clone()
        run(state, toys.activations(1))
        moved_FD = (state.sae.enc_FD - before_FD).abs()
        assert moved_FD.max().item() == pytest.approx(rate, rel=1e-3) == moved_FD.median().item()


@pytest.mark.parametrize(("warmup", "expected"), [(0.0, [1.0] * 4), (0.2, [0.5, 1, 1, 1]), (1.0, [0.1, 0.2, 0.3, 0.4])])
def test_penalty_share_rises_over_the_warm_up(warmup, expected):
    config = toys.run_config("run_0", steps=10, optimiser=Optimiser(penalty_warmup=warmup))
    assert [penalty_share(config, step) for step in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize(("estimator", "kept"), [("max", True), ("unbiased", False)])
def test_pairs_stay_in_the_running_unless_their_chance_to_be_found_counts(estimator, kept, monkeypatch):
    given, mined_P2 = [], torch.tensor([[0, 1]])
    monkeypatch.setattr("fipo.lsh.candidate_pairs", lambda *_, held_P2, **__: given.append(held_P2) or mined_P2)
    lsh = LSH(refresh_every=1, partners=None, min_cosine=0.0)
    config = toys.run_config("run_3", penalty=Penalty(estimator=estimator), lsh=lsh)
    run(toys.fresh(config), toys.activations(2))
    assert [held_P2 is not None for held_P2 in given] == [kept, kept]
    assert not kept or (len(given[0]) == 0 and given[1] is mined_P2)


def test_k_falls_from_its_multiple_to_k():
    config = toys.run_config("topk", steps=20, optimiser=Optimiser(k_start=5.0, k_fall=0.5))
    assert [active_latents(config, step) for step in (0, 4, 9, 19)] == [14, 9, 3, 3]
    more = replace(config, optimiser=Optimiser(k_start=9.0))
    assert active_latents(more, 0) == toys.LATENTS, "there are no more"
    at_once = replace(config, optimiser=Optimiser(k_start=5.0, k_fall=0.0))
    assert [active_latents(at_once, step) for step in (0, 1)] == [3, 3]


@pytest.mark.parametrize("name", ["topk", "run_6"])
def test_a_step_has_as_many_active_latents_as_its_k(name):
    config = toys.run_config(name, steps=20, optimiser=Optimiser(k_start=3.0, k_fall=0.5, autocast=False))
    state = toys.fresh(config)
    found = [train_step(state, acts_BD).l0 for acts_BD in toys.activations(12)]
    assert found[0] > 6 and found[0] <= 9 and found[-1] <= 3


def test_the_levels_shrink_over_their_rise():
    config = toys.run_config("run_6", steps=20, levels=Levels(rise=0.5))
    assert [order_share(config, step) for step in (0, 4, 9, 19)] == [0.1, 0.5, 1.0, 1.0]
    at_once = replace(config, levels=Levels(rise=0.0))
    assert [order_share(at_once, step) for step in (0, 1)] == [1.0, 1.0]
    assert order_share(replace(config, levels=None), 19) == 0


def test_the_stop_gradient_rises_to_its_strength_between_two_shares():
    config = toys.run_config("run_6", steps=20, levels=Levels(stop_gradient=0.8, held=(0.5, 0.7)))
    found = [stop_gradient(config, step) for step in (0, 9, 10, 11, 12, 13, 19)]
    assert found == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8])
    at_once = replace(config, levels=Levels(stop_gradient=0.8, held=(0.0, 0.0)))
    assert [stop_gradient(at_once, step) for step in (0, 19)] == [0.8, 0.8]
    assert stop_gradient(replace(config, levels=None), 19) == 0


def test_the_step_lets_the_shortage_of_its_activation_decide(monkeypatch):
    """With the smallest code as large as the mean one nothing is held, and levels are large; with a far smaller one
    all of s is, and they are as small as the step has them."""
    seen, ways = [], []
    nested, drawn = reconstruction.nested_error, fipo_levels.cuts
    monkeypatch.setattr(fipo_levels, "cuts", lambda *given: ways.append(float(given[1])) or drawn(*given))
    monkeypatch.setattr(reconstruction, "nested_error", lambda *given: seen.append(given[3]) or nested(*given))
    for threshold in (0.1, 1.0):
        state = toys.fresh(toys.run_config("run_6", levels=Levels(stop_gradient=0.5, held=(0.0, 0.0))))
        state.sae.activation.threshold.fill_(threshold)
        state.sae.activation.mean.fill_(1.0)
        run(state, toys.activations(1))
    assert seen == [0.5, 0.0] and ways == [pytest.approx(1 / 9.6), 0.0]


@pytest.mark.parametrize(("at", "steps", "told"), [(3, 12, 12), (13, 20, 16), (17, 20, 20)])
def test_what_a_gpu_found_is_told_at_every_sixteenth_step_and_at_the_last(at, steps, told, monkeypatch):
    """Here no update asks, as on a GPU."""
    monkeypatch.setattr(train, "update", lambda *_: None)
    state = toys.fresh(toys.run_config("topk", steps=steps))
    with pytest.raises(UserError, match="the gradient"):
        for acts_BD in toys.activations(steps):
            state.faults.found_5[4] |= state.step == at
            train_step(state, acts_BD)
    assert state.step == told


def test_the_learning_rate_falls_to_0_before_the_last_phase_and_once_more_in_it():
    levels = Levels(decoder_only=0.1, settling_rate=0.5)
    config = toys.run_config("run_6", steps=100, levels=levels, optimiser=Optimiser(warmup=0.05, decay=0.2))
    rates = [learning_rate(config, step) / config.workload.learning_rate for step in range(100)]
    assert rates[5:70] == [1.0] * 65
    assert rates[70:90] == pytest.approx([left / 20 for left in range(20, 0, -1)])
    assert rates[90:] == pytest.approx([0.5 * left / 10 for left in range(10, 0, -1)])
    for last in (levels, replace(levels, decoder_only=0.0), None):
        assert learning_rate(replace(config, levels=last), 100) == 0, "behind the last step"


def test_decoder_only_is_the_last_share_of_the_steps():
    config = toys.run_config("run_6", steps=20, levels=Levels(decoder_only=0.25))
    assert first_decoder_only(config) == 15
    state = toys.fresh(config)
    assert not plan_of(replace(state, step=14), 16).frozen and plan_of(replace(state, step=15), 16).frozen
    assert first_decoder_only(replace(config, levels=Levels(decoder_only=0.0))) == 20
    assert first_decoder_only(toys.run_config("run_3", steps=20)) == 20


@pytest.mark.parametrize("architecture", ["relu", "topk", "batchtopk", "jumprelu"])
def test_before_the_last_phase_all_codes_become_smaller_and_nothing_else_changes(architecture):
    """Beside it the same run, with codes as they were."""
    levels = Levels(shares=(0.5, 1.0), decoder_only=0.25, shrink=0.3)
    configs = [
        toys.run_config("run_6", steps=16, architecture=architecture, levels=each)
        for each in (levels, replace(levels, shrink=0.0))
    ]
    small, plain = states = [toys.fresh(config) for config in configs]
    before, at, after = (toys.activations(16)[part] for part in (slice(11), slice(11, 12), slice(12, 16)))
    for state in states:
        run(state, before)
    assert not differing(snapshot(small), snapshot(plain))
    for state in states:
        run(state, at)
    held_out_BD = toys.activations(1, seed=9)[0]
    codes = [state.sae.eval().encode(held_out_BD).detach() for state in states]
    assert torch.allclose(codes[0], 0.7 * codes[1], atol=1e-6) and torch.equal(codes[0] > 0, codes[1] > 0)
    assert codes[0].any() and torch.allclose(small.importance.values(), 0.7 * plain.importance.values())
    changed = differing(snapshot(small), snapshot(plain))
    assert {"sae.enc_FD", "sae.enc_bias_F", "importance.mean_F"} <= set(changed)
    assert not [name for name in changed if name.startswith(("sae.dec", "adam.", "reservoir."))]
    reports = [[train_step(state, acts_BD) for acts_BD in after] for state in states]
    for one, other in zip(*reports, strict=True):
        assert one.l0 == pytest.approx(other.l0, rel=0.02), "the same codes are kept"
    assert "sae.dec_FD" in differing(snapshot(small), snapshot(plain))


def test_a_last_phase_that_is_none_shrinks_nothing():
    config = toys.run_config("run_6", levels=Levels(shares=(0.5, 1.0), decoder_only=0.0, shrink=0.5))
    state = run(toys.fresh(config), toys.activations(11))
    before_FD = state.sae.enc_FD.detach().clone()
    run(state, toys.activations(12)[11:])
    assert (state.sae.enc_FD.norm() / before_FD.norm()).item() == pytest.approx(1, abs=0.1)


# Levels, pairs, revival


def test_the_step_draws_its_cuts_anew_from_the_generator_of_the_state(monkeypatch):
    """And by the way of their power, which rises over the run."""
    seen = []
    drawn = fipo_levels.cuts
    monkeypatch.setattr(fipo_levels, "cuts", lambda *given: seen.append((given, drawn(*given))) or seen[-1][1])
    state = toys.fresh(
        toys.run_config("run_6", steps=4, levels=Levels(shares=(0.25, 0.5, 1.0), rise=1.0, short=(9, 10)))
    )
    run(state, toys.activations(4))
    assert [float(given[1]) for given, _ in seen] == [0.25, 0.5, 0.75, 1.0]
    assert all(given[2] is state.generator for given, _ in seen)
    assert len({float(found[0]) for _, found in seen}) == 4


def test_pairs_are_mined_every_n_steps():
    state, seen = toys.fresh(toys.run_config("run_3")), []
    for acts_BD in toys.activations(11):
        train_step(state, acts_BD)
        seen.append(state.pairs_P2)
    assert [step for step in range(1, 11) if seen[step] is not seen[step - 1]] == [5, 10]


def test_the_reservoir_is_offered_tokens_by_their_squared_error(monkeypatch):
    state, offered = toys.fresh(toys.run_config("run_3")), []
    monkeypatch.setattr(state.reservoir, "offer", lambda *given: offered.append(given))
    report = train_step(state, toys.activations(1)[0])
    [(x_BD, weight_B, generator)] = offered
    assert torch.equal(x_BD, report.x_BD) and generator is state.generator
    assert torch.allclose(weight_B, report.residual_BD.pow(2).sum(1))


def test_revival_points_dead_latents_at_the_reservoir_and_resets_their_clock():
    dead = [2, 7, 11]
    state = with_long_dead(toys.fresh(toys.run_config("run_3", steps=100)), dead)
    batches = toys.activations(3)
    run(state, batches[:2])
    assert (state.importance.silent_tokens_F[dead] >= 10**6).all()
    train_step(state, batches[2])
    held_RD = state.reservoir.contents()[:3]
    assert any(torch.equal(held_RD[0], row_D) for row_D in torch.cat(batches)), "the reservoir holds training tokens"
    assert torch.allclose(state.sae.dec_FD[dead], held_RD / held_RD.norm(dim=1, keepdim=True))
    assert not state.importance.silent_tokens_F[dead].any() and not state.sae.enc_bias_F[dead].any()
    for parameter in (state.sae.dec_FD, state.sae.enc_FD):
        moments = state.optimizer.state[parameter]
        assert not moments["exp_avg"][dead].any() and not moments["exp_avg_sq"][dead].any()
    assert (state.sae.encode(held_RD)[range(3), dead] > 0).all()


def test_a_step_in_one_of_several_ranks_is_refused(monkeypatch):
    state = toys.fresh(toys.run_config("run_6"))
    before = snapshot(state)
    monkeypatch.setattr(train, "several_ranks", lambda: True)
    with pytest.raises(UserError, match="expected one process"):
        train_step(state, toys.activations(1)[0])
    assert not differing(before, snapshot(state))


@pytest.mark.parametrize("latent", [-1, toys.LATENTS])
def test_pairs_of_latents_that_are_not_there_are_refused(latent):
    state = toys.fresh(toys.run_config("run_3"))
    with pytest.raises(UserError, match="pairs_P2"):
        state.load_state_dict(state.state_dict() | {"pairs_P2": torch.tensor([[0, latent]])})


@pytest.mark.parametrize(("name", "norm"), [("run_0", 0.25), ("topk", 1.0)])
def test_a_dense_dictionary_starts_near_its_input(name, norm):
    """Of 64 latents of width 8 half are active, x̂ = F / (2 D) · x times the norm of the encoder's rows."""
    state = toys.fresh(toys.run_config(name, workload=toys.workload(latents=64)))
    torch.testing.assert_close(state.sae.enc_FD.norm(dim=1), torch.full((64,), norm))


def test_no_step_behind_the_last():
    """The learning rate would go on falling, below 0: training backwards."""
    state = run(toys.fresh(toys.run_config("run_6", steps=3)), toys.activations(3))
    before = snapshot(state)
    with pytest.raises(UserError, match="step 4 of a run of 3 is given; .* raise workload.train_tokens"):
        train_step(state, toys.activations(1)[0])
    assert not differing(before, snapshot(state))


@pytest.mark.parametrize("name", RUNS)
def test_a_copy_trains_as_the_original_and_apart_from_it(name):
    """Its σ comes from its own codes."""
    state = run(toys.fresh(toys.run_config(name)), toys.activations(4))
    copied, before = copy.deepcopy(state), snapshot(state)
    run(copied, toys.activations(5, seed=9))
    assert not differing(before, snapshot(state))
    run(state, toys.activations(5, seed=9))
    assert not differing(snapshot(copied), snapshot(state))


def test_a_latent_is_dead_from_the_last_of_its_silent_tokens_on(monkeypatch):
    """One that has been silent for `dead_tokens` tokens, not one token less: it gets the auxiliary loss, by half as
    many latents as the model is wide (Gao et al. 2024), and is revived."""
    state, given = toys.fresh(toys.run_config("run_6", steps=100)), []
    most = state.config.workload.dead_tokens
    monkeypatch.setattr(train.objective, "auxiliary", lambda *of: given.append(of) or of[0].sum() * 0)
    state.sae.enc_bias_F.data[[2, 7]] = -100.0
    state.importance.silent_tokens_F[[2, 7]] = torch.tensor([most, most - 1])
    train_step(state, toys.activations(1)[0])
    [(residual_BD, pre_BN, dec_ND, k)] = given
    assert dec_ND.equal(toys.fresh(state.config).sae.dec_FD[[2]]) and pre_BN.shape == (toys.BATCH, 1)
    assert k == toys.WIDTH // 2
    state.importance.silent_tokens_F[[2, 7]] = torch.tensor([most, most - 1])
    state.step = state.config.reservoir.revive_every - 1
    train.revive_dead(state)
    assert state.importance.silent_tokens_F[[2, 7]].tolist() == [0, most - 1]


def test_the_clock_of_a_latent_that_could_not_be_revived_runs_on():
    """More dead latents than tokens in the reservoir: the rest stay dead and wait."""
    config = toys.run_config("run_3", steps=100)
    config = replace(config, reservoir=replace(config.reservoir, slots=2))
    dead = [2, 7, 11]
    state = run(with_long_dead(toys.fresh(config), dead), toys.activations(3))
    assert state.sae.enc_bias_F[11] < -99 and not state.sae.enc_bias_F[[2, 7]].any()
    assert state.importance.silent_tokens_F[11] >= 10**6


def test_no_revival_in_the_last_fifth():
    config = toys.run_config("run_3", steps=10)
    config = replace(config, reservoir=replace(config.reservoir, revive_every=1))
    state = run(with_long_dead(toys.fresh(config), [2]), toys.activations(7))
    for revived in (True, False, False):  # after steps 8, 9 and 10
        with_long_dead(state, [2])
        run(state, toys.activations(1))
        assert (state.importance.silent_tokens_F[2] < 10**6) == revived


def test_no_revival_while_the_encoder_rests():
    levels = replace(toys.run_config("run_6").levels, decoder_only=0.5)
    config = toys.run_config("run_6", steps=10, levels=levels)
    config = replace(config, reservoir=replace(config.reservoir, revive_every=1))
    state = run(toys.fresh(config), toys.activations(4))
    for revived in (True, False):  # after steps 5 and 6
        with_long_dead(state, [2])
        run(state, toys.activations(1))
        assert (state.importance.silent_tokens_F[2] < 10**6) == revived


# Learning


def planted_config(name: str, steps: int) -> RunConfig:
    toy = toys.workload(steps, batch_tokens=64, train_tokens=64 * steps, latents=32, k=2, dead_tokens=640)
    toy = replace(toy, text=replace(toy.text, buffer_tokens=64))
    return toys.run_config(name, workload=toy)


@pytest.mark.parametrize("name", RUNS)
def test_training_on_planted_features_explains_them(name):
    state, batches = toys.fresh(planted_config(name, 300), width=16), toys.planted(304)
    before = quality(state.sae, batches[300:])
    run(state, batches[:300])
    after = quality(state.sae, batches[300:])
    assert after.fvu < 0.3 < before.fvu and after.fvu < 0.5 * before.fvu


@pytest.mark.parametrize("name", ["run_0", "run_3", "run_6", "topk"])
def test_a_step_changes_its_state_where_it_lies(name):
    """A recording of it (fipo.graphs) reads and writes the memory that it was made with."""
    state = toys.fresh(toys.run_config(name))

    def tensors() -> dict[str, torch.Tensor]:
        holders = {"importance": state.importance, "reservoir": state.reservoir, "faults": state.faults}
        held = {f"{name}.{key}": value for name, one in holders.items() if one for key, value in vars(one).items()}
        for key, parameter in state.sae.named_parameters():
            held |= {f"adam.{key}.{moment}": value for moment, value in state.optimizer.state[parameter].items()}
        held |= dict(state.sae.named_parameters()) | dict(state.sae.named_buffers())
        return {key: value for key, value in held.items() if isinstance(value, torch.Tensor)}

    first, second = toys.activations(2)
    train_step(state, first)
    before = tensors()
    train_step(state, second)
    after = tensors()
    assert [key for key in before if after[key] is not before[key]] == []
