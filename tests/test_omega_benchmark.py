"""benchmarks/omega.py: the exact search is exact, and a short run of both ways is published."""

import json
import sys

import pytest
import torch
import toys

from benchmarks import omega
from fipo.objective import orthogonality


@pytest.mark.parametrize("rows", [3, 100])
def test_the_dearest_pairs_alone_pay_what_all_pairs_pay(rows):
    dec_FD = torch.nn.functional.normalize(torch.randn(40, 8, generator=toys.seeded()), dim=1)
    sigma_F = torch.rand(40, generator=toys.seeded(1))
    every_P2 = torch.combinations(torch.arange(40))
    pairs_P2 = omega.dearest_pairs(dec_FD, sigma_F, rows)
    assert len(pairs_P2) <= 39 and (sigma_F[pairs_P2[:, 1]] > sigma_F[pairs_P2[:, 0]]).all()
    torch.testing.assert_close(orthogonality(dec_FD, sigma_F, pairs_P2), orthogonality(dec_FD, sigma_F, every_P2))


def test_a_short_run_is_published(tmp_path, monkeypatch, capsys):
    out = tmp_path / "omega.json"
    settings = dict(seeds=1, latents=32, features=64, k=3, steps=6, wide=256, rounds=1)
    arguments = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["omega.py", "--json", str(out), *arguments])
    omega.main()
    result = json.loads(out.read_text())
    names, ratios = ("gain_share", "smallest_gain_share", "cost_share"), result["ratios"]
    assert result["name"] == "omega" and set(ratios) == {f"{name}{ending}" for name in names for ending in omega.SOUGHT}
    assert [row["pairs"] for row in result["rows"][:5]] == list(omega.WAYS)
    left = [row["Ω"] for row in result["rows"][:5]]
    expected = [(left[0] - value) / (left[0] - left[4]) for value in left[1:4]]
    assert [ratios[f"gain_share{ending}"] for ending in omega.SOUGHT] == pytest.approx(expected)
    shares = [ratios[f"cost_share{ending}"] for ending in omega.SOUGHT]
    assert (
        shares[0] < shares[1] and shares[0] < shares[2] and "all pairs, searched every step" in capsys.readouterr().out
    )


def test_the_exact_search_takes_little_more_than_half_of_all_products():
    """A search among less important rows as well would make the exact way dearer than it is."""
    sizes = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._overloadpacket.__name__ == "mm":
                sizes.append(args[0].shape[0] * args[1].shape[1])
            return func(*args, **(kwargs or {}))

    with Seen():
        omega.dearest_pairs(torch.nn.functional.normalize(torch.randn(64, 8), dim=1), torch.rand(64), rows=8)
    assert sum(sizes) <= 0.6 * 64 * 64
