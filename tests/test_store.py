"""fipo.data.store: what was harvested is read back, found again under its key alone, whole or not at all."""

import errno
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from toys import after, seeded

from fipo.data import shards, store
from fipo.data.buffer import StoredSource
from fipo.data.harvest import Chunk
from fipo.data.store import cache_root, open_or_harvest
from fipo.errors import UserError
from fipo.files import read_json, sha256_file, write_json

LAYERS, WIDTH = 2, 3
NUMBERS_N = torch.zeros(10, dtype=torch.int64)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 10)


def chunks(sizes=(7, 16, 1, 13), dtype=torch.float32):
    generator, text = seeded(), 0
    for size in sizes:
        acts_NLD = torch.randn(size, LAYERS, WIDTH, generator=generator).to(dtype)
        yield Chunk(acts_NLD, torch.arange(text, text + size) // 3, 100 + torch.arange(text, text + size))
        text += size


def whole(sizes=(7, 16, 1, 13), dtype=torch.float32):
    return torch.cat([chunk.acts_NLD for chunk in chunks(sizes, dtype)])


def given(sizes=(7, 16, 1, 13), dtype=torch.float32):
    """What harvests these chunks, from any token on."""
    return lambda skip: after(chunks(sizes, dtype), skip)


def never(_skip=0):
    raise AssertionError("harvested again")


def contents(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_over_several_shards(dtype):
    made = open_or_harvest({"key": 1}, given(dtype=dtype), tokens=None)
    expected = whole(dtype=dtype)
    assert made.tokens == 37 and len(made.manifest["shards"]) == 4
    assert torch.equal(made.read(0, 37), expected) and made.read(0, 37).dtype == dtype
    for start, count in ((0, 1), (9, 2), (3, 30), (10, 10), (36, 1)):
        assert torch.equal(made.read(start, count), expected[start : start + count])
    assert torch.equal(torch.cat(list(made.batches(8))), expected)
    assert torch.equal(made.texts(), torch.cat([chunk.text_N for chunk in chunks()]))
    assert torch.equal(made.token_ids(), torch.arange(100, 137))
    again = [torch.cat(parts) for parts in zip(*made.chunks(8), strict=True)]
    assert all(map(torch.equal, again, (expected, made.texts(), made.token_ids())))


def test_gather_in_any_order():
    made = open_or_harvest({"key": 1}, given(), tokens=None)
    for places in ([36, 0, 19, 20, 5, 5, 10], [3], [], list(range(36, -1, -1))):
        places_N = torch.tensor(places, dtype=torch.int64)
        assert torch.equal(made.gather(places_N), whole()[places_N])


@pytest.mark.parametrize("tokens", [1, 9, 10, 11, 20, 36, 37])
def test_keeps_as_many_as_asked(tokens):
    made = open_or_harvest({"key": 1}, given(), tokens)
    assert made.tokens == tokens == len(made.texts())
    assert torch.equal(made.read(0, tokens), whole()[:tokens])


def test_reads_no_further_than_needed():
    def endless(_skip):
        yield from chunks()
        never()

    assert open_or_harvest({"key": 1}, endless, tokens=37).tokens == 37


def test_found_again_without_harvest():
    first = open_or_harvest({"key": 1, "layers": [0, 1]}, given(), tokens=20)
    again = open_or_harvest({"layers": [0, 1], "key": 1}, never, tokens=20)
    assert (first.made, again.made) == (True, False)
    assert again.folder == first.folder and torch.equal(again.read(0, 20), whole()[:20])


def test_another_key_is_another_store(monkeypatch):
    first = open_or_harvest({"key": 1}, given(), tokens=20)
    other = open_or_harvest({"key": 2}, given((30,)), tokens=20)
    assert other.folder != first.folder and not torch.equal(other.read(0, 20), first.read(0, 20))
    monkeypatch.setattr(shards, "FORMAT", shards.FORMAT + 1)
    assert open_or_harvest({"key": 1}, given(), tokens=20).folder not in (first.folder, other.folder)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "deleted", "manifest"])
def test_damaged_store_is_harvested_again(damage, capsys):
    first = open_or_harvest({"key": 1}, given(), tokens=None)
    shard = first.folder / first.manifest["shards"][1]["file"]
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
        shard.write_bytes(content)
    elif damage == "truncated":
        shard.write_bytes(content[:-4])
    elif damage == "deleted":
        shard.unlink()
    else:
        (first.folder / "manifest.json").write_text("{")
    calls = []

    def produce(skip):
        calls.append(1)
        return given()(skip)

    again = open_or_harvest({"key": 1}, produce, tokens=None)
    assert calls == [1] and torch.equal(again.read(0, 37), whole())
    assert capsys.readouterr().err.count("stored activations are harvested again") == 1
    assert open_or_harvest({"key": 1}, never, tokens=None).tokens == 37


def shard_changes(manifest, **changes):
    return manifest | {"shards": [manifest["shards"][0] | changes, *manifest["shards"][1:]]}


LIES = {
    "list": lambda _: [],
    "format": lambda m: m | {"format": 99},
    "key": lambda m: m | {"key": {"key": 2}},
    "unknown field": lambda m: m | {"more": 1},
    "fewer tokens": lambda m: m | {"tokens": 36},
    "no tokens": lambda m: m | {"tokens": 0},
    "a text": lambda m: m | {"tokens": "37"},
    "huge": lambda m: m | {"tokens": 10**30},
    "shard missing": lambda m: m | {"shards": m["shards"][:3]},
    "shards of another type": lambda m: m | {"shards": "abcd"},
    "shard of another type": lambda m: m | {"shards": [1, 2, 3, 4]},
    "above": lambda m: shard_changes(m, file="../precious"),
    "absolute": lambda m: shard_changes(m, file="/etc/passwd"),
    "another shard": lambda m: shard_changes(m, file=m["shards"][1]["file"], sha256=m["shards"][1]["sha256"]),
    "shard's tokens": lambda m: shard_changes(m, tokens=9),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_not_followed(own_cache, lie):
    first = open_or_harvest({"key": 1}, given(), tokens=None)
    (own_cache / "precious").write_text("content")
    write_json(first.folder / "manifest.json", LIES[lie](first.manifest))
    again = open_or_harvest({"key": 1}, given(), tokens=None)
    assert again.manifest == first.manifest and torch.equal(again.read(0, 37), whole())
    assert (own_cache / "precious").read_text() == "content"


def change_shard(folder, **tensors):
    """Other tensors in the first shard, and its right checksum in the manifest."""
    file, manifest = folder / "shard_00000.safetensors", read_json(folder / "manifest.json")
    shards.write_tensors(file, tensors)
    write_json(folder / "manifest.json", shard_changes(manifest, sha256=sha256_file(file)))


@pytest.mark.parametrize(
    "tensors",
    [
        {"acts_NLD": torch.ones(9, LAYERS, WIDTH), "text_N": NUMBERS_N[:9], "token_N": NUMBERS_N[:9]},
        {"acts_NLD": torch.ones(10, LAYERS + 1, WIDTH), "text_N": NUMBERS_N, "token_N": NUMBERS_N},
        {"acts_NLD": torch.ones(10, WIDTH), "text_N": NUMBERS_N, "token_N": NUMBERS_N},
        {"acts_NLD": torch.ones(10, LAYERS, WIDTH).long(), "text_N": NUMBERS_N, "token_N": NUMBERS_N},
        {"acts_NLD": torch.ones(10, LAYERS, WIDTH).bfloat16(), "text_N": NUMBERS_N, "token_N": NUMBERS_N},
        {"acts_NLD": torch.ones(10, LAYERS, WIDTH), "text_N": torch.zeros(10), "token_N": NUMBERS_N},
        {"acts_NLD": torch.ones(10, LAYERS, WIDTH), "text_N": NUMBERS_N, "token_N": NUMBERS_N[:9]},
        {"acts_NLD": torch.ones(10, LAYERS, WIDTH), "text_N": NUMBERS_N},
    ],
)
def test_a_shard_with_the_wrong_tensors_is_harvested_again(tensors):
    first = open_or_harvest({"key": 1}, given(), tokens=None)
    change_shard(first.folder, **tensors)
    with pytest.raises(UserError, match="is damaged"):
        store.ActivationStore(first.folder)
    assert torch.equal(open_or_harvest({"key": 1}, given(), tokens=None).read(0, 37), whole())


def test_a_link_in_place_of_a_shard_is_not_followed(tmp_path):
    first = open_or_harvest({"key": 1}, given(), tokens=None)
    shard = first.folder / "shard_00000.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="shard_00000.safetensors is damaged"):
        store.ActivationStore(first.folder)


def test_a_shard_that_breaks_while_it_is_in_use():
    made = open_or_harvest({"key": 1}, given(), tokens=None)
    (made.folder / "shard_00000.safetensors").write_bytes(b"x")
    for call in (lambda: made.read(0, 3), lambda: made.gather(torch.tensor([3])), made.texts):
        with pytest.raises(UserError, match="shard_00000.safetensors is damaged"):
            call()


def test_the_second_of_two_processes_waits_and_finds_it(own_cache):
    """Harvested by another process between our look at the cache and our lock."""
    made = open_or_harvest({"key": 1}, given(), tokens=None)
    hidden = made.folder.rename(own_cache / "hidden")
    original = store.locked

    def other_was_faster(path, **named):
        hidden.rename(made.folder)
        return original(path, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "locked", other_was_faster)
        assert open_or_harvest({"key": 1}, never, tokens=None).folder == made.folder


def test_the_lock_of_one_killed_after_its_harvest_is_cleared(own_cache):
    made = open_or_harvest({"key": 1}, given(), tokens=None)
    (own_cache / f".{made.folder.name}.lock").touch()
    open_or_harvest({"key": 1}, never, tokens=None)
    assert [path.name for path in own_cache.iterdir()] == [made.folder.name]


def stopped(error, after_tokens):
    """A harvest that ends in an error, whatever it was asked to skip."""

    def produce(skip):
        for chunk in given()(skip):
            if skip >= after_tokens:
                raise error
            skip += len(chunk.text_N)
            yield chunk
        raise error

    return produce


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("after_tokens", "kept"), [(1, 0), (20, 20), (24, 20), (37, 30)])
def test_a_harvest_that_is_stopped_or_fails_goes_on_after_its_last_whole_shard(
    own_cache, capsys, after_tokens, kept, error
):
    with pytest.raises(error):
        open_or_harvest({"key": 1}, stopped(error, after_tokens), tokens=None)
    (left,) = [*own_cache.iterdir(), None][:1]
    assert (left is None) == (kept == 0) and (left is None or left.name.endswith(".unfinished"))
    if left is not None:
        for name in (".manifest.json.77.tmp", ".tmpIpHMnT", "shard_00009.safetensors"):
            (left / name).write_text("half")
    skipped = []

    def rest(skip):
        skipped.append(skip)
        return given()(skip)

    made = open_or_harvest({"key": 1}, rest, tokens=None)
    assert made.made == (kept == 0)
    assert skipped == [kept] and made.tokens == 37 and torch.equal(made.read(0, 37), whole())
    assert torch.equal(made.token_ids(), torch.arange(100, 137))
    assert [path.name for path in own_cache.iterdir()] == [made.folder.name]
    assert len(list(made.folder.iterdir())) == 5
    assert (f"goes on after {kept} tokens" in capsys.readouterr().err) == (kept > 0)


def test_a_harvest_does_not_go_on_in_another_order(own_cache):
    with pytest.raises(KeyboardInterrupt):
        open_or_harvest({"key": 1}, stopped(KeyboardInterrupt, 37), None, order="2048")
    skipped = []
    made = open_or_harvest({"key": 1}, lambda skip: skipped.append(skip) or given()(skip), None, order="16384")
    assert skipped == [0] and [path.name for path in own_cache.iterdir()] == [made.folder.name]


def test_a_store_names_the_order_of_its_tokens_to_what_is_trained_on_it():
    made = open_or_harvest({"key": 1}, given(), None, order="2048")
    assert open_or_harvest({"key": 1}, never, None, order="16384").order == made.order == "2048"
    assert StoredSource(made).key == f"{made.folder.name}, 2048"
    manifest = read_json(made.folder / "manifest.json")
    del manifest["order"]
    write_json(made.folder / "manifest.json", manifest)
    of_before = open_or_harvest({"key": 1}, never, None, order="2048")
    assert of_before.order == "" and StoredSource(of_before).key == made.folder.name, "as checkpoints of before have it"


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_lies_in_the_place_of_an_unfinished_store_is_not_followed(own_cache, tmp_path, kind):
    with pytest.raises(KeyboardInterrupt):
        open_or_harvest({"key": 1}, stopped(KeyboardInterrupt, 37), None)
    (left,) = own_cache.iterdir()
    shutil.rmtree(left)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    left.symlink_to(tmp_path / "mine") if kind == "link" else left.write_text("x")
    made = open_or_harvest({"key": 1}, given(), None)
    assert not made.folder.is_symlink() and torch.equal(made.read(0, 37), whole())
    assert (tmp_path / "mine" / "file").read_text() == "x" and contents(own_cache)[0].name == made.folder.name


def test_room_is_asked_for_what_is_not_there_yet(monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        open_or_harvest({"key": 1}, stopped(KeyboardInterrupt, 37), None)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: SimpleNamespace(free=2000))
    with pytest.raises(UserError, match="the activations take"):
        open_or_harvest({"key": 1}, given(), None, needed=9_000)
    assert open_or_harvest({"key": 1}, given(), None, needed=2_500).tokens == 37


@pytest.mark.parametrize("damage", ["shard", "manifest", "key"])
def test_of_a_stopped_harvest_what_is_damaged_is_made_again(own_cache, damage):
    with pytest.raises(KeyboardInterrupt):
        open_or_harvest({"key": 1}, stopped(KeyboardInterrupt, 37), tokens=None)
    (left,) = own_cache.iterdir()
    if damage == "shard":
        content = bytearray((left / "shard_00001.safetensors").read_bytes())
        content[-1] ^= 1
        (left / "shard_00001.safetensors").write_bytes(content)
    elif damage == "manifest":
        (left / "manifest.json").write_text("{")
    else:
        write_json(left / "manifest.json", read_json(left / "manifest.json") | {"key": {"key": 2}})
    skipped = []
    made = open_or_harvest({"key": 1}, lambda skip: skipped.append(skip) or given()(skip), tokens=None)
    assert skipped == [10 if damage == "shard" else 0] and torch.equal(made.read(0, 37), whole())
    assert {path.name for path in made.folder.iterdir()} == {
        "manifest.json",
        *(f"shard_0000{number}.safetensors" for number in range(4)),
    }


@pytest.mark.parametrize("tokens", [30, 33])
def test_a_whole_harvest_that_was_killed_before_it_had_its_name(monkeypatch, tokens):
    def killed(*_given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "put_in_place", killed)
        open_or_harvest({"key": 1}, given(), tokens)
    made = open_or_harvest({"key": 1}, given(), tokens)
    assert made.tokens == tokens and torch.equal(made.read(0, tokens), whole()[:tokens])


def test_a_disk_slower_than_the_harvest(monkeypatch):
    """The next shard is filled meanwhile, and none before it is written."""
    write, together, most = shards.write_tensors, [], []

    def slowly(file, tensors):
        together.append(file)
        most.append(len(together))
        time.sleep(0.05)
        write(file, tensors)
        together.remove(file)

    monkeypatch.setattr(shards, "write_tensors", slowly)
    made = open_or_harvest({"key": 1}, given((64, 5)), tokens=None)
    assert torch.equal(made.read(0, 69), whole((64, 5))) and most == [1] * 7


def test_a_disk_that_is_full_while_the_harvest_goes_on(monkeypatch):
    harvested, write = [], shards.write_tensors

    def full(file, tensors):
        if file.name == "shard_00001.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, tensors)

    def counted(_skip):
        for chunk in chunks((10,) * 9):
            harvested.append(chunk)
            yield chunk

    monkeypatch.setattr(shards, "write_tensors", full)
    with pytest.raises(UserError, match="No space left on device"):
        open_or_harvest({"key": 1}, counted, tokens=None)
    assert len(harvested) == 3
    monkeypatch.setattr(shards, "write_tensors", write)
    skipped = []
    made = open_or_harvest({"key": 1}, lambda skip: skipped.append(skip) or given((10,) * 9)(skip), tokens=None)
    assert skipped == [10] and torch.equal(made.read(0, 90), whole((10,) * 9))


def test_nothing_to_keep(own_cache):
    for empty in ((), (0, 0)):
        with pytest.raises(UserError, match="no content token: it is empty, or holds special tokens only"):
            open_or_harvest({"key": 1}, given(empty), tokens=5)
    assert contents(own_cache) == []


def test_text_too_short(own_cache):
    with pytest.raises(UserError, match="ends after 37 content tokens; 38 were asked for"):
        open_or_harvest({"key": 1}, given(), tokens=38)
    assert contents(own_cache) == []


def test_cache_is_where_the_environment_says(own_cache, monkeypatch, tmp_path):
    assert open_or_harvest({"key": 1}, given(), tokens=None).folder.parent == own_cache == cache_root()
    monkeypatch.delenv("FIPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "fipo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "fipo"


def test_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FIPO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot write .*file/cache"):
        open_or_harvest({"key": 1}, given(), tokens=None)


def test_the_cache_without_a_home(monkeypatch, tmp_path):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(store.Path, "home", homeless)
    for name in ("FIPO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="no home folder for the cache; name a folder in FIPO_CACHE"):
        store.cache_root()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_root() == tmp_path / "fipo"
    monkeypatch.setenv("FIPO_CACHE", str(tmp_path / "own"))
    assert store.cache_root() == tmp_path / "own"
