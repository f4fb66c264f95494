"""What a model's own generation_config asks for, and examples/generate.py and the page make of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import demo
from app.models.use_model import open_model
from app.page.page import Page
from generate_runs import answer, refusal

GIVEN = ("--context_length", 128, "--file", "text.txt", "--max_new_tokens", 12)
TEXT = "The ship is called Pequod"


@pytest.fixture
def own(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model to change, and a text, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    return shutil.copytree(model, tmp_path / "own")


def greedy(capsys: pytest.CaptureFixture[str], model: Path) -> str:
    return answer(capsys, "--model", model, *GIVEN, "--temperature", 0)[0]


def configure(model: Path, **fields: Any) -> None:
    (model / "generation_config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 2, "num_return_sequences": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"num_beams": 2, "force_words_ids": [[5]]},
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": True, "temperature": 0.6, "num_return_sequences": 2},
    ],
)
def test_one_answer_is_made_word_by_word(
    fields: dict[str, Any], own: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the program, and twice by the page, whatever else the config asks for."""
    wanted = greedy(capsys, model)
    configure(own, **fields)
    assert greedy(capsys, own) == wanted and wanted.strip()
    page = Page(open_model(demo.parse([str(own), "--context_length", "128"])))
    for _ in range(2):
        *_, (_, said) = page.answer(TEXT, "", 12, 0)
        assert said + "\n" == wanted
    printed = answer(capsys, "--model", own, *GIVEN)[0]  # as the config says
    assert printed == wanted or fields.get("temperature")


def test_a_temperature_of_0_is_not_sampled_with(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(own, temperature=0.0)
    said = refusal(capsys, "--model", own, *GIVEN, "--top_p", 0.9)
    assert "--top_p has no effect with a temperature of 0, which the model's generation_config has" in said
    assert answer(capsys, "--model", own, *GIVEN, "--top_p", 0.9, "--temperature", 0.5)[0]


def test_an_answer_ends_at_a_stop_string(own: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = greedy(capsys, model)[:-1]
    configure(own, stop_strings=[whole[:3]])
    said = greedy(capsys, own)[:-1]  # the string may begin in the prompt
    assert whole.startswith(said) and 0 < len(said) <= 3 < len(whole)


@pytest.mark.parametrize("given", [["--temperature", 0], ["--temperature", 0.7], []])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_model_whose_weights_are_no_numbers(
    number: float, given: list[Any], own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(own / "model.safetensors")
    weights["model.norm.weight"].fill_(number)
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    configure(own, remove_invalid_values=True)
    assert "the model computes nan where numbers should be" in refusal(capsys, "--model", own, *GIVEN, *given)


def test_what_generate_refuses_is_one_line(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(own, do_sample=True, temperature=-1.0)
    assert "`temperature` (=-1.0) has to be a strictly positive float" in refusal(capsys, "--model", own, *GIVEN)
