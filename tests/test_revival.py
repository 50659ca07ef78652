"""fipo.revival: dead latents become detectors of the given inputs, their Adam moments cleared, live ones untouched."""

import pytest
import torch
import toys
from torch.nn.functional import normalize

from fipo.activations import ReLU
from fipo.revival import revive
from fipo.sae import SAE

WIDTH, LATENTS = 6, 8


def trained() -> tuple[SAE, torch.optim.Adam]:
    """An SAE after one Adam step, so that every moment is non-zero."""
    sae = SAE(WIDTH, LATENTS, ReLU(), generator=toys.seeded())
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.01)
    for parameter in sae.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=toys.seeded(1))
    optimizer.step()
    return sae, optimizer


def dead_latents(*latents: int) -> torch.Tensor:
    return torch.zeros(LATENTS, dtype=torch.bool).index_fill(0, torch.tensor(latents), True)


def inputs(count: int) -> torch.Tensor:
    return 3 * torch.randn(count, WIDTH, generator=toys.seeded(2))


def tensors(sae: SAE, optimizer: torch.optim.Adam) -> dict[str, torch.Tensor]:
    """Rows by latent of all that revival may touch."""
    result = {}
    for name, parameter in {"dec": sae.dec_FD, "enc": sae.enc_FD, "bias": sae.enc_bias_F}.items():
        result[name] = parameter.detach().clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            result[f"{name}.{moment}"] = optimizer.state[parameter][moment].clone()
    return result


def test_dead_latents_detect_the_inputs_and_forget_their_moments():
    sae, optimizer = trained()
    dead_F, inputs_RD = dead_latents(1, 4, 6), inputs(5)
    before = tensors(sae, optimizer)
    live_norm = sae.enc_FD[~dead_F].norm(dim=1).mean()
    assert revive(sae, optimizer, dead_F, inputs_RD, 0.5).tolist() == dead_F.nonzero().squeeze(1).tolist()
    after = tensors(sae, optimizer)
    unit_ND = inputs_RD[:3] / inputs_RD[:3].norm(dim=1, keepdim=True)
    assert torch.allclose(after["dec"][dead_F], unit_ND)
    assert torch.allclose(after["enc"][dead_F], 0.5 * live_norm * unit_ND)
    assert not after["bias"][dead_F].any()
    for name, value in after.items():
        if "exp_avg" in name:
            assert before[name][dead_F].all() and not value[dead_F].any(), name
        assert torch.equal(value[~dead_F], before[name][~dead_F]), name


def test_a_revived_latent_fires_on_its_input():
    sae, optimizer = trained()
    revive(sae, optimizer, dead_latents(2, 3), inputs(2), 0.5)
    codes_RF = sae.encode(inputs(2))
    assert codes_RF[0, 2] > 0 and codes_RF[1, 3] > 0


def test_fewer_inputs_than_dead_latents_revive_the_first():
    sae, optimizer = trained()
    before = tensors(sae, optimizer)
    assert revive(sae, optimizer, dead_latents(1, 4, 6), inputs(2), 0.5).tolist() == [1, 4]
    after = tensors(sae, optimizer)
    assert torch.equal(before["dec"][6], after["dec"][6]) and not torch.equal(before["dec"][4], after["dec"][4])


@pytest.mark.parametrize(("dead", "count"), [((), 3), ((1, 2), 0)])
def test_nobody_dead_or_nothing_to_point_at_changes_nothing(dead, count):
    sae, optimizer = trained()
    before = tensors(sae, optimizer)
    dead_F = dead_latents(*dead) if dead else torch.zeros(LATENTS, dtype=torch.bool)
    assert revive(sae, optimizer, dead_F, inputs(count), 0.5).numel() == 0
    assert all(torch.equal(value, before[name]) for name, value in tensors(sae, optimizer).items())


def test_an_input_without_a_direction_is_left_out():
    sae, optimizer = trained()
    inputs_RD = inputs(4).index_fill(0, torch.tensor([0, 2]), 0.0)
    assert revive(sae, optimizer, dead_latents(1, 4, 6), inputs_RD, 0.5).tolist() == [1, 4]
    assert torch.allclose(sae.dec_FD[[1, 4]], normalize(inputs_RD[[1, 3]], dim=1))


def test_all_dead_before_the_first_step():
    """No live latent to take the norm from, no moments yet."""
    sae = SAE(WIDTH, LATENTS, ReLU(), gain=2.0, generator=toys.seeded())
    revived = revive(sae, torch.optim.Adam(sae.parameters()), dead_latents(*range(LATENTS)), inputs(LATENTS), 0.5)
    assert revived.numel() == LATENTS
    assert torch.allclose(sae.enc_FD.norm(dim=1), torch.ones(LATENTS)) and sae.dec_FD.isfinite().all()
