"""fipo.data.text: local folders and files give their texts in order under a fingerprint; what is wrong is told."""

import gzip
import json
import logging
import lzma
import math

import pyarrow
import pytest
import tiny

from fipo.config import Text
from fipo.data import text as text_module
from fipo.data.text import PAUSES, open_text, pinned
from fipo.errors import UserError

COMPRESS = {"zst": pyarrow.Codec("zstd").compress, "gz": gzip.compress, "xz": lzma.compress}
TEXTS = ["first text", "second text", "third text"]


def text(source, **changes):
    given = {"source": str(source), "tokens": 1, "held_out_tokens": 2, "packed": False}
    return Text(**given | changes)


def write(folder, kind, texts=TEXTS, field="text"):
    folder.mkdir(exist_ok=True)
    path = folder / f"data.{kind}"
    if kind == "parquet":
        tiny.write_parquet(path, {field: texts})
    elif kind == "txt":
        path.write_text("\n".join(texts))
    elif kind == "csv":
        path.write_text("\n".join([field, *texts]))
    else:
        path.write_text("".join(json.dumps({field: line}) + "\n" for line in texts))
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "txt", "csv"])
def test_one_file(tmp_path, kind):
    source = open_text(text(write(tmp_path, kind)))
    assert list(source.texts()) == TEXTS
    assert list(source.texts()) == TEXTS  # a second pass begins anew


@pytest.mark.parametrize("ending", ["zst", "gz", "xz"])
def test_compressed_as_the_pile_is(tmp_path, ending):
    """monology/pile-uncopyrighted holds `train/00.jsonl.zst` to `29`, `val.jsonl.zst` and `test.jsonl.zst`."""
    for name, texts in (("train/00", TEXTS[:2]), ("train/01", TEXTS[2:]), ("val", ["v"]), ("test", ["t"])):
        path = tmp_path / f"{name}.jsonl.{ending}"
        path.parent.mkdir(exist_ok=True)
        lines = "".join(json.dumps({"text": line, "meta": {"pile_set_name": "x"}}) + "\n" for line in texts)
        path.write_bytes(COMPRESS[ending](lines.encode()))
    assert list(open_text(text(tmp_path)).texts()) == TEXTS
    assert list(open_text(text(tmp_path / f"train/00.jsonl.{ending}")).texts()) == TEXTS[:2]


def test_configurations_of_a_folder(tmp_path):
    lines = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("en", "fr"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{lines}---\n")
    for name in ("en", "fr"):
        tiny.write_parquet(tmp_path / name / "train.parquet", {"text": [name]})
    assert list(open_text(text(tmp_path, config="fr")).texts()) == ["fr"]
    assert open_text(text(tmp_path, config="fr")).fingerprint != open_text(text(tmp_path, config="en")).fingerprint
    with pytest.raises(UserError, match=r"(?s)does not load: .*fr"):
        list(open_text(text(tmp_path)).texts())


def test_what_has_no_configurations_is_given_none(tmp_path):
    for source in (write(tmp_path, "jsonl"), "sae-probes"):
        with pytest.raises(UserError, match="text.config is 'en', and .* has no configurations"):
            open_text(text(source, config="en"))


def test_the_newest_revision_is_pinned(monkeypatch, text_folder):
    monkeypatch.setattr(text_module, "newest_revision", lambda name: f"newest of {name}")
    assert pinned(text("someone/texts")).revision == "newest of someone/texts"
    assert pinned(text("someone/texts", revision="abc")).revision == "abc"
    assert pinned(text(text_folder)).revision is None
    assert "@newest of someone/texts/" in open_text(text("someone/texts")).fingerprint
    with pytest.raises(UserError, match="no/such does not exist"):
        pinned(text("./no/such", revision="abc"))


def test_folder_of_parquet(text_folder):
    assert list(open_text(text(text_folder)).texts()) == tiny.sentences(150, seed=1)


def test_folder_with_splits(tmp_path):
    tiny.write_parquet(tmp_path / "train.parquet", {"text": ["a"]})
    tiny.write_parquet(tmp_path / "test.parquet", {"text": ["b"]})
    assert list(open_text(text(tmp_path, split="test")).texts()) == ["b"]
    assert list(open_text(text(tmp_path)).texts()) == ["a"]
    with pytest.raises(UserError, match="split validation"):
        list(open_text(text(tmp_path, split="validation")).texts())


def test_empty_texts_are_left_out(tmp_path):
    path = write(tmp_path, "jsonl", ["a", "", "b"])
    assert list(open_text(text(path)).texts()) == ["a", "b"]


def test_other_column(tmp_path):
    path = write(tmp_path, "parquet", field="body")
    assert list(open_text(text(path, field="body")).texts()) == TEXTS
    with pytest.raises(UserError, match="has the columns body, not text; set text.field"):
        list(open_text(text(path)).texts())


def test_missing_path(tmp_path):
    with pytest.raises(UserError, match="no_such does not exist"):
        open_text(text(tmp_path / "no_such"))


def test_kind_of_file_that_is_not_read(tmp_path):
    path = tmp_path / "text.docx"
    path.write_text("a")
    with pytest.raises(UserError, match="is no .parquet, .jsonl"):
        list(open_text(text(path)).texts())


def test_folder_without_data(tmp_path):
    with pytest.raises(UserError, match="does not load"):
        list(open_text(text(tmp_path)).texts())


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_damaged_file(tmp_path, kind):
    path = write(tmp_path, kind)
    path.write_bytes(b"\x00\xff{{{ no such thing")
    with pytest.raises(UserError, match=f"data.{kind}.*repair or replace"):
        list(open_text(text(path)).texts())
    assert logging.getLogger("datasets").level > logging.ERROR, "it would tell it as well"


def test_fingerprint_names_the_content(tmp_path):
    prints = set()
    for texts in (TEXTS, TEXTS[::-1], [*TEXTS[:2], "third texts"]):
        prints.add(open_text(text(write(tmp_path, "jsonl", texts))).fingerprint)
    assert len(prints) == 3
    assert open_text(text(write(tmp_path, "jsonl"))).fingerprint in prints
    one = open_text(text(tmp_path)).fingerprint
    tiny.write_parquet(tmp_path / "more.parquet", {"text": ["d"]})
    assert open_text(text(tmp_path)).fingerprint != one


def test_fingerprint_names_column_and_split(tmp_path):
    """The same files with another column or split are other texts: activations must not be taken from the cache."""
    for split in ("train", "test"):
        tiny.write_parquet(tmp_path / f"{split}.parquet", {"text": [f"a {split}"], "body": [f"b {split}"]})
    choices = ({}, {"field": "body"}, {"split": "test"})
    assert len({open_text(text(tmp_path, **choice)).fingerprint for choice in choices}) == 3


def test_hub_out_of_reach():
    with pytest.raises(UserError, match="dataset someone/texts is no local path, and the hub cannot be asked"):
        open_text(text("someone/texts"))


def test_hub_out_of_reach_with_a_revision():
    source = open_text(text("someone/texts", revision="abc"))
    assert source.fingerprint == "someone/texts@abc/None/train/text"
    with pytest.raises(UserError, match="dataset someone/texts, split train, cannot be read"):
        list(source.texts())


class Stream:
    """A stream of the hub that breaks off; `breaks` are the records before which it does, one an attempt."""

    def __init__(self, records, breaks):
        self.records, self.breaks, self.start = records, breaks, 0

    def skip(self, count):
        self.start = count
        return self

    def __iter__(self):
        end = self.breaks.pop(0) if self.breaks else None
        yield from self.records[self.start : end]
        if end is not None:
            raise ConnectionError("reset by peer")


@pytest.fixture
def streamed(monkeypatch):
    """The texts of a hub dataset that breaks off, and the waits before each new attempt."""
    waits = []
    monkeypatch.setattr(text_module.time, "sleep", waits.append)

    def run(breaks, *passes, other=None):
        records = [[{"text": line, "other": other} for line in texts] for texts in passes or (TEXTS,)]
        calls = []

        def load(*_given):
            calls.append(1)
            return Stream(records[min(len(calls), len(records)) - 1], breaks)

        monkeypatch.setattr(text_module, "load_hub", load)
        return open_text(text("someone/texts", revision="abc")).texts(), waits

    return run


def test_a_stream_that_breaks_off_goes_on_where_it_was(streamed, capsys):
    texts, waits = streamed([1, 2, 2, 2])
    assert list(texts) == TEXTS and waits == [1, 1, 2, 4]  # a record came after the first break
    assert "someone/texts broke off after record 1; trying again in 1 s" in capsys.readouterr().err


def test_a_stream_goes_on_whatever_its_other_columns_hold(streamed):
    """Not a number is not equal to itself."""
    texts, _ = streamed([2], other=math.nan)
    assert list(texts) == TEXTS


def test_a_stream_that_stays_away_is_a_clear_stop(streamed):
    texts, waits = streamed([2] * 20)
    with pytest.raises(UserError, match=r"text source someone/texts broke off after record 2 .*reset by peer"):
        list(texts)
    assert waits == list(PAUSES)


def test_a_stream_that_never_began_is_not_waited_for(streamed):
    texts, waits = streamed([0])
    with pytest.raises(UserError, match="broke off after record 0"):
        list(texts)
    assert waits == []


@pytest.mark.parametrize("second", [["other text", *TEXTS], TEXTS[:1]])
def test_a_stream_that_comes_back_different_is_a_clear_stop(streamed, second):
    texts, _ = streamed([2], TEXTS, second)
    with pytest.raises(UserError, match="came back with another record in place of record 2; give text.revision"):
        list(texts)


def test_a_local_file_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module.time, "sleep", lambda _s: pytest.fail("waited"))
    path = write(tmp_path, "jsonl")
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(UserError, match="data.jsonl"):
        list(open_text(text(path)).texts())


def test_a_column_without_text(tmp_path):
    path = tiny.write_parquet(tmp_path / "data.parquet", {"text": [1, 2]})
    with pytest.raises(UserError, match="column text holds int; set text.field"):
        list(open_text(text(path)).texts())
