"""What the tests of the programs start from."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from evaluate_runs import make_books
from finetune_runs import make_model, make_text


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that are read are cached in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def alone(own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model's folder, and a text to train it on."""
    folder = tmp_path_factory.mktemp("inputs")
    return make_model(folder / "model"), make_text(folder / "text.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of texts that are shorter and longer than its context."""
    return make_books(tmp_path_factory.mktemp("books"))
