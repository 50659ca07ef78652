"""fipo.controls: principal components against numpy, a random SAE of the L0 asked for, scale of codes."""

import numpy as np
import pytest
import torch
from toys import seeded

from fipo.activations import ReLU, TopK
from fipo.controls import code_scale, principal_components, random_like
from fipo.sae import SAE


def sample(rows=400, width=12, seed=1):
    return 3 + torch.randn(rows, width, generator=seeded(seed)) * torch.linspace(0.5, 4, width)


def trained(latents=64, width=12, k=None):
    sae = SAE(width, latents, ReLU() if k is None else TopK(k), generator=seeded(2))
    sae.mean_D.fill_(3.0)
    sae.enc_bias_F.data.fill_(-2.0)
    return sae.eval()


def test_principal_components_are_numpys():
    train_ND = sample()
    mean_D, directions_DC = principal_components(train_ND)
    centred = train_ND.double().numpy() - train_ND.double().numpy().mean(0)
    variance, vectors = np.linalg.eigh(centred.T @ centred)
    for number in range(12):
        cosine = abs(directions_DC[:, number].double().numpy() @ vectors[:, -1 - number])
        assert cosine == pytest.approx(1, abs=1e-4)
    assert torch.allclose(mean_D, train_ND.mean(0)) and (np.diff(variance) > 0).all()


def test_fewer_texts_than_channels_give_as_many_components_as_texts():
    assert principal_components(sample(rows=5))[1].shape == (12, 5)


@pytest.mark.parametrize("k", [None, 3, 20])
def test_random_sae_has_the_size_and_l0_asked_for(k):
    sae, sample_BD = trained(k=k), sample()
    control = random_like(sae, sample_BD, seeded(3))
    assert control.latents == sae.latents and not control.training
    wanted, given = ((one.encode(sample_BD) > 0).sum().item() for one in (sae, control))
    assert abs(given - wanted) <= 1
    assert torch.allclose(control.enc_DF, control.dec_FD.T) and torch.allclose(control.mean_D, sample_BD.mean(0))


def test_random_sae_knows_nothing_of_the_trained_one():
    sae, sample_BD = trained(), sample()
    control = random_like(sae, sample_BD, seeded(3))
    cosines = torch.nn.functional.normalize(sae.dec_FD, dim=1) @ control.dec_FD.T
    other = torch.nn.functional.normalize(torch.randn(64, 12, generator=seeded(9)), dim=1) @ control.dec_FD.T
    assert cosines.max() < 0.99 and abs(cosines.amax(1).mean() - other.amax(1).mean()) < 0.1
    assert not torch.equal(control.dec_FD, random_like(sae, sample_BD, seeded(4)).dec_FD)


def test_code_scale_sees_what_is_not_folded():
    width = 12
    sae = SAE(width, width, ReLU(), generator=seeded())
    with torch.no_grad():
        sae.enc_DF.copy_(torch.eye(width))
        sae.dec_FD.copy_(torch.eye(width))
    acts_BD = torch.rand(100, width, generator=seeded(1))
    assert code_scale(sae, acts_BD) == pytest.approx(1)
    with torch.no_grad():
        sae.enc_DF.mul_(1e-3)
    assert code_scale(sae, acts_BD) == pytest.approx(1e-3)
