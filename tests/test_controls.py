"""fipo.controls: principal components against numpy, a random SAE of the L0 asked for, scale of codes."""

import numpy as np
import pytest
import torch
from toys import seeded

from fipo import controls
from fipo.activations import ReLU
from fipo.controls import code_l0, code_scale, nearby_l0, principal_components, random_codes, random_sae
from fipo.sae import SAE


def sample(rows=400, width=12, seed=1):
    return 3 + torch.randn(rows, width, generator=seeded(seed)) * torch.linspace(0.5, 4, width)


def trained(latents=64, width=12):
    sae = SAE(width, latents, ReLU(), generator=seeded(2))
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


@pytest.mark.parametrize("l0", [1.0, 3.3, 20.0])
def test_random_sae_has_the_size_and_l0_asked_for(l0):
    sample_BD = sample()
    control = random_sae(64, l0, sample_BD, seeded(3))
    assert control.latents == 64 and not control.training
    assert (control.encode(sample_BD) > 0).sum().item() / 400 == pytest.approx(l0, abs=1 / 400)
    assert torch.allclose(control.enc_FD, control.dec_FD) and torch.allclose(control.mean_D, sample_BD.mean(0))


def test_random_codes_are_those_of_autocast():
    control, sample_BD = random_sae(64, 5.0, sample(), seeded(3)), sample(seed=4)

    def expected():
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            return control.encode(sample_BD)

    least = expected()[expected() > 0].min().float()
    for threshold in (least * 0.9999, least, least * 1.0001):  # on either side of a code, and at it
        control.activation.log_threshold_F.data.fill_(threshold.log())
        with torch.no_grad():
            assert random_codes(control)(sample_BD).equal(expected())


def test_random_sae_knows_nothing_of_the_trained_one():
    sae, sample_BD = trained(), sample()
    control = random_sae(64, 5.0, sample_BD, seeded(3))
    cosines = torch.nn.functional.normalize(sae.dec_FD, dim=1) @ control.dec_FD.T
    other = torch.nn.functional.normalize(torch.randn(64, 12, generator=seeded(9)), dim=1) @ control.dec_FD.T
    assert cosines.max() < 0.99 and abs(cosines.amax(1).mean() - other.amax(1).mean()) < 0.1
    assert not torch.equal(control.dec_FD, random_sae(64, 5.0, sample_BD, seeded(4)).dec_FD)


@pytest.mark.parametrize("l0", [0.0, 1.0, 7.7, 32.0, 45.1, 59.9, 300.0])
def test_nearby_l0_is_within_a_tenth_and_its_own_neighbour(l0):
    near = nearby_l0(l0)
    assert near == pytest.approx(max(l0, 1), rel=0.091) and nearby_l0(near) == near
    assert nearby_l0(32.3) == nearby_l0(31.0) == 32


def test_code_scale_sees_what_is_not_folded():
    width = 12
    sae = SAE(width, width, ReLU(), generator=seeded())
    with torch.no_grad():
        sae.enc_FD.copy_(torch.eye(width))
        sae.dec_FD.copy_(torch.eye(width))
    acts_BD = torch.rand(100, width, generator=seeded(1))
    assert code_scale(sae, acts_BD) == pytest.approx(1)
    with torch.no_grad():
        sae.enc_FD.mul_(1e-3)
    assert code_scale(sae, acts_BD) == pytest.approx(1e-3)
    mostly_BD = acts_BD.index_fill(0, torch.arange(1, 100), 0.0)  # silent on these
    assert code_scale(sae, mostly_BD) == pytest.approx(1e-3) and code_scale(sae, 0 * acts_BD) == 0


def test_a_sample_is_encoded_in_pieces(monkeypatch):
    """The same control, L0 and scale, without the whole matrix of codes."""
    sae, sample_BD, seen, original = trained(), sample(), [], SAE.pre_codes

    def counted(self, x_BD, latents_N=None):
        seen.append(len(x_BD))
        return original(self, x_BD, latents_N)

    monkeypatch.setattr(SAE, "pre_codes", counted)
    found = []
    for codes in (2**24, 100 * 64):
        monkeypatch.setattr(controls, "CODES_AT_ONCE", codes)
        control = random_sae(64, 5.0, sample_BD, seeded(3))
        found.append((control.activation.threshold_F, code_l0(sae, sample_BD), code_scale(sae, sample_BD)))
    (whole_F, l0, scale), (pieces_F, l0_of_pieces, scale_of_pieces) = found
    torch.testing.assert_close(pieces_F, whole_F)
    assert l0_of_pieces == l0 and scale_of_pieces == pytest.approx(scale)
    assert seen == 3 * [400] + 12 * [100]
