"""What latents respond to, against brute force on planted codes."""

import pytest
import torch
from torch import nn
from toys import seeded

from fipo import features, pooling
from fipo.data.harvest import Chunk
from fipo.features import BEFORE, BEHIND, EVENLY, LARGEST, activities
from fipo.metrics import nearest
from fipo.sae import SAE

LATENTS, WIDTH, ROWS = 5, 4, 40


class Relu(nn.Module):
    """Codes above 1, so that many are 0."""

    sparse = False

    def forward(self, pre_BF):
        return pre_BF * (pre_BF > 1)


@pytest.fixture
def sae():
    made = SAE(WIDTH, LATENTS, Relu(), generator=seeded())
    with torch.no_grad():
        made.enc_bias_F[3] = -100.0  # never active
    return made


@pytest.fixture
def text():
    """Activations [N, 2, D], rows of 1 to 60 tokens whose numbers do not ascend, and ids."""
    sizes = torch.randint(1, 61, (ROWS,), generator=seeded(1))
    text_N = torch.repeat_interleave(torch.randperm(ROWS, generator=seeded(2)), sizes)
    return Chunk(torch.randn(len(text_N), 2, WIDTH, generator=seeded(3)), text_N, torch.arange(len(text_N)) + 1000)


def activity(sae, chunks, place, most=10_000):
    return activities({"a": (sae, place)}, chunks, most)["a"]


def pieces(chunk, size):
    return [Chunk(*parts) for parts in zip(*(part.split(size) for part in chunk), strict=True)]


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_every_active_code_by_brute_force(sae, text, size):
    found = activity(sae, pieces(text, size), 1, 10_000)
    codes_NF = sae.encode(text.acts_NLD[:, 1]).detach()
    assert found.tokens == len(text.text_N) and found.id_N.equal(text.token_N)
    torch.testing.assert_close(found.rate_F, (codes_NF > 0).float().mean(0))
    torch.testing.assert_close(found.mean_F, codes_NF.double().mean(0), rtol=1e-5, atol=0)
    for latent in range(LATENTS):
        code_P, token_P = found.of(latent)
        assert token_P.tolist() == codes_NF[:, latent].nonzero()[:, 0].tolist()
        torch.testing.assert_close(code_P, codes_NF[token_P, latent])


def test_no_more_tokens_than_asked_for(sae, text):
    def chunks():
        yield from pieces(text, 50)
        raise AssertionError("read on")

    found, whole = (activity(sae, given, 0, most) for given, most in ((chunks(), 120), (pieces(text, 120), 120)))
    assert found.tokens == 120 and all(map(torch.equal, found, whole))


def test_several_saes_in_one_pass(sae, text):
    other = SAE(WIDTH, 3, Relu(), generator=seeded(7))
    both = activities({"a": (sae, 1), "b": (other, 0)}, iter(pieces(text, 64)), 10_000)
    for name, one, place in (("a", sae, 1), ("b", other, 0)):
        assert all(map(torch.equal, both[name], activity(one, pieces(text, 64), place)))


def test_a_dense_sae_ends_the_text_early_for_all(sae, text, monkeypatch):
    """Which takes no more memory than the codes it may have."""
    whole = activity(sae, pieces(text, 50), 0)
    monkeypatch.setattr(features, "MOST_CODES", 100)
    both = activities({"a": (sae, 0), "b": (sae, 1)}, pieces(text, 50), 10_000)
    assert both["a"].tokens == both["b"].tokens < whole.tokens
    assert 100 <= max(len(one.code_P) for one in both.values()) < 100 + 50 * LATENTS


def test_wide_codes_are_made_in_pieces(sae, text, monkeypatch):
    seen, original = [], SAE.encode
    monkeypatch.setattr(SAE, "encode", lambda self, acts_BD: seen.append(len(acts_BD)) or original(self, acts_BD))
    monkeypatch.setattr(pooling, "CODES_IN_CACHE", 70 * LATENTS)
    found = activity(sae, [text], 0)
    assert set(seen[:-1]) == {70} and sum(seen) == found.tokens


def test_examples_are_of_the_largest_rows_and_evenly_of_the_rest(sae, text):
    found = activity(sae, [text], 0, 10_000)
    codes_NF = sae.encode(text.acts_NLD[:, 0]).detach()
    for latent in (0, 1, 2, 4):
        by_row = [float(codes_NF[text.text_N == row, latent].max()) for row in range(ROWS)]
        ranked = sorted((value for value in by_row if value > 0), reverse=True)
        assert len(ranked) > LARGEST + EVENLY
        largest = [example.largest for example in found.examples(latent)]
        rest = ranked[LARGEST:]
        evenly = [rest[round(place * (len(rest) - 1) / (EVENLY - 1))] for place in range(EVENLY)]
        assert largest == pytest.approx([*ranked[:LARGEST], *evenly])


def test_an_example_is_the_text_around_within_its_row(sae, text):
    found = activity(sae, [text], 0, 10_000)
    codes_NF = sae.encode(text.acts_NLD[:, 0]).detach()
    cut = 0
    for example in found.examples(2):
        first, count = example.tokens[0] - 1000, len(example.tokens)
        assert example.tokens == list(range(first + 1000, first + 1000 + count))
        torch.testing.assert_close(torch.tensor(example.codes), codes_NF[first : first + count, 2])
        row = text.text_N[first]
        own = (text.text_N == row).nonzero()[:, 0].tolist()
        at = first + example.codes.index(example.largest)
        assert codes_NF[own, 2].max() == codes_NF[at, 2]
        assert (first, first + count) == (max(own[0], at - BEFORE), min(own[-1], at + BEHIND) + 1)
        cut += count < len(own)
    assert cut, "no row was longer than what is shown"


def test_a_latent_that_is_never_active_has_no_example(sae, text):
    found = activity(sae, [text], 0, 10_000)
    assert found.examples(3) == [] and found.rate_F[3] == 0 and found.mean_F[3] == 0


def test_two_rows_of_one_number_that_do_not_touch_are_two(sae):
    """Numbers begin anew where a live source is read again; what stands apart is never one stretch."""
    acts_NLD = torch.full((6, 1, WIDTH), 5.0) * sae.enc_FD[0].detach()
    chunk = Chunk(acts_NLD, torch.tensor([7, 7, 8, 8, 7, 7]), torch.arange(6))
    assert sorted(example.tokens for example in activity(sae, [chunk], 0, 6).examples(0)) == [[0, 1], [2, 3], [4, 5]]


def test_nearest_is_another_one_or_none():
    assert nearest(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]), [0, 1]) == ([1, 0], [-1.0, -1.0])
    assert nearest(torch.ones(1, 2), [0])[1] == [-torch.inf]


def test_nearest_by_brute_force():
    dec_FD = torch.randn(9, 4, generator=seeded(4))
    latents, cosines = nearest(dec_FD, [8, 2, 5])
    for latent, near, cosine in zip([8, 2, 5], latents, cosines, strict=True):
        others = [
            (torch.cosine_similarity(dec_FD[latent], dec_FD[n], dim=0).item(), n) for n in range(9) if n != latent
        ]
        assert (cosine, near) == (pytest.approx(max(others)[0], abs=1e-6), max(others)[1])
