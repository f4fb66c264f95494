"""Bad arguments of examples/finetune_llama.py are one clear error before it starts, and --help teaches good ones."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

import finetune_llama
from app.models import suitable
from app.training import arguments
from app.training.recipe import CHECKPOINTING
from finetune_runs import ROOT
from longlora_ext.parallel import check_sequence_parallel


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--context_length 1", "--context_length must be 2 or more, got 1"),
        ("--context_length many", "argument --context_length/--context-length: invalid int value: 'many'"),
        ("--group_size 8 --group_ratio 0.5", "give one of them"),
        ("--group_ratio 0", "--group_ratio must be above 0 and at most 1, got 0.0"),
        ("--group_ratio 1.5", "--group_ratio must be above 0 and at most 1, got 1.5"),
        ("--group_size 7", "--group_size must be even and at least 2, got 7"),
        ("--group_size 4096", "group_size must be an even integer from 2 to twice the context of 128, but it is 4096"),
        ("--context_length 32 --group_size 66", "integer from 2 to twice the context of 32, but it is 66"),
        ("--window 0", "--window must be 1 or more, got 0"),
        ("--context_length 32 --rope_type yarn", "context_length 32 is the model's own: RoPE is not scaled"),
        ("--context_length 30", "--context_length 30 is less than the model's own 32"),
        ("--rope_type none", "rope_type must be one of default, "),
        ("--rope_type longrope", "needs rope_parameters with short_factor and long_factor"),
        ("--rope_parameters 5", "--rope_parameters must be a JSON object, got '5'"),
        ("--rope_parameters {", "--rope_parameters must be a JSON object, got '{'"),
        ("--full_finetune --lora_r 4", "--lora_r has no effect with --full_finetune"),
        ("--full_finetune --lora-alpha=4", "--lora_alpha has no effect with --full_finetune"),
        ("--lora_r 0", "--lora_r must be 1 or more, got 0"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size must be 1 or more, got 0"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps must be 1 or more, got 0"),
        (
            "--dense_steps -1",
            "--dense_steps must be a share of the steps, from 0 to below 1, or a whole number, got -1.0",
        ),
        ("--dense_steps 1.5", "or a whole number, got 1.5"),
        ("--max_steps 5 --dense_steps 6", "--dense_steps 6 is more than the 5 steps there are"),
        ("--learning_rate -1", "--learning_rate must be above 0, got -1.0"),
        ("--learning_rate nan", "--learning_rate must be above 0, got nan"),
        ("--learning_rate inf", "--learning_rate must be finite, got inf"),
        ("--num_train_epochs nan", "--num_train_epochs must be finite, got nan"),
        ("--seed -1", "--seed must be at least 0 and below 2^32, got -1"),
        ("--adam_beta2 1", "--adam_beta2 must be at least 0 and below 1, got 1.0"),
        ("--weight_decay -1", "--weight_decay must be 0 or more, got -1.0"),
        ("--model_name_or_path=", "--model_name_or_path is empty"),
        ("--train_file=", "--train_file is empty"),
        ("--eval_file=", "--eval_file is empty"),
        ("--output_dir= --resume_from_checkpoint latest", "--output_dir is empty"),
        ("--resume_from_checkpoint=", "--resume_from_checkpoint is empty"),
        ("--model_name_or_path nowhere/model", "--model_name_or_path nowhere/model: "),
        ('--rope_type default --rope_parameters {"rope_theta":0}', "rope_theta must be a finite number above 0"),
        ("--train_file {text} --dataloader_drop_last --per_device_train_batch_size 99", "sequences are no batch of 99"),
        ("--train_file {character}", "there is nothing to learn from 1 tokens"),
        ("--train_file {text} --context_length 1000000000", "the context of 1,000,000,000 tokens is longer than"),
        ("--eval_tokens -1", "--eval_tokens must be 0 or more, got -1"),
        ("--max_steps 0 --num_train_epochs 2", "--max_steps must be above 0, or -1 for as many as --num_train_epochs"),
        ("--max_steps -1 --num_train_epochs 0", "nothing to train"),
        ("--train_file {text} --eval_file {text}", "is named twice"),
        ("--train_file some/dataset --eval_file some/dataset", "some/dataset is named twice"),
        (
            "--task sft",
            "--task sft needs --train_file with questions and answers; examples/data/questions.jsonl is one",
        ),
        ("--task chat", "argument --task: invalid choice: 'chat'"),
        ("--rows both", "argument --rows: invalid choice: 'both'"),
        ("--task sft --train_file {text} --text_column x", "--text_column has no effect with --task sft"),
        ("--task sft --train_file {text}", "text.jsonl, row 1: it has the columns text; --task sft takes rows of "),
        ("--task sft --train_file {character}", "character.txt is text; rows are read from .json, .jsonl and .parquet"),
        ("--eval_file x.txt", "--eval_file needs --train_file"),
        ("--resume_from_checkpoint latest", "needs the --output_dir of the run to go on with"),
        ("--resume_from_checkpoint true", "--resume_from_checkpoint latest needs the --output_dir of the run to go on"),
        ("--resume_from_checkpoint gone", "gone: no complete checkpoint"),
        ("--deepspeed gone.json", "--deepspeed gone.json: no such file"),
        ("--deepspeed {empty}.bad", "empty.jsonl.bad: no JSON: "),
        ("--deepspeed []", "--deepspeed []: no such file"),
        ("--load_in_4bit", "--load_in_4bit needs the package bitsandbytes (pip install '.[qlora]')"),
        ("--sequence_parallel_size 0", "--sequence_parallel_size must be 1 or more, got 0"),
        ("--sequence_parallel_size 2", "--sequence_parallel_size 2 does not divide the number of processes, 1"),
        ("--sequence_parallel halo", "--sequence_parallel halo needs --sequence_parallel_size above 1"),
        (f'--{CHECKPOINTING}_kwargs {{"offload":true}}', '_kwargs "offload" needs a GPU'),
        ("--use_liger_kernel", "--use_liger_kernel needs a GPU and the package liger-kernel"),
        ("--modle_name_or_path x", "unknown argument: --modle_name_or_path x"),
        ("--lr_scheduler_type zigzag", "zigzag"),
        ("--use_cpu --fp16 --bf16", "At most one of fp16 and bf16"),
        ("--model_name_or_path /gone", "/gone"),
        ("--gguf_file gone.gguf", "gone.gguf"),
        ("--train_file {text} --train-file={character}", "--train_file is given more than once: all its"),
        ("--train_file gone.txt", "gone.txt: no such file, folder or glob pattern"),
        ("--train_file {empty}", "holds no text"),
        ("--train_file {text} --eval_file {empty}", "--eval_file"),
        ("--train_file {text} --text_column body", "no column 'body'; it has text"),
        ("--output_dir {text}/out", "text.jsonl/out cannot be written to: Not a directory"),
        ("--output_dir {text}", "is a file; it must be a new or an empty folder"),
    ],
)
def test_a_bad_argument_is_one_clear_error(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    given: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    model, text = inputs
    files = {"text": text, "empty": tmp_path / "empty.jsonl", "character": tmp_path / "character.txt"}
    files["empty"].write_text('{"text": ""}\n')
    files["character"].write_text("a")
    (tmp_path / "empty.jsonl.bad").write_text("{oops")
    words = [re.sub(r"\{(text|empty|character)\}", lambda name: str(files[name[1]]), word) for word in given.split()]
    with pytest.raises(SystemExit) as stopped:
        finetune_llama.main(["--model_name_or_path", str(model), *words])
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finetune_llama.py: error: ")]
    assert len(said) == 1 and message in said[0]
    assert not list(tmp_path.rglob("adapter*"))


def test_an_evaluation_of_nothing_is_refused(inputs: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    """Of a single conversation none is held out: the first evaluation ended in a KeyError, or said nothing."""
    (tmp_path / "one.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    words = ["--task", "sft", "--train_file", str(tmp_path / "one.jsonl"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        finetune_llama.main(["--model_name_or_path", str(inputs[0]), *words, "--eval_strategy", "steps"])
    assert "--eval_strategy steps has nothing to evaluate on" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        finetune_llama.main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for what in ("--resume_from_checkpoint latest", "--model_name_or_path", "--group_ratio", "--learning_rate"):
        assert what in said
    for command in re.findall(r"examples/ds_configs/\w+\.json", said):
        assert (ROOT / command).is_file()
    assert "(default: None)" not in said


# --- what becomes of them ---------------------------------------------------------------------------------------


def test_a_machine_without_the_kernels_is_told_at_once(inputs: tuple[Path, Path]) -> None:
    """As with fp32 on a GPU; a dtype that no kernel takes stands for it."""
    config = AutoConfig.from_pretrained(inputs[0])
    suitable.check_kernels(config, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"S2-Attn does not run here, on cpu in torch\.complex64: "):
        suitable.check_kernels(config, torch.complex64, torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "meant"), [("true", "latest"), ("True", "latest"), ("latest", "latest"), ("out/checkpoint-2",) * 2]
)
def test_true_is_the_latest_checkpoint_as_the_trainer_has_it(given: str, meant: str) -> None:
    words = ["--output_dir", "out", "--resume_from_checkpoint", given]
    assert arguments.parse(words)[2].resume_from_checkpoint == meant


def test_4_bit_weights_neither_train_nor_are_cut_up(
    inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("app.models.four_bits.find_spec", lambda name: name)  # as if bitsandbytes were there
    given = ["--model_name_or_path", str(inputs[0]), "--load_in_4bit"]
    zero3 = str(ROOT / "examples" / "ds_configs" / "zero3.json")
    for more, message in ((["--full_finetune"], "--full_finetune trains all"), (["--deepspeed", zero3], "with ZeRO-3")):
        with pytest.raises(SystemExit):
            arguments.parse([*given, *more])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "processes", "by", "message"),
    [
        ({}, 3, "ulysses", "by='ulysses': 3 ranks do not divide 4 query heads .*; by='halo' has no such limit"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2, "ulysses", "6 query heads and 3 key and value heads"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, 2, "auto", "cannot share sequences with rope_type 'dynamic'"),
        ({}, 4, "ulysses", None),  # two key and value heads, each for two processes
        ({"num_attention_heads": 9}, 2, "auto", None),
        ({"num_attention_heads": 9}, 2, "halo", None),
        ({"num_attention_heads": 9, "rope_parameters": {"rope_type": "dynamic"}}, 1, "auto", None),
    ],
)
def test_sequences_that_processes_cannot_share(
    config: dict[str, object], processes: int, by: str, message: str | None
) -> None:
    made = SimpleNamespace(**{"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": {}, **config})
    if message is None:
        check_sequence_parallel(made, processes, by)
    else:
        with pytest.raises(ValueError, match=message):
            check_sequence_parallel(made, processes, by)
