"""examples/generate.py: a question about a long text, answered by any of the three kinds of models."""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import CausalLMOutputWithPast

import generate
from app.models.use_model import OpenedModel
from evaluate_runs import make_adapter
from finetune_runs import make_model
from generate_runs import answer, refusal
from longlora_ext.adapter import merge

CONTEXT = 512
TEXT = "The ship is called Pequod. " * 10


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return make_adapter(make_model(folder / "base"), folder / "adapter", CONTEXT)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text(TEXT)
    return tmp_path / "book.txt"


def test_the_answer_is_that_of_the_model(
    adapter: Path, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(adapter, tmp_path / "merged")
    given = ["--file", book, "--question", "Which ship?", "--max_new_tokens", 12, "--temperature", 0]
    printed, beside = answer(capsys, "--model", adapter, *given)
    prompt = f"{TEXT.rstrip()}\n\nQuestion: Which ship?\nAnswer:"
    assert f"{len(prompt)} tokens read, at most 12 to come" in beside  # a token a byte

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = tokenizer(prompt, return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert printed == tokenizer.decode(said, skip_special_tokens=True) + "\n" and printed.strip()
    assert answer(capsys, "--model", tmp_path / "merged", *given)[0] == printed
    base = ["--model", adapter.with_name("base"), "--context_length", CONTEXT]
    assert answer(capsys, *base, *given)[0] != printed


def test_the_answer_comes_word_by_word(
    adapter: Path, book: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed by the time that the model makes each token, of a model that says this and a byte a token."""
    said, came = b"It is the Pequod.", []

    def opened(options: argparse.Namespace, original=generate.open_model) -> OpenedModel:
        found = original(options)
        letters = iter(found.tokenizer(said.decode())["input_ids"])

        def say(model: torch.nn.Module, given: tuple, output: CausalLMOutputWithPast) -> None:
            came.append(capsys.readouterr().out)
            output.logits[..., next(letters)] = 1e9

        found.base.register_forward_hook(say)
        return found

    monkeypatch.setattr(generate, "open_model", opened)
    last, _ = answer(capsys, "--model", adapter, "--file", book, "--max_new_tokens", len(said), "--temperature", 0)
    assert [*filter(None, came), last] == ["It ", "is ", "the ", "Pequod.\n"]


def test_standard_input_and_no_question(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stdin(content: bytes) -> None:  # as in a C locale
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), "ascii", errors="surrogateescape"))

    stdin(TEXT.encode() + "é".encode())
    given = ["--model", adapter, "--file", "-", "--max_new_tokens", 2]
    assert f"{len(TEXT) + 2} tokens read" in answer(capsys, *given)[1]
    stdin(b"\xff\xfe")
    assert "--file - is no text in UTF-8: invalid start byte at byte 0" in refusal(capsys, *given)


def test_sampling_is_by_seed(adapter: Path, book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", adapter, "--file", book, "--max_new_tokens", 20, "--temperature", 5.0, "--top_k", 100]
    one, again, other = (answer(capsys, *given, "--seed", seed)[0] for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize("behind", ["<eos>", "<sep>", "<sep> <eos>"])
@pytest.mark.parametrize("question", [None, "Why?"])
def test_a_prompt_does_not_end_with_what_ends_a_text(adapter: Path, behind: str, question: str | None) -> None:
    """Of tokenizers that append an end of sequence or a separator, as add_eos_token has it."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    plain = tokenizer.decode(generate.tokens(tokenizer, "Some text.", question)[0])
    tokenizer.add_special_tokens({"bos_token": "<bos>", "sep_token": "<sep>"})
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<bos>", "<sep>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<bos> $A {behind}", special_tokens=ids
    )
    assert tokenizer("x")["input_ids"][-1] != tokenizer("x", add_special_tokens=False)["input_ids"][-1]
    assert tokenizer.decode(generate.tokens(tokenizer, "Some text.", question)[0]) == f"<bos>{plain}"
    assert tokenizer.decode(generate.tokens(tokenizer, "Some text.<eos>", None)[0]) == "<bos>Some text."


def test_add_eos_token_of_a_saved_tokenizer(adapter: Path, book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(adapter.with_name("base"), book.parent / "model")
    AutoTokenizer.from_pretrained(model, add_eos_token=True).save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id
    given = ["--model", model, "--context_length", CONTEXT, "--file", book, "--max_new_tokens", 1]
    assert f"{len(TEXT)} tokens read" in answer(capsys, *given)[1]


def test_too_much_text_is_refused_with_its_count(adapter: Path, book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", adapter, "--file", book]
    said = refusal(capsys, *given, "--max_new_tokens", 243)
    assert (
        "the prompt has 270 tokens, with 243 for the answer 513, but" in said and "was trained on 512 tokens." in said
    )
    book.write_text(TEXT * 2)
    assert "the prompt has 540 tokens, with 1 for the answer 541" in refusal(capsys, *given)
    assert "540 tokens read, at most 3" in answer(capsys, *given, "--max_new_tokens", 3, "--beyond_trained_length")[1]


def test_a_tokenizer_of_another_model_is_refused(
    adapter: Path, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(adapter.with_name("base"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["Pequod"])
    tokenizer.save_pretrained(model)
    said = refusal(capsys, "--model", model, "--context_length", CONTEXT, "--file", book)
    assert "the text has the token id 257, but the model's vocabulary has 257 tokens" in said


def test_it_ends_when_it_is_stopped(
    adapter: Path, book: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(seed: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "set_seed", stop)
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--model", str(adapter), "--file", str(book)])
    assert stopped.value.code == 130 and capsys.readouterr().err.endswith("to come\n\n")


def test_a_byte_order_mark_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"\xef\xbb\xbfone\r\n\xef\xbb\xbftwo\x0c"
    (tmp_path / "x.txt").write_bytes(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), "ascii"))
    assert generate.read("--file", str(tmp_path / "x.txt")) == generate.read("--file", "-") == "one\r\n\ufefftwo\x0c"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--file gone.txt", "--file gone.txt cannot be read: No such file or directory"),
        ("--file /", "--file / cannot be read: Is a directory"),
        ("--file=", "--file is empty; it must name a file"),
        ("--file {empty}", "holds no text"),
        ("--file {binary}", "is no text in UTF-8: invalid start byte at byte 0"),
        ("--file {book} --max_new_tokens 0", "--max_new_tokens must be 1 or more, got 0"),
        ("--file {book} --temperature -1", "--temperature must be 0, or 1e-06 or more, got -1.0"),
        ("--file {book} --temperature 1e-45", "--temperature must be 0, or 1e-06 or more, got 1e-45"),
        ("--file {book} --temperature inf", "--temperature must be 0, or 1e-06 or more, got inf"),
        ("--file {book} --seed -1", "--seed must be in 0..4294967295, got -1"),
        ("--file {book} --seed 99999999999", "--seed must be in 0..4294967295, got 99999999999"),
        ("--file {book} --question=", "--question is empty"),
        ("--file {book} --question \udce9", "--question is no text in UTF-8"),
        ("--file {book} --top_p 2", "--top_p must be above 0 and at most 1, got 2.0"),
        ("--file {book} --top_k 0", "--top_k must be 1 or more, got 0"),
        ("--file {book} --temperature 0 --top_p 0.9", "--top_p has no effect with --temperature 0"),
        ("--file {book} --temperature 0 --top_k 3", "--top_k has no effect with --temperature 0"),
        ("--file {book} --repetition_penalty 0", "--repetition_penalty must be a number above 0, got 0.0"),
        ("--file {book} --model nowhere", "--model nowhere: "),
        ("--file {book} --chat_template llama2", "--chat_template needs a --question"),
        ("", "the following arguments are required: --file"),
    ],
)
def test_a_bad_argument_is_one_clear_error(
    adapter: Path, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, message: str
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    words = given.format(book=book, empty=tmp_path / "empty", binary=tmp_path / "binary").split()
    assert message in refusal(capsys, *([] if "nowhere" in given else ["--model", adapter]), *words)
