"""fipo.evaluate: tasks and their repeats, many SAEs in one pass, and what each result is made of."""

import pytest
import torch
from toys import seeded

from fipo import controls
from fipo.activations import ReLU
from fipo.config import Probing
from fipo.data.labelled import load_labelled
from fipo.data.lm import LanguageModel
from fipo.data.prepare import probe_chunks
from fipo.errors import UserError
from fipo.evaluate import Draws, Subject, _score_layer, probe
from fipo.pooling import FeatureMap, pool
from fipo.randomness import generator_for
from fipo.replay import replay
from fipo.sae import SAE
from fipo.summary import accuracies, extras, outcomes
from fipo.uncertainty import Answers, dataset_error

PROBING = Probing(datasets=("x",), train_per_class=20, test_per_class=10, ks=(1, 5))


def subject(layer=0, seed=0, width=16, scale=1.0):
    sae = SAE(width, 32, ReLU(), generator=seeded(seed))
    with torch.no_grad():
        sae.enc_FD.mul_(scale)
    return Subject(layer, sae.eval(), f"weights {seed} {scale}")


@pytest.fixture
def data(labelled_folders):
    return [load_labelled(str(folder), PROBING, 0) for folder in labelled_folders]


@pytest.fixture
def lm(load_lm):
    return load_lm("bert")


def with_(**changes):
    values = {name: getattr(PROBING, name) for name in PROBING.__slots__}
    return Probing(**(values | changes))


def test_first_draw_is_the_given_split_and_others_are_new_ones(data):
    draws = Draws(data[0], with_(repeats=3), 7)
    texts = sum(map(len, data[0].train.values()))
    for repeat, (train, test) in enumerate(draws.draws):
        trained, tested = set(train.rows_TM.flatten().tolist()), set(test.rows_TM.flatten().tolist())
        assert not trained & tested and len(trained) == 60 and len(tested) == 30
        assert (max(trained) < texts <= min(tested)) == (repeat == 0)
        owner = torch.cat([torch.arange(3).repeat_interleave(20), torch.arange(3).repeat_interleave(10)])
        for tasks in (train, test):
            for label in range(3):
                mine = owner[tasks.rows_TM[label]] == label
                assert torch.equal(mine, tasks.labels_TM[label] == 1)
    rows = [train.rows_TM for train, _ in draws.draws]
    assert not rows[1].equal(rows[2]) and rows[0].equal(Draws(data[0], PROBING, 7).first[0].rows_TM)


def test_all_in_one_pass_is_each_alone(lm, data):
    subjects = {"a": subject(0, 1), "b": subject(1, 2), "c": subject(0, 3)}
    together = probe(lm, data, subjects, PROBING, 5, keep=False)
    for name, one in subjects.items():
        alone = probe(lm, data, {name: one}, PROBING, 5, keep=False)[name]
        for ours, theirs in zip(together[name], alone, strict=True):
            assert ours.classes == theirs.classes and ours.rows_TM.equal(theirs.rows_TM)
            assert list(ours.scores) == ["llm", "pca", "sae", "random"]
            for who in ours.scores:
                for k in (1, 5):
                    assert ours.scores[who].first.right[k].equal(theirs.scores[who].first.right[k]), (name, who)


def test_saes_of_a_layer_size_and_l0_share_one_random_control(lm, data, monkeypatch):
    made, fitted, original, fit = [], [], controls.random_sae, Draws.score

    def counted(latents, l0, sample_BD, generator):
        made.append((latents, l0))
        return original(latents, l0, sample_BD, generator)

    def scored(self, who, features_NF, *, full):
        fitted.append(who)
        return fit(self, who, features_NF, full=full)

    monkeypatch.setattr(controls, "random_sae", counted)
    monkeypatch.setattr(Draws, "score", scored)
    one = subject(0, 1)
    found = probe(lm, data, {"a": one, "b": one, "c": one, "d": subject(1, 1)}, PROBING, 5)
    assert len(made) == 2 and fitted.count("random") == 2 * len(data) and fitted.count("sae") == 4 * len(data)
    assert all(found["a"][n].scores["random"] is found["c"][n].scores["random"] for n in range(len(data)))


def test_one_pass_for_all_and_none_the_second_time(lm, data, monkeypatch):
    passed, original = [], LanguageModel.activations

    def counted(self, ids_BS, mask_BS):
        passed.append(ids_BS.shape[0])
        return original(self, ids_BS, mask_BS)

    monkeypatch.setattr(LanguageModel, "activations", counted)
    subjects = {"a": subject(0, 1), "b": subject(1, 2)}
    first = probe(lm, data, subjects, PROBING, 5)
    texts = sum(len(one.texts) for one in data)
    assert texts < sum(passed) <= 2 * texts + 60  # once, and a sample for the random control
    passed.clear()
    second = probe(lm, data, subjects, PROBING, 5)
    assert not passed
    for name in subjects:
        for one, two in zip(first[name], second[name], strict=True):
            assert all(one.scores[w].first.right[5].equal(two.scores[w].first.right[5]) for w in one.scores)


def test_tokens_on_disk_or_straight_from_the_model_are_the_same(lm, data):
    made = []
    live, stored, _ = (
        probe(lm, data, {"a": subject()}, with_(cached=cached), 5, keep=False, harvested=made.append)["a"]
        for cached in (False, True, True)
    )
    assert made == [[], [True, True], [False, False]]
    for one, two in zip(live, stored, strict=True):
        for who in ("sae", "llm", "pca"):
            assert one.scores[who].first.right[5].equal(two.scores[who].first.right[5])


def test_bfloat16_is_close_and_not_the_same(lm, data):
    exact, rounded = (
        probe(lm, data, {"a": subject()}, with_(pooling=pooling), 5)["a"] for pooling in ("float32", "bfloat16")
    )
    means = [[one.scores["sae"].first.right[5].double().mean().item() for one in result] for result in (exact, rounded)]
    assert means[0] == pytest.approx(means[1], abs=0.1)
    for result, dtype in ((exact, torch.float32), (rounded, torch.bfloat16)):  # in which latents are chosen
        assert all(one.scores[who].first.difference_TK.dtype == dtype for one in result for who in ("sae", "llm"))


def test_repeats_have_a_spread_and_leave_the_result_alone(lm, data):
    once, often = (probe(lm, data, {"a": subject()}, with_(repeats=r), 5)["a"] for r in (1, 4))
    for one, more in zip(once, often, strict=True):
        assert one.scores["sae"].first.right[1].equal(more.scores["sae"].first.right[1])
        assert more.scores["sae"].repeated[1].shape == (4, 3)
        assert more.scores["sae"].repeated[1][0].equal(one.scores["sae"].repeated[1][0])
    spread = extras(often, data, PROBING)["eval_result_statistics"]["repeats"]["suite"]["sae_top_1_test_accuracy"]
    values = [sum(one.scores["sae"].repeated[1][draw].mean().item() for one in often) / len(often) for draw in range(4)]
    assert spread["draws"] == 4 and spread["mean"] == pytest.approx(sum(values) / 4)
    assert spread["standard_deviation"] == pytest.approx(torch.tensor(values).double().std().item())
    alone = extras(once, data, PROBING)["eval_result_statistics"]["repeats"]["suite"]["sae_top_1_test_accuracy"]
    assert alone["draws"] == 1 and alone["standard_deviation"] is None


def test_the_chosen_latents_are_those_of_the_largest_difference(lm, data):
    one, sae = data[0], subject().sae
    (result,) = probe(lm, data, {"a": subject()}, PROBING, 5).values()
    chosen = extras(result, data, PROBING)["eval_result_chosen_latents"][one.name]
    latents = FeatureMap(0, sae.latents, sae.encode, ("sae",))
    (pooled_NF,) = pool(probe_chunks(one.texts, lm), len(one.texts), [latents], lm.layers)
    train, _ = Draws(one, PROBING, 5).first
    for place, label in enumerate(one.train):
        rows_M, labels_M = train.rows_TM[place], train.labels_TM[place]
        difference_F = pooled_NF[rows_M[labels_M == 1]].mean(0) - pooled_NF[rows_M[labels_M == 0]].mean(0)
        best = sorted(range(sae.latents), key=lambda latent: -abs(float(difference_F[latent])))[: max(PROBING.ks)]
        assert chosen[label]["latents"] == best
        assert chosen[label]["mean_differences"] == pytest.approx(difference_F[best].tolist(), abs=1e-5)


def test_summary_is_the_scores(lm, data):
    (result,) = probe(lm, data, {"a": subject()}, PROBING, 5).values()
    found, more, kept = accuracies(result), extras(result, data, PROBING), outcomes(result, data)
    for one, text in zip(result, data, strict=True):
        by_class = found[one.name]["sae_top_5_test_accuracy"]
        assert list(by_class) == list(text.train)
        right_TM = one.scores["sae"].first.right[5].double()
        assert list(by_class.values()) == pytest.approx(right_TM.mean(1).tolist())
        errors = more["eval_result_statistics"]["standard_error"]
        expected = dataset_error(Answers(right_TM, one.rows_TM))
        assert errors["datasets"][one.name]["sae_top_5_test_accuracy"] == pytest.approx(expected)
        assert errors["tasks"][one.name]["random_top_1_test_accuracy"].keys() == by_class.keys()
        assert kept[f"{one.name}/sae_top_5/right_TM"].equal(one.scores["sae"].first.right[5])
        controls = more["eval_result_controls"]["datasets"][one.name]
        assert controls["random_top_1_test_accuracy"] == pytest.approx(
            one.scores["random"].first.right[1].double().mean().item()
        )
    margin = more["eval_result_controls"]["margin_over_random"]["top_5"]
    difference = [
        (one.scores["sae"].first.right[5].double() - one.scores["random"].first.right[5].double()).mean().item()
        for one in result
    ]
    assert margin["difference"] == pytest.approx(sum(difference) / 2) and margin["standard_error"] > 0
    described = more["eval_result_datasets"]
    assert [entry["selected_texts_sha256"] for entry in described] == [one.fingerprint for one in data]
    assert described[0]["train_texts"] == 60 and described[0]["classes"] == list(data[0].train)


def test_saebenchs_random_numbers_are_replayed_over_all_datasets(lm, data):
    subjects = {"a": subject(0, 1), "b": subject(1, 2)}
    asked = with_(rng="saebench")
    results = probe(lm, data, subjects, asked, 5)
    pooled = probe(lm, data, subjects, PROBING, 5)
    for name, (layer, sae, _) in subjects.items():
        generator = torch.Generator().manual_seed(5)  # one stream an SAE, through all datasets
        for one, default, text in zip(results[name], pooled[name], data, strict=True):
            maps = [FeatureMap(layer, 16, lambda acts_BD: acts_BD, ("llm",), channels=True)]
            maps.append(FeatureMap(layer, 32, sae.encode, ("sae",)))
            llm_ND, sae_NF = pool(probe_chunks(text.texts, lm), len(text.texts), maps, lm.layers)
            expected = replay(llm_ND, sae_NF, [20] * 3, [10] * 3, (1, 5), generator)
            assert one.replayed == expected and default.replayed is None
            found = accuracies([one])[text.name]
            assert {metric: list(by_class.values()) for metric, by_class in found.items()} == expected
            assert one.scores["sae"].first.right[5].equal(default.scores["sae"].first.right[5])


def test_random_control_is_drawn_by_the_seed(lm, data):
    one, two = (probe(lm, data, {"a": subject()}, PROBING, seed)["a"] for seed in (5, 6))
    assert not one[0].scores["random"].first.right[5].equal(two[0].scores["random"].first.right[5])
    assert not generator_for(5, "x").get_state().equal(generator_for(6, "x").get_state())


def test_codes_a_thousand_times_too_small_are_warned_of(lm, data, capsys):
    probe(lm, data[:1], {"good": subject()}, PROBING, 5)
    assert "warning" not in capsys.readouterr().err
    probe(lm, data[:1], {"small": subject(scale=1e-3)}, PROBING, 5)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(told) == 1 and "SAE small" in told[0] and "W_enc" in told[0]


def test_an_sae_that_does_not_fit(lm, data):
    with pytest.raises(UserError, match="SAE a takes activations of width 8, and layer 0 of .* has 16"):
        probe(lm, data, {"a": subject(width=8)}, PROBING, 5)
    with pytest.raises(UserError, match="k = 50 is more than the 32 latents of SAE a"):
        probe(lm, data, {"a": subject()}, with_(ks=(1, 50)), 5)


def test_principal_components_are_those_of_the_training_texts_alone(data):
    """What the test texts are like moves neither mean nor directions."""
    draws = Draws(data[0], PROBING, 0)
    pooled_ND = torch.randn(len(data[0].texts), 16, generator=seeded(1))
    other_ND = pooled_ND.clone()
    other_ND[draws.train_texts :] = 100 * torch.randn(len(other_ND) - draws.train_texts, 16, generator=seeded(2))
    seen = []

    class Seen:
        train_texts = draws.train_texts

        def score(self, name, features_NF, *, full):
            if name == "pca":
                seen.append(features_NF[: draws.train_texts])

    for features_ND in (pooled_ND, other_ND):
        _score_layer({("llm", 0): features_ND}, Seen(), 0)
    assert seen[0].equal(seen[1])
