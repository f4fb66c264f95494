"""What examples/finetune_llama.py takes and refuses before it starts, and what it makes of its arguments."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, TrainingArguments

import finetune_llama
from app.models import suitable
from app.training import arguments
from app.training.context import new_context
from app.training.options import DataOptions, ModelOptions
from app.training.recipe import CHECKPOINTING, TINY_RECIPE
from app.training.run_settings import settings
from finetune_runs import ROOT, make_model, make_text, small_run
from longlora_ext.config import extend_config
from longlora_ext.parallel import check_sequence_parallel


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return make_model(folder / "model"), make_text(folder / "text.jsonl")


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
        ("--context_length 32 --group_size 66", "--group_size 66 is more than twice the context of 32"),
        ("--window 0", "--window must be 1 or more, got 0"),
        ("--context_length 32 --rope_type yarn", "--context_length 32 is the model's own: RoPE is not scaled for it"),
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
        ("--model_name_or_path nowhere/model", "--model_name_or_path nowhere/model: "),
        ('--rope_type default --rope_parameters {"rope_theta":0}', "rope_theta must be a finite number above 0"),
        ("--train_file {text} --dataloader_drop_last --per_device_train_batch_size 99", "sequences are no batch of 99"),
        ("--train_file {character}", "there is nothing to learn from 1 tokens"),
        ("--train_file {text} --context_length 1000000000", "the context of 1,000,000,000 tokens is longer than"),
        ("--eval_tokens -1", "--eval_tokens must be 0 or more, got -1"),
        ("--max_steps 0 --num_train_epochs 0", "nothing to train"),
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


def variant(model: Path, folder: Path, **config: object) -> Path:
    """A copy of a model with another config."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


UNSUITABLE = {
    "window": ({"model_type": "mistral", "sliding_window": 0}, "a sliding window of 0 tokens: set"),
    "chunks": ({"model_type": "llama4_text", "attention_chunk_size": 16}, "its attention is in chunks of 16 tokens"),
    "softcap": ({"attn_logit_softcapping": 30.0}, "caps its logits"),
    "dropout": ({"attention_dropout": 0.1}, 'set "attention_dropout": 0.0'),
    "vocabulary": ({"vocab_size": 100}, "the text has the token id 256, but the model's vocabulary has 100 tokens"),
    "shapes": ({"intermediate_size": 128}, "is [32, 64] in its files, and [32, 128] by its config"),
    "weights": ({}, "weights: Error while deserializing header"),
    "tokenizer": ({}, "the tokenizer of "),
}


@pytest.mark.parametrize("what", UNSUITABLE)
def test_an_unsuitable_model_is_one_clear_error(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    changes, message = UNSUITABLE[what]
    model = variant(inputs[0], tmp_path / what, **changes)
    if what == "weights":
        cut(model / "model.safetensors")
    if what == "tokenizer":
        for path in model.glob("token*"):
            path.unlink()
    with pytest.raises(SystemExit) as stopped:
        finetune_llama.main(small_run(model, inputs[1], tmp_path / "out"))
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    said = [line for line in printed.err.splitlines() if line.startswith("finetune_llama.py: error: ")]
    assert len(said) == 1 and message in said[0]
    assert "measuring" not in printed.out


SIZES = {"num_hidden_layers": 4, "max_position_embeddings": 32, "hidden_size": 64, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 16}
MIXED = ["sliding_attention", "full_attention"] * 2


WITH_WINDOWS: dict[str, list[dict]] = {
    "mistral": [{}],
    "mixtral": [{}],
    "starcoder2": [{}],
    "phi3": [{}],
    "ministral": [{}],
    "olmo3": [{}],
    "qwen2": [
        {"use_sliding_window": True, "max_window_layers": 1},
        {"use_sliding_window": True, "layer_types": MIXED},
    ],
    "qwen2_moe": [{"use_sliding_window": True}],
    "qwen3_moe": [{"use_sliding_window": True}],
    "gemma3_text": [{"layer_types": MIXED}],
    "cohere2": [{"layer_types": MIXED}],
    "exaone4": [{"layer_types": MIXED}],
}


@pytest.mark.parametrize(
    ("kind", "fields"), [(kind, fields) for kind, several in WITH_WINDOWS.items() for fields in several]
)
def test_models_with_a_sliding_window_are_suitable(kind: str, fields: dict) -> None:
    """And are extended and trained with it."""
    config = AutoConfig.for_model(kind, **SIZES, vocab_size=99, pad_token_id=0, sliding_window=16, **fields)
    for context in (None, 64):
        suitable.check_attention(config, context)
    # Phi-3 takes longrope alone, which with one factor for all frequencies is linear scaling.
    factors = {"short_factor": [2.0] * 8, "long_factor": [2.0] * 8, "attention_factor": 1.0}
    rope = {"rope_type": "longrope", "rope_parameters": factors} if kind == "phi3" else {}
    extended = extend_config(config, 64, **rope)
    assert extended.sliding_window == 16
    model = AutoModelForCausalLM.from_config(extended, attn_implementation="s2attn").train()
    model(torch.arange(40)[None], labels=torch.arange(40)[None]).loss.backward()
    grads = [weight.grad for name, weight in model.named_parameters() if "q_proj" in name or "qkv_proj" in name]
    assert grads and all(grad.isfinite().all() and grad.any() for grad in grads)


@pytest.mark.parametrize("layers, what", [(None, "null, or a number"), (MIXED, "a number")])
@pytest.mark.parametrize("window", [0, None])
def test_a_window_of_no_tokens_is_unsuitable(window: int | None, layers: list | None, what: str) -> None:
    kind = "mistral" if layers is None else "qwen3"
    config = AutoConfig.for_model(kind, **SIZES, use_sliding_window=True)
    config.sliding_window, config.layer_types = window, layers
    if layers is None and window is None:
        return suitable.check_attention(config)
    with pytest.raises(ValueError, match=rf'of {window} tokens: set "sliding_window": {what} of tokens'):
        suitable.check_attention(config)


def test_learned_sinks_are_suitable_and_chunks_are_not() -> None:
    suitable.check_attention(AutoConfig.for_model("gpt_oss", **SIZES))
    with pytest.raises(ValueError, match="in chunks of 16 tokens"):
        suitable.check_attention(AutoConfig.for_model("llama4_text", **SIZES, attention_chunk_size=16))


def test_a_model_whose_code_wants_a_window_that_no_layer_uses() -> None:
    """As after taking away layer_types and the window both."""
    fields = {**SIZES, "layer_types": ["full_attention"] * 4}
    with pytest.raises(ValueError, match=r'set "sliding_window": 4096, or any number, in its config.json'):
        suitable.check_attention(AutoConfig.for_model("olmo3", **fields, sliding_window=None))
    suitable.check_attention(AutoConfig.for_model("olmo3", **fields, sliding_window=4096))


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


def parsed(*words: str) -> tuple[ModelOptions, DataOptions, TrainingArguments]:
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


def test_what_is_given_wins_over_every_default() -> None:
    given = "--learning_rate 1e-4 --gradient_accumulation_steps 3 --max_steps 7 --save_steps 5 --eval_tokens 9"
    for model in ([], ["--model_name_or_path", "some/model"]):
        _, text, args = parsed(*model, *given.split(), f"--{CHECKPOINTING}", "false")
        assert (args.learning_rate, args.gradient_accumulation_steps, args.max_steps) == (1e-4, 3, 7)
        assert (args.save_steps, text.eval_tokens, getattr(args, CHECKPOINTING)) == (5, 9, False)
    _, _, args = parsed("--model-name-or-path", "some/model", "--num-train-epochs=2")
    assert (args.num_train_epochs, args.max_steps) == (2, -1)


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


def settings_of(*words: str) -> dict:
    model, _, args = parsed(*words)
    return json.loads(json.dumps(settings(model, args)))


@pytest.mark.parametrize(
    "option",
    [
        "--adam_beta2 0.9", "--adam_epsilon 1e-6", "--label_smoothing_factor 0.1", "--neftune_noise_alpha 5",
        "--dataloader_drop_last", "--optim adafactor", "--optim_args a=1", "--lora_alpha 8", "--seed 3", "--bf16",
        '--lr_scheduler_kwargs {"num_cycles":2}', "--per_device_train_batch_size 3", "--max_grad_norm 2",
    ],
)  # fmt: skip
def test_what_losses_depend_on_is_a_setting(option: str) -> None:
    plain = ("--bf16", "false") if option == "--bf16" else ()
    assert settings_of("--use_cpu", *option.split()) != settings_of("--use_cpu", *plain)


@pytest.mark.parametrize(
    "option",
    [
        "--max_steps 9", "--num_train_epochs 2", "--logging_steps 3", "--save_steps 7", "--save_total_limit 9",
        "--eval_tokens 5", "--eval_strategy epoch", "--dataloader_num_workers 2", "--report_to none", "--run_name me",
        f"--{CHECKPOINTING} true", "--resume_from_checkpoint latest", "--disable_tqdm true",
        "--per_device_eval_batch_size 2",
    ],
)  # fmt: skip
def test_what_no_loss_depends_on_is_none(option: str) -> None:
    assert settings_of(*option.split()) == settings_of()


def test_a_model_is_the_same_wherever_it_lies(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    first = settings_of("--model_name_or_path", str(inputs[0]))
    moved = shutil.copytree(inputs[0], tmp_path / "moved")
    assert settings_of("--model_name_or_path", str(moved)) == first
    with open(moved / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    assert settings_of("--model_name_or_path", str(moved))["model"] != first["model"]
    assert settings_of("--model_name_or_path", "some/model")["model"] == "some/model"


def test_a_machine_without_the_kernels_is_told_at_once(inputs: tuple[Path, Path]) -> None:
    """As with fp32 on a GPU; a dtype that no kernel takes stands for it."""
    config = AutoConfig.from_pretrained(inputs[0])
    suitable.check_kernels(config, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"S2-Attn does not run here, on cpu in torch\.complex64: "):
        suitable.check_kernels(config, torch.complex64, torch.device("cpu"))


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
        ({}, 3, "ulysses", "3 ranks do not divide 4 query heads and 2 key and value heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2, "ulysses", "6 query heads and 3 key and value heads"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, 2, "auto", "is not for --rope_type dynamic"),
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
