"""fipo.runs: folder name, run file, config.yaml and FIPO_WORKLOAD make one config; every mistake names its key."""

import dataclasses
from pathlib import Path

import pytest
import tiny
import yaml

from fipo import runs
from fipo.errors import UserError
from fipo.method import Levels
from fipo.records import to_dict
from fipo.workloads import BUILT_IN

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
RUNS = [f"run_{number}" for number in range(10)]


def resolve(tmp_path, own=None, run="run_0"):
    """The config of tmp_path/run with `own` as its config.yaml."""
    folder = tmp_path / run
    folder.mkdir(exist_ok=True)
    if own is not None:
        (folder / "config.yaml").write_text(own if isinstance(own, str) else yaml.safe_dump(own), encoding="utf-8")
    return runs.resolve(folder, EXPERIMENTS)


@pytest.mark.parametrize("workload", sorted(BUILT_IN))
def test_every_run_resolves_for_every_workload(tmp_path, monkeypatch, workload):
    monkeypatch.setenv("FIPO_WORKLOAD", workload)
    assert sorted(path.stem for path in EXPERIMENTS.glob("run_*.yaml")) == RUNS
    for run in RUNS:
        config = resolve(tmp_path, run=run)
        assert config.run == run and config.workload == BUILT_IN[workload]


def test_a_part_of_a_workload_is_no_whole_one(tmp_path):
    """Whatever it names, the rest comes from the workload of that name; what a run saved is whole."""
    part = {"name": "gemma-2-2b", "model": "m", "text": {"source": "t"}, "probing": {"train_per_class": 5}}
    config = resolve(tmp_path, {"workload": part})
    assert (config.workload.model, config.workload.layers) == ("m", BUILT_IN["gemma-2-2b"].layers)
    whole = to_dict(config) | {"workload": to_dict(config)["workload"] | {"name": "of a file now gone"}}
    assert resolve(tmp_path, whole).workload.name == "of a file now gone"


def test_the_run_of_this_folder(tmp_path, monkeypatch):
    (tmp_path / "run_3").mkdir()
    monkeypatch.chdir(tmp_path / "run_3")
    assert runs.resolve(Path("."), EXPERIMENTS).run == "run_3"


def test_what_the_runs_switch_on(tmp_path):
    """Issue 2, section 3."""
    configs = [resolve(tmp_path, run=run) for run in RUNS]
    parts = ("importance", "reservoir", "lsh", "penalty", "levels")
    on = [[name for name in parts if getattr(config, name) is not None] for config in configs]
    full = ["importance", "reservoir", "lsh", "penalty"]
    assert on == [[], full[:2], full[:3], full, full, full, [*full, "levels"], [], [], ["levels"]]
    assert [config.architecture for config in configs] == ["relu"] * 6 + ["batchtopk"] * 4
    assert all(config.lsh.autocast for config in configs[2:7])
    three, four, five, six, seven, eight, nine = configs[3:]
    assert four.importance.decay == 0.99 != three.importance.decay and four.penalty == three.penalty
    assert five.penalty.weight == 0.1 != three.penalty.weight and five.importance == three.importance
    assert six.levels.order == "importance" and len({config.seed for config in configs}) == 1
    assert seven == dataclasses.replace(eight, run="run_7", frozen_decoder=True)
    assert nine.levels == Levels(
        order="fixed",
        shares=(1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
        drawn=False,
        short_power=1.0,
        favour=(0.0, 0.0, 0.0),
        stop_gradient=0.0,
        robust=0.0,
        decoder_only=0.0,
    )
    assert nine == dataclasses.replace(eight, run="run_9", levels=nine.levels)
    assert {config.aux_weight for config in configs[6:]} == {1 / 32}


def test_minilm_is_the_default_and_the_environment_chooses(tmp_path, monkeypatch):
    assert resolve(tmp_path).workload.name == "minilm"
    monkeypatch.setenv("FIPO_WORKLOAD", "pythia-70m")
    assert resolve(tmp_path).workload.name == "pythia-70m"
    assert resolve(tmp_path, {"workload": {"name": "gemma-2-2b"}}).workload.name == "gemma-2-2b"


def test_last_name_of_the_folder_is_the_run(tmp_path):
    assert resolve(tmp_path, run="run_3").run == "run_3"
    with pytest.raises(UserError, match="run 'run_77' is unknown; .* one of run_0, .*run_9, or its config.yaml"):
        runs.resolve(tmp_path / "run_77", EXPERIMENTS)
    assert not (tmp_path / "run_77").exists()


def test_config_in_the_folder_wins(tmp_path):
    config = resolve(tmp_path, {"seed": 7, "penalty": {"weight": 0.5}, "workload": {"k": 3}}, run="run_3")
    assert config.seed == 7 and config.workload.k == 3 and config.penalty.weight == 0.5
    assert config.lsh is not None and config.workload.latents == BUILT_IN["minilm"].latents


def test_null_switches_a_section_off(tmp_path):
    config = resolve(tmp_path, {"penalty": None, "lsh": None}, run="run_3")
    assert config.penalty is None and config.lsh is None and config.reservoir is not None


def test_config_in_the_folder_names_the_run_file(tmp_path):
    config = resolve(tmp_path, {"run": "run_3"}, run="my_own_name")
    assert config.run == "run_3" and config.penalty is not None
    with pytest.raises(UserError, match="run 'run_x' is unknown"):
        resolve(tmp_path, {"run": "run_x"}, run="another")


@pytest.mark.parametrize("run", RUNS)
def test_saved_config_resolves_to_itself(tmp_path, monkeypatch, run):
    config = resolve(tmp_path, {"workload": {"k": 5}, "seed": 3}, run=run)
    runs.save(config, tmp_path / run)
    monkeypatch.setenv("FIPO_WORKLOAD", "pythia-70m")  # the folder remembers its own
    assert runs.resolve(tmp_path / run, EXPERIMENTS) == config
    assert yaml.safe_load((tmp_path / run / "config.yaml").read_text()) == to_dict(config)


def test_saved_config_keeps_a_section_off_that_the_run_file_has_on(tmp_path):
    config = resolve(tmp_path, {"penalty": None}, run="run_3")
    runs.save(config, tmp_path / "run_3")
    assert runs.resolve(tmp_path / "run_3", EXPERIMENTS) == config


@pytest.mark.parametrize(
    ("own", "text"),
    [
        ({"seeed": 1}, "seeed"),
        ({"workload": {"layer": [1]}}, "workload.layer "),
        ({"workload": {"text": {"souce": "x"}}}, "workload.text.souce"),
        ({"penalty": {"wait": 1}}, "penalty.wait"),
        ({"workload": {"latents": 0}}, r"workload.latents \(F\) is 0; expected a positive"),
        ({"workload": {"k": 0}}, "workload.k is 0; expected a positive"),
        ({"workload": {"k": 4000}}, "workload.k is 4000; expected at most workload.latents = 3072"),
        ({"workload": {"latents": 40}}, "workload.probing.ks .* at most workload.latents = 40"),
        ({"workload": {"layers": []}}, "workload.layers"),
        ({"workload": {"layers": [-1]}}, "workload.layers"),
        ({"workload": {"layers": [1, 1]}}, "workload.layers"),
        ({"workload": {"train_tokens": 10}}, "workload.train_tokens is 10; .* zero steps"),
        ({"workload": {"dtype": "int8"}}, "workload.dtype is 'int8'; expected one of float32"),
        ({"workload": {"probing": {"ks": [0]}}}, "probing.ks"),
        ({"workload": {"text": {"source": ""}}}, "text.source"),
        ({"workload": {"k": "many"}}, "workload.k is 'many'; expected int"),
        ({"workload": "tiny"}, "workload 'tiny' is unknown; FIPO_WORKLOAD takes minilm, pythia-70m, gemma-2-2b"),
        ({"workload": [1]}, "workload .* is unknown"),
        ({"workload": None}, "workload is None; expected a name, or a mapping of keys to values; leave it out"),
        ({"architecture": "gated"}, "architecture is 'gated'; expected one of relu"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed is True"),
        ({"lsh": {}}, "lsh is 'on'; expected importance as well"),
        ({"importance": {"decay": float("nan")}}, "importance.decay is nan"),
        ("[1, 2]", "config.yaml holds list; expected a mapping"),
        ("a: [", "config.yaml is not readable YAML"),
        ("seed: !!python/object/apply:os.system ['true']", "config.yaml is not readable YAML: line 1 has a tag"),
        ("seed: !own 3", "config.yaml is not readable YAML: line 1 has a tag, an anchor or an alias, which are not"),
        ("a: 1\nseed: !!int 3", "config.yaml is not readable YAML: line 2 has a tag"),
        ("a: &a [1, 1]\nb: [*a, *a]", "config.yaml is not readable YAML: line 1 has a tag, an anchor or an alias"),
        ("seed: 1\nseed: 2", "config.yaml is not readable YAML: key 'seed' is given twice"),
        ("lsh: {bits: 1, bits: 2}", "config.yaml is not readable YAML: key 'bits' is given twice"),
        ("[" * 10_000, "config.yaml is not readable YAML"),
        ('run: "\\ud800"', "config.yaml is not readable YAML"),
        ("seed: 1" + " " * 300_000, "config.yaml is not readable YAML: it is larger than 256 kB"),
        ("seed: " + "9" * 30, "seed is 9999.*; expected an integer of at most 64 bits"),
        ("seed: " + "x" * 3000, "seed is 'x+\\.\\.\\.; expected int"),
        ("run: ../experiments/run_0", "run '../experiments/run_0' is unknown"),
        ("0", "config.yaml holds int; expected a mapping"),
    ],
)
def test_bad_config_names_its_key(tmp_path, own, text):
    with pytest.raises(UserError, match=text) as caught:
        resolve(tmp_path, own)
    assert "\n" not in str(caught.value)


def test_config_that_is_no_text(tmp_path):
    (tmp_path / "run_0").mkdir()
    (tmp_path / "run_0" / "config.yaml").write_bytes(b"\xff\xfe\x00\x01\x80")
    with pytest.raises(UserError, match="config.yaml is not readable YAML"):
        resolve(tmp_path)


def test_unknown_workload(tmp_path, monkeypatch):
    monkeypatch.setenv("FIPO_WORKLOAD", "nosuch")
    with pytest.raises(UserError, match="workload 'nosuch' is unknown; FIPO_WORKLOAD takes minilm"):
        resolve(tmp_path)


def test_workload_from_a_file(tmp_path, monkeypatch):
    values = tiny.workload_values(Path("model"), Path("text"), [Path("labelled")])
    monkeypatch.setenv("FIPO_WORKLOAD", str(tiny.write_workload(tmp_path / "mine.yaml", values)))
    config = resolve(tmp_path, {"workload": {"k": 7}})
    assert config.workload.name == "tiny" and config.workload.k == 7 and config.workload.layers == (0, 1)
    runs.save(config, tmp_path / "run_0")
    (tmp_path / "mine.yaml").unlink()
    monkeypatch.delenv("FIPO_WORKLOAD")
    assert runs.resolve(tmp_path / "run_0", EXPERIMENTS) == config


def test_merge_goes_key_by_key_and_leaves_its_inputs():
    below, above = {"a": {"b": 1, "c": 2}, "d": [1, 2]}, {"a": {"c": 3}, "d": [3], "e": None}
    assert runs.merge(below, above) == {"a": {"b": 1, "c": 3}, "d": [3], "e": None}
    assert below == {"a": {"b": 1, "c": 2}, "d": [1, 2]}
