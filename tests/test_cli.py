"""The command `fipo`: probing saved SAEs end to end, comparing results, and one line for every mistake."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from toys import seeded

from fipo import probe_job
from fipo.activations import ReLU, TopK
from fipo.checkpoint import load_tensors, save_tensors
from fipo.cli import main
from fipo.config import Probing
from fipo.data.labelled import load_labelled
from fipo.data.prepare import probe_chunks
from fipo.data.store import cache_root
from fipo.errors import UserError
from fipo.export import load_sae, save_sae
from fipo.metrics import max_cosines
from fipo.probe_job import some_texts
from fipo.sae import SAE
from fipo.sae_probes_suite import SuiteDataset
from fipo.saved import find_saved
from fipo.yamlfile import write_yaml
from tests.test_compare import finished


@pytest.fixture
def saved(tmp_path, model_folder):
    """Two SAEs of two layers in a folder like a run's, and a third of another kind beside it."""
    model = str(model_folder("bert"))

    def save(folder, layer, activation, seed, width=16):
        sae = SAE(width, 32, activation, generator=seeded(seed))
        save_sae(folder, sae, model=model, layer=layer, context=16, dataset="text", beside={})
        return folder

    for layer in (0, 1):
        save(tmp_path / "run_3" / f"layer_{layer}", layer, ReLU(), layer)
    (tmp_path / "run_3" / "config.yaml").write_text("run: run_3\nseed: 42\n")
    save(tmp_path / "other", 1, TopK(4), 7)
    return tmp_path


def probe(capsys, folders, labelled, *more):
    code = main(["probe", *map(str, folders), "--datasets", *map(str, labelled), *SIZES, *map(str, more)])
    return code, *capsys.readouterr()


SIZES = ["--k", "1,5", "--train", "20", "--test", "10"]


def test_probes_runs_and_single_saes_in_one_go(saved, labelled_folders, capsys):
    out = saved / "out"
    code, shown, _ = probe(capsys, [saved / "run_3", saved / "other"], labelled_folders, "--out", out)
    assert code == 0
    for name in ("run_3/layer_0", "run_3/layer_1", "other"):
        assert f"{name}: test accuracy of the k best, SAE | LLM | PCA | random" in shown
    for label in ("topics", "sport", "money", "mean", "over random"):
        assert shown.count(label) >= 3
    files = {file.name for file in out.iterdir()}
    names = ("run_3_layer_0", "run_3_layer_1", "other")
    suffixes = ("_eval_results.json", "_outcomes.safetensors", "_features.html")
    assert files == {f"{n}{suffix}" for n in names for suffix in suffixes}
    record = json.loads((out / "run_3_layer_1_eval_results.json").read_text())
    assert record["eval_type_id"] == "sparse_probing" and record["eval_config"]["dataset_names"] == ["topics", "more"]
    assert record["sae"] == {"name": "run_3/layer_1", "layer": 1, "run": "run_3", "seed": 42, "config": {}}
    assert record["sae_cfg_dict"]["hook_layer"] == 1 and record["git_revision"] and record["versions"]["torch"]
    right_TM = load_tensors(out / "run_3_layer_1_outcomes.safetensors")["topics/sae_top_5/right_TM"]
    mean = record["eval_result_details"][0]["sae_top_5_test_accuracy"]
    assert right_TM.dtype == torch.bool and mean == pytest.approx(right_TM.double().mean().item())


def test_the_page_is_of_the_sae_and_of_texts_of_all_classes(saved, labelled_folders, capsys, load_lm, monkeypatch):
    asked = []
    monkeypatch.setattr(probe_job, "some_texts", lambda data, count: asked.append(count) or some_texts(data, 24))
    probe(capsys, [saved / "run_3", saved / "other"], labelled_folders, "--out", saved / "out")
    assert asked == 2 * [65_536 // (2 * 16)], "datasets and tokens a text"
    lm, probing = load_lm("bert"), Probing(datasets=("x",), train_per_class=20, test_per_class=10)
    for name, folder in (("run_3_layer_1", "run_3/layer_1"), ("other", "other")):
        record = json.loads((saved / "out" / f"{name}_eval_results.json").read_text())
        page = (saved / "out" / f"{name}_features.html").read_text(encoding="utf-8")
        text = re.sub("<[^>]*>", "", page)
        assert all(any(word in text for word in words) for words in tiny.TOPICS.values())
        texts = [t for one in labelled_folders for t in some_texts(load_labelled(str(one), probing, 42), 24)]
        acts_ND = torch.cat([chunk.acts_NLD[:, 1] for chunk in probe_chunks(texts, lm)])
        assert f"on {len(acts_ND):,} tokens of the labelled texts" in page
        sae = load_sae(saved / folder)
        with torch.no_grad():
            rates = (sae.encode(acts_ND) > 0).double().mean(0).tolist()
        told = dict(re.findall(r'id="sae-1-(\d+)">.*?active on ([\d.e+]+) %', page, flags=re.DOTALL))
        chosen = record["eval_result_chosen_latents"]["topics"]["sport"]["latents"]
        assert {str(latent) for latent in chosen} <= told.keys()
        assert all(float(rate) == pytest.approx(100 * rates[int(n)], rel=0.05) for n, rate in told.items())
        assert f'<td class="n">{sum(rates):.1f}</td><td class="n">{max_cosines(sae.dec_FD).mean():.3f}</td>' in page


def test_some_texts_are_of_all_classes_in_turn(labelled_folders):
    data = load_labelled(str(labelled_folders[0]), Probing(datasets=("x",), train_per_class=20, test_per_class=10), 42)
    uneven = dataclasses.replace(data, train={"a": ["a1", "a2", "a3"], "b": ["b1"], "c": ["c1", "c2"]})
    assert some_texts(uneven, 5) == ["a1", "b1", "c1", "a2", "c2"]
    assert some_texts(uneven, 0) == ["a1", "b1", "c1"], "one of each at least"
    assert len(some_texts(uneven, 100)) == 6


def test_a_page_that_fails_takes_no_result_along_and_is_made_later(saved, labelled_folders, capsys, monkeypatch):
    out = saved / "out"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no page"):
        patch.setattr(probe_job.page, "write", lambda *_: (_ for _ in ()).throw(ValueError("no page")))
        probe(capsys, [saved / "run_3"], labelled_folders, "--out", out)
    assert {file.suffix for file in out.iterdir()} == {".json", ".safetensors"}
    written = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    monkeypatch.setattr(probe_job, "probe", None)  # would be called to probe again
    assert probe(capsys, [saved / "run_3"], labelled_folders, "--out", out)[0] == 0
    assert len(list(out.glob("*.html"))) == 2 and all(file.stat().st_mtime_ns == t for file, t in written.items())


def test_a_result_of_before_pages_is_made_anew(saved, labelled_folders, capsys):
    probe(capsys, [saved / "other"], labelled_folders, "--out", saved / "out")
    file = saved / "out" / "other_eval_results.json"
    record = json.loads(file.read_text())
    del record["eval_result_chosen_latents"]
    file.write_text(json.dumps(record))
    assert probe(capsys, [saved / "other"], labelled_folders, "--out", saved / "out")[0] == 0
    assert "eval_result_chosen_latents" in json.loads(file.read_text())


def test_the_same_command_gives_the_same_numbers(saved, labelled_folders, capsys):
    results = []
    for name in ("a", "b"):
        probe(capsys, [saved / "other"], labelled_folders, "--out", saved / name)
        results.append(json.loads((saved / name / "other_eval_results.json").read_text()))
    first, second = results
    assert first["eval_result_unstructured"] == second["eval_result_unstructured"]
    assert first["eval_result_controls"] == second["eval_result_controls"]


def row(shown, name):
    """The cells of the first row of this name, as lists of texts."""
    line = next(line for line in shown.splitlines() if line.startswith(f"│ {name} "))
    return [cell.split() for cell in line.strip("│").split("│")][1:]


def test_the_table_has_all_controls_and_the_spread_over_repeats(saved, labelled_folders, capsys):
    out, ks = saved / "out", (1, 5)
    wide = "--k", "1,2,3,4,5,6"
    _, shown, _ = probe(capsys, [saved / "other"], labelled_folders, "--repeats", 3, "--out", out)
    record = json.loads((out / "other_eval_results.json").read_text())
    controls, repeats = record["eval_result_controls"]["mean"], record["eval_result_statistics"]["repeats"]["suite"]
    for cell, k in zip(row(shown, "mean"), ks, strict=True):
        assert cell[4::2] == [f"{controls[f'{who}_top_{k}_test_accuracy']:.3f}" for who in ("pca", "random")]
    for cell, k in zip(row(shown, "sd over 3 draws"), ks, strict=True):
        names = [f"{who}_top_{k}_test_accuracy" for who in ("sae", "llm", "pca", "random")]
        assert cell[::2] == [f"{repeats[name]['standard_deviation']:.3f}" for name in names]
    _, shown, _ = probe(capsys, [saved / "other"], labelled_folders, *wide)
    assert (
        "sd over" not in shown and len(row(shown, "mean")) == 6 and all(len(cell) == 7 for cell in row(shown, "mean"))
    )


def test_what_was_stopped_goes_on_and_other_settings_are_refused(saved, labelled_folders, capsys, monkeypatch):
    given, out, original = (saved / "run_3", saved / "other"), saved / "out", probe_job.write_json
    with monkeypatch.context() as patch:

        def disk_of_one(path, record):
            if list(out.glob("*.json")):
                raise UserError(f"cannot write {path}: no space left on the device")
            original(path, record)

        patch.setattr(probe_job, "write_json", disk_of_one)
        code, shown, _ = probe(capsys, given, labelled_folders, "--out", out)
        assert code == 2 and not shown, "files come first"
    (first,) = out.glob("*.json")
    written = {file: file.stat().st_mtime_ns for file in (first, out / "run_3_layer_0_outcomes.safetensors")}
    code, shown, _ = probe(capsys, given, labelled_folders, "--out", out)
    assert code == 0 and shown.count("over random") == 3 and len(list(out.iterdir())) == 9
    assert all(file.stat().st_mtime_ns == time for file, time in written.items())
    assert probe(capsys, given, labelled_folders, "--out", out)[:2] == (0, shown)
    (out / "other_outcomes.safetensors").unlink()
    assert probe(capsys, given, labelled_folders, "--out", out)[:2] == (0, shown) and len(list(out.iterdir())) == 9
    for changed in (["--seed", 3], ["--k", 1], ["--test", 8], ["--repeats", 2], ["--context", 12]):
        code, shown, told = probe(capsys, given, labelled_folders, *changed, "--out", out)
        assert code == 2 and not shown and "of another SAE or of other settings" in told, changed
    assert probe(capsys, given, labelled_folders[:1], "--out", out)[0] == 2
    write_again(saved / "other", 8)
    assert probe(capsys, given, labelled_folders, "--out", out)[0] == 2


def write_again(folder, seed):
    """Another SAE of the same size and setting."""
    tensors = load_tensors(folder / "sae_weights.safetensors")
    tensors["b_enc"] = torch.randn(32, generator=seeded(seed))
    save_tensors(folder / "sae_weights.safetensors", tensors)


@pytest.mark.usefixtures("small_suite")
@pytest.mark.parametrize("suite", ["saebench", "sae-probes"])
def test_a_reader_that_leaves_takes_no_file_along(suite, saved, labelled_folders, monkeypatch):
    """As `fipo probe ... | head` does."""

    reading, writing = os.pipe()
    os.close(reading)
    datasets = SIZES + ["--datasets", *map(str, labelled_folders)] if suite == "saebench" else ["--k", "1"]
    given = [str(saved / "run_3"), str(saved / "other"), "--suite", suite, *datasets, "--out", str(saved / "out")]
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert main(["probe", *given]) == 141
    assert len(list((saved / "out").glob("*_results.json"))) == 3


def test_comparing_results(saved, labelled_folders, capsys):
    """run_9 is run_3 with a ruined layer 1: the difference is 0 on layer 0 and clearly negative on layer 1."""
    shutil.copytree(saved / "run_3", saved / "run_9")
    (saved / "run_9" / "config.yaml").write_text("run: run_9\nseed: 42\n")
    dead = SAE(16, 32, ReLU(), generator=seeded(1))
    dead.enc_bias_F.data.fill_(-1e3)
    model = json.loads((saved / "run_3" / "layer_1" / "cfg.json").read_text())["metadata"]["model_name"]
    save_sae(saved / "run_9" / "layer_1", dead, model=model, layer=1, context=16, dataset="text", beside={})
    out = saved / "out"
    probe(capsys, [saved / "run_3", saved / "run_9"], labelled_folders, "--out", out)
    assert main(["compare", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| workload | run | layer | SAE top-1 | LLM top-1 | PCA top-1 | random top-1 |")
    table = [line for line in lines if line.startswith("| - | run_")]
    assert len(table) == 4 and "| 0.500 |" in [line for line in table if "run_9 | 1" in line][0]
    same = next(line for line in lines if line.startswith("| run_9 - run_3 | 0 | all |"))
    assert "+0.000 [+0.000, +0.000]" in same
    worse = next(line for line in lines if line.startswith("| run_9 - run_3 | 1 | all |"))
    mean, low, high = (float(part.strip(" [],|")) for part in worse.split("|")[-2].replace(",", "").split())
    assert low <= mean <= high < 0
    assert sum("| topics |" in line for line in lines) == 2  # two runs: each dataset as well
    assert "run_3: 42; run_9: 42" in "\n".join(lines)


def test_a_k_beyond_saebenchs_is_shown_and_compared(saved, labelled_folders, capsys):
    given = ["probe", str(saved / "other"), "--datasets", *map(str, labelled_folders), *SIZES[2:], "--k", "1,3"]
    assert main([*given, "--out", str(saved / "out")]) == 0
    means = [line.split("│") for line in capsys.readouterr().out.splitlines() if "mean  " in line]
    assert len(means) == 1 and all("-" not in cell for cell in means[0])
    assert main(["compare", str(saved / "out")]) == 0
    assert "| SAE top-3 | LLM top-3 | PCA top-3 | random top-3 |" in capsys.readouterr().out


@pytest.mark.usefixtures("small_suite")
@pytest.mark.parametrize("suite", [["--suite", "sae-probes", "--k", "1"], None])
def test_runs_probed_and_compared_are_told_apart_as_runs_are(suite, saved, labelled_folders, capsys):
    """A sweep of one seed, and a second seed that differs in more."""
    runs = {"a": {"k": 4}, "b": {"k": 8}, "c": {"k": 4, "penalty": {"kind": "ortsae"}, "seed": 43}}
    for name, values in runs.items():
        shutil.copytree(saved / "run_3" / "layer_1", saved / name / "layer_1")
        config = {"run": "run_8", "seed": 42, "architecture": "topk", "workload": {"k": values.pop("k")}, **values}
        write_yaml(saved / name / "config.yaml", config)
    given = suite or ["--datasets", *map(str, labelled_folders), *SIZES]
    out = saved / "out"
    assert main(["probe", *(str(saved / name) for name in runs), *given, "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["compare", str(out)]) == 0
    table = capsys.readouterr().out.partition("difference")[0].splitlines()
    for name in ("run_8, k 4 |", "run_8, k 8 |", "run_8, penalty.kind ortsae |"):
        (row,) = (line for line in table if name in line)
        assert "±" not in row


def mistake(case, saved, labelled):
    """(folders, datasets, more arguments, what must be told)"""
    other = saved / "other"
    match case:
        case "no SAE":
            return [saved], labelled, [], "holds no SAE"
        case "twice":
            return [other, other], labelled, [], "is given twice"
        case "no dataset":
            return [other], ["nowhere/at/all"], [], "neither a folder nor known"
        case "k":
            return [other], labelled, ["--k", "1,x"], "--k is '1,x'"
        case "k above F":
            return [other], labelled, ["--k", "33"], "more than the 32 latents"
        case "too few texts":
            return [other], labelled, ["--train", "21"], "0 texts"
        case "result in the way":
            (saved / "out").mkdir()
            (saved / "out" / "other_eval_results.json").write_text("{}")
            return [other], labelled, ["--out", saved / "out"], "of other settings; name another --out, or remove it"
        case "damaged":
            (other / "sae_weights.safetensors").write_bytes(b"no")
            return [other], labelled, [], "damaged"
        case "missing":
            (other / "sae_weights.safetensors").unlink()
            return [other], labelled, [], "sae_weights.safetensors is missing"
        case "far too large":
            tensors = load_tensors(other / "sae_weights.safetensors")
            save_tensors(other / "sae_weights.safetensors", tensors | {"W_enc": tensors["W_enc"].mul(1e37)})
            return [other], labelled, [], "are not finite numbers"
        case "k of 0":
            return [other], labelled, ["--k", "0,1"], "--k is 0,1; expected positive numbers"
        case "seed":
            return [other], labelled, ["--seed", "-1"], "--seed is -1"
        case "small context":
            return [other], labelled, ["--context", "2"], "the context is 2 tokens; expected 3 at least"
        case "long context":
            return [other], labelled, ["--context", "4000"], "takes at most"
        case "twice the same text":
            return [other], [labelled[0], labelled[0]], [], "are named topics"
        case "same name":
            shutil.copytree(labelled[1], saved / "elsewhere" / "topics")
            return [other], [labelled[0], saved / "elsewhere" / "topics"], [], "are named topics"
        case "same file":
            shutil.copytree(other, saved / "x" / "y_z")
            shutil.copytree(other, saved / "x_y" / "z")
            return [saved / "x" / "y_z", saved / "x_y" / "z"], labelled, [], "would both be x_y_z"
        case "out is a file":
            (saved / "mine.txt").write_text("precious")
            return [other], labelled, ["--out", saved / "mine.txt" / "deeper"], "cannot write to"
        case "no content":
            for split, first in (("train", 1), ("test", 200)):
                spaces = {"text": [" " * (first + n) for n in range(120)], "label": [0, 1] * 60}
                tiny.write_parquet(saved / "empty" / f"{split}.parquet", spaces)
            return [other], [saved / "empty"], [], "content token"
    raise AssertionError(case)


CASES = ["no SAE", "twice", "no dataset", "k", "k above F", "too few texts", "result in the way", "damaged", "missing"]
CASES += ["far too large", "k of 0", "seed", "small context", "long context", "twice the same text", "same name"]
CASES += ["same file", "out is a file", "no content"]


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_one_line_and_exit_code_2(case, saved, labelled_folders, capsys):
    folders, datasets, more, told = mistake(case, saved, labelled_folders)
    if case == "too few texts":
        more = ["--train", "2000"]
    code, shown, errors = probe(capsys, folders, datasets, *more)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and not shown
    assert told in lines[0] or (case == "too few texts" and "2000 are needed" in lines[0])


METADATA = [
    ({"hook_layer": None, "hook_name": None}, "names no layer"),
    ({"hook_layer": 0}, "names no layer"),
    ({"hook_layer": True}, "names no layer"),
    ({"hook_layer": -1, "hook_name": None}, "block 0 of the model, or before"),
    ({"hook_layer": 9, "hook_name": None}, "layer 9"),
    ({"hook_name": "blocks.1.hook_mlp_out"}, "only SAEs of the residual stream"),
    ({"hook_name": "blocks.0.hook_resid_pre", "hook_layer": 0}, "block 0 of the model, or before"),
    ({"model_name": None}, "does not say its model"),
    ({"model_name": 5}, "metadata.model_name is '5'"),
    ({"context_size": 8}, "differ in context"),
    ({"context_size": "16"}, "metadata.context_size is '16'"),
    (None, "no mapping with a mapping `metadata`"),
]


@pytest.mark.parametrize(("metadata", "told"), METADATA)
def test_what_an_sae_reads_must_be_said_and_be_the_residual_stream(metadata, told, saved, labelled_folders, capsys):
    rewrite(saved / "other", metadata)
    code, shown, errors = probe(capsys, [saved / "run_3", saved / "other"], labelled_folders)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and not shown and told in lines[0]


def test_an_sae_saved_with_a_context_of_one_token_asks_for_another(saved, labelled_folders, capsys):
    rewrite(saved / "other", {"context_size": 1})
    code, _, errors = probe(capsys, [saved / "other"], labelled_folders)
    assert code == 2 and "the context is 1 tokens; expected 3 at least" in errors and "give --context" in errors
    assert probe(capsys, [saved / "other"], labelled_folders, "--context", "16")[0] == 0


@pytest.mark.parametrize(("option", "value"), [("--train", "0"), ("--test", "1"), ("--repeats", "0")])
def test_what_is_wrong_with_an_option_is_told_by_its_name(option, value, saved, labelled_folders, capsys):
    code, shown, errors = probe(capsys, [saved / "other"], labelled_folders, option, value)
    assert code == 2 and not shown and f"error: {option} is {value}" in errors


def test_an_sae_that_is_silent_is_told_and_not_called_unscaled(saved, labelled_folders, capsys):
    file = saved / "other" / "sae_weights.safetensors"
    tensors = load_tensors(file)
    save_tensors(file, tensors | {"b_enc": tensors["b_enc"] - 1e3})
    code, _, errors = probe(capsys, [saved / "other"], labelled_folders)
    assert code == 0 and "no latent of SAE other is active" in errors and "times smaller" not in errors


@pytest.mark.parametrize("config", ["run: run_3\nseed: 2024-01-01\n", "run: run_3\nworkload: 3\n"])
def test_what_lies_beside_an_sae_may_be_no_run_of_ours(config, saved, labelled_folders, capsys):
    (saved / "run_3" / "config.yaml").write_text(config)
    shutil.copytree(saved / "other", saved / "run_3" / "layer_²")
    out = saved / "out"
    code, _, errors = probe(capsys, [saved / "run_3" / "layer_0"], labelled_folders, "--out", out)
    assert code == 0, errors
    assert json.loads((out / "layer_0_eval_results.json").read_text())["sae"]["seed"] is None
    assert probe(capsys, [saved / "run_3"], labelled_folders)[0] in (0, 2)


def rewrite(folder, metadata):
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"] = config["metadata"] | metadata if metadata is not None else []
    (folder / "cfg.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("metadata", "layer"),
    [
        ({"hook_name": "blocks.1.hook_resid_post"}, 1),
        ({"hook_name": "blocks.1.hook_resid_pre"}, 0),
        ({"hook_name": "encoder.layer.1"}, 1),
        ({"hook_name": "model.layers.0", "hook_layer": None}, 0),
        ({"hook_name": None}, 1),
    ],
)
def test_what_goes_into_a_block_is_what_comes_out_of_the_one_before(metadata, layer, saved):
    rewrite(saved / "other", metadata)
    assert find_saved([saved / "other"])[0].layer == layer


@pytest.mark.parametrize("names", [{}, {"hook_name": "hook_point"}])
def test_the_flat_config_of_saelens_before_version_6(names, saved, labelled_folders, capsys):
    config = json.loads((saved / "other" / "cfg.json").read_text())
    flat = {names.get(key, key): value for key, value in (config | config.pop("metadata")).items() if key != "metadata"}
    (saved / "other" / "cfg.json").write_text(json.dumps(flat))
    code, shown, told = probe(capsys, [saved / "other"], labelled_folders)
    assert code == 2 and not shown
    assert "cfg.json was saved by SAELens before version 6" in told and "load it in SAELens 6 and save it anew" in told


def test_a_run_given_alone_keeps_its_name(saved, monkeypatch):
    def names(*folders):
        return [one.name for one in find_saved(folders)]

    run, other = saved / "run_3", saved / "other"
    assert names(run) == ["run_3/layer_0", "run_3/layer_1"] == names(run / "layer_0", run / "layer_1")
    assert names(run / "layer_1") == ["run_3/layer_1"] and names(other) == ["other"]
    assert names(other, run) == ["other", "run_3/layer_0", "run_3/layer_1"]
    (run / "config.yaml").unlink()
    assert names(run) == ["run_3/layer_0", "run_3/layer_1"] and names(run / "layer_1") == ["layer_1"]
    monkeypatch.chdir(run)
    assert names(Path(".")) == ["run_3/layer_0", "run_3/layer_1"]
    for seed in (42, 43):
        shutil.copytree(run, saved / f"seed_{seed}" / "run_3")
    of_seeds = names(*(saved / f"seed_{seed}" / "run_3" for seed in (42, 43)))
    assert of_seeds == [f"seed_{seed}/run_3/layer_{layer}" for seed in (42, 43) for layer in (0, 1)]


@pytest.mark.parametrize("content", ["workload: minilm\n", "run: x\nworkload: null\n", "run: 3\n"])
def test_a_config_beside_an_sae_that_is_none_of_ours_says_nothing(content, saved):
    (saved / "config.yaml").write_text(content)
    assert find_saved([saved / "other"])[0].run == {}


def test_the_cache_tells_saes_of_the_same_weights_apart(saved, labelled_folders, capsys):
    """Of k 4 and of k 32: the second must not be given what was pooled for the first."""
    config = json.loads((saved / "other" / "cfg.json").read_text())
    results = []
    for cached in (True, False):
        for k in (4, 32):
            folder = saved / f"k{k}_{cached}" / "sae"
            shutil.copytree(saved / "other", folder)
            (folder / "cfg.json").write_text(json.dumps(config | {"k": k}))
            if not cached:
                shutil.rmtree(cache_root())
            assert probe(capsys, [folder], labelled_folders, "--out", folder.parent)[0] == 0
            results.append(json.loads((folder.parent / "sae_eval_results.json").read_text())["eval_result_statistics"])
    assert results[0] == results[2] and results[1] == results[3] and results[0] != results[1]


def test_compare_needs_results(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert "holds no final_info.json" in capsys.readouterr().err


def test_a_reader_who_leaves_is_no_error(tmp_path, monkeypatch, capsys):
    """As `head`, which has read what it wants; the picture is drawn all the same."""
    folder, picture = finished(tmp_path / "a", "run_6", 1, 0.3), tmp_path / "a.png"
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patch, os.fdopen(writing, "w") as left:
        patch.setattr("sys.stdout", left)
        assert main(["compare", str(folder), "--picture", str(picture)]) == 141
    assert picture.exists() and capsys.readouterr() == ("", "")


@pytest.fixture
def small_suite(monkeypatch):
    """Two datasets of 300 sentences on two topics instead of the 113."""
    from fipo import suite_job

    made = []
    for number in (1, 2):
        texts = [text for topic in ("sport", "money") for text in tiny.sentences(150, number, topic)]
        made.append(SuiteDataset(f"{number}_topic", texts, [0] * 150 + [1] * 150))

    monkeypatch.setattr(suite_job, "suite_datasets", lambda names: [d for d in made if not names or d.name in names])


@pytest.mark.usefixtures("small_suite")
def test_suite_of_sae_probes(saved, capsys):
    out = saved / "out"
    arguments = ["probe", str(saved / "run_3"), str(saved / "other"), "--suite", "sae-probes", "--out", str(out)]
    assert main(arguments) == 0
    shown, told = capsys.readouterr()
    assert shown.count("mean over 2 datasets of sae-probes, SAE | LLM | random") == 3 and "last tokens" in told
    record = json.loads((out / "run_3_layer_1_sae_probes_results.json").read_text())
    assert record["suite"] == "sae-probes" and record["setting"] == "normal" and record["datasets"] == 2
    accuracies = [scores["sae"]["5"]["accuracy"] for scores in record["results"].values()]
    assert record["mean"]["sae"]["5"]["accuracy"] == pytest.approx(sum(accuracies) / 2) and min(accuracies) > 0.5
    margin = [scores["sae"]["1"]["f1"] - scores["random"]["1"]["f1"] for scores in record["results"].values()]
    assert record["margin_over_random"]["1"]["f1"]["difference"] == pytest.approx(sum(margin) / 2)
    assert len(record["results"]["1_topic"]["llm"]["2"]["latents"]) == 2
    one = json.loads((out / "run_3_layer_0_sae_probes_results.json").read_text())["margin_over_random"]
    told_of = [[f"{m['difference']:+.3f}", "±", f"{m['standard_error']:.3f}"] for m in (one[k]["auc"] for k in one)]
    assert row(shown, "auc over random") == told_of and len(told_of) == 3
    capsys.readouterr()
    (out / "other_sae_probes_results.json").unlink()
    written = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert main(arguments) == 0, "what was stopped goes on"
    assert written and all(file.stat().st_mtime_ns == time for file, time in written.items())
    shown_again, told = capsys.readouterr()
    assert shown_again == shown and "last tokens" in told
    assert json.loads((out / "other_sae_probes_results.json").read_text())["results"]
    assert main([*arguments, "--k", "1,2"]) == 2 and "of other settings" in capsys.readouterr().err
    assert main([*arguments[:4], "sae-probes", "--datasets", "2_topic"]) == 0
    shown = capsys.readouterr().out
    assert "mean over 1 datasets" in shown and all(len(cell) == 1 for cell in row(shown, "f1 over random"))


@pytest.mark.usefixtures("small_suite")
def test_the_seed_draws_the_second_suites_splits_as_well(saved, capsys):
    records = {}
    for seed in (None, 42, 43):
        given = ["--suite", "sae-probes", "--k", "1", "--datasets", "1_topic", "--out", str(saved / f"seed_{seed}")]
        assert main(["probe", str(saved / "other"), *given, *([] if seed is None else ["--seed", str(seed)])]) == 0
        records[seed] = json.loads((saved / f"seed_{seed}" / "other_sae_probes_results.json").read_text())
    assert records[None]["results"] == records[42]["results"]
    assert [record["random_seed"] for record in records.values()] == [42, 42, 43]
    for who in ("sae", "llm", "random"):
        scores = [records[seed]["results"]["1_topic"][who]["1"]["validation_auc"] for seed in (42, 43)]
        assert scores[0] != scores[1], who
    capsys.readouterr()
    assert main(["probe", str(saved / "other"), *given, "--seed", str(2**32)]) == 2
    assert "--seed is 4294967296; expected zero or more, for sae-probes of at most 32 bits" in capsys.readouterr().err


@pytest.mark.usefixtures("small_suite")
@pytest.mark.parametrize(
    ("broken", "more", "lower"),
    [
        ("fipo.probe_job.probe", SIZES, "lower the number of SAEs given at once, --train or --test"),
        ("fipo.suite_job.last_token_activations", ["--suite", "sae-probes"], "or name fewer --datasets"),
    ],
)
def test_out_of_memory_says_what_to_lower(broken, more, lower, saved, labelled_folders, capsys, monkeypatch):
    def no_memory(*_given, **_named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.")

    monkeypatch.setattr(broken, no_memory)
    datasets = map(str, labelled_folders) if more == SIZES else ["1_topic"]
    assert main(["probe", str(saved / "other"), *more, "--datasets", *datasets]) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "out of memory in probing" in told and lower in told


@pytest.mark.usefixtures("small_suite")
@pytest.mark.parametrize(("option", "value"), [("--train", "50"), ("--pooling", "float32"), ("--context", "16")])
def test_the_second_suite_takes_no_options_of_the_first(option, value, saved, capsys):
    assert main(["probe", str(saved / "other"), "--suite", "sae-probes", option, value]) == 2
    assert f"{option} means nothing" in capsys.readouterr().err


@pytest.mark.usefixtures("small_suite")
def test_the_second_suite_looks_at_all_saes_before_it_begins(saved, capsys):
    (saved / "other" / "sae_weights.safetensors").write_bytes(b"no")
    out = saved / "out"
    folders = [str(saved / "run_3"), str(saved / "other")]
    assert main(["probe", *folders, "--suite", "sae-probes", "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert "is damaged" in told and "last tokens" not in told and not out.exists()


def test_datasets_must_be_named(saved, capsys):
    assert main(["probe", str(saved / "other")]) == 2
    assert "--datasets is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"sae": 3}', '{"sae": {"run": null, "name": "x", "seed": [], "layer": 1}}']
)
def test_compare_refuses_what_is_no_result(content, tmp_path, capsys):
    (tmp_path / "x_eval_results.json").write_text(content)
    assert main(["compare", str(tmp_path)]) == 2
    assert "is no result of `fipo probe`" in capsys.readouterr().err


def test_ctrl_c_leaves_with_130_and_the_pooled_texts(saved, labelled_folders, capsys, monkeypatch, own_cache):
    def stop(*_given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fipo.probe_job.outcomes", stop)
        code, _, errors = probe(capsys, [saved / "other"], labelled_folders, "--out", saved / "out")
    assert code == 130 and "stopped" in errors and "Traceback" not in errors
    assert list((own_cache / "pooled").glob("*.safetensors")) and not list((saved / "out").glob("*.json"))
    assert probe(capsys, [saved / "other"], labelled_folders, "--out", saved / "out")[0] == 0
