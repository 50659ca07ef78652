"""fipo.job, whole, on tiny models: what a run leaves, that it is the same twice and after an interruption, that a
finished folder stays as it is, and that what is no result is an error."""

import dataclasses
import json
import os
import re
import shutil
import signal
import struct
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
import toys
import yaml

from fipo import checkpoint, job, loop, runs
from fipo.data import store
from fipo.data.harvest import first_rows, harvest
from fipo.data.lm import LanguageModel
from fipo.errors import UserError
from fipo.export import load_sae
from fipo.files import read_json
from fipo.lock import locked
from fipo.log import read_log
from fipo.report import check_is_result, print_results
from fipo.results import read_result
from fipo.signals import Interrupted

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
QUICK = {"log_every": 5, "checkpoint_every": 15, "checkpoint_share": 1e9}
FINAL_KEYS = (
    "training_steps final_loss layer dict_size architecture k learning_rate sparsity_penalty held_out_fvu held_out_l0 "
    "held_out_tokens "
    "dead_share mean_max_cosine eval_type_id eval_config eval_id datetime_epoch_millis eval_result_metrics "
    "eval_result_details sae_bench_commit_hash sae_lens_id sae_lens_release_id sae_lens_version sae_cfg_dict "
    "eval_result_unstructured eval_result_protocol eval_result_datasets eval_result_controls eval_result_statistics "
    "eval_result_chosen_latents "
    "run workload seed importance_half_life_tokens git_revision versions hardware activations layers"
)
LOG_KEYS = (
    "step tokens layer loss reconstruction sparsity auxiliary orthogonality fvu l0 dead_share sigma_quantiles "
    "mean_max_cosine max_cosine_histogram candidate_pairs learning_rate tokens_per_second"
)


@pytest.fixture(scope="module")
def values(model_folder, text_folder, labelled_folders):
    """Tiny BERT, one document a row, from a cache."""
    return tiny.workload_values(model_folder("bert"), text_folder, labelled_folders)


@pytest.fixture(scope="module")
def packed_values(model_folder, text_folder, labelled_folders):
    """Tiny GPT-NeoX, packed, straight from the model; training passes over the text more than once."""
    changes = {"packed": True, "cached": False, "train_tokens": 3200}
    return tiny.workload_values(model_folder("gpt_neox"), text_folder, labelled_folders[:1], **changes)


def start(out_dir, values, **method):
    """Run in out_dir, whose config.yaml is written first where there is none."""
    out_dir.mkdir(parents=True, exist_ok=True)
    if not (out_dir / "config.yaml").exists():
        (out_dir / "config.yaml").write_text(yaml.safe_dump(QUICK | method | {"workload": values}))
    job.run(out_dir, EXPERIMENTS)
    return out_dir


@pytest.fixture(scope="module")
def finished(tmp_path_factory, values):
    """One finished run_3, with its own cache; read only."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIPO_CACHE", str(root / "cache"))
        return start(root / "run_3", values)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder):
    """All that training made, without what names times."""
    return {name: content for name, content in files(folder).items() if name.endswith(".safetensors")}


def log(folder, timeless=False):
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not timeless or "second" not in key} for line in lines]


def interrupt_at(monkeypatch, step, error=KeyboardInterrupt):
    """The step of that number, counted from 0, raises before it does anything."""
    original = loop.train_step

    def train_step(state, acts_BD):
        if state.step == step:
            raise error
        return original(state, acts_BD)

    monkeypatch.setattr(loop, "train_step", train_step)


def interrupted(out_dir, values, monkeypatch, step, **method):
    """Run in out_dir until the step of that number, counted from 0."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, step)
        start(out_dir, values, **method)


def test_leaves_these_files_and_no_others(finished):
    expected = {"config.yaml", "final_info.json", "runtime.json", "training.png", "features.html", "training_log.jsonl"}
    for layer in (0, 1):
        saved = ("cfg.json", "fipo_statistics.safetensors", "sae_weights.safetensors", "probing_outcomes.safetensors")
        expected |= {f"layer_{layer}/{name}" for name in saved}
    assert files(finished).keys() == expected


def test_final_info(finished):
    info = read_json(finished / "final_info.json")
    assert " ".join(info) == FINAL_KEYS
    assert list(info["layers"]) == ["0", "1"]
    assert {key: info[key] for key in info["layers"]["1"]} == info["layers"]["1"]
    assert info["training_steps"] == 40 and info["layer"] == 1 and info["dict_size"] == 64
    assert info["learning_rate"] == 0.003 and info["sparsity_penalty"] == 0.01
    assert info["run"] == "run_3" and info["workload"] == "tiny" and info["seed"] == 42
    assert info["held_out_tokens"] == 200 and 0 < info["held_out_fvu"] < 1.5 and 0 < info["held_out_l0"] <= 64
    assert info["eval_config"]["dataset_names"] == ["topics", "more"]
    for who in ("llm", "sae"):
        for k in (1, 5):
            assert 0.4 < info["eval_result_metrics"][who][f"{who}_top_{k}_test_accuracy"] <= 1
    # Words of its topic stand in every text, and even a random model keeps words apart.
    assert info["eval_result_metrics"]["llm"]["llm_top_5_test_accuracy"] > 0.7
    assert info["eval_result_metrics"]["sae"]["sae_top_5_test_accuracy"] > 0.7
    assert info["final_loss"] == log(finished)[-1]["loss"]
    assert "torch" in info["versions"] and info["git_revision"] and info["hardware"]["cores"]
    assert {"model", "tokenizer", "text", "layers", "context", "dtype"} <= info["activations"].keys()


def test_the_revision_of_the_text_is_that_of_the_first_start(tmp_path, values, monkeypatch):
    """When the dataset has moved on, the run goes on with the text that it began with."""
    newest = iter(["first", "second"])
    monkeypatch.setattr(
        job, "pinned", lambda text: text if text.revision else dataclasses.replace(text, revision=next(newest))
    )
    interrupted(tmp_path / "run_0", values, monkeypatch, step=17)
    assert runs.resolve(tmp_path / "run_0", EXPERIMENTS).workload.text.revision == "first"
    start(tmp_path / "run_0", values)
    assert [line["step"] for line in log(tmp_path / "run_0") if line["layer"] == 0] == list(range(5, 45, 5))
    assert runs.resolve(tmp_path / "run_0", EXPERIMENTS).workload.text.revision == "first"


def test_the_record_is_read_as_one(finished):
    assert read_result(finished) == read_json(finished / "final_info.json")


def test_training_log(finished):
    lines = log(finished)
    assert [(line["step"], line["layer"]) for line in lines] == [(s, n) for s in range(5, 45, 5) for n in (0, 1)]
    for line in lines:
        assert " ".join(line) == LOG_KEYS
        terms = sum(line[name] for name in ("reconstruction", "sparsity", "auxiliary", "orthogonality"))
        assert line["loss"] == pytest.approx(terms, rel=1e-5) and line["tokens"] == 32 * line["step"]
        assert len(line["sigma_quantiles"]) == 4 and line["sigma_quantiles"] == sorted(line["sigma_quantiles"])
        assert sum(line["max_cosine_histogram"]) == 64 and len(line["max_cosine_histogram"]) == 50
        assert line["candidate_pairs"] > 0 and line["tokens_per_second"] > 0
    assert lines[-1]["fvu"] < lines[1]["fvu"] and lines[-1]["reconstruction"] < lines[1]["reconstruction"]


def test_config_as_resolved(finished, values):
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    assert saved["run"] == "run_3" and saved["workload"] == values | saved["workload"]
    assert saved["lsh"]["tables"] == 8 and saved["penalty"]["weight"] > 0 and saved["levels"] is None


def test_runtime(finished):
    times = read_json(finished / "runtime.json")
    phases = ["set_up", "harvest", "training", "probing", "page"]
    assert list(times)[:5] == phases and all(times[phase] > 0 for phase in phases)
    assert times["harvested"] is True, "nothing was in its cache"
    assert 0.05 < times["peak_memory_gib"] < 6 and times["hardware"]["threads"] >= 1


def test_page_shows_the_held_out_text_and_what_the_probes_took(finished):
    content = (finished / "features.html").read_text(encoding="utf-8")
    info = read_json(finished / "final_info.json")
    assert "on 200 tokens of held-out text" in content and "run_3, tiny, seed 42" in content
    for number, record in enumerate(info["layers"].values(), 1):
        assert f'<td class="n">{record["held_out_fvu"]:.3f}</td>' in content
        for of_dataset in record["eval_result_chosen_latents"].values():
            for chosen in of_dataset.values():
                assert len(chosen["latents"]) == 5
                assert all(f'<article id="sae-{number}-{latent}">' in content for latent in chosen["latents"])
    assert any(word in re.sub("<[^>]*>", "", content) for word in tiny.TOPICS["sport"])


def test_picture_is_a_png(finished):
    content = (finished / "training.png").read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR" and content[-8:-4] == b"IEND"
    assert width > 800 and height > 400


def test_saved_saes_work_on_raw_activations(finished, load_lm):
    """The FVU of the record is that of the saved SAE on the first 200 tokens of the text, which are held out."""
    lm = load_lm("bert")
    rows = first_rows(lm.token_rows(tiny.sentences(150, seed=1)), lm, 200)
    acts_NLD = torch.cat([chunk.acts_NLD for chunk in harvest(lm, rows)])[:200]
    info = read_json(finished / "final_info.json")
    page = (finished / "features.html").read_text(encoding="utf-8")
    for place, layer in enumerate((0, 1)):
        sae, acts_ND = load_sae(finished / f"layer_{layer}"), acts_NLD[:, place]
        with torch.no_grad():
            fvu = (sae(acts_ND) - acts_ND).pow(2).sum() / (acts_ND - acts_ND.mean(0)).pow(2).sum()
            rates = (sae.encode(acts_ND) > 0).double().mean(0).tolist()
        told = re.findall(rf'id="sae-{place + 1}-(\d+)">.*?active on ([\d.]+) %', page, flags=re.DOTALL)
        assert len(told) > 20 and all(float(rate) == pytest.approx(100 * rates[int(n)], abs=0.6) for n, rate in told)
        assert fvu.item() == pytest.approx(info["layers"][str(layer)]["held_out_fvu"], rel=1e-3)
        beside = safetensors.torch.load_file(finished / f"layer_{layer}" / "fipo_statistics.safetensors")
        assert beside["sigma_F"].shape == beside["silent_tokens_F"].shape == (64,) and beside["sigma_F"].max() > 0


def test_finished_folder_is_never_touched(finished, values):
    before = files(finished)
    with pytest.raises(UserError, match="holds a finished run, which is never overwritten; name another folder or"):
        start(finished, values)
    assert files(finished) == before


def test_same_command_twice_and_the_cache_is_used(tmp_path, finished, values, monkeypatch):
    """The second time no text goes through the language model, and all weights come out the same, bit for bit."""
    monkeypatch.setenv("FIPO_CACHE", str(finished.parent / "cache"))

    def refuse(*_given):
        raise AssertionError("the language model ran")

    monkeypatch.setattr("fipo.data.lm.check_reading", lambda _lm: None)  # but for its trial

    monkeypatch.setattr(LanguageModel, "activations", refuse)
    again = start(tmp_path / "run_3", values)
    assert weights(again) == weights(finished) and len(weights(again)) == 6
    assert log(again, timeless=True) == log(finished, timeless=True)
    old, new = (read_json(folder / "final_info.json") for folder in (finished, again))
    assert new["eval_result_unstructured"] == old["eval_result_unstructured"]


def test_another_seed_gives_other_weights(tmp_path, finished, values, monkeypatch):
    monkeypatch.setenv("FIPO_CACHE", str(finished.parent / "cache"))
    other = weights(start(tmp_path / "run_3", values, seed=1))
    assert all(other[name] != content for name, content in weights(finished).items())


@pytest.mark.parametrize("step", [3, 15, 32])
def test_interrupted_run_goes_on_bit_for_bit(tmp_path, finished, values, monkeypatch, step):
    """Before the first checkpoint, right at one, and between two (15 and 30 of 40 steps)."""
    monkeypatch.setenv("FIPO_CACHE", str(finished.parent / "cache"))
    out_dir = tmp_path / "run_3"
    interrupted(out_dir, values, monkeypatch, step)
    assert not (out_dir / "final_info.json").exists() and (out_dir / loop.CHECKPOINTS).exists() == (step >= 15)
    logged = [line["step"] for line in log(out_dir)] if step >= 5 else []
    assert logged == [s for s in range(5, step + 1, 5) for _ in (0, 1)]
    steps = []
    original = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda state, acts: steps.append(state.step) or original(state, acts))
    start(out_dir, values)
    assert steps[0] == step // 15 * 15 and steps[-1] == 39
    assert weights(out_dir) == weights(finished)
    assert log(out_dir, timeless=True) == log(finished, timeless=True)
    assert files(out_dir).keys() == files(finished).keys()


def test_interrupted_twice_and_in_probing(tmp_path, finished, values, monkeypatch):
    monkeypatch.setenv("FIPO_CACHE", str(finished.parent / "cache"))
    out_dir = tmp_path / "run_3"
    for step in (20, 33):
        interrupted(out_dir, values, monkeypatch, step)

    def stop(*_given, **_named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "probe", stop)
        start(out_dir, values)
    start(out_dir, values)
    assert weights(out_dir) == weights(finished)
    assert log(out_dir, timeless=True) == log(finished, timeless=True)
    assert read_json(out_dir / "runtime.json")["harvested"] is False, "the cache was there"


def test_a_harvest_of_which_a_part_was_found_is_no_whole_one():
    for parts, whole in (([[True, True], [True]], True), ([[True, True], [False]], False), ([[False], [True]], False)):
        phases = job.Phases()
        for made in parts:
            phases.harvest_ends(made)
        assert phases.harvested is whole and phases.seconds["harvest"] > 0


def test_half_written_log_line_is_dropped_on_resume(tmp_path, finished, values, monkeypatch):
    monkeypatch.setenv("FIPO_CACHE", str(finished.parent / "cache"))
    out_dir = tmp_path / "run_3"
    interrupted(out_dir, values, monkeypatch, 32)
    with open(out_dir / "training_log.jsonl", "a", encoding="utf-8") as opened:
        opened.write('{"step": 35, "la')
    start(out_dir, values)
    assert log(out_dir, timeless=True) == log(finished, timeless=True)


def test_packed_decoder_without_cache_resumes_exactly(tmp_path, packed_values, monkeypatch, own_cache):
    """LiveSource and our own method; step 75 of 100 lies in the second pass over the text."""
    straight = start(tmp_path / "straight" / "run_6", packed_values, checkpoint_every=70)
    broken = tmp_path / "broken" / "run_6"
    interrupted(broken, packed_values, monkeypatch, 75, checkpoint_every=70)
    start(broken, packed_values)
    assert weights(broken) == weights(straight) and log(broken, timeless=True) == log(straight, timeless=True)
    tokens = [read_json(path)["tokens"] for path in own_cache.glob("*/manifest.json")]
    assert 200 in tokens and 1000 not in tokens  # held out and probing text only
    info = read_json(straight / "final_info.json")
    assert info["training_steps"] == 100 and info["sae_cfg_dict"]["architecture"] == "jumprelu"


def test_probes_that_all_guess_are_an_error(tmp_path, values, monkeypatch):
    """Every latent of one layer has died in training: accuracies of exactly 0.5."""
    out_dir, original = tmp_path / "run_0", job.train_all

    def deadly(*given):
        states = original(*given)
        states[1].sae.enc_bias_F.data.fill_(-1e6)
        return states

    monkeypatch.setattr(job, "train_all", deadly)
    with pytest.raises(UserError, match="layer 1: every probe of the SAE scores exactly 0.5"):
        start(out_dir, values)
    assert not (out_dir / "final_info.json").exists()


def test_too_few_steps_are_an_error(finished):
    config = runs.resolve(finished, EXPERIMENTS)
    layers = {1: read_json(finished / "final_info.json")["layers"]["1"]}
    check_is_result(config, layers)
    longer = dataclasses.replace(config, workload=dataclasses.replace(config.workload, train_tokens=1280 + 32))
    with pytest.raises(UserError, match="layer 1 trained 40 of 41 steps"):
        check_is_result(longer, layers)


@pytest.fixture
def neighbours(tmp_path, finished):
    """A finished run_1, and run_0 beside it with other scores."""
    for run in ("run_0", "run_1"):
        shutil.copytree(finished, tmp_path / run)
    file = tmp_path / "run_0" / "final_info.json"
    info = read_json(file)
    for layer in info["layers"].values():
        for row in layer["eval_result_details"]:
            row["sae_top_1_test_accuracy"] -= 0.1
    file.write_text(json.dumps(info | info["layers"]["1"]))
    return tmp_path


def test_a_run_alone_has_no_baseline(finished, capsys):
    print_results(finished)
    assert "| run_0" not in capsys.readouterr().out


def test_table_beside_run_0(neighbours, capsys):
    print_results(neighbours / "run_1")
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("SAE | LLM | PCA | random | run_0") == 2 and "k=5" in shown
    baseline, info = (read_json(neighbours / run / "final_info.json") for run in ("run_0", "run_1"))
    for number in (0, 1):
        row, old = (record["eval_result_details"][number] for record in (info, baseline))
        controls = info["eval_result_controls"]["datasets"][row["dataset_name"].removesuffix("_results")]
        cell = " | ".join(
            f"{value:.3f}"
            for value in (
                row["sae_top_1_test_accuracy"],
                row["llm_top_1_test_accuracy"],
                controls["pca_top_1_test_accuracy"],
                controls["random_top_1_test_accuracy"],
                old["sae_top_1_test_accuracy"],
            )
        )
        assert cell in shown and row["dataset_name"].removesuffix("_results") in shown


@pytest.mark.parametrize("damage", ["torn", "without controls"])
def test_a_damaged_run_beside_is_done_without(damage, neighbours, capsys):
    file = neighbours / "run_0" / "final_info.json"
    info = read_json(file)
    for layer in info["layers"].values():
        del layer["eval_result_controls"]
    file.write_text("{" if damage == "torn" else json.dumps(info))
    print_results(neighbours / "run_1")
    shown, told = capsys.readouterr()
    assert shown.count("SAE | LLM | PCA | random") == 2 and "random | run_0" not in shown
    assert "warning: the table does without run_0" in told


def test_mistakes_leave_no_folder_behind(tmp_path, values, own_cache, monkeypatch):
    monkeypatch.setenv("FIPO_WORKLOAD", str(tmp_path / "workload.yaml"))
    empty = tiny.write_parquet(tmp_path / "empty" / "train.parquet", {"text": ["", ""]}).parent
    for change, text in (
        ({"model": str(tmp_path / "none")}, "none does not exist"),
        ({"layers": [7]}, "layer 7 of .* it has layers 0 to 2"),
        ({"weights_sha256": "0" * 64}, "expected 0000"),
        ({"text": values["text"] | {"source": str(tmp_path / "none")}}, "none does not exist"),
        ({"text": values["text"] | {"source": str(empty)}}, "no content token"),
        ({"text": values["text"] | {"tokens": 10**6}}, "1000000 were asked for"),
    ):
        tiny.write_workload(tmp_path / "workload.yaml", values | change)
        with pytest.raises(UserError, match=text):
            job.run(tmp_path / "run_0", EXPERIMENTS)
        assert not (tmp_path / "run_0").exists()
    assert all(path.name in ("workload.yaml", "empty") for path in tmp_path.iterdir())
    assert not [path for path in own_cache.rglob("*") if ".tmp" in path.name]


def test_mistakes_in_the_probing_text_are_told_before_training(tmp_path, values, monkeypatch):
    """Not after minutes or days of it."""
    probing = values["probing"] | {"datasets": [str(tmp_path / "none")]}
    monkeypatch.setattr(loop, "train_step", lambda *_given: pytest.fail("trained first"))
    with pytest.raises(UserError, match="probing dataset .*none is neither a folder nor known"):
        start(tmp_path / "run_0", values | {"probing": probing})


def full_at(monkeypatch, number):
    """The disk is full when the safetensors file of that number is written."""
    calls = []
    original = safetensors.torch.save_file

    def full(*given, **named):
        calls.append(1)
        if len(calls) == number:
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        return original(*given, **named)

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full)


def checkpoints(out_dir):
    return sorted(path.name for path in (out_dir / loop.CHECKPOINTS).glob("*"))


def test_full_disk_at_a_checkpoint_does_not_stop_the_run(tmp_path, finished, values, monkeypatch, capsys):
    """The second checkpoint does not fit: the first stays, and so does the result."""
    monkeypatch.setenv("FIPO_CACHE", str(finished.parent / "cache"))
    out_dir, kept = tmp_path / "run_3", []
    original = job.export
    monkeypatch.setattr(job, "export", lambda *given: kept.append(checkpoints(out_dir)) or original(*given))
    full_at(monkeypatch, 2)
    start(out_dir, values)
    said = capsys.readouterr().err
    assert "warning: no checkpoint at step 30, the run goes on: cannot write" in said and "No space left" in said
    assert kept[0] == ["step_15"] and weights(out_dir) == weights(finished)


def test_full_disk_at_a_result_stops_and_goes_on_later(tmp_path, finished, values, monkeypatch):
    monkeypatch.setenv("FIPO_CACHE", str(finished.parent / "cache"))
    out_dir = tmp_path / "run_3"
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot write .*layer_0/sae_weights.*No space"):
        full_at(patch, 3)
        start(out_dir, values)
    assert checkpoints(out_dir) == ["step_15", "step_30"]
    start(out_dir, values)
    assert weights(out_dir) == weights(finished) and files(out_dir).keys() == files(finished).keys()


@pytest.mark.parametrize("step", [7, 39])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_training_saves_first(tmp_path, finished, values, monkeypatch, step, number):
    """In the middle and in the last step: the one under way is finished, saved, and not done again."""
    monkeypatch.setenv("FIPO_CACHE", str(finished.parent / "cache"))
    out_dir, steps = tmp_path / "run_3", []
    original = loop.train_step

    def train_step(state, acts_BD):
        steps.append(state.step)
        if state.step == step and steps.count(step) == 1:
            os.kill(os.getpid(), number)
        return original(state, acts_BD)

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(Interrupted) as caught:
        start(out_dir, values)
    assert caught.value.exit_code == 128 + number
    assert checkpoints(out_dir)[-1] == f"step_{step + 1}" and not list(out_dir.rglob(".*"))
    start(out_dir, values)
    assert steps == [n for n in range(40) for _ in (0, 1)]
    assert weights(out_dir) == weights(finished)
    assert log(out_dir, timeless=True) == log(finished, timeless=True)


def test_a_signal_elsewhere_leaves_nothing_half_written(tmp_path, values, monkeypatch, own_cache):
    """While text goes through the model, and while the result is written."""
    out_dir = tmp_path / "run_0"

    def stop(*_given, **_named):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    for owner, name in ((LanguageModel, "activations"), (job, "measure"), (job.report, "draw")):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(owner, name, stop)
            start(out_dir, values)
        assert not [path for path in [*tmp_path.rglob(".*"), *own_cache.rglob(".*")] if path.is_file()]
        assert not list(own_cache.rglob("*.tmp")) and not (out_dir / "final_info.json").exists()
    start(out_dir, values)


def test_what_a_killed_process_left_is_cleared(tmp_path, finished, values, monkeypatch):
    monkeypatch.setenv("FIPO_CACHE", str(finished.parent / "cache"))
    out_dir = tmp_path / "run_3"
    (out_dir / "layer_0").mkdir(parents=True)
    (out_dir / loop.CHECKPOINTS / ".step_15.123.tmp").mkdir(parents=True)
    for name in (".lock", ".writable", ".config.yaml.7.tmp", "layer_0/.cfg.json.8.tmp"):
        (out_dir / name).write_text("x")
    start(out_dir, values)
    assert files(out_dir).keys() == files(finished).keys()


def test_two_processes_in_one_folder(tmp_path, values):
    out_dir = tmp_path / "run_3"
    with locked(out_dir / ".lock"), pytest.raises(UserError, match="another process is working in .*run_3; wait until"):
        start(out_dir, values)
    assert [path.name for path in out_dir.iterdir()] == ["config.yaml"]


def test_finished_while_we_waited_for_the_lock(tmp_path, finished, values, monkeypatch):
    """The other process ended between our look at the folder and our lock."""
    out_dir = tmp_path / "run_3"
    shutil.copytree(finished, out_dir)
    final = (out_dir / "final_info.json").read_text()
    (out_dir / "final_info.json").unlink()
    original = job.writable

    def writable(folder, option):
        (folder / "final_info.json").write_text(final)
        return original(folder, option)

    monkeypatch.setattr(job, "writable", writable)
    with pytest.raises(UserError, match="holds a finished run, which is never overwritten"):
        start(out_dir, values)
    assert files(out_dir) == files(finished)


def test_killed_right_after_the_record_was_written(tmp_path, finished, values):
    out_dir = tmp_path / "run_3"
    shutil.copytree(finished, out_dir)
    (out_dir / loop.CHECKPOINTS / "step_30").mkdir(parents=True)
    for left in (loop.CHECKPOINTS, ".lock"):
        (out_dir / ".lock").touch()
        with pytest.raises(UserError, match="holds a finished run"):
            start(out_dir, values)
        assert files(out_dir) == files(finished) and not (out_dir / left).exists()


def test_damaged_checkpoint_is_told_and_the_one_before_it_used(tmp_path, finished, values, monkeypatch, capsys):
    monkeypatch.setenv("FIPO_CACHE", str(finished.parent / "cache"))
    out_dir = tmp_path / "run_3"
    interrupted(out_dir, values, monkeypatch, 32)
    (out_dir / loop.CHECKPOINTS / "step_30" / "state.safetensors").write_bytes(b"half")
    steps, original = [], loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda state, acts: steps.append(state.step) or original(state, acts))
    start(out_dir, values)
    assert steps[0] == 15 and "step_30 is damaged" in capsys.readouterr().err
    assert weights(out_dir) == weights(finished) and log(out_dir, timeless=True) == log(finished, timeless=True)


def test_checkpoint_of_another_config(tmp_path, finished, values, monkeypatch):
    monkeypatch.setenv("FIPO_CACHE", str(finished.parent / "cache"))
    out_dir = tmp_path / "run_3"
    interrupted(out_dir, values, monkeypatch, 20)
    config = yaml.safe_load((out_dir / "config.yaml").read_text())
    config["workload"]["learning_rate"] = 0.004
    (out_dir / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="step_15 belongs to another config, text or model"):
        start(out_dir, values)


@pytest.mark.parametrize("left", [None, "", "seed: 42\n"])
def test_checkpoints_without_their_config_are_nobodys(tmp_path, finished, values, monkeypatch, left):
    monkeypatch.setenv("FIPO_CACHE", str(finished.parent / "cache"))
    out_dir = tmp_path / "run_3"
    interrupted(out_dir, values, monkeypatch, 20)
    (out_dir / "config.yaml").unlink()
    if left is not None:
        (out_dir / "config.yaml").write_text(left)
    before = files(out_dir)
    with pytest.raises(UserError, match="holds checkpoints and no config.yaml of their run; put it back"):
        job.run(out_dir, EXPERIMENTS)
    assert files(out_dir) == before


def test_layers_of_an_earlier_config_do_not_stay(tmp_path, finished, values, monkeypatch):
    monkeypatch.setenv("FIPO_CACHE", str(finished.parent / "cache"))
    out_dir = tmp_path / "run_3"
    shutil.copytree(finished / "layer_1", out_dir / "layer_2")
    start(out_dir, values)
    assert files(out_dir).keys() == files(finished).keys()


def test_a_log_that_was_lost_after_the_last_step_is_told(tmp_path, finished, values, monkeypatch):
    monkeypatch.setenv("FIPO_CACHE", str(finished.parent / "cache"))
    monkeypatch.setattr(job, "read_log", lambda file: [line for line in read_log(file) if line["layer"] == 0])
    with pytest.raises(UserError, match="has lost its last line of layer 1; remove the newest folder"):
        start(tmp_path / "run_3", values)


def test_logging_and_saving_at_every_step_changes_no_weight(tmp_path, finished, values, monkeypatch):
    monkeypatch.setenv("FIPO_CACHE", str(finished.parent / "cache"))
    often = start(tmp_path / "run_3", values, log_every=1, checkpoint_every=1)
    assert weights(often) == weights(finished)
    assert len(log(often)) == 80 and log(often, timeless=True)[8:10] == log(finished, timeless=True)[:2]


def test_checkpoints_keep_to_their_share_of_the_time(monkeypatch, tmp_path):
    """A clock that moves by hand: steps of 1 s, checkpoints of 3 s, a share of a tenth."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *_given: now.__setitem__(0, now[0] + 3))
    config = toys.run_config("run_0", steps=1000, checkpoint_every=5, checkpoint_share=0.1)
    saver, saved = loop.Saver(config, tmp_path, "key"), []
    for step in range(1, 1001):
        now[0] += 1
        if saver.due(step):
            saver.save(step, {})
            saved.append(step)
        assert saver.spent <= max(3.0, 0.1 * now[0])
    assert saved[0] == 5 and all(step % 5 == 0 for step in saved) and saver.spent == 3 * len(saved) > 90


def test_store_is_not_rewritten_while_it_is_whole(finished, values, monkeypatch, tmp_path):
    monkeypatch.setenv("FIPO_CACHE", str(finished.parent / "cache"))

    def shards():
        return {path: path.stat().st_mtime_ns for path in store.cache_root().glob("*/shard_*")}

    before = shards()
    assert len(before) >= 4
    start(tmp_path / "run_0", values)
    assert shards() == before
