"""The defaults of examples/finetune_llama.py: by model, by machine, and what is given in their place."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from app.training import arguments, report
from app.training.context import new_context
from app.training.options import DataOptions, ModelOptions, TrainingOptions
from app.training.recipe import CHECKPOINTING, TINY_RECIPE
from app.training.run_settings import settings
from app.training.steps import fit_to_steps, left_open
from finetune_runs import ROOT, run


def parsed(*words: str) -> tuple[ModelOptions, DataOptions, TrainingOptions]:
    return arguments.parse(["--output_dir", "out", *words])


def test_a_named_model_gets_the_recipe_of_the_paper() -> None:
    _, _, args = parsed("--model_name_or_path", "some/model")
    assert (args.learning_rate, args.max_steps, args.warmup_steps) == (2e-5, 1000, 20)
    assert args.lr_scheduler_type == "constant_with_warmup"
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64
    assert getattr(args, CHECKPOINTING) is True
    _, _, args = parsed("--model_name_or_path", "some/model", "--per_device_train_batch_size", "16")
    assert args.gradient_accumulation_steps == 4


def test_answers_are_learned_for_five_passes_as_the_original_did() -> None:
    sft = ("--task", "sft", "--train_file", "x.jsonl")
    _, _, args = parsed("--model_name_or_path", "some/model", *sft)
    assert (args.num_train_epochs, args.max_steps, args.learning_rate) == (5, -1, 2e-5)
    _, _, args = parsed("--model_name_or_path", "some/model", *sft, "--max_steps", "9")
    assert args.max_steps == 9
    assert parsed(*sft)[2].max_steps == TINY_RECIPE["max_steps"]


def test_the_tiny_llama_gets_its_own() -> None:
    model, text, args = parsed()
    assert Path(model.model_name_or_path) == ROOT / "examples" / "tiny_llama"
    assert text.eval_tokens == TINY_RECIPE["eval_tokens"]
    assert args.max_steps == TINY_RECIPE["max_steps"] < 1000
    assert args.gradient_accumulation_steps == 1


def test_epochs_take_the_place_of_the_recipes_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """They are what the other options are checked against, too."""
    model, _, args = parsed("--num_train_epochs", "2", "--dense_steps", "300")
    assert (args.max_steps, args.num_train_epochs, model.dense_steps) == (-1, 2, 300)
    with pytest.raises(SystemExit):
        parsed("--num_train_epochs", "0")
    assert "nothing to train: give --max_steps or --num_train_epochs above 0" in capsys.readouterr().err


def test_what_is_given_wins_over_every_default() -> None:
    given = "--learning_rate 1e-4 --gradient_accumulation_steps 3 --max_steps 7 --save_steps 5 --eval_tokens 9"
    for model in ([], ["--model_name_or_path", "some/model"]):
        _, text, args = parsed(*model, *given.split(), f"--{CHECKPOINTING}", "false")
        assert (args.learning_rate, args.gradient_accumulation_steps, args.max_steps) == (1e-4, 3, 7)
        assert (args.save_steps, text.eval_tokens, getattr(args, CHECKPOINTING)) == (5, 9, False)
    _, _, args = parsed("--model-name-or-path", "some/model", "--num-train-epochs=2")
    assert (args.num_train_epochs, args.max_steps) == (2, -1)


@pytest.mark.parametrize(
    ("steps", "rate", "warmup"), [(1, 2e-4, 0), (16, 2e-4, 2), (200, 1e-4, 20), (1000, 2e-5, 20), (4000, 2e-5, 20)]
)
def test_fewer_steps_than_the_paper_s_go_further_in_each(steps: int, rate: float, warmup: int) -> None:
    own = ("--model_name_or_path", "some/model", "--max_steps", str(steps))
    _, _, args = parsed(*own)
    assert (args.learning_rate, args.warmup_steps) == (pytest.approx(rate), warmup)
    assert ("in each" in report.rate(args, steps, 1)) == (steps < 1000)
    _, _, args = parsed(*own, "--learning_rate", "3e-5", "--warmup_steps", "5")
    assert (args.learning_rate, args.warmup_steps) == (3e-5, 5)
    for others in (["--recipe", "paper"], ["--full_finetune"], ["--task", "sft", "--train_file", "x.jsonl"]):
        _, _, args = parsed(*own, *others)
        assert (args.learning_rate, args.warmup_steps) == (2e-5, warmup)
    assert parsed("--max_steps", str(steps))[2].learning_rate == TINY_RECIPE["learning_rate"]


@pytest.mark.parametrize(
    ("given", "open_"),
    [
        ("", {"learning_rate", "warmup_steps"}),
        ("--learning_rate 3e-5", {"warmup_steps"}),
        ("--warmup-steps=5", {"learning_rate"}),
        ("--max_steps 9", set()),
        ("--recipe paper", {"warmup_steps"}),
        ("--full_finetune", {"warmup_steps"}),
        ("--task sft --train_file x.jsonl", {"warmup_steps"}),
    ],
)
def test_passes_over_the_text_get_what_as_many_steps_get(given: str, open_: set[str]) -> None:
    """Once they are counted: until then, neither rate nor warmup is a setting of the run."""
    options, _, args = parsed("--model_name_or_path", "some/model", "--num_train_epochs", "2", *given.split())
    before = args.to_dict()
    assert {*args.by_steps} == open_ and not open_ & settings(options, args).keys()
    assert fit_to_steps(args, 16) == {name: {"learning_rate": 2e-4, "warmup_steps": 2}[name] for name in open_}
    changed = {name for name, value in args.to_dict().items() if value != before[name]}
    assert changed == open_ and settings(options, args).keys() >= {"weight_decay"}
    assert not parsed("--num_train_epochs", "2")[2].by_steps  # the tiny Llama has rates of its own


@pytest.mark.parametrize(
    ("config", "open_"), [("optimizer", ["warmup_steps"]), ("fp16", ["learning_rate", "warmup_steps"])]
)
def test_the_rate_that_deepspeed_was_told_stays(config: str, open_: list[str]) -> None:
    args: Any = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config={config: {}}))
    assert [*left_open(("learning_rate", "warmup_steps"), [], args)] == open_


def test_a_pass_of_one_step_trains(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """It goes no further than its warmup where that is of 20 steps; and it can be resumed."""
    model, text = inputs
    words = ["--model_name_or_path", str(model), "--train_file", str(text), "--num_train_epochs", "1"]
    words += ["--eval_tokens", "0", "--save_steps", "1", "--output_dir", str(tmp_path / "out")]
    for further in ([], ["--resume_from_checkpoint", "latest"]):
        done = run(*words, *further)
        assert done.returncode == 0, done.stderr
        assert re.search(
            r"1 step \(1 x the text\), \d\d sequences in each, the whole text, learning rate 0.0002", done.stdout
        )
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(weight.any() for name, weight in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize("name", ["activation", "gradient"])
def test_activation_checkpointing_goes_by_both_of_its_names(name: str) -> None:
    off = (f"--{name}_checkpointing=false", f"--{name}-checkpointing-kwargs", '{"use_reentrant": true}')
    _, _, args = parsed("--model_name_or_path", "some/model", *off)
    assert getattr(args, CHECKPOINTING) is False
    assert getattr(args, f"{CHECKPOINTING}_kwargs") == {"use_reentrant": True}


def test_cpu_processes_find_each_other_without_being_asked() -> None:
    """Without `use_cpu` and without DeepSpeed, accelerate starts no group where there is no GPU."""
    assert parsed()[2].use_cpu == (not torch.accelerator.is_available())


def test_one_dtype_for_the_weights_and_the_banner() -> None:
    for given, dtype in ((["--bf16"], torch.bfloat16), (["--fp16"], torch.float16), ([], torch.float32)):
        defaults = [] if given or not torch.cuda.is_available() else ["--bf16", "false"]
        assert arguments.compute_dtype(parsed("--use_cpu", *given, *defaults)[2]) == dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the processor does not matter")
@pytest.mark.parametrize(
    ("capabilities", "environment", "given", "bf16"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, None, (), True),
        ({"avx512_bf16": False, "amx_bf16": True}, None, (), True),
        ({"avx512_bf16": False, "amx_bf16": False}, None, (), False),
        ({}, None, (), False),
        ({"avx512_bf16": True}, "no", (), False),
        ({"avx512_bf16": True}, None, ("--bf16", "false"), False),
        ({"avx512_bf16": True}, None, ("--fp16",), False),
        ({}, None, ("--bf16",), True),
    ],
)
def test_a_processor_that_multiplies_bf16_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict, environment: str | None, given: tuple[str, ...], bf16: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if environment:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment)
    assert parsed(*given)[2].bf16 == bf16


@pytest.mark.parametrize(
    ("model", "given", "rope_type", "sink"),
    [
        ({}, (), "yarn", True),
        ({}, ("--rope_type", "linear", "--sink", "false"), "linear", False),
        ({}, ("--recipe", "paper"), "linear", False),
        ({}, ("--context_length", "64"), "default", True),
        (
            {
                "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
                "original_max_position_embeddings": 32,
            },
            (),
            "linear",
            True,
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, (), "dynamic", True),
    ],
)
def test_a_model_of_ones_own_is_scaled_by_yarn_or_as_it_is(
    model: dict, given: tuple[str, ...], rope_type: str, sink: bool
) -> None:
    options, _, _ = parsed("--model_name_or_path", "some/model", *given)
    config = new_context(LlamaConfig(max_position_embeddings=64, **model), options)
    assert config.rope_parameters["rope_type"] == rope_type and bool(getattr(config, "s2attn_sink", False)) == sink


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        ("--max_steps 16 --learning_rate 2e-5", True),
        ("--max_steps 16", False),
        ("--max_steps 16 --learning_rate 1e-4", False),
        ("--max_steps 1000", False),
        ("--task sft --train_file x.jsonl", True),
        ("--num_train_epochs 2 --learning_rate 2e-5", True),
    ],
)
def test_few_tokens_at_the_papers_learning_rate_are_said(given: str, warned: bool) -> None:
    _, _, args = parsed("--model_name_or_path", "some/model", *given.split())
    said = report.rate(args, args.max_steps if args.max_steps > 0 else 16, 64 * 8192)
    assert said.startswith(f"learning rate {args.learning_rate:g}") and ("these are 8,388,608" in said) == warned
