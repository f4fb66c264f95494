"""The token that ends an answer, in the model's generation config; and the day that a chat template prints."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

import finetune_llama
import generate
import merge_adapter
from app.inputs.chat import LLAMA_2, answer_ends, encode, ends
from app.inputs.conversations import conversation
from app.inputs.samples import read_samples
from app.inputs.template import ChatTemplate, prints_date
from byte_tokens import BEGINNINGS, ENDLESS, byte_tokenizer
from chat_templates import CHATML, DEEPSEEK, GEMMA, LLAMA_3_1, PHI_3, QWEN_3, tokenizer_of
from conversation_rows import ANSWER, ASKED, CALL, chat
from finetune_runs import small_run
from longlora_ext.adapter import load, lora_config, prepare_model, stop_at, stops
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("own_cache")


# --- which token ------------------------------------------------------------------------------------------------


def end_texts(template: str, row: dict[str, Any]) -> list[str]:
    tokenizer = tokenizer_of(template)
    found = conversation(row)
    return tokenizer.convert_ids_to_tokens(ends(encode(found, ChatTemplate(tokenizer)), found, tokenizer))


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (QWEN_3, "<|im_end|>"),
        (LLAMA_3_1, "<|eot_id|>"),
        (GEMMA, "<end_of_turn>"),
        (DEEPSEEK, "<|endoftext|>"),
        (PHI_3, "<|endoftext|>"),
    ],
    ids=["ChatML", "Qwen 3", "Llama 3.1", "Gemma", "DeepSeek", "Phi 3"],
)
def test_the_token_that_ends_an_answer(template: str, end: str) -> None:
    assert end_texts(template, chat(ASKED, ANSWER, ASKED, ANSWER)) == [end]
    tokenizer = tokenizer_of(template)
    assert tokenizer.convert_ids_to_tokens(answer_ends(tokenizer)) == [end]


def test_of_two_kinds_of_answers_both_ends() -> None:
    called = {"role": "assistant", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "sunny"}
    row = chat(ASKED, called, result, ANSWER, chat_template_kwargs={"builtin_tools": ["weather"]})
    assert sorted(end_texts(LLAMA_3_1, row)) == ["<|eom_id|>", "<|eot_id|>"]


def test_an_end_that_is_not_learned_is_none() -> None:
    called = {"role": "assistant", "tool_calls": [CALL], "weight": 0}
    row = chat(ASKED, called, {"role": "tool", "content": "x"}, ANSWER, chat_template_kwargs={"builtin_tools": ["x"]})
    assert end_texts(LLAMA_3_1, row) == ["<|eot_id|>"]


@pytest.mark.parametrize("content", ["yes", "yes<|end|>"])
def test_what_ends_nothing_but_an_answers_own_words_is_no_end(content: str) -> None:
    """The template ends answers with nothing, so they get the end of a text."""
    for template in (ENDLESS, BEGINNINGS):
        tokenizer = byte_tokenizer(template, eos_token="<eos>")
        found = conversation(chat(ASKED, {**ANSWER, "content": content}))
        samples = encode(found, ChatTemplate(tokenizer))
        assert ends(samples, found, tokenizer) == [tokenizer.eos_token_id]
        assert samples[0].labels[-1] == tokenizer.eos_token_id


def test_a_template_that_takes_no_answer_has_no_ends() -> None:
    tokenizer = byte_tokenizer("{{ messages[0].content }}", eos_token="<eos>")
    assert answer_ends(tokenizer) == []
    tokenizer = byte_tokenizer(LLAMA_2, eos_token="</s>", bos_token="<s>")
    assert answer_ends(tokenizer) == [tokenizer.eos_token_id]


# --- the generation config --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("had", "given", "new", "has"),
    [
        (2, [5], [5], [2, 5]),
        (2, [2], [], 2),
        ([2, 5], [5], [], [2, 5]),
        (None, [5, 5, 6], [5, 6], [5, 6]),
        (2, [], [], 2),
    ],
)
def test_stop_at(had: object, given: list[int], new: list[int], has: object) -> None:
    model = tiny_model()
    model.generation_config = GenerationConfig(eos_token_id=had)
    trained = prepare_model(model, lora_config(model))
    assert stop_at(trained, given) == new
    assert model.generation_config.eos_token_id == has


def make_chatml_base(folder: Path, template: str = CHATML) -> Path:
    """A random model whose texts end with <|endoftext|>."""
    tokenizer = tokenizer_of(template)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_chats(path: Path, count: int = 8) -> Path:
    rows = [chat({**ASKED, "content": f"{n}?"}, {**ANSWER, "content": "ab"[n % 2]}) for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_model_taught_in_chatml_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, text = make_chatml_base(tmp_path / "base"), write_chats(tmp_path / "chats.jsonl")
    run = small_run(base, text, tmp_path / "out", steps=1)
    finetune_llama.main([*run, "--task", "sft", "--full_finetune", "--eval_tokens", "0"])
    assert "note: answers end with <|im_end|>: generation will stop there" in capsys.readouterr().out
    made = tmp_path / "out" / "model"
    tokenizer = AutoTokenizer.from_pretrained(made)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stops(AutoModelForCausalLM.from_pretrained(made).generation_config) == [tokenizer.eos_token_id, end]


def test_an_adapter_taught_in_chatml_stops(tmp_path: Path) -> None:
    """Loaded by itself and merged; the base model's own end of a text stays. With all that the pattern can be."""
    base, text = make_chatml_base(tmp_path / "base"), write_chats(tmp_path / "chats.jsonl")
    run = [*small_run(base, text, tmp_path / "out", steps=2), "--window", "20", "--dense_layers", "1"]
    finetune_llama.main([*run, "--dense_steps", "1", "--task", "sft", "--eval_tokens", "0"])
    adapter, merged = tmp_path / "out" / "adapter", tmp_path / "merged"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    both = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert load(adapter).generation_config.eos_token_id == both
    merge_adapter.main([str(adapter), str(merged)])
    assert AutoModelForCausalLM.from_pretrained(merged).generation_config.eos_token_id == both
    assert AutoModelForCausalLM.from_pretrained(base).generation_config.eos_token_id == both[0]


def test_generate_stops_where_answers_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a base model, which says nothing of its template's end; without the template it goes on."""
    base = make_chatml_base(tmp_path / "base")
    end = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|im_end|>")
    (tmp_path / "book.txt").write_text("x")
    written = []

    def opened(options: Any, original: Any = generate.open_model) -> Any:
        found = original(options)

        def say(model: torch.nn.Module, given: tuple, output: Any) -> None:
            written.append(end)
            output.logits[..., end] = 1e9

        found.base.register_forward_hook(say)
        return found

    monkeypatch.setattr(generate, "open_model", opened)
    words = ["--model", str(base), "--file", str(tmp_path / "book.txt"), "--max_new_tokens", "3"]
    generate.main([*words, "--beyond_trained_length", "--question", "Why?"])
    assert len(written) == 1
    generate.main([*words, "--beyond_trained_length"])
    assert len(written) == 4


# --- the day ----------------------------------------------------------------------------------------------------

YESTERDAY = date(2024, 7, 26)


def test_a_template_is_given_a_day() -> None:
    tokenizer = tokenizer_of(LLAMA_3_1)
    asked = [ASKED]
    assert prints_date(tokenizer) and not prints_date(tokenizer_of(CHATML))
    today = ChatTemplate(tokenizer).write(asked, {})
    assert f"Today Date: {date.today():%d %b %Y}" in today
    then = ChatTemplate(tokenizer, YESTERDAY).write(asked, {})
    assert then == today.replace(f"{date.today():%d %b %Y}", "26 Jul 2024")
    given = ChatTemplate(tokenizer, YESTERDAY).write(asked, {"date_string": "1 May 1999"})
    assert "1 May 1999" in given and "2024" not in given


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%A, %B %d, %Y", "%d.%m.%y %H:%M", "%j %U 100%%", "%-d/%-m", "%c|%x|%X"])
def test_any_format_of_a_date(form: str) -> None:
    """Also where the template starts with a line break, which is written, and asks within a macro."""
    template = "\n{% set form = '" + form + "' %}{% macro now() %}{{ strftime_now(form) }}{% endmacro %}{{ now() }}"
    text = ChatTemplate(byte_tokenizer(template), YESTERDAY).write([ASKED], {})
    assert text == "\n" + YESTERDAY.strftime(form)


def test_marked_answers_with_a_day() -> None:
    tokenizer = byte_tokenizer(
        "{{ strftime_now('%Y') }}{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
        eos_token="<eos>",
    )
    ((ids, labels),) = encode(conversation(chat(ASKED, ANSWER)), ChatTemplate(tokenizer, YESTERDAY))
    assert tokenizer.decode(ids) == "2024<|user|>of Italy?<|assistant|>Rome<|end|>"
    assert tokenizer.decode([label for label in labels if label != -100]) == "Rome<|end|>"


def test_samples_of_another_day_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    text, tokenizer = [str(write_chats(tmp_path / "chats.jsonl"))], tokenizer_of(LLAMA_3_1)
    samples = [read_samples(text, tokenizer, 256, day).ids(0) for day in (YESTERDAY, date(2024, 7, 27), YESTERDAY)]
    assert "26 Jul 2024" in tokenizer.decode(samples[0]) and "27 Jul 2024" in tokenizer.decode(samples[1])
    assert samples[0].tolist() == samples[2].tolist()


def test_a_run_goes_on_and_is_done_again_on_another_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, text = make_chatml_base(tmp_path / "base", LLAMA_3_1), write_chats(tmp_path / "chats.jsonl")
    out = tmp_path / "out"
    words = [*small_run(base, text, out, steps=2), "--task", "sft", "--eval_tokens", "0", "--context_length", "128"]
    finetune_llama.main(words)
    first = json.loads((out / "run.json").read_text())
    assert first["settings"]["template_date"] == date.today().isoformat()

    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return cls(2050, 1, 1)

    for module in ("app.training.template_date", "app.inputs.samples"):
        monkeypatch.setattr(f"{module}.date", Tomorrow)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another cache")
    words[words.index("--max_steps") + 1] = "4"
    finetune_llama.main([*words, "--resume_from_checkpoint", "latest"])
    assert "going on from checkpoint-2" in capsys.readouterr().out
    again = ["--from_manifest", str(out / "run.json"), "--output_dir", str(tmp_path / "again"), "--max_steps", "1"]
    finetune_llama.main(again)
    for made in (out, tmp_path / "again"):
        settings = json.loads((made / "run.json").read_text())["settings"]
        assert settings["template_date"] == first["settings"]["template_date"]
        assert settings["train_sha256"] == first["settings"]["train_sha256"]
    saved = AutoTokenizer.from_pretrained(out / "adapter").chat_template
    assert saved == LLAMA_3_1 and not re.search("macro", saved)
    fresh = [*small_run(base, text, tmp_path / "fresh", steps=1), "--task", "sft", "--eval_tokens", "0"]
    finetune_llama.main([*fresh, "--context_length", "128"])
    assert json.loads((tmp_path / "fresh" / "run.json").read_text())["settings"]["template_date"] == "2050-01-01"
