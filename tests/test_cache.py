"""The command that lists and empties the cache."""

import errno
import os
import time
from pathlib import Path

import pytest
import torch

from fipo import cache, cli
from fipo.cache import entries
from fipo.checkpoint import save_tensors
from fipo.data.harvest import Chunk
from fipo.data.shards import MANIFEST
from fipo.data.store import lock_of, open_or_harvest
from fipo.files import read_json, write_json
from fipo.lock import locked
from fipo.pooling import keep, numbers_or_read, read_kept

KEY = {"model": "a" * 64, "layers": [1, 3], "context": 128, "dtype": "torch.float32"}


def make(**key):
    numbers_N = torch.arange(25)
    return open_or_harvest(KEY | key, lambda _: [Chunk(torch.ones(25, 2, 3), numbers_N, numbers_N)], tokens=None).folder


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
    assert (
        "pooled texts and measures, 1 files" in out
        and "in 5 entries" in out
        and "mine" not in out
        and str(own_cache) in out
    )


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


@pytest.mark.parametrize("name", ["", "mine", "0" * 32, "../mine", ".", "p", "pool", "{short}"])
def test_a_name_that_is_none_of_the_entries(filled, capsys, name):
    name = name.format(short=filled["first"].name[:7])
    assert cli.main(["cache", "--remove", filled["next"].name, name]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is no entry of" in error
    assert filled["next"].exists(), "nothing was removed"


def test_two_entries_that_begin_alike(capsys):
    folder = make()
    twin = folder.with_name(folder.name[:-1] + ("0" if folder.name[-1] != "0" else "1"))
    twin.mkdir()
    assert cli.main(["cache", "--remove", folder.name[:20]]) == 2
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


def test_what_was_freed_is_said(capsys):
    folder = make()
    (folder / "more").write_bytes(bytes(2_500_000))
    assert "1 entries; 2.5 MB freed" not in listed(capsys)
    assert "in 0 entries; 2.5 MB freed" in listed(capsys, "--remove", folder.name, "all", "all"), "counted once"


@pytest.mark.parametrize(
    "key",
    [
        *(
            [],
            "text",
            5,
            None,
            {"layers": 5},
            {"rows": [1]},
            {"rows": "other"},
            {"model": "[/foo]", "layers": ["[/x]"]},
        ),
        {"context": "\x1b[31m\n\udcff"},
    ],
)
def test_a_manifest_that_says_anything_is_listed_and_can_go(key, capsys):
    folder, other = make(), make(rows="next")
    write_json(folder / MANIFEST, read_json(folder / MANIFEST) | {"key": key})
    out = listed(capsys)
    assert folder.name[:12] in out and "training text" in out and "\x1b" not in out and "\udcff" not in out
    assert "in 1 entries" in listed(capsys, "--remove", folder.name) and other.exists() and not folder.exists()


def test_a_name_of_the_cache_that_looks_like_markup(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FIPO_CACHE", str(tmp_path / "c[/bold][red]3"))
    make()
    assert "c[/bold][red]3" in listed(capsys)


@pytest.mark.parametrize("ending", ["2048x1024.unfinished", "999999.tmp"])  # the second of before
def test_what_a_killed_harvest_left_is_listed_and_can_go(own_cache, capsys, ending):
    left = own_cache / f".{'a' * 32}.{ending}"
    left.mkdir()
    (left / "shard_00000.safetensors").write_bytes(bytes(3_000_000))
    assert "3.0 MB" in (out := listed(capsys)) and "unreadable: not finished" in out and "aaaaaaaaaaaa" in out
    with locked(own_cache / f".{'a' * 32}.lock"):
        assert cli.main(["cache", "--remove", "unreadable"]) == 2, "it is being made"
    assert left.exists() and "another process" in capsys.readouterr().err
    assert "3.0 MB freed" in listed(capsys, "--remove", "unreadable") and not left.exists()


def test_of_a_link_goes_what_it_leads_to(tmp_path, capsys):
    folder = make()
    elsewhere = folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(elsewhere)
    assert folder.name[:12] in listed(capsys)
    assert "in 0 entries" in listed(capsys, "--remove", folder.name)
    assert not os.path.lexists(folder) and not elsewhere.exists()


def test_the_manifest_goes_first(monkeypatch):
    folder, seen = make(), []
    monkeypatch.setattr(cache, "remove", lambda path: seen.append(path))
    assert cli.main(["cache", "--remove", "all"]) == 2, "and what is still there is said"
    assert seen == [folder / MANIFEST, folder]


def test_pooled_texts_that_are_read_are_used(own_cache):
    keep("key", torch.ones(3))
    numbers_or_read("other key", lambda: {"l0": 3.0})
    for read in (lambda: read_kept("key"), lambda: numbers_or_read("other key", dict)):
        for file in (own_cache / "pooled").iterdir():
            os.utime(file, (1000, 1000))
        assert entries(own_cache)[0].used == 1000
        assert read() is not None
        assert entries(own_cache)[0].used > 1e9


def test_files_that_go_away_meanwhile_are_left_out(filled, own_cache, monkeypatch):
    original = Path.stat

    def stat(path, **given):
        if path.name.startswith("shard"):
            raise FileNotFoundError(path)
        return original(path, **given)

    monkeypatch.setattr(Path, "stat", stat)
    sizes = {entry.folder: entry.size for entry in entries(own_cache)}
    assert 0 < sizes[filled["next"]] < 2000, "the manifest alone"


def test_ctrl_c_speaks_of_pooled_texts_only_where_there_are_any(monkeypatch, capsys):
    monkeypatch.setattr(cache, "entries", lambda _root: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["cache"]) == 130 and "pooled" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), OSError(errno.ENOSPC, "full", "/some/file")])
def test_other_troubles_with_files_keep_their_traceback(error, monkeypatch):
    def run(_names):
        raise error

    monkeypatch.setattr(cache, "run", run)
    with pytest.raises(OSError, match="broken|full"):
        cli.main(["cache"])
