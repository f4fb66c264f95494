"""Runs of finetune_llama.py on mixtures of texts."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

import finetune_llama
from app.runs.json_files import read_json
from finetune_runs import losses, make_model, run, small_run
from same_run import assert_same_run

pytestmark = pytest.mark.usefixtures("alone")


def write(path: Path, lengths: list[int], letter: str) -> Path:
    """JSON Lines of documents of these lengths less the end-of-sequence token, each with its number."""
    rows = [{"text": f"{letter}{number} ".ljust(length - 1, letter)} for number, length in enumerate(lengths)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def material(tmp_path: Path) -> list[str]:
    """Arguments of a run on a mixture: of 20 documents of 400 tokens and of 200 of 50."""
    make_model(tmp_path / "model")
    write(tmp_path / "long.jsonl", [400] * 20, "a")
    write(tmp_path / "short.jsonl", [50] * 200, "b")
    words = small_run(Path("model"), Path("unused"), Path("out"), steps=4)
    place = words.index("--train_file")
    return [*words[:place], *words[place + 2 :]]


MIXED = ["--train_file", "long.jsonl:0.6", "short.jsonl:0.4"]


def banner(printed: str) -> dict[str, str]:
    lines = printed[printed.index("model:  ") :].splitlines()
    return {title.strip(): value.strip() for title, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_a_run_on_a_mixture(material: list[str], rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    finetune_llama.main([*material, *MIXED, "--rows", rows])
    said = banner(capsys.readouterr().out)
    # Every 20th document of each is held out: 19 of 400 are left, and 190 of 50.
    assert said["mixture"] == "long.jsonl 60.1% of the tokens, 60.0% asked: 7,600 of 7,600 tokens, 19 of 19 documents"
    assert said["short.jsonl 39.9% of the tokens, 40.0% asked"] == "5,050 of 9,500 tokens, 101 of 190 documents"
    assert said["text"] == "12,650 tokens in 120 documents" and "left out" not in said
    assert len(losses(Path("out"))) == 4
    kept = read_json(Path("out/run.json"))["settings"]
    assert (kept["train_weights"], kept["train_tokens"]) == ([0.6, 0.4], 12650)


def other(arguments: list[str], words: list[str]) -> list[str]:
    """With these in place of their like: a list is given once."""
    place = arguments.index("--train_file")
    rest = [*arguments[:place], *arguments[place + 3 :]] if "--train_file" in words else arguments
    return [*rest, *words]


def test_a_run_goes_on_with_its_mixture_alone(material: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    finetune_llama.main([*material, *MIXED])
    Path("undisturbed").symlink_to("out")
    begin = [*material, *MIXED, "--max_steps", "2"]
    begin[begin.index("out")] = "again"
    finetune_llama.main(begin)
    go_on = [*begin[:-1], "4", "--resume_from_checkpoint", "latest"]
    for words, message in [
        (["--train_file", "long.jsonl:0.5", "short.jsonl:0.5"], "train_weights was [0.6, 0.4] and is [0.5, 0.5]"),
        (["--train_file", "long.jsonl", "short.jsonl"], "train_weights was [0.6, 0.4] and is None"),
        (["--min_document_tokens", "10"], "min_document_tokens was None and is 10"),
        (["--max_document_tokens", "4000"], "max_document_tokens was None and is 4000"),
        (["--seed", "8"], "seed was 7 and is 8"),
    ]:
        with pytest.raises(SystemExit):
            finetune_llama.main(other(go_on, words))
        assert message in capsys.readouterr().err
    finetune_llama.main(other(go_on, ["--train_file", "long.jsonl:6", "short.jsonl:4"]))  # the same shares
    assert_same_run(Path("again"), Path("undisturbed"))


def test_a_mixture_is_repeated_from_another_folder(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune_llama.main([*material, *MIXED])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    finetune_llama.main(["--from_manifest", str(tmp_path / "out" / "run.json"), "--output_dir", "again"])
    assert losses(Path("again")) == pytest.approx(losses(tmp_path / "out"), abs=1e-6)


def test_conversations_are_mixed_too(material: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """By samples, which count as long as they were before they were cut to the context."""
    for name, number, words in (("a.jsonl", 20, 40), ("b.jsonl", 60, 5)):
        draw = random.Random(number)
        rows = [{"instruction": f"Say {draw.random()}", "output": f"{n % 10} " * words} for n in range(number)]
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    finetune_llama.main([*material, "--task", "sft", "--train_file", "a.jsonl:1", "b.jsonl:1"])
    said = banner(capsys.readouterr().out)
    # 19 samples of about 120 tokens, and as many tokens of the short ones.
    assert re.fullmatch(r"a.jsonl 5\d.\d% of .* 50.0% asked: 2,263 of 2,263 tokens, 19 of 19 samples", said["mixture"])
    (short,) = (value for title, value in said.items() if title.startswith("b.jsonl "))
    tokens, samples = re.fullmatch(r"([\d,]+) of 2,\d+ tokens, (\d+) of 57 samples", short).groups()
    assert 2200 < int(tokens.replace(",", "")) <= 2263
    assert said["samples"].startswith(f"{19 + int(samples)} with ")
    material[material.index("out")] = "again"
    words = ["--task", "sft", "--train_file", "a.jsonl", "b.jsonl", "--max_document_tokens", "100"]
    finetune_llama.main([*material, *words, "--context_length", "64"])
    said = banner(capsys.readouterr().out)
    assert said["left out"] == "20 samples of more than 100 tokens"
    assert said["too long"].startswith("0 truncated")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train_file", "long.jsonl:nan", "short.jsonl:1"], "--train_file long.jsonl:nan: a weight must be"),
        (["--train_file", "long.jsonl:0.5", "short.jsonl"], "long.jsonl has a weight and short.jsonl has none"),
        (
            ["--train_file", "long.jsonl:1", "long.jsonl:1"],
            "long.jsonl is named twice: by long.jsonl and by long.jsonl",
        ),
        (["--train_file", "long.jsonl:1", "*.jsonl:1"], "long.jsonl is named twice: by long.jsonl and by *.jsonl"),
        (["--train_file", "long.jsonl:1", "gone.txt:1"], "gone.txt: no such file"),
        (["--train_file", "long.jsonl", "--eval_file", "short.jsonl:1"], "--eval_file short.jsonl:1 has a weight"),
        ([*MIXED, "--min_document_tokens", "100"], "short.jsonl: no document has at least 100 tokens"),
        (["--train_file", "long.jsonl:1e-9", "short.jsonl:1"], "its shortest document has 400"),
        ([*MIXED, "--min_document_tokens", "0"], "--min_document_tokens must be 1 or more, got 0"),
        ([*MIXED, "--max_document_tokens", "-3"], "--max_document_tokens must be 1 or more, got -3"),
        (
            [*MIXED, "--min_document_tokens", "9", "--max_document_tokens", "8"],
            "--min_document_tokens 9 is more than --max_document_tokens 8",
        ),
    ],
)
def test_a_run_that_cannot_be_mixed_is_refused(
    material: list[str], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        finetune_llama.main([*material, *words])
    assert stopped.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "finetune_llama.py: error: " in line)
    assert message in line and "LONGLORA_TRACEBACK" not in line


@pytest.mark.full
def test_several_processes_choose_the_same(material: list[str], tmp_path: Path) -> None:
    """Two processes see in each step what one does: the same losses."""
    finetune_llama.main([*material, *MIXED])
    words = [*material, *MIXED]
    words[words.index("out")] = "two"
    words[words.index("--gradient_accumulation_steps") + 1] = "1"
    done = run(*words, processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (read_json(Path(name, "run.json"))["settings"] for name in ("out", "two"))
    assert ours["train_sha256"] == theirs["train_sha256"]
    assert losses(Path("two")) == pytest.approx(losses(Path("out")), abs=2e-3)
