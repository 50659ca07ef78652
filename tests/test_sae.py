"""fipo.sae: shapes, standardisation, unit rows, purity of encode and decode."""

import pytest
import torch
import toys

from fipo.activations import build_activation
from fipo.sae import SAE

WIDTH, LATENTS = 8, 20


def sae(architecture: str = "relu", seed: int = 0, gain: float = 1.0) -> SAE:
    return SAE(WIDTH, LATENTS, build_activation(architecture, LATENTS, 4), gain=gain, generator=toys.seeded(seed))


def acts(batch: int = 5) -> torch.Tensor:
    return torch.randn(batch, WIDTH, generator=toys.seeded(9))


@pytest.mark.parametrize("architecture", ["relu", "topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("training", [True, False])
def test_forward_is_decode_of_encode_and_changes_nothing(architecture, training):
    model, acts_BD = sae(architecture).train(training), acts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    codes_BF = model.encode(acts_BD)
    assert codes_BF.shape == (5, LATENTS) and (codes_BF >= 0).all()
    assert torch.equal(model(acts_BD), model.decode(codes_BF))
    assert torch.equal(acts_BD, acts())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_equations_of_the_docstring():
    model, acts_BD = sae(), acts()
    with torch.no_grad():
        model.enc_bias_F.normal_(generator=toys.seeded(1))
        model.dec_bias_D.normal_(generator=toys.seeded(2))
        model.mean_D.normal_(generator=toys.seeded(3))
        model.scale.fill_(2.5)
    x_BD = (acts_BD - model.mean_D) * 2.5
    codes_BF = (x_BD @ model.enc_FD.T + model.enc_bias_F).clamp_min(0)
    x_hat_BD = codes_BF @ model.dec_FD + model.dec_bias_D
    assert torch.allclose(model.standardise(acts_BD), x_BD) and torch.allclose(model.encode(acts_BD), codes_BF)
    assert torch.allclose(model.reconstruct(codes_BF), x_hat_BD, atol=1e-6)
    assert torch.allclose(model.decode(codes_BF), x_hat_BD / 2.5 + model.mean_D, atol=1e-6)


def test_standardised_data_has_mean_zero_and_mean_squared_norm_d():
    model, acts_BD = sae(), 3 + 7 * acts(100)
    model.mean_D.copy_(acts_BD.mean(0))
    model.scale.copy_((WIDTH / (acts_BD - acts_BD.mean(0)).pow(2).sum(1).mean()).sqrt())
    x_BD = model.standardise(acts_BD)
    assert x_BD.mean(0).abs().max() < 1e-5
    assert x_BD.pow(2).sum(1).mean().item() == pytest.approx(WIDTH, rel=1e-5)


def test_half_precision_input_is_standardised_in_float32():
    model, acts_BD = sae(), acts().bfloat16()
    model.mean_D.fill_(0.1)
    x_BD = model.standardise(acts_BD)
    assert x_BD.dtype == torch.float32 and torch.equal(x_BD, acts_BD.float() - 0.1)


def test_fresh_rows_have_unit_norm_and_the_encoder_is_their_transpose_times_gain():
    model = sae(gain=0.25)
    assert torch.allclose(model.dec_FD.norm(dim=1), torch.ones(LATENTS))
    assert torch.equal(model.enc_FD, 0.25 * model.dec_FD)
    assert (model.d_in, model.latents) == (WIDTH, LATENTS)


def test_the_generator_alone_decides_the_start():
    assert torch.equal(sae(seed=1).dec_FD, sae(seed=1).dec_FD)
    assert not torch.equal(sae(seed=1).dec_FD, sae(seed=2).dec_FD)


def test_sparse_architectures_decode_as_the_dense_ones_do():
    codes_BF = sae("topk").encode(acts())
    assert torch.allclose(sae("topk").decode(codes_BF), sae("relu").decode(codes_BF), atol=1e-6)


def test_normalise_decoder_keeps_directions_and_survives_a_zero_row():
    model = sae()
    before_FD = model.dec_FD.detach().clone()
    with torch.no_grad():
        model.dec_FD *= torch.linspace(0.1, 9, LATENTS)[:, None]
        model.dec_FD[3] = 0
    model.normalise_decoder()
    others = torch.arange(LATENTS) != 3
    assert torch.allclose(model.dec_FD[others], before_FD[others], atol=1e-6)
    assert torch.equal(model.dec_FD[3], torch.zeros(WIDTH))


def test_projected_gradient_has_no_part_along_the_rows_and_keeps_the_rest():
    model = sae()
    gradient_FD = torch.randn(LATENTS, WIDTH, generator=toys.seeded(4))
    model.dec_FD.grad = gradient_FD.clone()
    model.project_decoder_gradient()
    assert (model.dec_FD.grad * model.dec_FD).sum(1).abs().max() < 1e-5
    removed_FD = gradient_FD - model.dec_FD.grad
    along_F = (gradient_FD * model.dec_FD).sum(1, keepdim=True)
    assert torch.allclose(removed_FD, along_F * model.dec_FD, atol=1e-6)


def test_rows_taken_in_parts_are_those_taken_at_once():
    """More rows than go into the cache at once, and not a multiple of them."""
    model = SAE(4, 300, build_activation("relu", 300, 4), generator=toys.seeded())
    generator = toys.seeded(4)
    dec_FD, gradient_FD = (torch.randn(300, 4, generator=generator) for _ in range(2))
    model.dec_FD.data, model.dec_FD.grad = dec_FD.clone(), gradient_FD.clone()
    model.project_decoder_gradient()
    projected_FD = gradient_FD - (gradient_FD * dec_FD).sum(1, keepdim=True) * dec_FD
    assert torch.allclose(model.dec_FD.grad, projected_FD, atol=1e-5)
    model.normalise_decoder()
    assert torch.allclose(model.dec_FD, dec_FD / dec_FD.norm(dim=1, keepdim=True))


def test_projection_without_a_gradient_does_nothing():
    model = sae()
    model.project_decoder_gradient()
    assert model.dec_FD.grad is None
