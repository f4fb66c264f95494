"""The tiny Llama that the repository ships, and the script that trains it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import train_tiny_llama as script
from app.inputs import corpus
from app.tiny.text import EVAL_LENGTHS, Windows, encode, held_out_windows, perplexity

FOLDER = Path(script.__file__).parent / "tiny_llama"
LOG = json.loads((FOLDER / "training_log.json").read_text())
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    encoded = encode(TOKENIZER, corpus.stdlib_documents()[1])
    return held_out_windows(encoded, max(EVAL_LENGTHS), LOG["perplexity_windows"])


def test_the_folder_is_complete_and_small() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_log.json",
    }
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_500_000


def test_is_a_llama_with_grouped_heads_and_a_short_context(model: LlamaForCausalLM) -> None:
    config = model.config
    assert type(model) is LlamaForCausalLM
    assert config.max_position_embeddings == 256
    assert config.num_attention_heads == 2 * config.num_key_value_heads
    assert config.head_dim % 8 == 0
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.use_cache
    assert model.num_parameters() == LOG["parameters"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_is_stored_in_bfloat16_and_loads_as_float32(model: LlamaForCausalLM) -> None:
    assert {tensor.dtype for tensor in load_file(FOLDER / "model.safetensors").values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_held_out_perplexity_is_what_the_log_says(model: LlamaForCausalLM, windows: torch.Tensor) -> None:
    """The same within 1 % on the same text, and near it on the texts of other versions of Python."""
    same = corpus.sha256_of_texts(corpus.stdlib_documents()[1]) == LOG["held_out_sha256"]
    logged = LOG["perplexity"]["unscaled"]["256"]
    assert perplexity(model, windows, 256) == pytest.approx(logged, rel=0.01 if same else 0.15)


def test_does_not_extrapolate(model: LlamaForCausalLM, windows: torch.Tensor) -> None:
    at = {length: perplexity(model, windows[::8], length) for length in (256, 512, 1024)}
    assert at[512] > 1.05 * at[256]
    assert at[1024] > 1.2 * at[256]


def test_log_and_model_card_tell_where_it_comes_from() -> None:
    first, last = LOG["loss"][0]["loss"], LOG["loss"][-1]["loss"]
    assert last < first / 1.5
    assert LOG["loss"][-1]["step"] == LOG["arguments"]["max_steps"]
    assert {"python", "torch", "transformers"} == set(LOG["versions"])
    card = (FOLDER / "README.md").read_text()
    assert f"{LOG['parameters']:,} parameters" in card
    assert f"| 256 | {LOG['perplexity']['unscaled']['256']:.1f} |" in card


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


def test_every_byte_has_a_token_and_nothing_is_added() -> None:
    text = "".join(map(chr, range(0x250))) + "\r\n\t  x  , y . \U0001f600\ud55c"
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text
    assert TOKENIZER("").input_ids == []
    single = {TOKENIZER.backend_tokenizer.token_to_id(letter) for letter in pre_tokenizers.ByteLevel.alphabet()}
    assert len(single) == 256
    assert None not in single


def test_tokenizer_and_config_agree(model: LlamaForCausalLM) -> None:
    assert len(TOKENIZER) == model.config.vocab_size
    assert TOKENIZER.eos_token_id == TOKENIZER.bos_token_id == model.config.eos_token_id
    assert TOKENIZER.pad_token_id == model.config.pad_token_id != TOKENIZER.eos_token_id
    assert TOKENIZER.model_max_length == 256


TINY_RUN = ("--max_steps", "3", "--save_steps", "2", "--batch_size", "2", "--vocab_size", "400")
TINY_RUN += ("--max_documents", "8", "--eval_windows", "2", "--fp32")


def train(folder: Path, *more: str) -> dict[str, torch.Tensor]:
    script.main(["--output_dir", str(folder), *TINY_RUN, *more])
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "model"
    train(folder)
    return folder


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_script_writes_a_folder_like_the_shipped_one(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {path.name for path in FOLDER.iterdir()}
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert len(tokenizer) == 400
    assert tokenizer.decode(tokenizer("def f(x):\n\treturn x\n").input_ids) == "def f(x):\n\treturn x\n"
    assert AutoModelForCausalLM.from_pretrained(run).config.vocab_size == 400
    log = json.loads((run / "training_log.json").read_text())
    assert log.keys() == LOG.keys()
    assert log["resumed_from"] is None
    assert all(1 < value < 10_000 for found in log["perplexity"].values() for value in found.values())


def test_the_seed_decides(run: Path, tmp_path: Path) -> None:
    weights = load_file(run / "model.safetensors")
    assert equal(train(tmp_path / "same"), weights)
    assert not equal(train(tmp_path / "other", "--seed", "1"), weights)


def test_an_interrupted_run_goes_on_to_the_same_result(run: Path, tmp_path: Path) -> None:
    partial = tmp_path / "model.partial"
    shutil.copytree(run.with_name("model.partial"), partial)
    (partial / "checkpoint-3" / "complete.json").unlink()  # killed in the middle of its last save
    (partial / "checkpoint-3" / "optimizer.pt").unlink()
    assert equal(train(tmp_path / "model"), load_file(run / "model.safetensors"))
    assert json.loads((tmp_path / "model" / "training_log.json").read_text())["resumed_from"] == "checkpoint-2"


def test_refuses_to_overwrite(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(SystemExit):
        train(run)
    assert f"--output_dir {run} exists, and nothing is overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_refuses_to_continue_a_run_with_other_arguments(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.with_name("model.partial"), tmp_path / "model.partial")
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path / "model", "--seed", "1")
    said = capsys.readouterr().err
    assert "train_tiny_llama.py: error: " in said and "unfinished run with other arguments" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max_steps", "0"), "--max_steps is 0, and must be at least 1"),
        (("--vocab_size", "100"), "--vocab_size is 100, and must be from 300"),
        (("--steps", "1"), "unrecognized arguments: --steps"),
    ],
)
def test_bad_arguments_are_named(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(tmp_path / "model", *arguments)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_says_so_when_there_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path / "stdlib"))
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path / "model")
    said = capsys.readouterr().err
    assert "train_tiny_llama.py: error: " in said and "sources of Python's standard library are not in" in said
    assert not list(tmp_path.iterdir())


def test_too_little_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(script, "stdlib_documents", lambda: (["some = text\n" * 200], ["too short\n"]))
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path / "model")
    assert "train_tiny_llama.py: error: --max_documents 8 leaves too little text" in capsys.readouterr().err


def test_windows_cover_the_text_and_repeat_with_the_seed() -> None:
    stream = torch.arange(10_000)
    one, same, other = (Windows(stream, 100, 250, seed) for seed in (0, 0, 1))
    assert one.starts == same.starts != other.starts
    assert len(one) == 250
    assert torch.equal(one[7]["input_ids"], torch.arange(one.starts[7], one.starts[7] + 100))
    seen = torch.cat([window["input_ids"] for window in (one[n] for n in range(99))])
    assert len(seen.unique()) == len(seen)  # a pass reads every token at most once


def test_perplexity_is_that_of_the_tokens_seen_in_pieces(model: LlamaForCausalLM) -> None:
    windows = torch.randint(2, 2000, (3, 512), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(windows.view(6, 256)).logits.double().log_softmax(-1)
    expected = -logits[:, :-1].gather(-1, windows.view(6, 256)[:, 1:, None]).mean()
    assert perplexity(model, windows, 256) == pytest.approx(math.exp(expected), rel=1e-4)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    assert "python examples/train_tiny_llama.py --output_dir" in text
    assert "minutes on two CPU cores" in text
