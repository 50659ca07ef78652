"""fipo.files: a file or folder is whole or absent; JSON and hashes."""

import errno
import hashlib
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fipo.errors import UserError
from fipo.files import (
    read_json,
    remove_temporaries,
    replacing,
    replacing_folder,
    sha256_file,
    sha256_json,
    writable,
    write_json,
    write_text,
)


def full_disk(*_args, **_keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_the_old_file_and_leaves_nothing_else(tmp_path):
    write_text(tmp_path / "a", "old")
    write_text(tmp_path / "a", "new π")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "new π" and names(tmp_path) == ["a"]


def test_write_makes_the_folder(tmp_path):
    write_text(tmp_path / "b" / "c", "text")
    assert names(tmp_path / "b") == ["c"]


def test_target_appears_only_when_complete(tmp_path):
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "half"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file_and_says_so(tmp_path, monkeypatch, call):
    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(UserError, match="cannot write .*/a: No space left on device; free space"):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_failure_of_the_writer_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(KeyError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_folder_replaces_the_old_one_whole(tmp_path):
    for name in ("one", "two"):
        with replacing_folder(tmp_path / "f") as temporary:
            (temporary / name).write_text(name)
    assert names(tmp_path) == ["f"] and names(tmp_path / "f") == ["two"]


def test_folder_appears_only_when_complete(tmp_path):
    with replacing_folder(tmp_path / "f") as temporary:
        (temporary / "one").write_text("1")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f" / "one").exists()


@pytest.mark.parametrize("error", [KeyError(), OSError(errno.ENOSPC, "No space left on device")])
def test_failed_folder_leaves_the_old_one(tmp_path, error):
    with replacing_folder(tmp_path / "f") as temporary:
        (temporary / "one").write_text("1")
    with pytest.raises((KeyError, UserError)) as caught, replacing_folder(tmp_path / "f") as temporary:
        (temporary / "two").write_text("2")
        raise error
    assert names(tmp_path) == ["f"] and names(tmp_path / "f") == ["one"]
    if isinstance(error, OSError):
        assert isinstance(caught.value, UserError) and "No space left on device" in str(caught.value)


def test_folder_starts_empty_after_a_killed_writer(tmp_path):
    with replacing_folder(tmp_path / "f") as temporary:
        path = temporary
    shutil.rmtree(tmp_path / "f")
    path.mkdir()
    (path / "left over").write_text("x")
    with replacing_folder(tmp_path / "f") as temporary:
        assert names(temporary) == []


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"b": [1, 2.5, None]}


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", math.nan)
    assert read_json(tmp_path / "a.json") == 1


STRANGE = ["NaN", '{"a": -Infinity}', "1e999", '{"a": 1, "a": 1}', "9" * 5000, '{"a": "\\ud800"}']


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000, "\ud800", *STRANGE])
def test_damaged_json_is_a_user_error_that_names_it(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="a.json is not readable JSON"):
        read_json(tmp_path / "a.json")


def test_a_character_of_two_halves_is_read(tmp_path):
    (tmp_path / "a.json").write_text('["\\ud83d\\ude00", "\\u00e9"]')
    assert read_json(tmp_path / "a.json") == ["\U0001f600", "é"]


def test_json_beyond_all_measure_is_not_read(tmp_path):
    """A sparse file of 1 TB takes neither time nor memory."""
    with open(tmp_path / "a.json", "wb") as opened:
        opened.truncate(2**40)
    with pytest.raises(UserError, match="a.json is larger than 64 MB: no file of ours"):
        read_json(tmp_path / "a.json")


def test_temporaries_are_removed_and_nothing_else(tmp_path):
    left = [".a.json.17.tmp", "below/.b.3.tmp", ".folder.4.tmp/inside", "below/.tmpIpHMnT"]
    own = [
        "a.json",
        ".note.tmp",
        "b.3.tmp",
        ".c.tmp.3",
        "below/c",
        ".tmp-mine",
        "tmpIpHMnT",
        ".tmpbackup/mine",
        ".tmpBackUp/mine",
        ".tmpNotes/mine",
        ".tmpa_b_c",
    ]
    for name in left + own:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    remove_temporaries(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(own)


def test_temporaries_of_the_living_stay_where_others_may_write(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for process in (dead.pid, os.getpid(), os.getppid()):
        (tmp_path / f".a.{process}.tmp").write_text("x")
        os.utime(tmp_path / f".a.{process}.tmp", (0, 0))
    (tmp_path / f".b.{dead.pid}.tmp").write_text("x")  # of a writer elsewhere, perhaps
    (tmp_path / ".tmpIpHMnT").write_text("x")  # the same of safetensors', which does not say whose it is
    (tmp_path / ".tmpabcdef").write_text("x")
    os.utime(tmp_path / ".tmpabcdef", (0, 0))
    remove_temporaries(tmp_path, of_the_dead=True)
    living = [f".a.{process}.tmp" for process in (os.getpid(), os.getppid())]
    assert names(tmp_path) == sorted([*living, f".b.{dead.pid}.tmp", ".tmpIpHMnT"])


def test_a_link_is_removed_and_not_what_it_points_at(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("x")
    (tmp_path / ".link.5.tmp").symlink_to(tmp_path / "precious")
    remove_temporaries(tmp_path)
    assert names(tmp_path) == ["precious"] and names(tmp_path / "precious") == ["a"]


def test_missing_json_is_a_user_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match="a.json does not exist"):
        read_json(tmp_path / "a.json")


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_sha256_of_json_ignores_the_order_of_keys_alone():
    assert sha256_json({"a": 1, "b": [2, 3]}) == sha256_json({"b": [2, 3], "a": 1})
    assert sha256_json([2, 3]) != sha256_json([3, 2])
    assert sha256_json({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()


def test_user_error_is_one_line():
    assert str(UserError("a\n   b\tc")) == "a b c"
    assert len(str(UserError("x" * 10**6))) < 1100


def test_a_file_where_a_folder_is_wanted_is_one_line(tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file" / "x.json", tmp_path / "file" / "deeper" / "x.json"):
        with pytest.raises(UserError, match="cannot write"):
            write_text(path, "new")
    with pytest.raises(UserError, match="choose another --out"), writable(tmp_path / "file", "--out"):
        pass
    assert (tmp_path / "file").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_nothing_was_written_into_is_taken_away(tmp_path):
    with writable(tmp_path / "new", "--out"):
        assert list((tmp_path / "new").iterdir()) == []
    assert not (tmp_path / "new").exists()
    with writable(tmp_path / "new", "--out"):
        (tmp_path / "new" / "result").touch()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["result"]
