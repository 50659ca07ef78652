"""The eight datasets of SAEBench by name, from local folders in the hub's layout: classes, filters, sampling, seeds."""

import random

import pandas
import pytest

from fipo.config import Probing
from fipo.data import saebench_text
from fipo.data.labelled import load_labelled
from fipo.data.saebench_text import NAMES, select
from fipo.errors import UserError

TRAIN, TEST, SEED = 8, 4, 42
CODE = "x" * 150


def save(root, name, split, rows, config=None):
    folder = root / name / (config or "data")
    folder.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def bios_rows(split, professions, per_gender=30):
    rows = [
        {"hard_text": f"{split} {profession} {gender} {number}", "profession": profession, "gender": gender}
        for number in range(per_gender)
        for profession in professions
        for gender in (1, 0)
    ]
    return rows


@pytest.fixture(autouse=True)
def _all_eight_small(tmp_path, monkeypatch):
    monkeypatch.setenv("FIPO_DATA_ROOT", str(tmp_path))
    for split in ("train", "test"):
        save(tmp_path, "LabHC/bias_in_bios", split, bios_rows(split, range(28)))
        stars = [
            {"text": f"{split} {category} {rating} {number}", "category": category, "rating": rating}
            for number in range(20)
            for category in (1, 2, 3, 4, 5, 6)
            for rating in (1.0, 5.0)
        ]
        save(tmp_path, "canrager/amazon_reviews_mcauley_1and5", split, stars)
        news = [{"text": f"{split} {label} {number}", "label": label} for number in range(30) for label in range(4)]
        save(tmp_path, "fancyzhx/ag_news", split, news)
    languages = {"C": ".h", "Python": ".py", "HTML": ".html", "Java": ".java", "PHP": ".php5", "C++": ".C", "GO": ".go"}
    code = [
        {"content": CODE + f"{language} {number} " + "y" * (600 if number % 3 else 10), "path": f"a.py/b{ending}"}
        for number in range(60)
        for language, ending in languages.items()
    ]
    save(tmp_path, "codeparrot/github-code", "train", code)
    for language, pair in {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}.items():
        lines = [{"translation": {part: f"{part} {number}" for part in pair.split("-")}} for number in range(40)]
        save(tmp_path, "Helsinki-NLP/europarl", "train", lines, config=pair)
        assert language in pair


def build(name):
    return select(name, TRAIN, TEST, SEED)[:2]


def test_the_names_and_their_36_tasks():
    counts = [len(build(name)[0]) for name in NAMES]
    assert list(NAMES)[:3] == [f"LabHC/bias_in_bios_class_set{number}" for number in (1, 2, 3)]
    assert counts == [5, 5, 5, 5, 2, 5, 4, 5] and sum(counts) == 36


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_no_text_in_both_splits(name):
    train, test = build(name)
    assert list(train) == list(test)
    assert all(len(texts) == TRAIN for texts in train.values()) and all(len(texts) == TEST for texts in test.values())
    assert not {text for texts in train.values() for text in texts} & {
        text for texts in test.values() for text in texts
    }


def test_professions_draw_half_of_either_gender():
    """Pandas' sample with the seed, gender 0 first."""
    train, _ = build("LabHC/bias_in_bios_class_set2")
    assert list(train) == ["11", "13", "14", "18", "19"]
    frame = pandas.DataFrame(bios_rows("train", range(28)))
    expected = []
    for gender in (0, 1):
        rows = frame[(frame["profession"] == 13) & (frame["gender"] == gender)]
        expected += rows["hard_text"].sample(n=TRAIN // 2, random_state=SEED).tolist()
    assert train["13"] == expected


def test_sentiment_is_drawn_over_all_categories():
    train, _ = build("canrager/amazon_reviews_mcauley_1and5_sentiment")
    assert list(train) == ["1.0", "5.0"]
    assert all(" 5.0 " in text for text in train["5.0"]) and len({text.split()[1] for text in train["5.0"]}) > 2


def test_code_is_long_loses_its_header_and_is_shuffled_by_python():
    """The stream stops once every language has more than enough: here all at the same number."""
    train, test = build("codeparrot/github-code")
    numbers = [number for number in range(60) if number % 3][: TRAIN + TEST + 1]
    random.Random(SEED).shuffle(numbers)
    assert [int(text.split()[1]) for text in (*train["C"], *test["C"])] == numbers[: TRAIN + TEST]
    assert all(text.startswith("C ") for text in train["C"])


def test_code_as_the_hubs_script_gives_it_is_that_of_the_files(tmp_path):
    """The files have path and content, of which the script makes language and code."""
    name = "codeparrot/github-code"
    expected = build(name)
    file = next((tmp_path / name).rglob("*.parquet"))
    rows = pandas.read_parquet(file).rename(columns={"content": "code"})
    names = {"h": "C", "py": "Python", "html": "HTML", "java": "Java", "php5": "PHP", "C": "C++", "go": "GO"}
    rows["language"] = rows.pop("path").str.rpartition(".")[2].map(names)
    rows.to_parquet(file)
    assert build(name) == expected


def test_europarl_takes_the_first_lines_of_each_pair():
    train, test = build("Helsinki-NLP/europarl")
    generator = random.Random(SEED)
    for language in ("en", "fr", "de", "es", "nl"):
        lines = [f"{language} {number}" for number in range(TRAIN + TEST + 1)]
        generator.shuffle(lines)
        assert train[language] == lines[:TRAIN] and test[language] == lines[TRAIN : TRAIN + TEST]


def test_a_class_with_too_few_texts_is_named():
    with pytest.raises(UserError, match="class 0 is missing or has too few texts"):
        select("LabHC/bias_in_bios_class_set1", 1000, 4, SEED)
    datasets = NAMES
    with pytest.raises(UserError, match="class 0 has .* 500 are needed"):
        load_labelled("fancyzhx/ag_news", Probing(datasets=datasets, train_per_class=500), SEED)


def test_a_missing_split_is_named():
    with pytest.raises(UserError, match="no parquet or jsonl file of the split validation"):
        list(saebench_text._records(None, "fancyzhx/ag_news", "validation", None))


@pytest.mark.parametrize(
    ("name", "rows", "config"),
    [
        ("fancyzhx/ag_news", [{"body": "x", "label": 1}], None),
        ("codeparrot/github-code", [{"code": "x", "lang": "C"}], None),
        ("codeparrot/github-code", [{"code": "x", "path": "a.c"}], None),
        ("Helsinki-NLP/europarl", [{"translation": {"en": "x"}}, {"translation": {"fr": "x"}}], "en-fr"),
        ("Helsinki-NLP/europarl", [{"translation": "x"}], "en-fr"),
    ],
)
def test_other_columns_are_told(name, rows, config, tmp_path):
    for split in ("train", "test"):
        save(tmp_path, name, split, rows, config)
    with pytest.raises(UserError, match=f"dataset {name}: (a record has the columns|class en holds what is no text)"):
        select(name, TRAIN, TEST, SEED)


@pytest.mark.parametrize(
    ("name", "source", "row", "told"),
    [
        ("fancyzhx/ag_news", None, {"text": "x", "label": [1]}, "label holds list; expected text or a number"),
        ("codeparrot/github-code", None, {"code": "x", "language": ["C"]}, "language holds list; expected text"),
        ("codeparrot/github-code", None, {"content": "x", "path": 1}, "path holds int; expected text"),
        ("codeparrot/github-code", None, {"content": 5, "path": "a.c"}, "content holds int; expected text"),
        (
            "canrager/amazon_reviews_mcauley_1and5_sentiment",
            "canrager/amazon_reviews_mcauley_1and5",
            {"text": "x", "rating": "five"},
            "rating is 'five'; expected a number",
        ),
    ],
)
def test_values_of_another_type_are_told(name, source, row, told, tmp_path):
    for split in ("train", "test"):
        save(tmp_path, source or name, split, [row] * 4)
    with pytest.raises(UserError, match=told):
        select(name, 2, 2, SEED)


def test_what_is_no_text_is_told(tmp_path):
    news = [{"text": None if number == 3 else "x", "label": label} for number in range(30) for label in range(4)]
    save(tmp_path, "fancyzhx/ag_news", "train", news)
    with pytest.raises(UserError, match="class 0 holds what is no text"):
        select("fancyzhx/ag_news", 30, TEST, SEED)


def test_a_revision_that_a_local_folder_may_not_have_is_told(capsys):
    assert select("fancyzhx/ag_news", TRAIN, TEST, SEED, "abc")[2] is None
    assert "whose revision is not known to be abc" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["LabHC/bias_in_bios_class_set1", "canrager/amazon_reviews_mcauley_1and5"])
def test_halves_want_even_numbers(name):
    with pytest.raises(UserError, match="give even numbers of training and test texts, not 7 and 4"):
        load_labelled(name, Probing(datasets=(name,), train_per_class=7, test_per_class=4), SEED)


def test_a_stream_that_breaks_off_is_one_line(monkeypatch):
    def broken(*_given):
        yield {"text": "x", "label": 1}
        raise ConnectionError("gone")

    monkeypatch.setattr(saebench_text, "load_local", broken)
    with pytest.raises(UserError, match=r"split train, broke off \(ConnectionError\): gone"):
        select("fancyzhx/ag_news", TRAIN, TEST, SEED)


def test_a_seed_beyond_the_generators():
    with pytest.raises(UserError, match="seed 4294967296 is more than the generators"):
        select("fancyzhx/ag_news", TRAIN, TEST, 2**32)
