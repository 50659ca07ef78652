"""fipo.data.text: local folders and files give their texts in order under a fingerprint; what is wrong is told."""

import json

import pytest
import tiny

from fipo.config import Text
from fipo.data.text import open_text
from fipo.errors import UserError

TEXTS = ["first text", "second text", "third text"]


def text(source, **changes):
    given = {"source": str(source), "tokens": 1, "held_out_tokens": 1, "packed": False}
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
    with pytest.raises(UserError, match=f"data.{kind}"):
        list(open_text(text(path)).texts())


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
    assert source.fingerprint == "someone/texts@abc/train/text"
    with pytest.raises(UserError, match="dataset someone/texts, split train, cannot be read"):
        list(source.texts())
