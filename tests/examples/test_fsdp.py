"""Models sharded by torch's FSDP: their tiled loss and what is saved of them, and what of `--fsdp` is taken.

That finetune_llama.py trains under it what it trains alone is in test_finetune_zero.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import forks
from app.training import arguments, fsdp
from finetune_runs import environment
from longlora_ext.adapter import lora_config, prepare_model
from tiny_models import tiny_model
from tiny_training import save_base

FULL = pytest.mark.full
WORKER = Path(__file__).resolve().parents[1] / "helpers" / "fsdp_worker.py"


@pytest.mark.parametrize(
    "check", [pytest.param("gradients", marks=FULL), "saving", pytest.param("first_version", marks=FULL)]
)
def test_two_processes_share_a_model(check: str, tmp_path: Path) -> None:
    """What is checked is told by the functions of fsdp_worker.py."""
    for name in ("tied", "untied"):
        save_base(tmp_path / name, tie_word_embeddings=name == "tied")
    done = forks.run([WORKER, tmp_path, check], environment(), processes=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--fsdp", "--fsdp needs processes to share the model: start the program with torchrun"),
        ("--fsdp full_shard auto_wrap", "--fsdp needs processes to share the model"),
        ("--fsdp full", "--fsdp must be true or full_shard or shard_grad_op or offload or auto_wrap, got 'full'"),
        ("--fsdp hybrid_shard", "--fsdp hybrid_shard is of the first version of FSDP, which is not taken"),
        ("--fsdp_config {}", "--fsdp_config has no effect without --fsdp"),
        ("--fsdp --fsdp_config gone.json", "--fsdp_config gone.json: No such file or directory"),
        ("--fsdp --fsdp_config {", "--fsdp_config {: no JSON: "),
        ('--fsdp --fsdp_config {"version":1}', "--fsdp_config version must be 2, got 1: the first is not taken"),
        ('--fsdp --fsdp_config {"fsdp_version":"1"}', '--fsdp_config version must be 2, got "1"'),
        ('--fsdp --fsdp_config {"use_orig_params":true}', "--fsdp_config has 'use_orig_params'; with version"),
        ('--fsdp --fsdp_config {"cpu_offload":"yes"}', '--fsdp_config cpu_offload must be true or false, got "yes"'),
        ('--fsdp --fsdp_config {"cpu_offload":1}', "--fsdp_config cpu_offload must be true or false, got 1"),
        ('--fsdp --fsdp_config {"state_dict_type":"LOCAL_STATE_DICT"}', 'be "SHARDED_STATE_DICT" or "FULL'),
        ('--fsdp --fsdp_config {"activation_checkpointing":true}', "give --activation_checkpointing"),
        ('--fsdp --fsdp_config {"transformer_layer_cls_to_wrap":[]}', "must be names of classes, got []"),
        ('--fsdp full_shard --fsdp_config {"reshard_after_forward":false}', "say different things"),
        ("--fsdp --deepspeed {}", "--fsdp does not work with --deepspeed: DeepSpeed shards the same weights"),
        ("--fsdp --load_in_4bit", "--fsdp does not work with --load_in_4bit"),
        ("--fsdp --fp16", "--fsdp does not work with --fp16"),
        ("--fsdp --use_liger_kernel", "--fsdp does not work with --use_liger_kernel"),
        ("--fsdp --torch_compile", "--fsdp does not work with --torch_compile"),
        ("--fsdp --accelerator_config {}", "--fsdp does not work with --accelerator_config"),
        ("--fsdp --auto_find_batch_size", "--fsdp does not work with --auto_find_batch_size"),
        ("--fsdp --load_best_model_at_end --eval_strategy steps", "--fsdp does not work with --load_best_model_at_end"),
        ("--fsdp offload RANK", "--fsdp offload needs a GPU"),
        ('--fsdp --save_only_model --fsdp_config {"state_dict_type":"SHARDED_STATE_DICT"} RANK', "--save_only_model "),
        ("ACCELERATE_USE_FSDP", "accelerate is configured for FSDP"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str, message: str
) -> None:
    words = given.split()
    for variable, value in (("RANK", "0"), ("ACCELERATE_USE_FSDP", "true")):
        if variable in words:
            words.remove(variable)
            monkeypatch.setenv(variable, value)
    if "auto_wrap" in words:  # which is one argument with the word before
        words = ["--fsdp", " ".join(words[1:])]
    if "offload" in words and torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stopped:
        arguments.parse(["--output_dir", "out", *words])
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finetune_llama.py: error: ")]
    assert len(said) == 1 and message in said[0]


def test_an_older_library_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fsdp.accelerate, "__version__", "1.13.0")
    with pytest.raises(SystemExit):
        arguments.parse(["--output_dir", "out", "--fsdp"])
    assert "--fsdp needs accelerate 1.15 or newer, and this is 1.13.0" in capsys.readouterr().err


def config_of(given: str | bool, config: str | None = None, save_only_model: bool = False) -> dict[str, object]:
    asked = SimpleNamespace(fsdp=given, fsdp_config=config, save_only_model=save_only_model)
    return fsdp.fsdp_config(asked)  # type: ignore[arg-type]


def test_what_is_said_in_words_and_in_a_file_is_one(tmp_path: Path) -> None:
    plain = config_of(True)
    assert plain == {
        "version": 2, "reshard_after_forward": True, "cpu_offload": False, "cpu_ram_efficient_loading": False,
        "state_dict_type": "SHARDED_STATE_DICT",
    }  # fmt: skip
    assert config_of("true") == config_of("full_shard") == config_of("full_shard auto_wrap") == plain
    assert config_of("shard_grad_op offload") == plain | {"reshard_after_forward": False, "cpu_offload": True}
    assert config_of(True, save_only_model=True)["state_dict_type"] == "FULL_STATE_DICT"
    file = tmp_path / "fsdp.json"
    file.write_text('{"fsdp_version": "2", "cpu_offload": "True", "fsdp_transformer_layer_cls_to_wrap": "Layer"}')
    assert config_of(True, str(file)) == plain | {
        "cpu_offload": True,
        "transformer_layer_cls_to_wrap": ["Layer"],
    }


def test_the_layers_of_a_model_are_found_or_asked_for() -> None:
    model = tiny_model(tie_word_embeddings=True)
    args = SimpleNamespace(fsdp_plugin_args={}, fsdp_config=config_of(True))
    fsdp.choose_layers(args, model)  # type: ignore[arg-type]
    assert args.fsdp_plugin_args == {"transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}
    args.fsdp_config["transformer_layer_cls_to_wrap"] = ["LlamaMLP"]
    fsdp.choose_layers(args, model)  # type: ignore[arg-type]
    assert args.fsdp_plugin_args == {"transformer_cls_names_to_wrap": ["LlamaMLP"]}
    args.fsdp_config["transformer_layer_cls_to_wrap"] = ["GPTBlock"]
    with pytest.raises(ValueError, match="the model has no module of the class GPTBlock"):
        fsdp.choose_layers(args, model)  # type: ignore[arg-type]
    args.fsdp_config = config_of(True)
    model._no_split_modules = None
    with pytest.raises(ValueError, match="LlamaForCausalLM does not say what its layers are"):
        fsdp.choose_layers(args, model)  # type: ignore[arg-type]
    args.fsdp_config["cpu_ram_efficient_loading"] = True
    with pytest.raises(ValueError, match="tears the tied embeddings of a model with an adapter apart"):
        fsdp.choose_layers(args, prepare_model(model, lora_config(model)))  # type: ignore[arg-type]
