"""RULER over tasks and lengths (app/evaluation/ruler_task.py), asked of models whose answers are known."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

import evaluate
from app.evaluation import ruler
from app.evaluation.ruler_task import RulerTask
from app.models.use_model import OpenedModel
from evaluate_runs import refusal
from finetune_runs import make_model

NEEDLE = r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\."


class Stub:
    """A model that answers a prompt as it is told to."""

    device = torch.device("cpu")
    config = SimpleNamespace(vocab_size=257)
    generation_config = GenerationConfig(eos_token_id=7)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answer) -> None:
        self.tokenizer, self.answer = tokenizer, answer
        self.prompts: list[str] = []

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config) -> torch.Tensor:
        assert not generation_config.do_sample
        self.prompts.append(self.tokenizer.decode(input_ids[0]))
        answer = self.tokenizer(self.answer(self.prompts[-1]), return_tensors="pt")["input_ids"].long()
        return torch.cat([input_ids, answer[:, : generation_config.max_new_tokens]], dim=1)


def solved(prompt: str) -> str:
    """What somebody answers who reads all of it, by its question alone."""
    if "VAR " in prompt:
        value: dict[str, str] = {}
        for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", prompt):
            value[name] = value.get(source, source)
        return ", ".join(value)[:30]
    if "numbered list" in prompt:
        counts = Counter(re.findall(r"\d+\. ([a-z]+)", prompt))
        return " ".join(word for word, _ in counts.most_common(10))
    if "coded" in prompt:
        text = prompt.split("coded words. ", 1)[1].split("\nQuestion")[0].split()
        return " ".join(word for word, _ in Counter(text).most_common(4))
    asked = prompt.rsplit("provided text?", 1)[1]
    return " ".join(value for key, value in re.findall(NEEDLE, prompt) if key in asked)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(make_model(tmp_path_factory.mktemp("model")))


def asked(tokenizer: PreTrainedTokenizerBase, answer, trained: int = 8000, **changes) -> RulerTask:
    description = {"model": "stub", "rope": {}, "scaled_without_training": False}
    opened = OpenedModel(Stub(tokenizer, answer), tokenizer, trained, description)  # type: ignore[arg-type]
    options = {
        "model": "stub", "tasks": None, "lengths": [6000, 8000], "trials": 2, "seed": 0, "haystack": None,
        "text_column": "text", "chat": True, "beyond_trained_length": False,
    }  # fmt: skip
    return RulerTask(SimpleNamespace(**options | changes), opened)  # type: ignore[arg-type]


def test_who_reads_all_of_it_is_right_and_who_does_not_is_wrong(tokenizer, tmp_path: Path) -> None:
    """A token is a byte here: of the five names 30 bytes hold four and a half, as the definition has it."""
    task = asked(tokenizer, solved, trials=1)
    results = {cell: task.compute(cell, lambda _: None) for cell in task.cells}
    shares = dict(zip(task.tasks, task.shares(results).tolist(), strict=True))
    assert shares.pop("vt") == pytest.approx([0.8, 0.8])
    assert set(map(tuple, shares.values())) == {(1.0, 1.0)}
    for cell, (name, length) in task.cells.items():
        for trial in results[cell]["trials"]:
            assert length - 800 < trial["tokens"] + ruler.TASKS[name].room <= length
    assert task.summary(results)["by_length"]["6000"] == pytest.approx((6 + 0.8) / 7)
    lines = task.table(results).splitlines()
    assert lines[2].split() == ["task", "6,000", "8,000", "tokens"] and lines[-1].split()[0] == "mean"
    (picture,) = task.draw(results, tmp_path)
    assert matplotlib.image.imread(picture).ndim == 3

    silent = asked(tokenizer, lambda prompt: " I do not know", tasks=["cwe", "niah_single"])
    assert silent.shares({cell: silent.compute(cell, lambda _: None) for cell in silent.cells}).tolist() == [[0, 0]] * 2


def test_a_chat_template_is_used_where_there_is_one(tokenizer, tmp_path: Path) -> None:
    chatty = AutoTokenizer.from_pretrained(make_model(tmp_path / "m"))
    chatty.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{{ strftime_now('%Y') }}{% endif %}"
    )
    for changes, begins, ends in (
        ({}, "<user>A special magic number is hidden within", "</><assistant>2024 The special magic number for"),
        ({"chat": False}, "A special magic number is hidden within", "provided text? The special magic number for"),
    ):
        task = asked(chatty, solved, tasks=["niah_single"], lengths=[2000], **changes)
        assert task.compute("niah_single-length-2000", lambda _: None)["recall"] == 2
        prompt = task.opened.model.prompts[0]
        assert prompt.startswith(begins) and ends in prompt[-150:] and prompt.endswith(" is")
    plain = asked(tokenizer, solved, tasks=["niah_single"], lengths=[2000])
    assert plain.settings["prompt"] == "plain text"


def test_another_text_of_the_same_name_is_another_haystack(tokenizer, own_cache: None, tmp_path: Path) -> None:
    settings = []
    for row in ("It was late.", "It was early."):
        (tmp_path / "book.jsonl").write_text(json.dumps({"text": row}) + "\n" + json.dumps({"text": None}) + "\n")
        task = asked(tokenizer, solved, haystack=[str(tmp_path / "book.jsonl")])
        assert set(task.haystack(3)) == {row}  # and not the word None
        settings.append(task.settings)
    assert settings[0]["haystack"] == settings[1]["haystack"] and settings[0] != settings[1]


def test_a_text_without_spaces_is_a_haystack(tokenizer, own_cache: None, tmp_path: Path) -> None:
    for text in ("鱼在水里游。" * 1000, "鱼在水里游" * 1000):
        (tmp_path / "book.txt").write_text(text)
        task = asked(tokenizer, solved, haystack=[str(tmp_path / "book.txt")], tasks=["niah_single"])
        assert all(task.haystack(2)) and task.lengths == [6000, 8000]


def test_questions_do_not_depend_on_what_was_asked_before(tokenizer) -> None:
    one, other = asked(tokenizer, solved), asked(tokenizer, solved, tasks=["cwe"], lengths=[8000])
    cell = "cwe-length-8000"
    assert one.compute(cell, lambda _: None) == other.compute(cell, lambda _: None)
    changed = asked(tokenizer, solved, tasks=["cwe"], seed=1).compute(cell, lambda _: None)
    assert changed["trials"] != other.compute(cell, lambda _: None)["trials"]


LONGEST = r"the longest of these prompts, of cwe, and its answer have 4,\d{3} tokens at least"


@pytest.mark.parametrize(
    ("trained", "changes", "message"),
    [
        (
            8000,
            {"lengths": [1500, 8000]},
            rf"--lengths 1500: {LONGEST}; --tasks niah_single vt or --lengths 4\d{{3}} w",
        ),
        (8000, {"lengths": [64]}, rf"--lengths 64: {LONGEST}; --lengths 4\d{{3}} would do$"),
        (1500, {}, rf"stub reads 1,500 tokens: {LONGEST}; --tasks niah_single vt would do$"),
        (256, {}, rf"stub reads 256 tokens: {LONGEST}, the shortest, of vt, \d{{3}}$"),
        (256, {"beyond_trained_length": True}, rf"stub reads 256 tokens: {LONGEST}; --lengths 4\d{{3}} would do$"),
    ],
)
def test_a_length_too_short_is_an_error_that_says_what_would_do(
    tokenizer, trained: int, changes: dict[str, Any], message: str
) -> None:
    changes = {"lengths": None, "tasks": ["niah_single", "vt", "cwe"], **changes}
    with pytest.raises(ValueError, match=message):
        asked(tokenizer, solved, trained, **changes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "64"], "--lengths 64: the longest of these prompts, of cwe, and its answer have"),
        (["--lengths", "9000"], "was scaled to 8,192 tokens"),
        (["--tasks", "qa"], "invalid choice: 'qa'"),
        (["--trials", "0"], "--trials must be 1 or more, got 0"),
        (["--haystack", "nothing.txt"], "nothing.txt"),
    ],
)
def test_what_is_wrong_is_an_error_before_anything_is_asked(
    words: list[str], message: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "m")
    assert message in refusal(capsys, "ruler", "--model", "m", "--context_length", 8192, *words)
    assert not (tmp_path / "evaluated").exists()


def test_the_program_asks_a_real_model_and_goes_on(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "tiny")
    (tmp_path / "book.txt").write_text("It was late. " * 50)
    given = ["ruler", "--model", "tiny", "--context_length", "2048", "--tasks", "vt", "niah_multikey", "--trials", "1"]
    words = [*given, "--lengths", "1024", "2048", "--haystack", "book.txt"]
    original, computed = RulerTask.compute, []

    def compute(self: RulerTask, cell: str, progress):
        computed.append(cell)
        if len(computed) == 3:
            raise KeyboardInterrupt
        return original(self, cell, progress)

    monkeypatch.setattr(RulerTask, "compute", compute)
    with pytest.raises(SystemExit):
        evaluate.main(words)
    evaluate.main(words)
    assert "going on: 2 of 4 parts are computed" in capsys.readouterr().out
    assert len(computed) == 5
    done = json.loads((tmp_path / "evaluated" / "tiny-ruler" / "results.json").read_text())
    assert set(done["summary"]["by_length"]) == {"1024", "2048"} and done["settings"]["haystack"] == "book.txt"
    assert (tmp_path / "evaluated" / "tiny-ruler" / "heat_map.png").exists()
