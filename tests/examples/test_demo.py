"""examples/demo.py: a page to try a model. What it does is tested without Gradio, the page itself in Chromium."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import demo
import generate
from app.evaluation.one_text import perplexity_of_text
from app.models.use_model import OpenedModel, open_model
from app.page.page import Page
from finetune_runs import ROOT, environment, make_model
from own_venv import make_venv

TEXT = "The ship is called Pequod. "


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    """A model that may read 128 tokens, of one byte each."""
    model = make_model(tmp_path_factory.mktemp("model"))
    return open_model(demo.parse([str(model), "--context_length", "128"]))


def test_the_answer_is_that_of_generate(opened: OpenedModel, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    given = ["--model", opened.description["model"], "--context_length", 128, "--file", tmp_path / "text.txt"]
    given += ["--question", "Which?", "--max_new_tokens", 12, "--temperature", 0]
    generate.main([*map(str, given)])
    (first, nothing), *pieces, (last, said) = Page(opened).answer(TEXT, "Which?", 12, 0)
    assert said + "\n" == capsys.readouterr().out and said.strip()
    read = len(f"{TEXT.rstrip()}\n\nQuestion: Which?\nAnswer:")
    assert (first, nothing, last) == (f"{read} tokens read, at most 12 to come …", "", f"{read} tokens read")
    assert [one for _, one in pieces] == sorted((one for _, one in pieces), key=len) and pieces[-1][1] == said


def test_tokens_are_counted_and_too_many_are_an_error(opened: OpenedModel) -> None:
    page = Page(opened)
    assert page.count("", "") == "0 of 128 tokens" and page.count(TEXT, "") == f"{len(TEXT)} of 128 tokens"
    assert page.count(TEXT * 5, "").startswith("135 of 128 tokens · **longer")
    for too_much in (lambda: next(page.answer(TEXT * 5, "", 5, 0)), lambda: page.curve(TEXT * 5)):
        with pytest.raises(ValueError, match=r"has 135 tokens.* scaled to 128 tokens"):
            too_much()
    assert next(page.answer(TEXT * 4, "", 500, 0))[0] == "108 tokens read, at most 20 to come …"
    assert next(Page(opened, beyond=True).answer(TEXT * 5, "", 5, 0))[0] == "135 tokens read, at most 5 to come …"
    for nothing in (lambda: next(page.answer(" \n", "Why?", 5, 0)), lambda: page.curve("")):
        with pytest.raises(ValueError, match="there is no text: paste one, or open a file"):
            nothing()


def test_a_file_is_text(opened: OpenedModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert Page(opened).read(str(tmp_path / "a.txt")) == "one\r\ntwo"
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"b\.bin is no text in UTF-8"):
        Page(opened).read(str(tmp_path / "b.bin"))


def test_who_has_enough_stops_the_model(opened: OpenedModel) -> None:
    """And an error of the model reaches who reads, who would otherwise wait for ever."""
    calls: list[int] = []
    hook = opened.base.register_forward_hook(lambda *_: calls.append(1))
    answer = Page(opened).answer(TEXT, "", 90, 0)
    for _ in range(3):
        next(answer)
    answer.close()
    made = len(calls)
    hook.remove()
    assert made < 60

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    hook = opened.base.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            list(Page(opened).answer(TEXT, "", 5, 0))
    finally:
        hook.remove()


def test_the_curve_is_the_model_s_loss(opened: OpenedModel) -> None:
    ids = torch.tensor([list(range(40, 61))])
    with torch.no_grad():
        losses = -opened.model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0].double()
    found = perplexity_of_text(opened, ids[0].numpy(), parts=4)
    assert [part[:2] for part in found] == [(1, 6), (6, 11), (11, 16), (16, 21)]
    want = losses.view(4, 5).mean(1).exp().tolist()
    assert [part[2] for part in found] == pytest.approx(want, rel=1e-4)
    assert len(perplexity_of_text(opened, np.array([5, 6, 7]))) == 2  # no more parts than tokens
    with pytest.raises(ValueError, match="has 1 token"):
        perplexity_of_text(opened, np.array([5]))


@pytest.mark.parametrize(
    "given, message",
    [
        (["--port", "0"], "--port must be in 1..65535, got 0"),
        (["gone/model.gguf"], "--model gone/model.gguf: there is no such file"),
    ],
)
def test_mistakes_are_one_line(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        demo.parse(given)
    assert message in capsys.readouterr().err


def test_without_gradio_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "app.page.looks", raising=False)
    with pytest.raises(SystemExit, match="2"):
        demo.main([])
    assert "gradio is not installed: pip install '.[demo]'" in capsys.readouterr().err


@pytest.mark.full
def test_in_a_browser(opened: OpenedModel, tmp_path: Path) -> None:
    """Chromium asks, reads the answer and sees the curve, as wide as a phone and as a desk; nothing else is loaded."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("NOT TESTED: there is no Chromium (Debian: apt-get install chromium)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    python = make_venv(tmp_path / "venv", "gradio>=6.20", "playwright")
    program = [python, ROOT / "examples" / "demo.py", opened.description["model"], "--context_length", 128]
    with subprocess.Popen([*map(str, program), "--port", str(port)], env=environment()) as process:
        try:
            look = [python, ROOT / "tests" / "helpers" / "look_at_demo.py", chromium, port, tmp_path]
            done = subprocess.run([*map(str, look)], capture_output=True, text=True, env=environment())
        finally:
            process.terminate()
    assert done.returncode == 0, done.stdout + done.stderr
    *_, (_, want) = Page(opened).answer(TEXT, "Which?", 512, 0)
    assert (tmp_path / "answer.txt").read_text() == want and want.strip()
