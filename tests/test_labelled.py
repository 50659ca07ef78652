"""fipo.data.labelled: local folders of labelled text are cut to size, drawn by the seed, and checked."""

import json

import pytest
import tiny

from fipo.config import Probing
from fipo.data.labelled import load_labelled
from fipo.errors import UserError
from fipo.files import write_json


def load(folder, train=20, test=10, seed=0):
    return load_labelled(str(folder), Probing(datasets=("x",), train_per_class=train, test_per_class=test), seed)


def write(folder, train, test):
    """Rows (text, label) of both splits."""
    for split, rows in (("train", train), ("test", test)):
        columns = {"text": [row[0] for row in rows], "label": [row[1] for row in rows]}
        tiny.write_parquet(folder / f"{split}.parquet", columns)
    return folder


def rows(label, count, split=""):
    return [(f"{label} {split} {number}", label) for number in range(count)]


def test_every_class_has_its_share(labelled_folders):
    data = load(labelled_folders[0])
    assert data.name == "topics" and list(data.train) == list(data.test) == sorted(tiny.TOPICS)
    for split, size in ((data.train, 20), (data.test, 10)):
        for topic, texts in split.items():
            assert len(texts) == len(set(texts)) == size
            assert all(set(text.split()) & set(tiny.TOPICS[topic]) for text in texts)
    train = {text for texts in data.train.values() for text in texts}
    assert train.isdisjoint(text for texts in data.test.values() for text in texts)


def test_texts_are_numbered_train_first_class_by_class(labelled_folders):
    data = load(labelled_folders[0])
    labels = sorted(tiny.TOPICS)
    assert data.texts == [
        *(text for label in labels for text in data.train[label]),
        *(text for label in labels for text in data.test[label]),
    ]


def test_seed_and_size_decide_the_draw(labelled_folders):
    first = load(labelled_folders[0])
    assert load(labelled_folders[0]) == first and load(labelled_folders[0]).fingerprint == first.fingerprint
    others = [load(labelled_folders[0], seed=1), load(labelled_folders[0], train=19), load(labelled_folders[1])]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert others[0].train != first.train


def test_numbers_as_labels_get_their_names(tmp_path):
    write(tmp_path, [("a", 0), ("b", 0), ("c", 1), ("d", 1)], [("e", 1), ("f", 1), ("g", 0), ("h", 0)])
    assert list(load(tmp_path, 2, 2).train) == ["0", "1"]
    write_json(tmp_path / "dataset.json", {"label_names": ["no", "yes"]})
    data = load(tmp_path, 2, 2)
    assert {label: set(texts) for label, texts in data.train.items()} == {"no": {"a", "b"}, "yes": {"c", "d"}}


def test_missing_split(tmp_path):
    write(tmp_path, rows("a", 3), rows("b", 3))
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(UserError, match="has no test.parquet; expected train.parquet and test.parquet"):
        load(tmp_path)


def test_missing_column(tmp_path):
    write(tmp_path, rows("a", 3), rows("a", 3))
    tiny.write_parquet(tmp_path / "train.parquet", {"text": ["a"], "class": ["b"]})
    with pytest.raises(UserError, match="train.parquet has the columns text, class; expected text, label"):
        load(tmp_path)


def test_damaged_parquet(tmp_path):
    write(tmp_path, rows("a", 3), rows("a", 3))
    (tmp_path / "train.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="train.parquet is not readable parquet"):
        load(tmp_path)


@pytest.mark.parametrize(("split", "left"), [("train", 3), ("test", 0)])
def test_class_with_too_few_texts(tmp_path, split, left):
    """The shorter split's texts are among the longer one's: 9 distinct ones."""
    few, many = rows("few", 3), rows("few", 9)
    other = rows("many", 30)
    write(tmp_path, [*(few if split == "train" else many), *other], [*(few if split == "test" else many), *other])
    with pytest.raises(UserError, match=f"class few has 9 texts, {left} left for {split}; 5 are needed: lower probing"):
        load(tmp_path, 5, 5)


def test_empty_texts_do_not_count(tmp_path):
    write(tmp_path, [*rows("a", 4), ("", "a"), *rows("b", 5)], [*rows("a", 5), *rows("b", 5)])
    with pytest.raises(UserError, match="class a has 5 texts, 4 left for train; 5 are needed"):
        load(tmp_path, 5, 5)


@pytest.mark.parametrize("split", ["train", "test"])
def test_label_in_one_split_only(tmp_path, split):
    both, more = [*rows("a", 9), *rows("b", 9)], [*rows("a", 9), *rows("b", 9), *rows("odd", 9)]
    write(tmp_path, more if split == "train" else both, more if split == "test" else both)
    with pytest.raises(UserError, match=f"label odd occurs in {split} and not in"):
        load(tmp_path, 5, 5)


def test_one_class_only(tmp_path):
    write(tmp_path, rows("a", 9), rows("a", 9, "test"))
    with pytest.raises(UserError, match=r"has the classes \['a'\]; probing needs at least two"):
        load(tmp_path, 5, 5)


def test_no_test_text_is_a_training_text(tmp_path):
    """The same rows in both files: whatever is done about it, no text may be trained and tested on."""
    same = [*rows("a", 10), *rows("b", 10)]
    write(tmp_path, same, same)
    try:
        data = load(tmp_path, 5, 5)
    except UserError as error:
        assert "train" in str(error) and "test" in str(error)  # noqa: PT017
    else:
        train = {text for texts in data.train.values() for text in texts}
        assert train.isdisjoint(text for texts in data.test.values() for text in texts)


def test_a_text_given_twice_is_one_and_one_of_two_classes_none(tmp_path):
    """Repeated draws mix both splits: what is in them twice would be trained and tested on."""
    both = [("both", "a"), ("both", "b")]
    train = [*rows("a", 3), *rows("a", 3), *rows("b", 4), *both]
    write(tmp_path, train, [*rows("a", 2, "test") * 2, *rows("b", 2, "test"), *both, ("either", "a"), ("either", "b")])
    data = load(tmp_path, 3, 2)
    assert len(set(data.texts)) == len(data.texts) == 10 and not {"both", "either"} & set(data.texts)
    with pytest.raises(UserError, match="class a has 5 texts, 3 left for train; 4 are needed"):
        load(tmp_path, 4, 2)


def test_unknown_name():
    with pytest.raises(UserError, match="probing dataset no/such is neither a folder nor known; known are sae-probes/"):
        load("no/such")


@pytest.mark.parametrize(
    ("columns", "description", "text"),
    [
        ({"text": [1, 2], "label": ["a", "b"]}, None, "text is int, label str; expected text"),
        ({"text": [["a"], ["b"]], "label": ["a", "b"]}, None, "text is list"),
        ({"text": ["a", "b"], "label": [0.5, 1.5]}, None, "label float"),
        ({"text": ["a", "b"], "label": [0, 2]}, {"label_names": ["x", "y"]}, "label 2 is no number below 2, as"),
        ({"text": ["a", "b"], "label": [0, -1]}, {"label_names": ["x", "y"]}, "label -1 is no number below 2, as"),
        ({"text": ["a", "b"], "label": ["x", "y"]}, {"label_names": ["x", "y"]}, "label 'x' is no number below 2"),
        ({"text": ["a", "b"], "label": [0, 1]}, {"label_names": {"0": "x"}}, "dataset.json holds no list of texts"),
        ({"text": ["a", "b"], "label": [0, 1]}, {"label_names": [1, 2]}, "dataset.json holds no list of texts"),
        ({"text": ["a", "b"], "label": [0, 1]}, [], "dataset.json holds no list of texts"),
    ],
)
def test_columns_and_descriptions_of_other_types(tmp_path, columns, description, text):
    for split in ("train", "test"):
        tiny.write_parquet(tmp_path / f"{split}.parquet", columns)
    if description is not None:
        (tmp_path / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=text):
        load_labelled(str(tmp_path), Probing(datasets=("x",), train_per_class=2, test_per_class=2), 0)
