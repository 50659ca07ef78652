"""fipo.probing against scikit-learn, brute force and planted truth: tasks, logistic regression, choice of features."""

import math

import numpy as np
import pytest
import torch
from toys import seeded

from fipo.evaluate import make_tasks
from fipo.probing import Tasks, fit_logistic, full_accuracies, mean_difference, one_vs_rest, sparse_probes

SIZES = [20, 20, 20, 20, 20]


def sklearn_fit(x, y, max_iter=10_000):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1.0, tol=1e-10, max_iter=max_iter).fit(x, y)


def random_tasks(sizes=tuple(SIZES), seed=0, split="train"):
    return make_tasks(list(torch.arange(sum(sizes)).split(list(sizes))), seed, "test", split)


def sparse_accuracies(*given):
    """Accuracy [T] of every k."""
    return {k: right_TM.double().mean(1) for k, right_TM in sparse_probes(*given).right.items()}


def features(rows, width, seed=1):
    """Non-negative, sparse, float32, as codes are."""
    return torch.randn(rows, width, generator=seeded(seed)).relu()


@pytest.mark.parametrize("sizes", [[20] * 5, [20, 20], [21, 21, 21], [7] * 4])
def test_one_vs_rest_is_balanced_even_and_without_overlap(sizes):
    ends = np.cumsum(sizes)
    for positive, size in enumerate(sizes):
        rows, labels = one_vs_rest(sizes, positive, seeded(positive))
        assert len(rows) == len(labels) == 2 * size and len(set(rows.tolist())) == 2 * size
        owner = np.searchsorted(ends, rows.numpy(), side="right")
        assert labels.sum() == size and ((owner == positive) == (labels.numpy() == 1)).all()
        counts = np.bincount(owner, minlength=len(sizes))
        assert counts[positive] == size
        share = size / (len(sizes) - 1)
        # Each other class gives ceil(share) before the cut to `size`, which takes few away.
        others = np.delete(counts, positive)
        assert others.max() <= np.ceil(share) and others.sum() == size
        assert labels.tolist() != sorted(labels.tolist(), reverse=True)


def test_one_vs_rest_is_drawn_by_the_generator():
    draws = [one_vs_rest(SIZES, 1, seeded(seed))[0].tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_tasks_of_a_dataset():
    tasks = random_tasks()
    assert tasks.rows_TM.shape == tasks.labels_TM.shape == (5, 40)
    again, other = random_tasks(), random_tasks(seed=1)
    assert torch.equal(tasks.rows_TM, again.rows_TM) and not torch.equal(tasks.rows_TM, other.rows_TM)
    for task in range(5):
        positives = tasks.rows_TM[task][tasks.labels_TM[task] == 1]
        assert sorted(positives.tolist()) == list(range(20 * task, 20 * task + 20))


def test_mean_difference_by_brute_force():
    features_NF, tasks = features(100, 7), random_tasks()
    given_TF = mean_difference(features_NF, tasks)
    for task in range(5):
        rows, positive = features_NF[tasks.rows_TM[task]], tasks.labels_TM[task] == 1
        expected_F = rows[positive].mean(0) - rows[~positive].mean(0)
        torch.testing.assert_close(given_TF[task], expected_F)


def test_mean_difference_in_bfloat16_is_rounded_as_saebench_s():
    features_NF, tasks = features(100, 7).bfloat16(), random_tasks()
    given_TF = mean_difference(features_NF, tasks)
    for task in range(5):
        rows, positive = features_NF[tasks.rows_TM[task]], tasks.labels_TM[task] == 1
        assert torch.equal(given_TF[task], rows[positive].mean(0) - rows[~positive].mean(0))


def test_mean_difference_of_unequal_sides():
    features_NF = features(10, 3)
    tasks = Tasks(torch.tensor([[0, 4, 5, 9]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    expected_F = features_NF[0] - features_NF[[4, 5, 9]].mean(0)
    torch.testing.assert_close(mean_difference(features_NF, tasks)[0], expected_F)


def problem(kind):
    """x [T, M, K] and y [T, M] of two tasks."""
    generator = seeded(7)
    x_TMK = torch.randn(2, 120, 4, generator=generator, dtype=torch.float64)
    y_TM = (
        x_TMK @ torch.tensor([1.0, -2.0, 0.5, 0.0]).double() + torch.randn(2, 120, generator=generator) > 0
    ).double()
    if kind == "separable":
        y_TM = (x_TMK[..., 0] > 0).double()
    if kind == "single feature":
        x_TMK = x_TMK[..., :1]
    if kind == "constant feature":
        x_TMK[..., 2] = 3.0
    if kind == "dead feature":
        x_TMK[..., 2] = 0.0
    if kind == "twice the same feature":
        x_TMK[..., 2] = x_TMK[..., 1]
    if kind == "unbalanced":
        y_TM[:, :100] = 0
    scale = {"small": 1e-3, "tiny": 1e-6, "large": 1e3, "mixed": torch.tensor([1e-3, 1.0, 1e3, 1.0])}.get(kind, 1.0)
    return x_TMK * scale, y_TM


KINDS = ("plain", "separable", "single feature", "constant feature", "dead feature", "twice the same feature")
KINDS += ("unbalanced", "small", "tiny", "large", "mixed")


@pytest.mark.parametrize("kind", KINDS)
def test_fit_logistic_is_scikit_learns(kind):
    x_TMK, y_TM = problem(kind)
    weights_TK, intercept_T = fit_logistic(x_TMK, y_TM)
    for task in range(2):
        x, y = x_TMK[task].numpy(), y_TM[task].numpy()
        if kind in ("tiny", "large", "mixed"):  # at such scales lbfgs stops early: Newton's method does not
            from sklearn.linear_model import LogisticRegression

            reference = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-10, max_iter=10_000).fit(x, y)
        else:
            reference = sklearn_fit(x, y)
        scale = np.abs(reference.coef_[0]).max()
        np.testing.assert_allclose(weights_TK[task].numpy(), reference.coef_[0], rtol=1e-4, atol=1e-4 * scale)
        np.testing.assert_allclose(intercept_T[task].item(), reference.intercept_[0], rtol=1e-4, atol=1e-4)
        right = ((x @ weights_TK[task].numpy() + intercept_T[task].item() > 0) == (y > 0)).mean()
        assert right == reference.score(x, y)


def test_fit_logistic_does_not_depend_on_its_neighbours():
    x_TMK, y_TM = problem("plain")
    hard_TMK, hard_TM = problem("separable")
    together = fit_logistic(torch.cat([x_TMK, 1e3 * hard_TMK]), torch.cat([y_TM, hard_TM]))[0]
    torch.testing.assert_close(together[:2], fit_logistic(x_TMK, y_TM)[0], rtol=1e-5, atol=1e-6)


def test_fit_logistic_strength_of_the_ridge():
    x_TMK, y_TM = problem("plain")
    weak, strong = (fit_logistic(x_TMK, y_TM, c=c)[0].norm() for c in (10.0, 0.01))
    assert strong < 0.5 * weak


def test_sparse_accuracies_equal_a_naive_loop():
    train_NF, test_NF = features(100, 30), features(50, 30, seed=2)
    train_NF[:20, 4] += 1
    test_NF[:10, 4] += 1
    train, test = random_tasks(), random_tasks([10] * 5, split="test")
    ks = (1, 2, 5, 10)
    given = sparse_accuracies(train_NF, test_NF, train, test, ks)
    assert tuple(given) == ks
    for task in range(5):
        rows, labels = train_NF[train.rows_TM[task]].numpy(), train.labels_TM[task].numpy()
        held, truth = test_NF[test.rows_TM[task]].numpy(), test.labels_TM[task].numpy()
        order = np.argsort(-np.abs(rows[labels == 1].mean(0) - rows[labels == 0].mean(0)), kind="stable")
        for k in ks:
            reference = sklearn_fit(rows[:, order[:k]].astype(float), labels)
            assert given[k][task].item() == pytest.approx(reference.score(held[:, order[:k]], truth), abs=1e-12)


def test_features_for_fewer_k_are_among_those_for_more():
    """Asked together or alone, k gives the same: the ranking does not depend on what else is asked."""
    train_NF, test_NF, train = features(100, 30), features(100, 30, seed=2), random_tasks()
    together = sparse_accuracies(train_NF, test_NF, train, train, (1, 5, 20))
    for k in (1, 5, 20):
        assert torch.equal(together[k], sparse_accuracies(train_NF, test_NF, train, train, (k,))[k])


def planted(rows_per_class, seed, strength=5.0):
    """Latent c is on in class c and off elsewhere; latents 5 to 39 are noise."""
    features_NF = features(5 * rows_per_class, 40, seed)
    for label in range(5):
        features_NF[:, label] *= 0.01
        features_NF[label * rows_per_class : (label + 1) * rows_per_class, label] += strength
    return features_NF


def test_planted_latents_are_found():
    train, test = random_tasks([60] * 5), random_tasks([40] * 5, split="test")
    accuracy_T = sparse_accuracies(planted(60, 1), planted(40, 2), train, test, (1,))[1]
    assert accuracy_T.min() > 0.98


def test_noise_gives_a_half():
    train, test = random_tasks([200] * 5), random_tasks([200] * 5, split="test")
    accuracies = sparse_accuracies(features(1000, 40), features(1000, 40, 2), train, test, (1, 5))
    full_T = full_accuracies(features(1000, 40), features(1000, 40, 2), train, test, seeded())
    for accuracy_T in (*accuracies.values(), full_T):
        assert (accuracy_T.mean() - 0.5).abs() < 0.05 and (accuracy_T - 0.5).abs().max() < 0.1


def test_dead_latents_give_exactly_a_half():
    train = random_tasks()
    nothing_NF = torch.zeros(100, 8)
    assert (sparse_accuracies(nothing_NF, nothing_NF, train, train, (1, 5))[5] == 0.5).all()


def test_full_accuracies_find_a_planted_direction():
    """No single feature tells the classes apart; their sum over one direction does."""
    direction_TF = torch.linalg.qr(torch.randn(40, 5, generator=seeded(3)))[0].T

    def draw(rows, seed):
        noise_NF = 0.5 * torch.randn(5 * rows, 40, generator=seeded(seed))
        return noise_NF + 3 * direction_TF.repeat_interleave(rows, dim=0)

    train, test = random_tasks([60] * 5), random_tasks([40] * 5, split="test")
    train_NF, test_NF = draw(60, 1), draw(40, 2)
    first_T = full_accuracies(train_NF, test_NF, train, test, seeded(4))
    assert first_T.min() > 0.95 and first_T.shape == (5,)
    assert sparse_accuracies(train_NF, test_NF, train, test, (1,))[1].max() < 0.93


def test_full_accuracies_are_seeded_and_change_nothing():
    train_NF, test_NF, train = features(750, 10), features(750, 10, 2), random_tasks([150] * 5)
    before = train_NF.clone()  # 300 rows a task: two batches, so their order counts
    first_T, second_T, other_T = (full_accuracies(train_NF, test_NF, train, train, seeded(seed)) for seed in (4, 4, 5))
    assert torch.equal(first_T, second_T) and not torch.equal(first_T, other_T)
    assert torch.equal(train_NF, before)


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_a_full_probe_is_a_plain_training_loop(share):
    """nn.Linear, binary cross-entropy and AdamW from torch's own stream, one task; on sparse and on dense features."""
    on_NF = torch.rand(750, 40, generator=seeded(8)) < share
    train_NF, test_NF, train = features(750, 40) * on_NF, features(750, 40, 2) * on_NF, random_tasks([150] * 5)
    train_NF[:150, 3], test_NF[:150, 3] = 2.0, 2.0
    task = Tasks(train.rows_TM[:1], train.labels_TM[:1])
    x_MF, y_M, x_test_MF = train_NF[task.rows_TM[0]], task.labels_TM[0], test_NF[task.rows_TM[0]]
    with torch.random.fork_rng():
        torch.manual_seed(9)
        linear, best, waited = torch.nn.Linear(40, 1), 0.0, 0
        optimizer = torch.optim.AdamW(linear.parameters(), lr=0.01)
        for _ in range(100):
            for part_B in torch.randperm(300).split(250):
                optimizer.zero_grad()
                loss = torch.nn.functional.binary_cross_entropy_with_logits(linear(x_MF[part_B])[:, 0], y_M[part_B])
                loss.backward()
                optimizer.step()
            accuracy = ((linear(x_test_MF)[:, 0] > 0) == (y_M > 0)).float().mean().item()
            best, waited = (accuracy, 0) if accuracy > best else (best, waited + 1)
            if waited == 10:
                break
    assert full_accuracies(train_NF, test_NF, task, task, seeded(9)).item() == pytest.approx(best, abs=1e-6)
    assert best > 0.7


def test_full_probes_beside_one_another_stop_each_on_its_own():
    """Of noise: where one has stopped, what its weights do next is of no account."""
    stopped = set()
    for seed in range(4):
        train_NF, test_NF, tasks = features(250, 30, seed), features(250, 30, seed + 50), random_tasks([50] * 5)
        given_T = full_accuracies(train_NF, test_NF, tasks, tasks, seeded(seed))
        generator = seeded(seed)
        weights_TF, bias_T = torch.empty(5, 30), torch.empty(5)
        torch.nn.init.kaiming_uniform_(weights_TF, a=math.sqrt(5), generator=generator)
        bias_T.uniform_(-1 / math.sqrt(30), 1 / math.sqrt(30), generator=generator)
        parameters = [[weights_TF[task, None].clone(), bias_T[task, None].clone()] for task in range(5)]
        optimizers = [torch.optim.AdamW([one.requires_grad_() for one in both], lr=0.01) for both in parameters]
        best, waited = [0.0] * 5, [0] * 5
        for epoch in range(100):
            running = [task for task in range(5) if waited[task] < 10]
            stopped |= {epoch} if len(running) in range(1, 5) else set()
            orders = [torch.randperm(100, generator=generator) for _ in running]
            for task, order_M in zip(running, orders, strict=True):
                rows_M, labels_M = tasks.rows_TM[task], tasks.labels_TM[task]
                logits_M = torch.nn.functional.linear(train_NF[rows_M[order_M]], *parameters[task])[:, 0]
                optimizers[task].zero_grad()
                torch.nn.functional.binary_cross_entropy_with_logits(logits_M, labels_M[order_M]).backward()
                optimizers[task].step()
                right_M = (torch.nn.functional.linear(test_NF[rows_M], *parameters[task])[:, 0] > 0) == (labels_M > 0)
                accuracy = right_M.float().mean().item()
                waited[task] = 0 if accuracy > best[task] else waited[task] + 1
                best[task] = max(best[task], accuracy)
        assert given_T.tolist() == pytest.approx(best, abs=1e-6)
    assert stopped, "some stop before others"
