"""fipo.uncertainty against simulation and closed forms: errors of means over tasks that share texts."""

import itertools
import math

import pytest
import torch
from toys import seeded

from fipo.uncertainty import Answers, bootstrap, dataset_error, joined, suite_error, task_errors


def shared(texts, tasks, seed, shared_part):
    """Answers to all texts in every task; a share of the texts is right or wrong in all tasks at once."""
    generator = seeded(seed)
    own_TM = torch.rand(tasks, texts, generator=generator) < 0.7
    common_M = torch.rand(texts, generator=generator) < 0.7
    same_M = torch.rand(texts, generator=generator) < shared_part
    rows_TM = torch.stack([torch.randperm(texts, generator=generator) for _ in range(tasks)])
    right_TM = torch.where(same_M, common_M, own_TM)
    return Answers(torch.gather(right_TM, 1, rows_TM).double(), rows_TM)


def test_task_errors_are_binomial():
    right_TM = torch.tensor([[True] * 75 + [False] * 25, [True] * 100])
    assert task_errors(right_TM).tolist() == pytest.approx([math.sqrt(0.75 * 0.25 / 100), 0])


def test_one_task_has_the_binomial_error():
    answers = shared(200, 1, 0, 0.5)
    assert dataset_error(answers) == pytest.approx(task_errors(answers.values_TM)[0].item(), rel=1e-9)


@pytest.mark.parametrize("shared_part", [0.0, 1.0])
def test_dataset_error_is_the_spread_over_new_texts(shared_part):
    draws = [shared(100, 5, seed, shared_part) for seed in range(400)]
    means = torch.tensor([one.mean for one in draws])
    errors = torch.tensor([dataset_error(one) for one in draws])
    assert errors.mean().item() == pytest.approx(means.std().item(), rel=0.12)


def test_texts_shared_by_tasks_make_the_error_larger():
    alone, together = (dataset_error(shared(400, 5, 1, part)) for part in (0.0, 1.0))
    assert together > 1.8 * alone


def test_suite_error():
    assert suite_error([0.03, 0.04]) == pytest.approx(0.025)


def test_bootstrap_interval_is_the_normal_one():
    datasets = [shared(300, 3, seed, 0.5) for seed in (1, 2)]
    each, whole = bootstrap(datasets, seeded(), resamples=4000)
    for answers, interval in zip(datasets, each, strict=True):
        assert interval.mean == pytest.approx(answers.mean)
        half = 1.96 * dataset_error(answers)
        assert interval.low == pytest.approx(answers.mean - half, abs=0.15 * half)
        assert interval.high == pytest.approx(answers.mean + half, abs=0.15 * half)
    half = 1.96 * suite_error([dataset_error(answers) for answers in datasets])
    assert whole.mean == pytest.approx(sum(one.mean for one in datasets) / 2)
    assert whole.high - whole.low == pytest.approx(2 * half, rel=0.1)


def test_bootstrap_is_seeded_and_no_difference_has_no_width():
    datasets = [shared(50, 2, 1, 0.5)]
    assert bootstrap(datasets, seeded(1)) == bootstrap(datasets, seeded(1)) != bootstrap(datasets, seeded(2))
    nothing = [Answers(torch.zeros(2, 10), torch.arange(10).repeat(2, 1))]
    assert bootstrap(nothing, seeded())[1] == (0, 0, 0)


def test_texts_that_few_tasks_have():
    """Rows of two tasks over different texts: resampling keeps them apart."""
    answers = Answers(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]), torch.tensor([[0, 1, 2], [7, 8, 9]]))
    assert answers.mean == 0.5 and dataset_error(answers) == 0
    interval = bootstrap([answers], seeded())[1]
    assert 0.49 < interval.low <= interval.high < 0.51


def test_answers_that_share_texts_are_joined_in_whatever_order_they_were_asked():
    values_TM, rows_TM = torch.ones(2, 4), torch.tensor([[10, 11, 12, 13], [12, 13, 14, 15]])
    other = Answers(values_TM, torch.tensor([[90, 91, 92, 93], [94, 95, 96, 97]]))
    alike = Answers(values_TM, rows_TM.flip(1) + 2)
    found = joined([Answers(values_TM, rows_TM), other, alike])
    assert [one.weight for one in found] == [2, 1] and torch.equal(
        found[0].rows_TM, torch.cat([rows_TM, alike.rows_TM])
    )
    assert len(joined([Answers(values_TM, rows_TM), Answers(torch.ones(2, 3), rows_TM[:, :3])])) == 2
    between = Answers(values_TM, torch.tensor([[10, 11, 90, 91], [92, 93, 14, 15]]))
    for order in itertools.permutations([Answers(values_TM, rows_TM), other, between]):
        assert [one.weight for one in joined(order)] == [3], "two that share none share some with the third"
