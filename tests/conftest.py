"""Fixtures: tiny models, text and labels on disk, made once a session; no network, and a cache of the test's own."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, and at every kernel

import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import tiny  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """FIPO_CACHE is a fresh folder in every test, and no workload is chosen."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FIPO_CACHE", str(cache))
    monkeypatch.delenv("FIPO_WORKLOAD", raising=False)
    return cache


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Callable[[str], Path]:
    """Folder of the tiny model of an architecture; read only."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tiny.save_model(tmp_path_factory.mktemp("models") / architecture, architecture)
        return made[architecture]

    return folder


@pytest.fixture(scope="session")
def load_lm(model_folder) -> Callable:
    """The tiny model of an architecture as a `LanguageModel`, loaded once for the same choices."""
    from fipo.data.lm import LanguageModel

    loaded = {}

    def load(architecture: str, layers: tuple[int, ...] = (0, 1), context: int = 16, **changes) -> LanguageModel:
        choice = (architecture, layers, context, *sorted(changes.items()))
        if choice not in loaded:
            given = {"dtype": "float32", "context": context, "weights_sha256": None, "device": "cpu"} | changes
            loaded[choice] = LanguageModel(str(model_folder(architecture)), layers, **given)
        return loaded[choice]

    return load


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """A dataset folder in the hub's layout: train split as parquet, 150 sentences."""
    folder = tmp_path_factory.mktemp("text")
    tiny.write_parquet(folder / "train.parquet", {"text": tiny.sentences(150, seed=1)})
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """The same sentences as jsonl."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.sentences(150, seed=1)))
    return path


@pytest.fixture(scope="session")
def labelled_folders(tmp_path_factory) -> list[Path]:
    """Two labelled folders of three classes."""
    root = tmp_path_factory.mktemp("labelled")
    return [tiny.write_labelled(root / name, seed=1000 * (place + 1)) for place, name in enumerate(("topics", "more"))]
