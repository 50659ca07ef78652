"""fipo.metrics against brute force; measuring twice gives the same and changes nothing."""

import pytest
import torch
import toys

from fipo.activations import build_activation
from fipo.errors import UserError
from fipo.metrics import max_cosines, quality
from fipo.sae import SAE

WIDTH, LATENTS = 6, 12


def sae(architecture: str = "relu") -> SAE:
    model = SAE(WIDTH, LATENTS, build_activation(architecture, LATENTS, 3), gain=0.4, generator=toys.seeded())
    model.mean_D.fill_(0.3)
    model.scale.fill_(1.7)
    model.enc_bias_F.data[:4] = torch.tensor([-100.0, -0.5, 0.2, -100.0])
    return model


def batches(*sizes: int) -> list[torch.Tensor]:
    acts_ND = 1 + torch.randn(sum(sizes), WIDTH, generator=toys.seeded(5))
    return list(acts_ND.split(list(sizes)))


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "topk"])
def test_quality_equals_brute_force_however_the_tokens_are_batched(architecture):
    model, (acts_ND,) = sae(architecture), batches(40)
    with torch.no_grad():
        x_hat_ND, codes_NF = model.eval()(acts_ND), model.encode(acts_ND)
    expected_fvu = (acts_ND - x_hat_ND).pow(2).sum() / (acts_ND - acts_ND.mean(0)).pow(2).sum()
    expected_dead = sum(not codes_NF[:, f].any() for f in range(LATENTS)) / LATENTS
    for sizes in ((40,), (7, 30, 3)):
        measured = quality(model, batches(*sizes))
        assert measured.fvu == pytest.approx(expected_fvu.item(), rel=1e-4)
        assert measured.l0 == pytest.approx((codes_NF > 0).sum().item() / 40)
        assert measured.dead_share == pytest.approx(expected_dead) and expected_dead >= 2 / LATENTS
        assert measured.tokens == 40


def test_a_perfect_sae_has_fvu_zero_and_one_that_gives_the_mean_has_one():
    model = SAE(WIDTH, 2 * WIDTH, build_activation("relu", 2 * WIDTH, 3), generator=toys.seeded())
    both_FD = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    model.dec_FD.data, model.enc_FD.data = both_FD, both_FD.clone()
    assert quality(model, batches(30)).fvu < 1e-10 and quality(model, batches(30)).l0 == WIDTH
    model.enc_bias_F.data.fill_(-1000)
    model.dec_bias_D.data = batches(30)[0].mean(0)
    measured = quality(model, batches(30))
    assert measured.fvu == pytest.approx(1.0, rel=1e-4) and (measured.l0, measured.dead_share) == (0.0, 1.0)


@pytest.mark.parametrize("architecture", ["relu", "topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("training", [True, False])
def test_quality_twice_is_the_same_and_leaves_state_mode_and_input(architecture, training):
    model, given = sae(architecture).train(training), batches(20)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert quality(model, given) == quality(model, given)
    assert model.training == training and model.activation.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(given[0], batches(20)[0]) and all(p.grad is None for p in model.parameters())


def test_quality_measures_in_evaluation_mode():
    model = sae("batchtopk").train()
    model.activation.threshold_F.fill_(1e9)
    assert quality(model, batches(20)).l0 == 0


@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_max_cosines_equals_brute_force(chunk):
    dec_FD = torch.randn(17, 5, generator=toys.seeded()) * torch.linspace(0.1, 3, 17)[:, None]
    expected = [
        max(torch.cosine_similarity(dec_FD[i], dec_FD[j], dim=0).item() for j in range(17) if j != i) for i in range(17)
    ]
    assert max_cosines(dec_FD, chunk=chunk).tolist() == pytest.approx(expected, abs=1e-6)


def test_max_cosines_of_a_sample_is_against_all_and_evenly_spaced():
    dec_FD = torch.randn(31, 5, generator=toys.seeded())
    every_N = max_cosines(dec_FD)
    assert torch.allclose(max_cosines(dec_FD, rows=4, chunk=3), every_N[[0, 10, 20, 30]])
    assert torch.equal(dec_FD, torch.randn(31, 5, generator=toys.seeded()))


def test_max_cosines_of_duplicates_orthogonal_opposite_and_single_rows():
    assert max_cosines(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).tolist() == pytest.approx([1.0, 1.0])
    assert max_cosines(torch.eye(3)).tolist() == [0.0, 0.0, 0.0]
    assert max_cosines(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).tolist() == [-1.0, -1.0]
    assert max_cosines(torch.ones(1, 2)).tolist() == [0.0]


def test_tokens_that_are_all_alike_are_told():
    with pytest.raises(UserError, match="the 6 held-out tokens are all alike"):
        quality(sae(), [torch.zeros(2, WIDTH)] * 3)
    for seed in range(20):  # sums of numbers that are all the same are not always the same to the last bit
        with pytest.raises(UserError, match="the 1000 held-out tokens are all alike"):
            quality(sae(), [torch.randn(WIDTH, generator=toys.seeded(seed)).expand(1000, WIDTH)])
