"""`--check_retrieval` and `--recipe paper` (app/training/retrieval_guard.py, recipe.py)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, MistralConfig, TrainingArguments

import finetune_llama
from app.training import retrieval_guard
from app.training.arguments import parse
from app.training.context import new_context
from app.training.measure import AFTER, BEFORE, SCALED
from app.training.options import ModelOptions
from app.training.recipe import RECIPE, SFT_RECIPE, TINY_RECIPE, recipe_of
from app.training.retrieval_guard import Advice, RetrievalGuard, advise
from finetune_runs import ROOT, make_model, make_text, small_run

TINY = str(ROOT / "examples" / "tiny_llama")


def guard(folder: Path, before: dict[str, Any] | None = None, context: int = 512) -> RetrievalGuard:
    tokenizer, config = AutoTokenizer.from_pretrained(TINY), AutoConfig.from_pretrained(TINY)
    extended = new_context(config, ModelOptions(context_length=context))
    return RetrievalGuard(folder, tokenizer, config, extended, Advice(["let each token"], ["lower"]), before)


@pytest.mark.parametrize(
    ("options", "own_window", "ways"),
    [
        ({}, None, ["--sink", "--learning_rate", "more steps", "--dense_steps"]),
        ({"sink": True}, None, ["--learning_rate", "more steps", "--dense_steps"]),
        ({}, 64, ["--learning_rate", "more steps", "--dense_steps"]),
        ({"dense_steps": 16}, None, ["--learning_rate", "more steps"]),
        ({"dense_steps": 0.5, "dense_layers": "4"}, None, ["--learning_rate", "more steps"]),
    ],
)
def test_what_a_run_does_already_is_no_advice(options: dict[str, Any], own_window: int | None, ways: list[str]) -> None:
    asked = ModelOptions(context_length=512, **options)
    base = MistralConfig(num_hidden_layers=4, max_position_embeddings=256, sliding_window=own_window)
    said = advise(asked, 16, base, new_context(base, asked)).training
    every = ["--sink", "--learning_rate", "more steps", "--dense_steps"]
    assert [way for way in every if way in " ".join(said)] == ways and len(said) == len(ways)


@pytest.mark.parametrize(
    ("scaled", "options", "ways"),
    [
        ({}, {"rope_type": "linear"}, "yarn or ntk"),
        ({}, {"rope_type": "yarn"}, "--rope_type ntk"),
        ({}, {"rope_type": "ntk"}, None),
        ({"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 128}, {}, None),
    ],
)
def test_another_way_to_scale_rope_is_advised_where_there_is_one(
    scaled: dict[str, Any], options: dict[str, Any], ways: str | None
) -> None:
    base = LlamaConfig(num_hidden_layers=4, max_position_embeddings=256)
    base.rope_parameters |= scaled
    asked = ModelOptions(context_length=512, **options)
    first, *others = advise(asked, 16, base, new_context(base, asked)).scaling
    assert ("--rope_type" in first and ways in first) if ways else "--context_length" in first
    assert "more steps" in others[-1]


def test_pass_keys_fill_the_model_s_own_context(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for prompt, answer in guard(tmp_path).questions:
        assert 225 < len(prompt) + len(answer) <= 256
        text, key = tokenizer.decode(prompt), tokenizer.decode(answer).strip()
        assert text.count(key) == 2 and len(key) == 5 and text.endswith("The pass key is")


def row(nats: float, found: int) -> dict[str, Any]:
    return {"nats": [nats] * 8, "found": [True] * found + [False] * (8 - found)}


@pytest.mark.parametrize(
    ("before", "after", "better", "says"),
    [
        ((0.28, 6), (0.55, 0), True, "Perplexity improved, but retrieval did not survive. What may help: let each"),
        ((0.28, 6), (0.55, 0), False, "Retrieval did not survive. What may help"),
        ((0.28, 6), (0.28, 3), None, "Retrieval did not survive"),
        ((0.28, 2), (0.10, 0), True, "Perplexity improved, but retrieval did not survive"),
        ((0.23, 7), (0.52, 5), True, "Perplexity improved, but retrieval has suffered. What may help"),
        ((0.23, 7), (0.60, 7), False, "Retrieval has suffered"),
        ((0.23, 7), (math.nan, 7), False, "Retrieval has suffered"),
        ((0.23, 7), (0.43, 8), True, "Retrieval has survived"),
        ((0.28, 6), (0.31, 5), True, "Retrieval has survived"),
        ((4.2, 0), (6.0, 0), True, "The base model does not find them either: it had nothing to lose"),
        ((3.0, 1), (3.2, 0), True, "The base model does not find them either: it had nothing to lose"),
    ],
)  # fmt: skip
def test_the_verdict_is_in_words(tmp_path: Path, before, after, better: bool | None, says: str) -> None:
    asked = guard(tmp_path, {BEFORE: row(*before)})
    asked.record[AFTER] = row(*after)
    rows = {BEFORE: {"512": 9.0, "1024": 9.0}, AFTER: {"512": 10.0, "1024": 8.0 if better else 10.0}}
    perplexity: Any = None if better is None else SimpleNamespace(lengths=[512, 1024], rows=rows)
    verdict = asked.verdict(perplexity)
    last = "inf" if math.isnan(after[0]) else f"{after[0]:.2f}"
    nats = f"{before[0]:.2f} before and {last} after nats per token (median); {before[1]} and {after[1]} of 8 found. "
    assert verdict.startswith(f"pass keys at 256 tokens, the model's own context: {nats}") and says in verdict


@pytest.mark.parametrize(
    ("scaled", "after", "says"),
    [
        ((0.48, 4), (0.52, 5), "Retrieval has suffered. Scaling RoPE did that, not training. What may help: lower"),
        ((0.48, 4), (0.52, 3), "Retrieval did not survive. Scaling RoPE did that, not training. What may help: lower"),
        ((0.25, 7), (0.67, 3), "Retrieval did not survive. Training did that, not scaling RoPE. What may help: let"),
        ((0.48, 4), (0.67, 3), "Scaling RoPE and training did that. What may help: let each token or lower"),
        ((0.48, 6), (0.50, 4), "Training did that"),
        ((0.48, 4), (0.43, 8), "Retrieval has survived"),
    ],
)
def test_what_scaling_did_is_not_laid_on_training(tmp_path: Path, scaled, after, says: str) -> None:
    """The numbers of the first and last are those of SmolLM2-135M with YaRN alone and with training after it."""
    asked = guard(tmp_path, {BEFORE: row(0.23, 7), SCALED: row(*scaled), AFTER: row(*after)})
    verdict = asked.verdict()
    nats = f"0.23 before, {scaled[0]:.2f} with RoPE scaled only, and {after[0]:.2f} after nats per token (median)"
    assert nats in verdict and f"7, {scaled[1]} and {after[1]} of 8 found" in verdict and says in verdict


def test_a_key_that_is_never_found_does_not_hide_the_others(tmp_path: Path) -> None:
    asked = guard(tmp_path, {BEFORE: row(0.2, 7)})
    asked.record[BEFORE]["nats"][0] = 3.5  # their mean is that of the row after, 0.61
    asked.record[AFTER] = row(0.61, 7)
    assert "0.20 before and 0.61 after nats per token (median); " in asked.verdict()
    assert "Retrieval has suffered" in asked.verdict()


def test_without_a_before_there_is_nothing_to_compare(tmp_path: Path) -> None:
    assert "were not asked for before training" in guard(tmp_path).verdict()


def test_each_row_is_measured_with_the_model_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, devices = torch.nn.Linear(1, 1).train(), []

    def losses(model: torch.nn.Module, prompt: list[int], answer: list[int], device: Any) -> tuple[torch.Tensor, bool]:
        assert not model.training
        devices.append(device)
        return torch.tensor([1.0, 3.0]), len(devices) % 2 == 0

    monkeypatch.setattr(retrieval_guard, "answer_losses", losses)
    asked = guard(tmp_path)
    asked.measure(model, TrainingArguments(use_cpu=True, report_to="none"), BEFORE)
    assert model.training and set(devices) == {torch.device("cpu")}
    written = json.loads((tmp_path / "retrieval.json").read_text())
    assert written[BEFORE] == {"nats": [2.0] * 8, "found": [False, True] * 4} and written["length"] == 256


def test_a_run_says_what_became_of_it_also_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = make_text(tmp_path / "text.jsonl")
    words = small_run(Path(TINY), text, tmp_path / "out", steps=2)
    finetune_llama.main([*words, "--context_length", "512", "--check_retrieval", "--eval_tokens", "0"])
    said = capsys.readouterr().out
    assert "pass keys at 256 tokens, the model's own context: " in said and "it had nothing to lose" in said
    first = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert first[BEFORE] != first[SCALED] != first[AFTER]
    words[words.index("--max_steps") + 1] = "3"
    finetune_llama.main(
        [*words, "--context_length", "512", "--check_retrieval", "--eval_tokens", "0",
         "--resume_from_checkpoint", "latest"]
    )  # fmt: skip
    again = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert (again[BEFORE], again[SCALED]) == (first[BEFORE], first[SCALED]) and again[AFTER] != first[AFTER]
    assert "it had nothing to lose" in capsys.readouterr().out


def test_a_context_too_short_for_a_pass_key_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = small_run(make_model(tmp_path / "m"), make_text(tmp_path / "t.jsonl"), tmp_path / "out")
    with pytest.raises(SystemExit):
        finetune_llama.main([*words, "--check_retrieval"])
    assert "--check_retrieval: a pass key needs more than the model's own 32 tokens" in capsys.readouterr().err


def test_the_paper_s_recipe_by_one_word() -> None:
    assert recipe_of(None, None, None) == TINY_RECIPE and recipe_of("m", None, None) == RECIPE
    assert recipe_of("m", "sft", None) == SFT_RECIPE
    paper = recipe_of(None, None, "paper")
    assert (RECIPE | {"sink": False}).items() <= paper.items()
    assert recipe_of("m", "sft", "paper")["num_train_epochs"] == 5
    options, _, args = parse(["--recipe", "paper", "--output_dir", "x"])  # of the tiny Llama
    assert (args.max_steps, args.learning_rate, args.warmup_steps) == (1000, 2e-5, 20)
    assert args.gradient_accumulation_steps * args.per_device_train_batch_size == 64
    assert (options.rope_type, options.sink, options.window, options.lora_r) == ("linear", False, None, 8)
    options, _, args = parse(
        ["--recipe", "paper", "--max_steps", "7", "--group_size", "64", "--sink", "--output_dir", "x"]
    )
    assert (args.max_steps, options.group_size, options.sink) == (7, 64, True)
