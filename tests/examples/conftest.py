"""What the tests of the programs start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_runs import make_model, make_text


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model's folder, and a text to train it on."""
    folder = tmp_path_factory.mktemp("inputs")
    return make_model(folder / "model"), make_text(folder / "text.jsonl")
