"""Passkey and multi-key retrieval (retrieval_task.py, prompts.py, heat_map.py in examples/app/evaluation), asked of
models whose answers are known."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import evaluate
from app.evaluation.answer_nats import answer_ids
from app.evaluation.heat_map import heat_map
from app.evaluation.prompts import FILLER, needles, passkey
from app.evaluation.retrieval_task import ANSWER_TOKENS, RetrievalTask
from app.models.use_model import OpenedModel
from finetune_runs import make_model

LENGTHS, DEPTHS = [500, 700, 900], [0.0, 0.5, 1.0]


class Stub:
    """A model that answers a prompt as it is told to."""

    device = torch.device("cpu")
    config = LlamaConfig(vocab_size=257)
    generation_config = GenerationConfig(eos_token_id=7)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answer) -> None:
        self.tokenizer, self.answer = tokenizer, answer
        self.prompts: list[str] = []

    def __call__(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        """To each token the next one is half as likely as all others together."""
        ids = torch.cat([input_ids, input_ids[:, :1]], dim=1)  # what comes behind the last is not known
        logits = torch.zeros(1, logits_to_keep, 257)
        wanted = ids[:, -logits_to_keep:]
        return SimpleNamespace(logits=logits.scatter(-1, wanted[..., None], float(np.log(256 / 2))))

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config) -> torch.Tensor:
        assert not generation_config.do_sample and attention_mask.all()
        assert generation_config.eos_token_id == [7, self.tokenizer.eos_token_id]  # the model's own stays
        prompt = self.tokenizer.decode(input_ids[0])
        self.prompts.append(prompt)
        answer = self.tokenizer(self.answer(prompt), return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, answer[:, : generation_config.max_new_tokens]], dim=1)


def knows(prompt: str) -> str:
    """The code of what the question names last."""
    asked = re.findall(r"[Tt]he (pass key|code of the \w+ \w+) is$", prompt)[-1]
    return " " + re.findall(rf"The {asked} is (\d+)", prompt)[0] + ". More"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(make_model(tmp_path_factory.mktemp("model")))


def retrieval(tokenizer: PreTrainedTokenizerBase, answer, task: str = "passkey", **changes) -> RetrievalTask:
    description = {"model": "stub", "rope": {}, "scaled_without_training": False}
    opened = OpenedModel(Stub(tokenizer, answer), tokenizer, 1000, description)  # type: ignore[arg-type]
    options = {
        "task": task, "model": "stub", "lengths": LENGTHS, "depths": DEPTHS, "trials": 2, "seed": 0, "needles": 4,
        "beyond_trained_length": False,
    }  # fmt: skip
    return RetrievalTask(SimpleNamespace(**options | changes), opened)  # type: ignore[arg-type]


def results_of(task: RetrievalTask) -> dict:
    return {cell: task.compute(cell, lambda asked: None) for cell in task.cells}


def test_the_question_is_the_last_that_is_read(tmp_path: Path) -> None:
    """Of a tokenizer that appends an end of sequence, as add_eos_token has it."""
    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path / "model"), add_eos_token=True)
    assert tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id
    asked = retrieval(tokenizer, knows)
    assert asked.summary(results_of(asked))["accuracy"] == 1
    assert all(prompt.endswith(" is") for prompt in asked.opened.model.prompts)


@pytest.mark.parametrize("task", ["passkey", "needles"])
@pytest.mark.parametrize(
    ("answer", "accuracy"),
    [
        (knows, 1.0),
        (lambda prompt: " I do not know", 0.0),
        (lambda prompt: knows(prompt).split(".")[0] + "0", 0.0),  # a digit too many
        (lambda prompt: " 1, no: " + knows(prompt), 0.0),  # the first answer counts
    ],
    ids=["knows", "does-not", "other-number", "second-guess"],
)
def test_who_knows_is_right_and_who_does_not_is_wrong(tokenizer, task: str, answer, accuracy: float) -> None:
    asked = retrieval(tokenizer, answer, task)
    results = results_of(asked)
    assert asked.summary(results)["accuracy"] == accuracy
    assert asked.summary(results)["asked"] == len(LENGTHS) * len(DEPTHS) * 2


def test_any_code_is_not_the_one_asked_for(tokenizer) -> None:
    """Who just repeats a number it saw has found the pass key, but not the needle."""
    first = lambda prompt: " " + re.findall(r"is (\d+)", prompt)[0]  # noqa: E731
    assert retrieval(tokenizer, first).summary(results_of(retrieval(tokenizer, first)))["accuracy"] == 1
    task = retrieval(tokenizer, first, "needles", depths=[0.0, 1.0], trials=5)
    top, bottom = task.shares(results_of(task))
    assert top.min() == 1 and bottom.max() < 0.5


def test_each_cell_stands_in_its_place(tokenizer) -> None:
    """Rows are depths, columns are lengths: a model that reads the last 300 characters finds what is there."""
    task = retrieval(tokenizer, lambda prompt: knows(prompt) if "key is" in prompt[-300:-60] else " 0")
    results = results_of(task)
    shares = task.shares(results)
    assert shares.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 1]] == task.summary(results)["shares"]
    lines = task.table(results).splitlines()
    assert lines[2].split() == ["depth", "500", "700", "900", "tokens"]
    assert lines[4].split() == ["50%", "1.00", "0.00", "0.00"]


@pytest.mark.parametrize("task", ["passkey", "needles"])
def test_prompts_fill_their_length_and_hide_the_needle_at_its_depth(tokenizer, task: str) -> None:
    asked = retrieval(tokenizer, knows, task)
    results = results_of(asked)
    longest_sentence = max(map(len, FILLER))
    for cell, (length, _) in asked.cells.items():
        for trial in results[cell]["trials"]:
            assert length - longest_sentence < trial["tokens"] + ANSWER_TOKENS <= length
    model: Stub = asked.opened.model  # type: ignore[assignment]
    for prompt, depth in zip(model.prompts[::2], DEPTHS * len(LENGTHS), strict=True):
        what = re.findall(r"[Tt]he (pass key|code of the \w+ \w+) is$", prompt)[-1]
        text = prompt.split("\n\n")[1]
        before, after = re.split(rf"The {what} is \d+\. (?:Remember it: \d+ is the pass key\. )?", text)
        filler = [sum(part.count(sentence.strip()) for sentence in FILLER) for part in (before, after)]
        assert filler[0] == round(depth * sum(filler))
    assert len(set(model.prompts)) == len(model.prompts)


def test_questions_do_not_depend_on_what_was_asked_before(tokenizer) -> None:
    one, other = retrieval(tokenizer, knows, "needles"), retrieval(tokenizer, knows, "needles", lengths=LENGTHS[1:])
    cell = "length-900-depth-0.5"
    assert one.compute(cell, lambda asked: None) == other.compute(cell, lambda asked: None)
    changed = retrieval(tokenizer, knows, "needles", seed=1).compute(cell, lambda asked: None)
    assert changed != one.compute(cell, lambda asked: None)


def test_dynamic_rope_does_not_remember_the_text_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers keeps of a longer text is gone before the next question."""
    given = ["--model", make_model(tmp_path / "tiny"), "--context_length", 900, "--rope_type", "dynamic"]
    options = evaluate.parse(["passkey", *map(str, given), "--lengths", "400", "900", "--trials", "1"])
    opened = evaluate.open_model(options)
    task = RetrievalTask(options, opened)
    heard: list[torch.Tensor] = []
    opened.model.model.rotary_emb.register_forward_hook(lambda module, given, output: heard.append(output[0].clone()))
    for cell in ("length-400-depth-0.5", "length-900-depth-0.5", "length-400-depth-0.5"):
        task.compute(cell, lambda asked: None)
    whole = [cosine for cosine in heard if cosine.shape[1] > 1]
    prefills, with_answers = whole[::2], whole[1::2]  # the question, and the same with the right answer
    assert [a.shape[1] - q.shape[1] for q, a in zip(prefills, with_answers, strict=True)] == [5] * 3
    assert torch.equal(with_answers[0], with_answers[2])
    assert prefills[0].shape == prefills[2].shape != prefills[1].shape
    assert torch.equal(prefills[0], prefills[2])


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_but_the_likeliest_token_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    """The model's own generation_config, an instruct model's, would push it away from repeating the key."""
    model = make_model(tmp_path / "tiny")
    own = {"repetition_penalty": 1.05, "no_repeat_ngram_size": 3, "do_sample": True, "temperature": 0.6, "top_k": 20}
    (model / "generation_config.json").write_text(json.dumps(own))
    options = evaluate.parse(["passkey", "--model", str(model), "--context_length", "512", "--trials", "1"])
    opened = evaluate.open_model(options)
    assert opened.model.generation_config.no_repeat_ngram_size == 3
    if wrapped:
        opened = replace(opened, model=get_peft_model(opened.model, LoraConfig(target_modules=["q_proj"])))
    ran: list[type] = []
    for name in ("RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "TemperatureLogitsWarper"):
        processor = getattr(transformers.generation.logits_process, name)
        monkeypatch.setattr(processor, "__call__", lambda self, ids, scores: ran.append(type(self)) or scores)
    opened.model.generate(input_ids=torch.zeros((1, 3), dtype=torch.long), max_new_tokens=1)
    assert len(ran) == 3
    ran.clear()
    task = RetrievalTask(options, opened)
    task.compute(next(iter(task.cells)), lambda asked: None)
    assert ran == []


def test_a_tokenizer_of_another_model_is_refused(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stub.config, "vocab_size", 80)
    for task in ("passkey", "needles"):
        with pytest.raises(
            ValueError, match=r"the text has the token id \d+, but the model's vocabulary has 80 tokens"
        ):
            retrieval(tokenizer, knows, task)


def test_depths_that_are_nearly_the_same_are_two_cells(tokenizer) -> None:
    task = retrieval(tokenizer, knows, depths=[0.0, 0.1234561, 0.1234562, 1.0], lengths=[500], trials=1)
    assert list(task.cells) == [f"length-500-depth-{depth}" for depth in ("0", "0.1234561", "0.1234562", "1")]
    assert task.shares(results_of(task)).tolist() == [[1]] * 4


def test_needles_are_different_things_with_different_codes() -> None:
    asked = needles(random.Random(0), 100)
    codes = re.findall(r"\d{5}", "".join(asked.needles))
    assert len(set(codes)) == len(set(asked.needles)) == 100 and asked.answer == codes[0]
    for seed in range(100):
        codes = re.findall(r"\d{5}", "".join(needles(random.Random(seed), 100).needles))
        assert len(set(codes)) == 100
    assert passkey(random.Random(0)).prompt(10, [0.5]).count("The pass key is") == 2  # the needle and the question


def test_heat_map_shows_its_numbers(tmp_path: Path) -> None:
    shares = np.array([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    heat_map(shares, [100, 200, 300], [0, 1], tmp_path / "some.png", "title")
    heat_map(np.ones_like(shares), [100, 200, 300], [0, 1], tmp_path / "all.png", "title")
    some, every = (matplotlib.image.imread(tmp_path / name) for name in ("some.png", "all.png"))
    assert some.shape == every.shape
    differs = np.argwhere((some != every).any(axis=-1))
    assert len(differs) and (differs.max(axis=0) < np.array(some.shape[:2]) * [0.6, 0.5]).all()  # the first cell alone


def test_the_program_asks_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model(tmp_path / "tiny")
    given = ["--model", str(model), "--context_length", "512", "--depths", "0", "1", "--trials", "1"]
    evaluate.main(["passkey", *given, "--lengths", "400", "512"])
    folder = tmp_path / "evaluated" / "tiny-passkey"
    done = json.loads((folder / "results.json").read_text())
    assert np.array(done["summary"]["shares"]).shape == (2, 2)
    assert matplotlib.image.imread(folder / "heat_map.png").ndim == 3
    assert done["settings"]["prompt"][2].endswith("The pass key is")
    answers = [trial["answer"] for cell in done["cells"].values() for trial in cell["trials"]]
    assert len(answers) == 4 and any(answers)


def test_nats_are_those_of_the_right_answer_behind_the_prompt(tmp_path: Path) -> None:
    """One forward pass each, against the log-softmax of a plain forward pass of prompt and answer."""
    model = make_model(tmp_path / "tiny")
    options = evaluate.parse(["needles", "--model", str(model), "--context_length", "600", "--trials", "2"])
    opened = evaluate.open_model(options)
    task = RetrievalTask(options, opened)
    result = task.compute("length-600-depth-0.25", lambda asked: None)
    nats = []
    for number, trial in enumerate(result["trials"]):
        fillers = next(n for n in range(1000) if task._tokens(task._prompt(600, 0.25, number, n)) == trial["tokens"])
        prompt = task._prompt(600, 0.25, number, fillers)
        ids = torch.tensor([task._ids(prompt + " " + trial["wanted"])])
        count = len(trial["wanted"]) + 1  # a token a byte, and the blank
        scores = opened.model(ids).logits[0, :-1].double().log_softmax(-1)
        losses = -scores.gather(-1, ids[0, 1:, None])[-count:, 0]
        assert trial["nats"] == pytest.approx(losses.mean().item(), rel=1e-5)
        nats.append(trial["nats"])
    assert len(set(nats)) == 2 and result["nats"] == pytest.approx(sum(nats) / 2)


def test_nats_stand_beside_what_was_found(tokenizer, tmp_path: Path) -> None:
    task = retrieval(tokenizer, knows)
    results = results_of(task)
    for place, cell in enumerate(task.cells):
        results[cell]["nats"] = float(place)
    summary = task.summary(results)
    assert summary["nats_by_cell"] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]] and summary["nats"] == 4
    lines = task.table(results).splitlines()
    assert lines[7] == "nats per token of the right answer, the mean of each cell"
    assert lines[-1].split() == ["100%", "2.000", "5.000", "8.000"]
    assert [path.name for path in task.draw(results, tmp_path)] == ["heat_map.png", "nats.png"]
    assert all(matplotlib.image.imread(tmp_path / name).ndim == 3 for name in ("heat_map.png", "nats.png"))


@pytest.mark.parametrize("answer", [" 123", "123", " 1\n2"])
def test_the_answer_s_tokens_are_those_behind_the_prompt(answer: str) -> None:
    """Of a tokenizer that takes a word and the blank before it together, and of one that joins digits to the prompt."""
    joined = Tokenizer(models.BPE({t: i for i, t in enumerate(["i", "s", " ", "1", "2", "3", "\n", "s1", "s 1"])},
                                  [("s", "1")]))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joined)
    before, behind = answer_ids(tokenizer, "is", answer)
    assert before + behind == tokenizer("is" + answer)["input_ids"] and behind
    assert tokenizer.decode(before + behind).replace(" ", "") == ("is" + answer).replace(" ", "")
    assert (before == tokenizer("is")["input_ids"]) == (answer != "123")
