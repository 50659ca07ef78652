"""benchmarks/eighteen_minutes.py and gemma_job.py: the GPU's path on a toy model, and the arithmetic."""

import json
import os
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import eighteen_minutes as bench
from benchmarks.gemma_job import GEMMA, PHASES, TINY, TRAINING, RandomModel, scales


def published(tmp_path, monkeypatch, *arguments):
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["eighteen_minutes", "--json", str(out), *arguments])
    bench.main()
    return json.loads(out.read_text())


def test_the_toy_is_measured_phase_by_phase(tmp_path, monkeypatch, capsys):
    before = os.environ["FIPO_CACHE"]
    result = published(tmp_path, monkeypatch, "--tiny", "1")
    assert [row["phase"] for row in result["rows"]] == [*PHASES, TRAINING]
    assert all(row["seconds, measured"] > 0 for row in result["rows"])
    assert all(row["roofline seconds"] > 0 for row in result["rows"][:-1])
    assert result["settings"]["kind"] == "measured" and "prediction" not in capsys.readouterr().out
    total = sum(row["seconds, measured"] for row in result["rows"][3:])
    assert result["ratios"]["minutes"] == pytest.approx(total / 60)
    assert os.environ["FIPO_CACHE"] == before, "the cache is the caller's again"


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures on a GPU")
def test_without_a_gpu_it_is_a_prediction_that_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "GEMMA", TINY)
    result = published(tmp_path, monkeypatch)
    assert "prediction, not measured" in capsys.readouterr().out
    assert "prediction" in result["settings"]["kind"] and result["settings"]["FLOP_EFFICIENCY"] == 0.55
    assert all("seconds, prediction" in row for row in result["rows"])


def test_tokens_in_time_are_what_probing_leaves():
    seconds = dict(zip(PHASES, [400, 100, 400, 60, 60, 60], strict=True))
    found = bench.in_time(GEMMA, seconds)
    assert found["minutes"] == 18 and found["share_of_the_plan"] == 1
    assert found["million_tokens_in_18_minutes"] == pytest.approx(50)
    assert bench.in_time(GEMMA, seconds | {PHASES[5]: bench.BUDGET})["million_tokens_in_18_minutes"] == 0


def test_the_slice_is_scaled_to_the_job():
    times = scales(GEMMA)
    assert times["SAE steps"] * GEMMA.steps * 2048 == 50_000_000
    assert {times[phase] for phase in PHASES[:3]} == {times["SAE steps"]}
    assert {times[phase] * GEMMA.slice_classes for phase in PHASES[3:]} == {36}


def test_a_block_costs_its_weights_and_its_attention():
    cost, model, context = bench.block_cost(TINY), TINY.model, TINY.workload.context
    heads, groups = model["num_attention_heads"] * 8, model["num_key_value_heads"] * 8
    weights = model["hidden_size"] * (2 * heads + 2 * groups + 3 * model["intermediate_size"])
    assert cost.flop == 2 * context * weights + 4 * context**2 * heads and cost.flop_32 == 0
    wider = TINY._replace(model=model | {"intermediate_size": 64})
    assert bench.block_cost(wider).flop - cost.flop == 2 * context * 16 * 3 * 32


def test_a_step_costs_one_product_with_all_latents():
    """The encoder's, in bfloat16; what else it multiplies is for dead latents and few."""
    larger = TINY._replace(workload=replace(TINY.workload, latents=128))
    small, large = bench.step_cost(TINY), bench.step_cost(larger)
    assert large.flop - small.flop == pytest.approx(2 * 1024 * 16 * 64, rel=0.1)
    assert large.moved > small.moved > 0


def test_rows_are_full_and_lead_with_the_begin_token():
    lm = RandomModel(TINY, "cpu")
    rows = list(lm.random_rows(torch.Generator().manual_seed(0), 300))
    assert len(rows) == 300 and {len(row) for row in rows} == {16} and {row[0] for row in rows} == {2}
    assert min(min(row[1:]) for row in rows) >= 3 and max(max(row) for row in rows) < 100
