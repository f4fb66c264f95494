"""What examples/evaluate.py refuses before it computes, and how it helps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import generate
from app.models import use_model
from evaluate_runs import refusal

pytestmark = pytest.mark.usefixtures("alone")


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for given, expected in ((["--help"], "what scaling RoPE alone does"), (["passkey", "--help"], "--depths")):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(given)
        assert stopped.value.code == 0 and expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("perplexity --stride 0", "--stride must be 1 or more, got 0"),
        ("perplexity --lengths 1 8", "--lengths must be 2 or more, got 1"),
        ("perplexity --lengths 8 --stride 8", "--stride must be less than the shortest length of 8, got 8"),
        ("perplexity --lengths 32 --max_tokens 16", "--max_tokens 16 is less than the longest length of 32"),
        ("perplexity --max_documents 0", "--max_documents must be 1 or more, got 0"),
        ("perplexity --group_size 8", "--group_size is for --attention s2"),
        ("perplexity --attention s2 --group_size 7", "--group_size must be even and at least 2, got 7"),
        ("perplexity --score some", "invalid choice: 'some'"),
        ("perplexity --text {ids} {books}", "files of token ids (.bin) and of text cannot be mixed"),
        ("perplexity --text {ids} {ids}", "ids.bin 2 times"),
        ("perplexity --text {books} --text {ids}", "--text is given more than once: all its values go after one, as"),
        ("perplexity --lengths=8 --lengths 16", "--lengths is given more than once"),
        ("passkey --depths 0 --depths 1", "--depths is given more than once"),
        ("perplexity --text {ids}", "the text has the token id 300, but the model's vocabulary has 257 tokens"),
        ("perplexity --text {odd}", "odd.bin is no file of token ids of 16 bits"),
        ("perplexity --text {wide}", "wide.bin has token ids of 32 or 64 bits, it seems: "),
        ("perplexity --text {wider}", "wider.bin has token ids of 32 or 64 bits, it seems: "),
        ("perplexity --attention eager", "invalid choice: 'eager'"),
        ("perplexity --text gone.txt", "gone.txt: no such file, folder or glob pattern"),
        ("perplexity --text {books} --lengths 512 --beyond_trained_length", "longest of 4 has 141"),
        ("perplexity --text {empty}", "no document of 32 tokens is there, the longest of 0 has 0"),
        ("perplexity --rope_type yarn", "--rope_type and --rope_parameters need --context_length"),
        ("perplexity --context_length 16", "error: --context_length 16 --rope_type linear: context_length must be an "),
        ("perplexity --context_length 64 --rope_type none", "rope_type must be one of default, "),
        ("perplexity --rope_parameters 5", "argument --rope_parameters: must be a JSON object, got '5'"),
        ("perplexity --base_model x", "--base_model is for adapters"),
        ("perplexity --model nowhere", "--model nowhere: "),
        ("passkey --depths 1.5", "--depths must be in 0..1, got 1.5"),
        ("passkey --trials 0", "--trials must be 1 or more, got 0"),
        ("passkey --lengths 32", "--lengths 32: this prompt and its answer have "),
        ("passkey", "reads 32 tokens, and this prompt has "),
        ("needles --needles 1", "--needles must be in 2..100, got 1"),
        ("passkey --needles 3", "unrecognized arguments: --needles 3"),
        ("summary", "invalid choice: 'summary'"),
        ("", "the following arguments are required: TASK"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_one_clear_error(
    model: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, message: str
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "ids.bin").write_bytes(np.full(40, 300, "<u2").tobytes())
    (tmp_path / "odd.bin").write_bytes(b"odd")
    np.arange(40, dtype="<u4").tofile(tmp_path / "wide.bin")
    np.full(40, 128_000, dtype="<u8").tofile(tmp_path / "wider.bin")
    names = ("empty.txt", "ids.bin", "odd.bin", "wide.bin", "wider.bin")
    files = {name.partition(".")[0]: tmp_path / name for name in names}
    words = given.format(books=books, **files).split()
    at = 1 if words[:1] and words[0] in evaluate.TASKS and "--model" not in words else None
    if at:
        words[1:1] = ["--model", str(model)]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(words)
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(said) == 1 and said[0].startswith("evaluate.py") and message in said[0]
    assert not Path("evaluated").exists()


@pytest.mark.parametrize("program", [evaluate, generate])
def test_a_model_is_spread_by_one_process_and_over_gpus(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ["perplexity"] if program is evaluate else ["--file", "-"]
    for processes, message in ((1, "spreads a model over GPUs, and there is none"), (2, "gives one process all GPUs")):
        monkeypatch.setattr(use_model, "WORLD_SIZE", processes)
        with pytest.raises(SystemExit, match="2"):
            program.main([*given, "--device_map", "auto"])
        assert f"{program.__name__}.py: error: --device_map auto {message}" in capsys.readouterr().err


def test_a_model_with_a_broken_or_missing_part_is_refused(
    model: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(file: str, content: str) -> str:
        broken = shutil.copytree(model, tmp_path / "broken", dirs_exist_ok=True)
        (broken / file).write_text(content)
        return refusal(capsys, "perplexity", "--model", broken, "--text", books)

    assert ": ValueError: " not in refused("config.json", "{")
    rope = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}}
    said = refused("config.json", json.dumps(json.loads((model / "config.json").read_text()) | rope))
    assert "broken: KeyError: " in said or "factor" in said
    assert "broken: " in refused("tokenizer.json", '{"a": 1}')
    shutil.rmtree(tmp_path / "broken")
    weights = load_file(model / "model.safetensors")
    gone = sorted(weights)[-1]
    broken = shutil.copytree(model, tmp_path / "broken")
    save_file({name: weight for name, weight in weights.items() if name != gone}, broken / "model.safetensors")
    said = refusal(capsys, "perplexity", "--model", broken, "--text", books)
    assert f"broken is incomplete: its files have no {gone}" in said


def test_the_deepspeed_launchers_argument_is_taken(model: Path, books: Path) -> None:
    evaluate.main(["--local_rank=0", "perplexity", "--model", str(model), "--text", str(books)])
    assert Path("evaluated/tiny-perplexity/results.json").is_file()
