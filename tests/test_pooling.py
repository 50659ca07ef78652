"""fipo.pooling: means over texts by brute force, however the tokens are cut into chunks; the cache and its key."""

import pytest
import torch
from toys import seeded

from fipo import pooling
from fipo.data.harvest import Chunk
from fipo.errors import UserError
from fipo.pooling import FeatureMap, numbers_or_read, pool, pool_or_read
from fipo.screen import Pairs

TEXTS, LAYERS, WIDTH = 7, (2, 5), 6


def tokens():
    """Tokens of 7 texts on two layers, in runs; a text may come in several runs."""
    generator = seeded()
    owner_N = torch.tensor([0, 0, 0, 3, 3, 1, 1, 1, 1, 2, 6, 6, 5, 4, 4, 0])
    return torch.randn(len(owner_N), 2, WIDTH, generator=generator), owner_N


def chunk(acts_NLD, owner_N):
    """Which tokens they are is nothing to pooling."""
    return Chunk(acts_NLD, owner_N, torch.zeros_like(owner_N))


def chunks(size):
    acts_NLD, owner_N = tokens()
    return [chunk(acts_NLD[s : s + size], owner_N[s : s + size]) for s in range(0, len(owner_N), size)]


def maps():
    weight_DF = torch.randn(WIDTH, 9, generator=seeded(1))
    return [
        FeatureMap(5, WIDTH, lambda acts_BD: acts_BD, ("llm",), channels=True),
        FeatureMap(2, 9, lambda acts_BD: (acts_BD.float() @ weight_DF).relu(), ("sae", "a")),
    ]


@pytest.mark.parametrize("size", [1, 3, 16])
def test_means_by_brute_force(size):
    acts_NLD, owner_N = tokens()
    llm_ND, sae_NF = pool(chunks(size), TEXTS, maps(), LAYERS)
    assert llm_ND.shape == (TEXTS, WIDTH) and sae_NF.shape == (TEXTS, 9)
    for text in range(TEXTS):
        mine = acts_NLD[owner_N == text]
        torch.testing.assert_close(llm_ND[text], mine[:, 1].mean(0))
        torch.testing.assert_close(sae_NF[text], maps()[1].encode(mine[:, 0]).mean(0))


@pytest.mark.parametrize("size", [1, 3, 16])
def test_pairs_are_pooled_like_the_matrix_they_stand_for(size):
    def encode(acts_BD):
        codes_BF = maps()[1].encode(acts_BD)
        token_N, latent_N = (codes_BF > 0).nonzero(as_tuple=True)
        return Pairs(codes_BF[token_N, latent_N], token_N, latent_N)

    (matrix_NF,) = pool(chunks(size), TEXTS, maps()[1:], LAYERS)
    (pairs_NF,) = pool(chunks(size), TEXTS, [maps()[1]._replace(encode=encode)], LAYERS)
    torch.testing.assert_close(pairs_NF, matrix_NF)


def test_wide_codes_are_made_in_pieces_that_fit_the_cache(monkeypatch):
    seen = []
    acts_NLD, owner_N = torch.randn(150, 1, 4, generator=seeded(3)), torch.arange(150) // 50
    wide = FeatureMap(0, 9, lambda acts_BD: seen.append(len(acts_BD)) or acts_BD.repeat(1, 3)[:, :9], ("sae",))
    (whole_NF,) = pool([chunk(acts_NLD, owner_N)], 3, [wide], (0,))
    monkeypatch.setattr(pooling, "CODES_IN_CACHE", 9 * 64)
    (pieces_NF,) = pool([chunk(acts_NLD, owner_N)], 3, [wide], (0,))
    assert seen == [150, 64, 64, 22]
    torch.testing.assert_close(pieces_NF, whole_NF)


@pytest.mark.usefixtures("own_cache")
def test_what_is_missing_is_made_in_the_pieces_of_all(monkeypatch):
    """A first run and one that found a part in the cache add up the same numbers in the same order."""
    monkeypatch.setattr(pooling, "CODES_IN_CACHE", 9 * 64)
    seen = []
    given = chunk(torch.randn(150, 1, 4, generator=seeded(3)), torch.arange(150) // 50)
    narrow = FeatureMap(0, 4, lambda acts_BD: seen.append(len(acts_BD)) or acts_BD, ("sae", "narrow"), keep=False)
    wide = FeatureMap(0, 9, lambda acts_BD: acts_BD.repeat(1, 3)[:, :9], ("sae", "wide"))
    for _ in range(2):
        pool_or_read({"text": "x"}, lambda: [given], 3, [narrow, wide], (0,))
    assert seen == 2 * [64, 64, 22]


def test_bfloat16_rounds_the_sum_and_the_mean():
    (llm_ND,) = pool(chunks(4), TEXTS, maps()[:1], LAYERS, precision="bfloat16")
    acts_NLD, owner_N = tokens()
    for text in range(TEXTS):
        mine = acts_NLD[owner_N == text][:, 1].bfloat16()
        torch.testing.assert_close(llm_ND[text], mine.float().sum(0).bfloat16() / len(mine), rtol=2**-8, atol=0)


def test_a_token_that_sums_to_zero_does_not_count_in_bfloat16():
    """It adds to the channels' sum, not to the count, and not to the codes."""
    acts_NLD = torch.tensor([[1.0, -1.0], [2.0, 0.5]])[:, None]
    both = [FeatureMap(0, 2, lambda acts_BD: acts_BD, ("llm",), channels=True)]
    both.append(FeatureMap(0, 2, lambda acts_BD: acts_BD.relu(), ("sae",)))
    given = [chunk(acts_NLD, torch.tensor([0, 0]))]
    assert [one.tolist() for one in pool(given, 1, both, (0,), precision="bfloat16")] == [[[3.0, -0.5]], [[2.0, 0.5]]]
    assert [one.tolist() for one in pool(given, 1, both, (0,))] == [[[1.5, -0.25]], [[1.5, 0.25]]]


def test_a_text_without_tokens_is_named():
    with pytest.raises(UserError, match="probing text 7 has no content token"):
        pool(chunks(4), TEXTS + 1, maps(), LAYERS)


class Counted:
    """Chunks that count how often they are asked for."""

    def __init__(self):
        self.times = 0

    def __call__(self):
        self.times += 1
        return chunks(4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_second_time_only_reads(own_cache, precision):
    source = Counted()
    first, second = (pool_or_read({}, source, TEXTS, maps(), LAYERS, precision=precision) for _ in range(2))
    assert source.times == 1 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert {one.dtype for one in (*first, *second)} == {getattr(torch, precision)}
    assert len(list((own_cache / "pooled").iterdir())) == 2


@pytest.mark.parametrize("change", ["text", "map", "layer", "precision"])
def test_key_names_all_it_depends_on(change):
    source = Counted()
    pool_or_read({"text": "x"}, source, TEXTS, maps(), LAYERS)
    channels, latents = maps()
    changed = {"map": latents._replace(key=("sae", "b")), "layer": latents._replace(layer=5)}.get(change, latents)
    key, precision = {"text": "y" if change == "text" else "x"}, "bfloat16" if change == "precision" else "float32"
    pool_or_read(key, source, TEXTS, [channels, changed], LAYERS, precision=precision)
    assert source.times == 2


def test_only_what_is_missing_is_pooled_and_what_is_not_to_be_kept_is_not(own_cache):
    source, (channels, latents) = Counted(), maps()
    pool_or_read({}, source, TEXTS, [channels, latents._replace(keep=False)], LAYERS)
    assert len(list((own_cache / "pooled").iterdir())) == 1

    def broken(_acts_BD):
        raise AssertionError("pooled again")

    given = pool_or_read({}, source, TEXTS, [channels._replace(encode=broken), latents], LAYERS)
    assert source.times == 2 and torch.equal(given[1], pool(chunks(4), TEXTS, [latents], LAYERS)[0])


@pytest.mark.parametrize("damage", [b"", b"garbage" * 10, None, "a bit"])
def test_damaged_cache_is_pooled_again(own_cache, damage):
    source = Counted()
    first = pool_or_read({}, source, TEXTS, maps(), LAYERS)
    for file in (own_cache / "pooled").iterdir():
        content = bytearray(file.read_bytes())
        content[-60] ^= 1  # in the tensor or its digest: the header is at the front
        file.write_bytes({None: bytes(content[:-8]), "a bit": bytes(content)}.get(damage, damage))
    again = pool_or_read({}, source, TEXTS, maps(), LAYERS)
    assert source.times == 2 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_numbers_are_measured_once_and_again_when_damaged(own_cache):
    times = []

    def measure():
        times.append(1)
        return {"l0": 3.5}

    for _ in range(2):
        assert numbers_or_read(["a"], measure) == {"l0": 3.5}
    assert len(times) == 1
    for damage in ("", "[1]", '{"l0": "many"}'):
        for file in (own_cache / "pooled").glob("*.json"):
            file.write_text(damage)
        assert numbers_or_read(["a"], measure) == {"l0": 3.5}
    assert len(times) == 4 and numbers_or_read(["b"], measure) and len(times) == 5
