"""benchmarks/train_step.py: processes answer and are compared, settings that fail are told; no rival is needed."""

import mmap
import sys

import pytest
import torch

from benchmarks import our_step, trainer_process
from benchmarks import train_step as bench
from benchmarks.our_step import fresh_state, gaussian, stepper

SHAPE = (16, 64, 32, 4)


@pytest.fixture
def start():
    running = []

    def started(setting="pairs", name="fipo"):
        running.append(bench.Trainer(sys.executable, name, "batchtopk", setting, SHAPE))
        return running[-1]

    yield started
    for trainer in running:
        trainer.end()


def test_a_process_answers_with_time_and_memory(start):
    trainer = start().measure(3)
    assert len(trainer.seconds) == 3 and all(0 < seconds < 60 for seconds in trainer.seconds)
    assert 50 * 2**20 < trainer.before <= trainer.peak < 4 * 2**30
    assert trainer.row["setting"] == "pairs" and trainer.row["ms a step"] > 0


def test_a_setting_that_does_not_run_is_told_and_the_fastest_is_kept():
    """Here `nobody` has no trainer at all, and `fipo` stands in for a rival."""
    best, tried = bench.fastest([bench.Trainer(sys.executable, "nobody", "topk", "a", SHAPE)], "toy")
    assert best is None and [row["failed"] for row in tried] == ["KeyError: 'nobody'"]
    best, tried = bench.fastest(bench.start(SHAPE, "topk", "")["fipo"], "toy")
    best.end()
    assert best.setting == min(tried, key=lambda row: row["ms a step"])["setting"] and len(tried) == 2


def test_trainers_take_turns_and_ratios_are_theirs_over_ours(monkeypatch):
    monkeypatch.setattr(bench, "RIVALS", ("sparsify",))
    monkeypatch.setattr(bench, "SETTINGS", {("fipo", "topk"): ("pairs",), ("sparsify", "topk"): ("signum",)})
    started = bench.start(SHAPE, "topk", sys.executable)
    assert [trainer.setting for trainer in started["sparsify"]] == ["signum"]
    started["a rival"] = bench.start(SHAPE, "topk", "")["fipo"]
    rows, tried = bench.step_rows(started, "toy", SHAPE[2], 2)
    assert [row["trainer"] for row in rows] == ["fipo", "fipo"] and rows[0]["what"] == "toy"
    assert rows[0]["tokens/s"] == pytest.approx(32 / rows[0]["ms a step"] * 1000)
    assert "failed" in tried[0] and "No module named" in tried[0]["failed"]
    ours = {"trainer": "fipo", "ms a step": 2.0, "peak MiB": 100.0, "beyond imports MiB": 10.0}
    theirs = ours | {"trainer": "saelens", "ms a step": 10.0, "peak MiB": 400.0, "beyond imports MiB": 100.0}
    assert bench.compared([ours, theirs], "topk", "16k") == {
        "saelens_topk_16k": 5.0,
        "saelens_topk_16k_memory": 0.25,
        "saelens_topk_16k_memory_beyond_imports": 0.1,
    }


def test_a_turn_is_a_second_of_steps_after_the_first(monkeypatch):
    class Clock(bench.Trainer):
        def __init__(self):
            self.name, self.setting, self.seconds, self.peak, self.before, self.steps = "fipo", "pairs", [], 1, 0, 0

        def step(self, count=1):
            """A tenth of a second longer each; the mean of so many."""
            self.steps += count
            return (self.steps - (count - 1) / 2) / 10

        def end(self):
            """There is no process."""

    monkeypatch.setattr(bench, "TURN", 1.0)
    clock = Clock()
    rows, _ = bench.step_rows({"fipo": [clock]}, "toy", 32, 3)
    # Two steps to warm up; three from .5 on after .3 and .4, two from 1.0 on after .8 and .9, one after 1.2 and 1.3.
    assert clock.seconds == pytest.approx([0.6, 1.05, 1.4]) and rows[0]["ms a step"] == pytest.approx(1050)


def test_growth_is_measured_against_the_encoders_product():
    rows, ratios = bench.growth_rows((64, 128), 5, width=16, batch=32, k=4)
    assert [row["F"] for row in rows] == [64, 128] and all(row["step / gemm"] > 1 for row in rows)
    assert ratios["growth_vs_gemm"] == pytest.approx(ratios["growth_of_step"] / ratios["growth_of_gemm"])
    assert ratios["growth_of_step"] == rows[1]["step ms"] / rows[0]["step ms"]


def test_the_penalty_has_a_share_of_the_step():
    rows, shares = bench.penalty_rows(SHAPE, 1)
    assert len(rows) == 3 and list(shares) == ["penalty_share", "ortsae_share", "gram_share"]
    assert all(share > 0 for share in shares.values())


def test_our_step_is_that_of_the_whole_method_and_counts_a_share_of_a_refresh():
    state = fresh_state("batchtopk", SHAPE, True, "cpu")
    config = state.config
    assert None not in (config.importance, config.reservoir, config.lsh, config.penalty, config.levels)
    assert config.aux_weight > 0 and config.optimiser.autocast and len(state.pairs_P2) >= 64 / 2
    cos_FF = state.sae.dec_FD @ state.sae.dec_FD.T
    assert (cos_FF.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).diagonal(dim1=0, dim2=2).mean() - 0.625).abs() < 0.1
    step = stepper("topk", SHAPE, True, "cpu")
    share = step(gaussian(SHAPE, "cpu")[0])
    assert 0 < share < 1 and step(gaussian(SHAPE, "cpu")[1]) == share


def test_the_share_is_measured_when_no_other_trainer_is_starting(monkeypatch):
    measured = []
    monkeypatch.setattr(our_step, "occasional", lambda *_given: measured.append(1) or {"refresh": 0.25})
    step = stepper("topk", SHAPE, True, "cpu")
    assert not measured
    assert [step(acts_BD) for acts_BD in gaussian(SHAPE, "cpu")] == [0.25] * 4 and len(measured) == 1


def test_memory_is_that_of_this_process():
    if not torch.cuda.is_available():
        before = trainer_process.memory("VmRSS")
        held = mmap.mmap(-1, 2**26)  # not from malloc, which may have kept as much
        for _ in range(64):
            held.write(b"1" * 2**20)
        assert trainer_process.memory("VmRSS") - before > 0.9 * len(held)
        assert trainer_process.memory("VmHWM") >= trainer_process.memory("VmRSS")
