"""Models in GGUF files: every program takes what the trainer takes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import finetune_llama
import generate
import merge_adapter
import plan
from app.models.convert_gguf import convert_gguf
from app.models.tokenizer import read_tokenizer
from app.runs.command_line import TINY_LLAMA
from finetune_runs import make_text
from longlora_ext.adapter import load
from tiny_gguf import logits, open_for_evaluation, save_gguf, save_small


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def files(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as tiny.gguf, and in 8 bits as packed.gguf, in a folder without anything else."""
    folder = tmp_path_factory.mktemp("models")
    save_gguf(tiny, folder / "tiny.gguf")
    save_gguf(tiny, folder / "packed.gguf", quantised=True)
    return folder


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.py").write_text(Path(finetune_llama.__file__).read_text())
    return tmp_path / "text.py"


def ways(files: Path, name: str, option: str = "--model") -> list[list[object]]:
    """Ways to say which file."""
    return [[option, files, "--gguf_file", name], [option, files / name], [option, f"{files}/", f"--gguf_file={name}"]]


@pytest.mark.parametrize("way", range(3))
def test_what_is_opened_is_the_model(tiny: Path, way: int, files: Path) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32))
    found = open_for_evaluation(*ways(files, "tiny.gguf")[way], "--dtype", "float32")
    assert torch.equal(logits(found.model), expected)
    assert found.trained_length == 256 and not found.model.training
    assert found.description["model"] == str(files / "tiny.gguf") and found.description["kind"] == "model"
    ids = found.tokenizer("def main():\n    return 1\n")["input_ids"]
    assert found.tokenizer.decode(ids) == "def main():\n    return 1\n"


def test_digits_are_put_by_themselves_where_the_model_has_learned_it(tiny: Path, tmp_path: Path, capsys) -> None:
    """Spaces before a digit stay together, as in SmolLM2. The tokens are those of the pieces, one after the other."""
    save_gguf(tiny, tmp_path / "model.gguf", pre="smollm")
    text = "if x:\n    1 + 23  # 4\n\n        5.67\tand ٣ ½ 8"
    plain = AutoTokenizer.from_pretrained(tiny)
    pieces = [piece for piece in re.split(r"([\d½])", text) if piece]
    expected = [token for piece in pieces for token in plain(piece, add_special_tokens=False)["input_ids"]]
    assert expected != plain(text, add_special_tokens=False)["input_ids"]
    convert_gguf(str(tmp_path), "model.gguf", tmp_path / "folder", torch.float32)
    for model in ("model.gguf", "folder"):
        tokenizer = open_for_evaluation("--model", tmp_path / model).tokenizer
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
        assert tokenizer.decode(expected) == text
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize("way, notes", [("gpt-2", 0), ("llama-bpe", 0), ("of-tomorrow", 1), ("default", 1)])
def test_a_way_to_split_that_nobody_knows_is_said_once(
    tiny: Path, way: str, notes: int, tmp_path: Path, capsys
) -> None:
    save_gguf(tiny, tmp_path / f"{way}.gguf", pre=way)
    for _ in range(2):
        read_tokenizer(str(tmp_path), f"{way}.gguf")
    said = capsys.readouterr().out
    assert said.count("text is split as for GPT-2") == said.count(f"note: {way}.gguf") == notes
    assert (repr(way) in said) == (way == "of-tomorrow")


@pytest.mark.parametrize(
    "way, said, begins",
    [("llama-bpe", None, True), ("tekken", None, True), ("llama-bpe", False, False), ("gpt-2", None, False),
     ("gpt-2", True, True)],
)  # fmt: skip
def test_text_begins_with_bos_as_in_llama_cpp(
    tiny: Path, way: str, said: bool | None, begins: bool, tmp_path: Path
) -> None:
    """The first converters wrote no add_bos_token for Llama 3: the name of its way to split text says it."""
    save_gguf(tiny, tmp_path / "model.gguf", pre=way, add_bos=said)
    convert_gguf(str(tmp_path), "model.gguf", tmp_path / "folder", torch.float32)
    for tokenizer in (read_tokenizer(str(tmp_path), "model.gguf"), read_tokenizer(str(tmp_path / "folder"))):
        plain = tokenizer("import os", add_special_tokens=False)["input_ids"]
        assert tokenizer("import os")["input_ids"] == [tokenizer.bos_token_id] * begins + plain


def test_quantised_weights_are_expanded(tiny: Path, files: Path) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32))
    found = open_for_evaluation("--model", files / "packed.gguf", "--dtype", "float32")
    distance = (logits(found.model) - expected).norm() / expected.norm()
    assert 0 < distance < 0.05
    assert {weight.dtype for weight in found.model.parameters()} == {torch.float32}


def test_scaling_alone_and_s2_attention(tiny: Path, files: Path) -> None:
    scaled = open_for_evaluation("--model", files / "tiny.gguf", "--context_length", "1024", "--attention", "s2")
    assert scaled.trained_length == 1024 and scaled.model.config.rope_parameters["factor"] == 4
    assert scaled.description["attention"] == "S2-Attn"
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert not torch.allclose(logits(scaled.model), logits(plain))


def test_perplexity_of_a_file_is_that_of_its_model(tiny: Path, files: Path, text: Path) -> None:
    given = ["perplexity", "--text", str(text), "--lengths", "128", "--max_tokens", "300", "--dtype", "float32"]
    for name, model in {"folder": tiny, "file": files / "tiny.gguf"}.items():
        evaluate.main([*given, "--model", str(model), "--output", name])
    summaries = [json.loads(Path(name, "results.json").read_text())["summary"] for name in ("folder", "file")]
    assert summaries[0] == summaries[1]
    evaluate.main([*given, "--model", str(files), "--gguf_file", "tiny.gguf"])
    assert Path("evaluated/tiny-perplexity/results.json").is_file()


def test_a_file_answers(tiny: Path, files: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for model in (tiny, files / "tiny.gguf"):
        given = ["--file", str(text), "--max_new_tokens", "12", "--temperature", "0", "--beyond_trained_length"]
        generate.main(["--model", str(model), *given])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


def test_a_plan_reads_the_config_alone(
    tiny: Path, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr(plan.Plan, "longest", lambda *_: 0)  # which takes seconds
    printed = []
    for way in (["--model", tiny], *ways(files, "tiny.gguf")[:2]):
        plan.main([*map(str, way), "--context", "512", "--json"])
        printed.append(json.loads(capsys.readouterr().out))
    numbers = [{name: value for name, value in found.items() if name != "model"} for found in printed]
    assert numbers[0] == numbers[1] == numbers[2]


def train(model: list[object], output: Path, text: Path) -> None:
    options = {"train_file": text, "output_dir": output, "max_steps": 1, "gradient_accumulation_steps": 1,
               "eval_tokens": 0, "context_length": 512, "save_strategy": "no"}  # fmt: skip
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    finetune_llama.main([str(word) for word in (*model, *given)])


def test_an_adapter_of_a_file_is_used_and_merged_wherever_its_run_lies(files: Path, tmp_path: Path) -> None:
    text = make_text(tmp_path / "text.jsonl")
    train(["--model_name_or_path", files / "tiny.gguf"], tmp_path / "run", text)
    here = open_for_evaluation("--model", tmp_path / "run/adapter", "--dtype", "float32")
    assert here.trained_length == 512
    expected = logits(here.model)

    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert torch.equal(logits(open_for_evaluation("--model", "moved/adapter", "--dtype", "float32").model), expected)
    assert torch.equal(logits(load("moved/adapter", attn_implementation="sdpa")), expected)
    merge_adapter.main(["moved/adapter", "merged", "--dtype", "float32"])
    torch.testing.assert_close(logits(open_for_evaluation("--model", "merged", "--dtype", "float32").model), expected)

    shutil.rmtree("moved/base_model")  # and then it is not guessed
    with pytest.raises(FileNotFoundError, match="run/base_model: pass base_model"):
        load("moved/adapter")


def test_a_file_that_lacks_weights_is_an_error_for_all(tiny: Path, files: Path, tmp_path: Path) -> None:
    """Which transformers would fill with random numbers."""
    broken = save_gguf(tiny, tmp_path / "broken.gguf", leave_out="blk.1.ffn_up.weight")
    incomplete = r"incomplete: .* no model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=incomplete):
        open_for_evaluation("--model", broken)
    with pytest.raises(ValueError, match=incomplete):
        convert_gguf(str(tmp_path), broken.name, tmp_path / "folder", torch.float32)
    assert not (tmp_path / "folder").exists()


def refusals(files: Path, tmp_path: Path) -> dict[str, tuple[list[object], str]]:
    (tmp_path / "noise.gguf").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "empty.gguf").touch()
    configured = tmp_path / "configured"
    configured.mkdir(exist_ok=True)
    (configured / "Tiny.GGUF").write_bytes((files / "tiny.gguf").read_bytes())
    (configured / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n")
    (tmp_path / "part-00001-of-00003.gguf").write_bytes((files / "tiny.gguf").read_bytes())
    return {
        "no such file": ([tmp_path / "gone.gguf"], "gone.gguf: there is no such file"),
        "none in the folder": ([files, "--gguf_file", "gone.gguf"], "no gone.gguf in it, but packed.gguf, tiny.gguf"),
        "not said which": ([files], "no weights in it but packed.gguf, tiny.gguf: say which by --gguf_file"),
        "with a config": ([configured], "no weights in it but Tiny.GGUF: say which by --gguf_file"),
        "said twice": ([files / "tiny.gguf", "--gguf_file", "tiny.gguf"], "is a file already: --gguf_file goes with"),
        "no GGUF": ([tmp_path / "noise.gguf"], "noise.gguf is no GGUF file"),
        "empty": ([tmp_path / "empty.gguf"], "empty.gguf is no GGUF file"),
        "a pointer": ([tmp_path / "pointer.gguf"], "pointer.gguf is a git-LFS pointer, not the file"),
        "a part": ([tmp_path / "part-00001-of-00003.gguf"], "one of several parts"),
        "another kind of file": ([TINY_LLAMA, "--gguf_file", "config.json"], "config.json is no GGUF file"),
    }


@pytest.mark.parametrize("program", [evaluate, finetune_llama, generate, plan], ids=lambda module: module.__name__)
def test_mistakes_are_one_line_of_each_program(
    program: Any, files: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {
        evaluate: ["perplexity", "--text", text], finetune_llama: ["--train_file", text], generate: ["--file", text],
        plan: [],
    }  # fmt: skip
    option = "--model_name_or_path" if program is finetune_llama else "--model"
    for given, message in refusals(files, tmp_path).values():
        with pytest.raises(SystemExit, match="2"):
            program.main([str(word) for word in (*before[program], option, *given)])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert message in line and line.startswith(f"{program.__name__}.py: error: {option}")


@pytest.mark.parametrize(
    "given, message",
    [
        (["--load_in_4bit"], "--load_in_4bit"),
        (["--base_model", "x"], "--base_model is for adapters"),
    ],
)
def test_what_goes_with_folders_alone(given: list[str], message: str, files: Path, text: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        generate.main(["--file", str(text), "--model", str(files / "tiny.gguf"), *given])
    assert message in capsys.readouterr().err
