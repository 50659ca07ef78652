"""fipo.absorption against its rules token by token, and a planted child that stands in for its parent."""

import json
import math
import sys

import pytest
import torch
from toys import seeded

from benchmarks import absorption as benchmark
from benchmarks.parity import inputs
from fipo.absorption import absorbed, main_latents
from fipo.activations import ReLU
from fipo.errors import UserError
from fipo.export import save_sae
from fipo.sae import SAE


def by_the_rules(acts_D, codes_F, dec_FD, probe_D, main):
    """One token, in Python's numbers: (in full?, fraction)."""
    norm = math.sqrt(sum(v * v for v in probe_D.tolist()))
    unit = [v / norm for v in probe_D.tolist()]
    cosines = [
        sum(u * v for u, v in zip(unit, row, strict=True)) / math.sqrt(sum(v * v for v in row))
        for row in dec_FD.tolist()
    ]
    parts = [code * cos for code, cos in zip(codes_F.tolist(), cosines, strict=True)]
    whole, held = sum(u * v for u, v in zip(unit, acts_D.tolist(), strict=True)), sum(parts[latent] for latent in main)
    best = max(range(len(parts)), key=lambda latent: parts[latent])
    in_full = all(codes_F[latent] == 0 for latent in main) and cosines[best] >= 0.025 and whole >= 0
    in_full = in_full and parts[best] / whole >= 0.4
    others = [part for latent, part in enumerate(parts) if latent not in main and cosines[latent] >= 0.1 and part > 0]
    carried = sum(sorted(others)[-3:])
    if held >= whole or carried / whole < 0.4:
        return in_full, 0.0
    if held <= 0:
        return in_full, 1.0
    carried = min(carried, whole - held)
    return in_full, min(1.0, max(0.0, carried / (carried + held)))


def test_every_token_by_the_rules():
    given = inputs.planted_absorption(300, 40, 24, seed=6)
    given["acts_ND"][:20] *= -1  # where a probe would not find the concept, nothing is absorbed in full
    found = absorbed(*(given[name] for name in ("acts_ND", "codes_NF", "dec_FD", "probe_D", "main_M")))
    rest = given["dec_FD"].double(), given["probe_D"].double(), given["main_M"].tolist()
    expected = [
        by_the_rules(acts_D, codes_F, *rest)
        for acts_D, codes_F in zip(given["acts_ND"].double(), given["codes_NF"].double(), strict=True)
    ]
    assert found.full_N.tolist() == [full for full, _ in expected]
    assert torch.allclose(found.fraction_N, torch.tensor([part for _, part in expected]), atol=1e-5)
    assert 50 < sum(found.full_N) < 200 and sum((found.fraction_N > 0) & (found.fraction_N < 1)) > 30
    without_N = given["acts_ND"] @ given["probe_D"] < 0
    assert without_N.sum() > 10 and not found.full_N[without_N].any()


def test_a_child_that_holds_its_parent():
    """Latents: the parent, and a child whose row holds the parent's direction; tokens: the parent alone, both by two
    codes, both by the child's."""
    dec_FD = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), dim=1)
    codes_NF = torch.tensor([[1.0, 0.0, 0.0], [0.5, 2**0.5 / 2, 3.0], [0.0, 2**0.5, 0.0], [0.0, 0.0, 3.0]])
    found = absorbed(codes_NF @ dec_FD, codes_NF, dec_FD, torch.tensor([5.0, 0.0, 0.0]), torch.tensor([0]))
    assert found.full_N.tolist() == [False, False, True, False]
    assert found.silent_N.tolist() == [False, False, True, True]
    assert found.fraction_N.tolist() == pytest.approx([0.0, 0.5, 1.0, 0.0])


def test_an_sae_whose_latents_are_all_main_ones():
    codes_NF = torch.tensor([[0.0, 1.0]])
    found = absorbed(torch.ones(1, 2), codes_NF, torch.eye(2), torch.ones(2), torch.tensor([0, 1]))
    assert not found.full_N.any() and not found.fraction_N.any()


@pytest.mark.parametrize(
    ("f1", "count"),
    [
        ([0.5], 1),
        ([0.5, 0.52], 1),
        ([0.5, 0.54], 2),
        ([0.5, 0.54, 0.56, 0.9], 2),
        ([0.1, 0.2, 0.3, 0.4], 4),
        ([0.5, 0.1, 0.9], 1),
    ],
)
def test_as_many_main_latents_as_each_add_something(f1, count):
    assert main_latents(f1) == count


def test_whole_words_of_a_row():
    pieces = [
        "Run",
        " walk",
        "ing",
        " Ships",
        ".",
        "\n",
        "Lines",
        "\n",
        " caf",
        "é",
        " ÖL",
        " k9",
        " 42",
        "’",
        "s",
        " end",
    ]
    assert list(benchmark.whole_words(pieces)) == [(3, "ships"), (6, "lines"), (12, "42"), (14, "s")]


@pytest.mark.parametrize("architecture", ["bert", "gpt_neox", "llama"])
def test_whole_words_whatever_marks_them_in_a_vocabulary(load_lm, architecture):
    lm = load_lm(architecture)
    ids = lm.tokenizer("the planet orbit market zz9 team of moon", add_special_tokens=False)["input_ids"]
    words = [word for _, word in benchmark.whole_words(lm.pieces(ids))]
    assert len(words) > 3 and set(words) <= {"planet", "orbit", "market", "team", "of"}


@pytest.fixture(scope="module")
def planted():
    """Words in -ing, numbers and others, each a direction of its own and its class's besides, four times each."""
    generator = seeded(3)
    letters = [[chr(97 + int(letter)) for letter in torch.randint(26, (6,), generator=generator)] for _ in range(600)]
    kinds = [f"{''.join(word)}ing" if place % 6 == 0 else "".join(word) for place, word in enumerate(letters)]
    kinds = list(dict.fromkeys(str(1000 + place) if place % 6 == 1 else kind for place, kind in enumerate(kinds)))
    words = [kind for kind in kinds for _ in range(4)]
    of_word = torch.nn.functional.normalize(torch.randn(len(kinds), 64, generator=generator), dim=1).repeat_interleave(
        4, 0
    )
    is_ing, is_number = (
        torch.tensor([[test(word)] for word in words]) for test in (lambda w: w[-3:] == "ing", str.isdigit)
    )
    dec_FD = torch.eye(64)[:2]
    acts_ND = of_word + 1.5 * is_ing * dec_FD[0] + 1.5 * is_number * dec_FD[1]
    trained = {kind for place, kind in enumerate(kinds) if place % 5}
    return (
        words,
        acts_ND + 0.05 * torch.randn(acts_ND.shape, generator=generator),
        torch.tensor([w in trained for w in words]),
    )


def test_known_classes_are_found_and_others_are_not(planted):
    words, acts_ND, train_N = planted
    known = benchmark.concepts(acts_ND, benchmark.memberships(words, train_N), train_N, decay=1e-3)
    assert {"number", "year", "-ing"} >= {one.name for one in known} >= {"number", "-ing"}
    for one in known:
        assert one.f1 > 0.9 and benchmark.f1_score(one.is_N, one.found_N) > 0.9


def test_an_sae_of_known_absorption(planted):
    """A third of the words in -ing are of twelve kinds, each with a direction and a latent more. In one SAE the latent
    has its direction alone; in the other it holds the parent's besides, whose latent is silent there."""
    words, acts_ND, train_N = planted
    kin = sorted({word for word in words if word.endswith("ing")})[::3]
    kind = {word: 2 + place % 12 for place, word in enumerate(kin)}
    parent_D, number_D, kin_KD = torch.eye(64)[0], torch.eye(64)[1], torch.eye(64)[2:14]
    acts_ND = acts_ND + 2 * torch.stack([torch.eye(64)[kind[w]] if w in kind else torch.zeros(64) for w in words])
    found = benchmark.concepts(acts_ND, benchmark.memberships(words, train_N), train_N, decay=1e-3)
    known = [one for one in found if one.name in ("-ing", "number")]
    rows = {}
    for name, absorbs in (("plain", 0.0), ("absorbing", 1.0)):
        sae = SAE(64, 14, ReLU(), generator=seeded(0))
        with torch.no_grad():
            sae.mean_D.zero_()
            sae.scale.fill_(1.0)
            child_KD = torch.nn.functional.normalize(absorbs * 1.5 * parent_D + 2 * kin_KD, dim=1)
            sae.dec_FD.copy_(torch.cat([parent_D[None], number_D[None], child_KD]))
            sae.enc_FD.copy_(torch.cat([(parent_D - absorbs * kin_KD.sum(0))[None], number_D[None], 1.25 * kin_KD]))
            sae.enc_bias_F.copy_(torch.tensor([-0.7, -0.7] + [-1.0] * 12))
        rows[name] = benchmark.measure(sae.eval(), acts_ND, known, train_N)
        with torch.no_grad():
            for parameter, factor in ((sae.dec_FD, 3), (sae.enc_FD, 1 / 3), (sae.enc_bias_F, 1 / 3)):
                parameter *= factor
        again = benchmark.measure(sae, acts_ND, known, train_N)
        assert all(again[key] == pytest.approx(rows[name][key]) for key in again), "rows may have any norm"
    assert rows["plain"]["absorbed in full"] == 0 and rows["plain"]["F1, one latent"] > 0.9
    in_full = rows["absorbing"]["of every class, in full"]
    tested = {
        word for word, trained in zip(words, train_N.tolist(), strict=True) if word.endswith("ing") and not trained
    }
    assert in_full["number"] == 0 and in_full["-ing"] == pytest.approx(len(tested & set(kin)) / len(tested), abs=0.03)
    assert 0.2 < in_full["-ing"] < 0.5


def test_rows_that_differ_by_seed_alone_are_one():
    rows = [
        {
            "SAEs": run,
            "sparsity": "k 8",
            "layer": 3,
            "seed": seed,
            "L0": 8.0,
            **dict.fromkeys(benchmark.MEASURES, value),
        }
        for run, seed, value in (("a", 1, 0.1), ("a", 2, 0.3), ("b", 1, 0.4), ("b", 2, 0.8), ("c", 3, 0.5))
    ]
    shown = [(row["seeds"], row["absorbed in full"]) for row in benchmark.summary(rows)]
    assert shown == [(2, "0.200 ± 0.141"), (2, "0.600 ± 0.283"), (1, "0.500")]
    assert benchmark.ratios(rows) == {
        "a / b, layer 3, k 8": pytest.approx(1 / 3),
        "a / c, layer 3, k 8": pytest.approx(0.4),
    }
    (apart,) = benchmark.paired(rows)
    assert (apart["difference"], apart["trainings"], apart["F1"]) == ("a - b", 2, "-0.400 ± 0.100")
    assert [next(iter(row)) for row in benchmark.tables(rows)] == ["SAEs"] * 3 + ["difference"] + ["one of"] * 5


def test_saes_of_a_model_and_what_is_told_in_one_line(model_folder, tmp_path, text_folder, monkeypatch):
    sae = SAE(16, 32, ReLU(), generator=seeded(0))
    save_sae(tmp_path / "sae", sae, model=str(model_folder("bert")), layer=1, context=16, dataset="none", beside={})
    monkeypatch.setattr(sys, "argv", ["absorption", str(tmp_path / "sae")])
    with pytest.raises(UserError, match="give a text by --text"):
        benchmark.main()
    given = ["absorption", str(tmp_path / "sae"), "--text", str(text_folder), "--tokens", "500"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(UserError, match="words to train on and to test on of no class; raise --tokens"):
        benchmark.main()
    monkeypatch.setattr(benchmark, "LEAST_WORDS", 1)
    monkeypatch.setattr(benchmark, "LEAST_F1", 0.1)
    monkeypatch.setattr(sys, "argv", [*given, "--json", str(tmp_path / "result.json")])
    benchmark.main()
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row.get("SAEs", row.get("one of")) for row in rows] == ["sae", "sae"] and rows[0]["seeds"] == 1
    monkeypatch.setattr(benchmark, "LEAST_F1", 1)
    with pytest.raises(UserError, match="no class of words has a probe of F1 above 1 on layer 1"):
        benchmark.main()
    narrow = SAE(8, 32, ReLU(), generator=seeded(0))
    save_sae(tmp_path / "sae", narrow, model=str(model_folder("bert")), layer=1, context=16, dataset="none", beside={})
    with pytest.raises(UserError, match="takes activations of width 8"):
        benchmark.main()
