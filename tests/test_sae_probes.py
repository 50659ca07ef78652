"""fipo.data.sae_probes on the real data package: classes apart, and no probing text among the training text."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fipo.config import Probing
from fipo.data import sae_probes
from fipo.data.labelled import load_labelled

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sae_probes") is None, reason="the data package sae-probes is not installed"
)
NAMES = tuple(sae_probes.DATASETS)


@pytest.fixture(scope="module")
def classes():
    return {name: sae_probes.labelled_texts(name) for name in NAMES}


@pytest.fixture(scope="module")
def training():
    return list(sae_probes.training_texts())


def test_eight_datasets_of_at_least_two_classes(classes):
    assert len(NAMES) == 8
    for name, by_class in classes.items():
        assert len(by_class) >= 2 and by_class.keys() == sae_probes.DATASETS[name].keys()
        assert all(len(texts) > 300 for texts in by_class.values()), name


@pytest.mark.parametrize("name", NAMES)
def test_classes_share_no_text_and_repeat_none(classes, name):
    normal = [sae_probes._normalised(text) for texts in classes[name].values() for text in texts]
    assert len(set(normal)) == len(normal) and "" not in normal


def test_no_training_text_is_a_probing_text(classes, training):
    probing = {
        sae_probes._normalised(text) for by_class in classes.values() for texts in by_class.values() for text in texts
    }
    normal = [sae_probes._normalised(text) for text in training]
    assert len(probing) > 5000 and len(normal) > 10_000
    assert probing.isdisjoint(normal)
    assert len(set(normal)) == len(normal)


def test_training_text_comes_in_a_fixed_shuffled_order(monkeypatch):
    """On four of the files, for time."""
    four = {number: sae_probes._files()[number] for number in (5, 6, 92, 113)}
    monkeypatch.setattr(sae_probes, "_files", lambda: four)
    monkeypatch.setattr(sae_probes, "RELATED_FILES", {92, 113})
    first = list(sae_probes.training_texts())
    assert list(sae_probes.training_texts()) == first and len(first) > 500
    assert first[:20] != sae_probes._read(5)[0][:20] and set(first[:20]) - set(sae_probes._read(5)[0])


def test_probing_files_count_as_related():
    used = {number for by_class in sae_probes.DATASETS.values() for number, _ in by_class.values()}
    assert used <= sae_probes.RELATED_FILES


def test_fingerprint_names_what_is_trained_on(monkeypatch):
    before = sae_probes.fingerprint()
    assert sae_probes.fingerprint() == before
    monkeypatch.setattr(sae_probes, "RELATED_FILES", sae_probes.RELATED_FILES - {92})
    sae_probes.fingerprint.cache_clear()
    assert sae_probes.fingerprint() != before
    monkeypatch.undo()
    sae_probes.fingerprint.cache_clear()


def test_as_labelled_text(classes, monkeypatch):
    monkeypatch.setattr(sae_probes, "labelled_texts", classes.get)
    probing = Probing(datasets=NAMES, train_per_class=20, test_per_class=10)
    for name in NAMES:
        data = load_labelled(name, probing, seed=0)
        assert list(data.train) == list(data.test) == list(classes[name])
        for label in data.train:
            assert len(data.train[label]) == 20 and len(data.test[label]) == 10
            assert set(data.train[label]) | set(data.test[label]) <= set(classes[name][label])
        train = {text for texts in data.train.values() for text in texts}
        assert train.isdisjoint(text for texts in data.test.values() for text in texts)
    assert load_labelled(NAMES[0], probing, seed=0) == load_labelled(NAMES[0], probing, seed=0)
    assert load_labelled(NAMES[0], probing, seed=0) != load_labelled(NAMES[0], probing, seed=1)


def test_letters_and_digits_are_those_of_the_pattern():
    every = "".join(map(chr, range(0x3000)))
    for text in (every, every[:128], "\u4e2d_\ud800 \u00c9"):
        assert sae_probes._normalised(text) == re.sub(r"[\W_]+", "", text).lower()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not list threads")
def test_reading_leaves_no_parsers_behind():
    """At the end of a short program pyarrow's aborted it, now and then; the one thread left is that of the disk."""
    program = (
        "import os\nimport pyarrow.csv\nfrom fipo.data import sae_probes\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "sae_probes.binary_files()\n"
        "print(len(os.listdir('/proc/self/task')) - before, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0 and int(done.stdout) <= 1, done.stderr
