"""The chat template that examples/generate.py asks with: the tokenizer's own, or that of --chat_template."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

import generate
from app.inputs.chat import LLAMA_2
from generate_runs import answer, refusal

TEXT = "The ship is called Pequod."
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[it]{% endif %}"
)


@pytest.fixture
def asked(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A question about a text, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(TEXT)
    given = ["--model", model, "--context_length", 512, "--file", "book.txt"]
    return [*given, "--question", "Why?", "--max_new_tokens", 1, "--chat_template"]


def test_a_chat_template_is_used_where_there_is_one(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    asked = tokenizer.decode(generate.tokens(tokenizer, "Some text.\n", "Why?")[0])
    assert asked == "[user]Some text.\n\nWhy?[it]"
    assert tokenizer.decode(generate.tokens(tokenizer, "Some text.\n", None)[0]) == "Some text.\n"
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    assert tokenizer.decode(generate.tokens(tokenizer, "Some text.\n", None)[0]) == "<bos>Some text.\n"
    tokenizer.chat_template = generate.chat_template("llama2")
    assert (
        tokenizer.decode(generate.tokens(tokenizer, "Some text.\n", "Why?")[0])
        == "<bos>[INST] Some text.\n\nWhy? [/INST]"
    )


def test_a_chat_template_can_be_given(
    asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("template.jinja").write_text(TEMPLATE)
    read = f"{len('[user]' + TEXT + '  Why?[it]')} tokens read"
    assert read in answer(capsys, *asked, "template.jinja")[1]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read in answer(capsys, *asked, "~/template.jinja")[1]
    assert generate.chat_template("Llama2") == LLAMA_2


@pytest.mark.parametrize("as_it_is", [str, lambda template: json.dumps({"chat_template": template})])
def test_a_template_is_that_of_its_file(as_it_is: Callable[[str], str], tmp_path: Path) -> None:
    """As of the hub's chat_template.json; a byte order mark is no part of it."""
    (tmp_path / "template").write_text(as_it_is(TEMPLATE), encoding="utf-8-sig")
    assert generate.chat_template(str(tmp_path / "template")) == TEMPLATE


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}[{{ m.role }}]{% endfor %}", "it leaves the beginning of the text out"),
        ("{{ messages[0].content[4:] }}", "cannot be used: it leaves the beginning of the text out"),
        ("{{ messages[0].content[:-2] }}", "cannot be used: it leaves the question out"),
        ("{{ raise_exception('no users') }}", "the model's chat template refuses it: no users"),
        ("{{ messages + 1 }}", "the model's chat template fails on it: TypeError: "),
        ("{{ messages[1].content }}", "the model's chat template refuses it: list object has no element 1"),
        ("{{ 1 // 0 }}", "the model's chat template fails on it: ZeroDivisionError: "),
    ],
)
def test_a_template_that_is_of_no_use(
    template: str, message: str, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("template.jinja").write_text(template)
    said = refusal(capsys, *asked, "template.jinja")
    assert said.startswith("generate.py: error: --chat_template template.jinja: ") and message in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("", None, "--chat_template is empty; it must name a file"),
        ("Llama3", None, "--chat_template Llama3: there is no such file; it may be a Jinja file, "),
        (".", None, "--chat_template . cannot be read: Is a directory"),
        ("t.jinja", b"caf\xe9", "--chat_template t.jinja is no text in UTF-8: unexpected end of data at byte 3"),
        ("t.jinja", b"\n", "--chat_template t.jinja holds no text"),
        ("t.json", b'{"a": 1}', "t.json: it is a JSON object, whose chat_template must be text, not None"),
        ("t.json", b'{"chat_template": [1]}', "t.json: it is a JSON object, whose chat_template must be text, not [1]"),
        ("t.jinja", b"{# one #}\n{% if %}", "--chat_template t.jinja: line 2 of the chat template is no Jinja: "),
    ],
)
def test_what_is_no_template_is_refused_before_the_model_is_opened(
    name: str,
    content: bytes | None,
    message: str,
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def opened(options: argparse.Namespace) -> None:
        raise AssertionError

    monkeypatch.setattr(generate, "open_model", opened)
    if content is not None:
        Path(name).write_bytes(content)
    assert message in refusal(capsys, *asked, name)
