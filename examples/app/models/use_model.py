"""A model to use, not to train: a base model, an adapter or a merged model, all opened by one option.

`open_model` knows how far the model may read, the length it was trained on, and describes it so that a result can be
traced to it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from app.models.convert_gguf import load_gguf
from app.models.folders import check_run_folder, is_adapter
from app.models.four_bits import check_bitsandbytes, four_bits
from app.models.gguf_rope import read_model_config
from app.models.source import GGUF_HELP, check_config, find_model
from app.models.suitable import check_attention, check_kernels, check_tokenizer
from app.models.tokenizer import read_tokenizer, sha256_of_tokenizer
from app.runs.command_line import TINY_LLAMA, Parser
from app.runs.errors import one_clear_error
from app.runs.json_files import json_object
from app.runs.launch import WORLD_SIZE
from longlora_ext import _pattern
from longlora_ext._errors import naming
from longlora_ext._lengths import rope_type_of
from longlora_ext.adapter import load, load_base
from longlora_ext.adapter._load import base_of
from longlora_ext.adapter._record import sample
from longlora_ext.attention import NAME
from longlora_ext.config import context_length, extend_config, group_size, settle_context

DTYPES = ("auto", "float32", "bfloat16", "float16")
#: Fields of a config that say nothing of what the model computes, or what is described by itself.
DESCRIBED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "s2attn_")


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to use.

    Attributes:
        model: The `PreTrainedModel` or `PeftModel`, in eval mode. Its `device` is where it takes tokens.
        tokenizer: Its tokenizer.
        trained_length: Tokens that it was made for: trained on, or as its RoPE was scaled by `--context_length`.
        description: What tells it and how it is used from any other, as JSON.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    trained_length: int
    description: dict[str, Any]

    @property
    def base(self) -> Any:
        """The `PreTrainedModel`, around which the `PeftModel` of an adapter is."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def check_length(self, length: int, beyond: bool, what: str) -> None:
        """Raise `ValueError` if that is more than the model was trained on, unless that is meant."""
        if length > self.trained_length and not beyond:
            made = "scaled to" if self.description["scaled_without_training"] else "trained on"
            raise ValueError(
                f"{what}, but {self.description['model']} was {made} {self.trained_length:,} tokens. Beyond that most "
                "models understand little; --beyond_trained_length does it nevertheless"
            )

    def forget_length(self) -> None:
        """Let the model read the next text as if it were its first.

        RoPE of the type "dynamic" keeps the frequencies of the longest text so far until a short one comes.
        """
        if rope_type_of(self.base.config) == "dynamic":
            with torch.no_grad():
                self.model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self.model.device), use_cache=False)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that `open_model` reads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=str(TINY_LLAMA),
        help="a base model or a merged one (a folder, a hub name or a GGUF file), or the folder of an adapter",
    )
    group.add_argument("--gguf_file", help=GGUF_HELP)
    group.add_argument(
        "--base_model", type=os.path.expanduser, help="where the base model of an adapter is now, if it was moved"
    )
    group.add_argument(
        "--present_context_length",
        type=int,
        help="tokens of the model's context; needed only if its config is ambiguous, which is reported as an error",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype to compute in; auto: bfloat16 on a GPU that has it, float32 elsewhere",
    )
    group.add_argument(
        "--load_in_4bit",
        action="store_true",
        help="load the base model in 4 bits, as in training with --load_in_4bit; needs bitsandbytes",
    )
    group.add_argument(
        "--device_map",
        choices=("auto",),
        help="auto: spread a model that is too large for one GPU over all GPUs of this machine, in one process; "
        "default: each process has the whole model on one GPU",
    )
    group.add_argument(
        "--beyond_trained_length",
        action="store_true",
        help="allow more tokens than the model was trained on",
    )


def add_scaling_options(parser: argparse.ArgumentParser) -> None:
    """Options for a model whose context is extended without training."""
    group = parser.add_argument_group('a longer context without training ("scaling only")')
    group.add_argument("--context_length", type=int, help="tokens to scale the model's RoPE to")
    group.add_argument(
        "--rope_type",
        default="linear",
        help="how: ntk, or any RoPE type of transformers (linear, yarn, dynamic, llama3, ...)",
    )
    group.add_argument("--rope_parameters", type=json_object, help="further parameters of that type, as JSON")


def check_model_options(parser: Parser, options: argparse.Namespace) -> None:
    """Refuse what is wrong by itself, of both groups of options, and find the model that they name."""
    with one_clear_error(f"--model {options.model}: "):
        options.model, options.gguf_file = find_model(options.model, options.gguf_file)
    if options.gguf_file and is_adapter(options.model):
        parser.error("--gguf_file is for a base model, and --model is an adapter")
    if options.gguf_file and (options.load_in_4bit or options.device_map):
        option = "--load_in_4bit" if options.load_in_4bit else "--device_map"
        parser.error(f"{option} is for a model folder, and {options.gguf_file} is a GGUF file")
    if options.device_map and WORLD_SIZE > 1:
        parser.error("--device_map auto gives one process all GPUs: start it with python")
    if options.device_map and not torch.cuda.is_available():
        parser.error("--device_map auto spreads a model over GPUs, and there is none")
    if options.context_length is None and (options.rope_type != "linear" or options.rope_parameters):
        parser.error("--rope_type and --rope_parameters need --context_length")
    if options.context_length is not None and is_adapter(options.model):
        parser.error("--context_length: an adapter brings the context that it was trained for")
    if options.present_context_length is not None and is_adapter(options.model):
        parser.error("--present_context_length: an adapter brings the context that it was trained for")


def open_model(options: argparse.Namespace, attention: str = "dense", groups: int | None = None) -> OpenedModel:
    """Load what `--model` names.

    Args:
        options: With the options of `add_model_options`, and perhaps those of `add_scaling_options`.
        attention: "dense" for sdpa; "s2" for S2-Attn as in training.
        groups: Group size for "s2", in tokens, in place of the config's.

    Raises:
        ValueError, OSError: There is no such model, or it cannot be used so.
        SystemExit: Its RoPE cannot be scaled as the options say, which is said.
    """
    path, gguf_file, scaled = options.model, options.gguf_file, getattr(options, "context_length", None)
    check_run_folder(path)
    if options.base_model and not is_adapter(path):
        raise ValueError("--base_model is for adapters, and this is none: it has no adapter_config.json")
    if not is_adapter(path):
        check_config(path, gguf_file)
    implementation = NAME if attention == "s2" else "sdpa"
    dtype, device = dtype_of(options.dtype), _device()
    keywords: dict[str, Any] = {"dtype": dtype, "attn_implementation": implementation}
    # Straight to where they are used: in 4 bits they stay there. On a CPU, PEFT would take a map for offloading.
    if options.device_map:
        keywords["device_map"] = options.device_map
    elif options.load_in_4bit or (device.type == "cuda" and not gguf_file):
        keywords["device_map"] = {"": device}
    if options.load_in_4bit:
        check_bitsandbytes()
        keywords["quantization_config"] = four_bits(dtype)
    if is_adapter(path):
        model: Any = load(path, base_model=options.base_model, **keywords)
    else:
        config = settle_context(read_model_config(path, gguf_file), options.present_context_length)
        if scaled is not None:
            with one_clear_error(f"--context_length {scaled} --rope_type {options.rope_type}: "):
                given = options.rope_parameters
                config = extend_config(config, scaled, rope_type=options.rope_type, rope_parameters=given)
        context_length(config)  # or an error, before anything is loaded
        if gguf_file:
            model = load_gguf(path, gguf_file, config, **keywords)
        else:
            model = load_base(path, what="the model", config=config, **keywords)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if any(weight.is_meta for weight in base.parameters()):
        raise ValueError("it does not fit into the memory of all GPUs; --load_in_4bit would take about a quarter")
    base_config: PreTrainedConfig = base.config
    described: dict[str, Any] = {"attention": f"dense ({implementation})"}
    if attention == "s2":
        check_attention(base_config, context_length(base_config))
        check_kernels(base_config, dtype, device)
        base_config.s2attn_mode = "s2"
        if groups is not None:
            base_config.s2attn_group_size = groups
        described = {"attention": "S2-Attn", "group_size": group_size(base_config)}
        if _pattern.sink(base_config):
            described["sink"] = True
        if (window := _pattern.window(base_config)) is not None:
            described["window"] = window
        if layers := _pattern.dense_layers(base_config):
            described["dense_layers"] = layers
    named = _tokenizer_source(path, options.base_model)
    with naming(f"the tokenizer of {named}"):
        tokenizer = read_tokenizer(named, gguf_file)
        check_tokenizer(tokenizer)
    model = (model if options.load_in_4bit or options.device_map else model.to(device)).eval()
    description = {
        "model": os.path.join(os.path.abspath(path) if os.path.isdir(path) else path, gguf_file or "").rstrip("/"),
        "kind": "adapter" if isinstance(model, PeftModel) else "model",
        "weights": _sha256_of_weights(model),
        "config": _sha256_of_config(base_config),
        "tokenizer": sha256_of_tokenizer(tokenizer),
        "dtype": str(dtype).removeprefix("torch.") + (", base model in 4 bits" if options.load_in_4bit else ""),
        "context": context_length(base_config),
        "scaled_without_training": scaled is not None,
        "rope": dict(getattr(base_config, "rope_parameters", None) or {}),
        **described,
    }
    return OpenedModel(model, tokenizer, context_length(base_config), description)


def dtype_of(name: str) -> torch.dtype:
    """The dtype that `--dtype` means on this machine."""
    if name == "auto":
        name = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)


def _device() -> torch.device:
    """Where this process computes; libraries that know no better take its GPU too."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _tokenizer_source(path: str, base_model: str | None) -> str:
    if not is_adapter(path) or (Path(path) / "tokenizer_config.json").is_file():
        return path
    return base_of(Path(path), base_model)


def _sha256_of_weights(model: torch.nn.Module) -> str:
    """SHA-256 of a few weights of each tensor: enough to tell two models apart, and fast for any size."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode() + sample(weight.detach()).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _sha256_of_config(config: PreTrainedConfig) -> str:
    """What weights alone do not tell: windows, experts of a token, epsilons, multipliers of logits and the like."""
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith(DESCRIBED)}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
