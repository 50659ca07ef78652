"""fipo.log: whole lines are read, half ones and what follows them are not; trimming is exact; a full disk is told."""

import json
import os

import pytest
import torch
import toys

from fipo.errors import UserError
from fipo.log import append_log, log_line, read_log, trim_log
from fipo.schedules import learning_rate
from fipo.train import train_step


def test_every_value_of_a_line():
    config = toys.run_config("run_3", steps=100)
    state = toys.fresh(config)
    report = train_step(state, toys.activations(1)[0])
    most = config.workload.dead_tokens
    state.importance.silent_tokens_F[:] = torch.tensor([most, most + 1] + [most - 1] * 14)
    state.importance.mean_F[:] = torch.arange(16.0)
    state.importance.weight.fill_(1.0)
    state.sae.dec_FD.data[:] = torch.eye(8).repeat(2, 1)
    state.sae.dec_FD.data[8] = -state.sae.dec_FD.data[0]
    line = log_line(state, report, 3, 5.0)
    assert (line["step"], line["tokens"], line["layer"], line["tokens_per_second"]) == (1, toys.BATCH, 3, 5.0)
    assert line["dead_share"] == 2 / 16 and line["candidate_pairs"] == len(state.pairs_P2)
    assert line["sigma_quantiles"] == pytest.approx([1.5, 7.5, 13.5, 14.85])
    assert line["max_cosine_histogram"] == [2, *[0] * 48, 14] and line["mean_max_cosine"] == pytest.approx(14 / 16)
    assert line["learning_rate"] == learning_rate(config, 0) > 0
    assert line["loss"] == report.terms.total.item() and line["reconstruction"] == report.terms.reconstruction.item()
    assert line["fvu"] == report.fvu and line["l0"] == report.l0


def lines(*steps):
    return [{"step": step, "layer": layer, "loss": 0.1 * step} for step in steps for layer in (0, 1)]


@pytest.fixture
def log(tmp_path):
    append_log(tmp_path / "log.jsonl", lines(5, 10))
    append_log(tmp_path / "log.jsonl", lines(15))
    return tmp_path / "log.jsonl"


def test_lines_come_back_in_order(log, tmp_path):
    assert read_log(log) == lines(5, 10, 15)
    assert read_log(tmp_path / "none") == []


TORN = {
    "half a line": b'{"step": 20, "la',
    "a whole line without its end": b'{"step": 20, "layer": 0}',
    "zeros, as a power cut leaves them": b"\0" * 40 + b"\n",
    "no UTF-8": b'{"step": 20, "layer": "\xff\n',
    "no mapping": b"[20]\n",
    "other keys": b'{"loss": 1}\n',
    "step of another type": b'{"step": "20", "layer": 0}\n',
    "infinity": b'{"step": 20, "layer": 0, "loss": Infinity}\n',
    "deep": b"[" * 10_000 + b"\n",
}


@pytest.mark.parametrize("end", TORN.values(), ids=TORN.keys())
def test_what_is_not_whole_ends_the_log(log, end):
    whole = log.read_bytes()
    log.write_bytes(whole + end + json.dumps(lines(25)[0]).encode() + b"\n")
    assert read_log(log) == lines(5, 10, 15)
    assert trim_log(log, 15) == 6 and log.read_bytes() == whole


@pytest.mark.parametrize(
    ("step", "kept"), [(0, ()), (4, ()), (5, (5,)), (12, (5, 10)), (15, (5, 10, 15)), (99, (5, 10, 15))]
)
def test_trimming_keeps_every_line_up_to_the_step_to_the_byte(log, step, kept):
    content = log.read_bytes().splitlines(keepends=True)
    assert trim_log(log, step) == 2 * len(kept)
    assert log.read_bytes() == b"".join(content[: 2 * len(kept)])


def test_nothing_to_trim(tmp_path):
    assert trim_log(tmp_path / "none", 3) == 0 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [28, 5])
def test_a_disk_that_does_not_take_it(log, monkeypatch, code):
    def refuse(_opened):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(
        UserError, match=f"cannot write .*log.jsonl: {os.strerror(code)}; free space, then give the same"
    ):
        append_log(log, lines(20))


def test_a_folder_in_its_place_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_log(tmp_path)
