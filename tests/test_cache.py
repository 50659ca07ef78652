"""The command that lists and empties the cache."""

import errno
import os
import subprocess
import sys
import time

import pytest
import torch

from fipo import cli
from fipo.cache import entries
from fipo.checkpoint import save_tensors
from fipo.data.harvest import Chunk
from fipo.data.store import MANIFEST, lock_of, open_or_harvest
from fipo.files import read_json, write_json
from fipo.lock import locked
from fipo.pooling import numbers_or_read

KEY = {"model": "a" * 64, "layers": [1, 3], "context": 128, "dtype": "torch.float32"}


def make(**key):
    numbers_N = torch.arange(25)
    return open_or_harvest(KEY | key, lambda: [Chunk(torch.ones(25, 2, 3), numbers_N, numbers_N)], tokens=None).folder


@pytest.fixture
def filled(own_cache):
    """A cache with a store of each kind, one of another version, one pooled file, and what is none of ours."""
    stores = {"next": make(rows="next"), "first": make(rows="first"), "labelled": make(), "old": make(rows="old")}
    manifest = read_json(stores["old"] / MANIFEST)
    write_json(stores["old"] / MANIFEST, manifest | {"format": 1})
    numbers_or_read("some key", lambda: {"l0": 3.0})
    (own_cache / "mine").mkdir()
    save_tensors(own_cache / "mine" / "precious.safetensors", {"x": torch.ones(3)})
    return stores


def listed(capsys, *arguments):
    assert cli.main(["cache", *arguments]) == 0
    return capsys.readouterr().out


def test_list(filled, capsys, own_cache):
    out = listed(capsys)
    for name, words in (("next", "training text"), ("first", "held-out text"), ("labelled", "labelled text")):
        (line,) = [line for line in out.splitlines() if filled[name].name[:12] in line]
        assert f"25 tokens of {words}; layers 1, 3, context 128, float32, model aaaaaaaa" in line
    (line,) = [line for line in out.splitlines() if filled["old"].name[:12] in line]
    assert "unreadable" in line
    assert "1 files of pooled" in out and "in 5 entries" in out and "mine" not in out and str(own_cache) in out


@pytest.mark.usefixtures("filled")
def test_sizes_are_those_of_the_files(own_cache):
    for entry in entries(own_cache):
        assert entry.size == sum(file.stat().st_size for file in entry.folder.iterdir())


def test_what_was_used_last_stands_first(filled, own_cache):
    for age, name in enumerate(("labelled", "next", "first")):
        then = time.time() - 1000 * (age + 1)
        os.utime(filled[name] / MANIFEST, (then, then))
    os.utime(filled["old"] / MANIFEST, (0, 0))
    (own_cache / "pooled").rename(own_cache / "away")
    order = [entry.folder for entry in entries(own_cache)]
    assert order == [filled[name] for name in ("labelled", "next", "first", "old")]
    make(rows="first")  # is there, and is used
    assert entries(own_cache)[0].folder == filled["first"]


def test_remove_by_name_unreadable_and_all(filled, capsys, own_cache):
    assert "in 4 entries" in listed(capsys, "--remove", filled["next"].name[:12])
    assert not filled["next"].exists() and filled["first"].exists()
    assert "in 3 entries" in listed(capsys, "--remove", "unreadable")
    assert not filled["old"].exists() and filled["labelled"].exists()
    assert "in 1 entries" in listed(capsys, "--remove", "pooled", filled["first"].name)
    assert "0.0 MB in 0 entries; 0.0 MB freed" in listed(capsys, "--remove", "all")
    assert [path.name for path in own_cache.iterdir()] == ["mine"]
    assert "in 0 entries" in listed(capsys, "--remove", "all", "unreadable")


@pytest.mark.parametrize("name", ["", "mine", "0" * 32, "../mine", "."])
def test_a_name_that_is_none_of_the_entries(filled, capsys, name):
    assert cli.main(["cache", "--remove", filled["next"].name, name]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is no entry of" in error
    assert filled["next"].exists(), "nothing was removed"


@pytest.mark.usefixtures("own_cache")
def test_two_entries_that_begin_alike(capsys):
    folder = make()
    twin = folder.with_name(folder.name[:-1] + ("0" if folder.name[-1] != "0" else "1"))
    twin.mkdir()
    assert cli.main(["cache", "--remove", folder.name[:5]]) == 2
    assert "is 2 entries of" in capsys.readouterr().err and folder.exists() and twin.exists()
    assert cli.main(["cache", "--remove", folder.name]) == 0 and not folder.exists() and twin.exists()


def test_a_store_that_is_being_made_is_left_alone(filled, capsys):
    with locked(lock_of(filled["next"])):
        assert cli.main(["cache", "--remove", "all"]) == 2
    assert "another process is working" in capsys.readouterr().err and filled["next"].exists()


def test_a_cache_that_is_not_there(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FIPO_CACHE", str(tmp_path / "none"))
    assert "in 0 entries" in listed(capsys)
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
def test_output_onto_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "fipo.cli", "cache"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert (
        done.stderr.decode() == f"error: the output cannot be written: {os.strerror(errno.ENOSPC)}; free space there\n"
    )
