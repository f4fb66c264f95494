"""run.json: what made an output folder, so that one command makes it again.

    deepspeed examples/finetune_llama.py --from_manifest finetuned/x/run.json --output_dir again

takes the arguments of that run, and stops before it trains if this would not be the same run: another text, other
settings, another number of processes. Versions of libraries that differ are said. What was given then and what took
effect, the settings that the losses depend on, the text's fingerprint, attention and RoPE, versions, the commit and the
literal command are all in the file, which lies beside what the run wrote and in the adapter's folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, TrainingArguments

from app.inputs.files import is_there
from app.models.windows import layers_for_sink
from app.runs.command_line import EXAMPLES
from app.runs.json_files import read_json
from app.runs.launch import launcher, say
from app.runs.provenance import commit, versions
from app.runs.run import Run
from app.runs.run_folder import RUN_FILE, differences
from app.training.options import DataOptions, ModelOptions
from longlora_ext._pattern import dense_layers, sink, window
from longlora_ext.config import context_length, group_size

#: Arguments of one call, not of the run: where it wrote, what it went on from, what a launcher or a person added.
NOT_REPEATED = ("from_manifest", "output_dir", "resume_from_checkpoint", "local_rank", "hub_token")

#: Schedules of the learning rate that are the same in a longer run.
OF_ANY_LENGTH = ("constant", "constant_with_warmup")

#: Options whose values may be paths.
PATHS = ("model_name_or_path", "train_file", "eval_file", "deepspeed", "fsdp_config")


def repeated(argv: Sequence[str]) -> tuple[list[str], dict[str, Any] | None]:
    """The arguments of a run, with those of an earlier run before them where `--from_manifest` names one.

    Returns:
        The arguments, and the earlier run's manifest or None.

    Raises:
        ValueError: There is no such file, or it is none of ours.
    """
    of_the_call, rest = _split(argv)
    path = of_the_call.from_manifest
    if path is None:
        return list(argv), None
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
        arguments, command = manifest["arguments"], manifest["command"]
        known = isinstance(manifest["settings"], dict) and isinstance(manifest["versions"], dict)
        if not known or not all(isinstance(word, str) for word in [command, *arguments]) or isinstance(arguments, str):
            raise TypeError
    except OSError as error:
        raise ValueError(f"--from_manifest {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--from_manifest {path}: not the {RUN_FILE} of a run of this program") from error
    kept = {name: value for name, value in vars(of_the_call).items() if value is not None and name != "from_manifest"}
    return [*arguments, *rest, *(f"--{name}={value}" for name, value in kept.items())], manifest


def check_versions(manifest: dict[str, Any] | None) -> None:
    """Say which versions are other than those of the run that is done again."""
    if manifest and (others := differences(manifest["versions"], versions())):
        say(f"note: the same run with other versions: {'; '.join(others)}")


def say_other_length(manifest: dict[str, Any], repeats: dict[str, Any] | None) -> None:
    """Say that a run was made longer whose learning rate depends on the number of steps, or that such a one is done
    again."""
    of = repeats or manifest
    steps, schedule = of.get("steps"), of.get("effective", {}).get("lr_scheduler_type")
    others = [call["steps"] for call in of.get("earlier", []) if call.get("steps", steps) != steps]
    if not others or schedule in OF_ANY_LENGTH:
        return
    depends = f"its learning rate ({schedule}) depends on their number"
    if repeats:
        say(f"note: the run that is done again had {others[-1]:,} steps at first, and {depends}: these losses differ")
    else:
        say(f"note: the run was to have {others[-1]:,} steps, and {depends}: one of {steps:,} from its start differs")


def describe(
    argv: Sequence[str],
    options: ModelOptions,
    text: DataOptions,
    args: TrainingArguments,
    config: PreTrainedConfig,
    run: Run,
    steps: int,
) -> dict[str, Any]:
    """The manifest of a run that is about to begin, or to go on from a checkpoint.

    Args:
        argv: The arguments, as `repeated` returned them.
        options, text, args: What they came to.
        config: The extended config.
        run: The run, with all of its settings.
        steps: How many it is to have.
    """
    heads: int = config.num_attention_heads
    group = group_size(config)
    return {
        "command": _command(run.folder.resolve() / RUN_FILE),
        "arguments": _absolute(_split(argv)[1]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "from": str(run.checkpoint) if run.checkpoint else None,
        "commit": commit(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "model": {
            "name": options.model_name_or_path,
            "type": config.model_type,
            "revision": getattr(config, "_commit_hash", None),  # on the hub
        },
        "context": context_length(config),
        "steps": steps,
        "rope": config.rope_parameters,
        "attention": {
            "training": "s2attn",
            "group_size": group,
            "sink": sink(config),
            "layers_with_sink": layers_for_sink(config) if sink(config) else 0,  # the others have windows
            "window": window(config),
            "shift": group // 2,
            "shifted_heads": list(range(heads // 2, heads)),
            "dense_layers": dense_layers(config),
            "dense_steps": options.dense_steps,
            "evaluation": "dense",
        },
        "settings": run.settings,
        "effective": {**asdict(options), **asdict(text), **args.to_dict()},
        **_earlier(run.checkpoint),
    }


def _split(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of the call alone, and the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in NOT_REPEATED:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    return parser.parse_known_args(argv)


def _absolute(arguments: Sequence[str]) -> list[str]:
    """The same with the paths of files that are there made absolute: they mean the same in every folder."""
    words, option = [], ""
    for word in arguments:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        option = name.lstrip("-").replace("-", "_") or option
        if option in PATHS and value:
            value = _absolute_path(value)
        words.append(name + equals + value)
    return words


def _absolute_path(value: str) -> str:
    """A path, perhaps with a weight behind a colon, made absolute if it is there."""
    for path, weight in ((value, ""), value.rpartition(":")[::2]):
        if path and is_there(path):
            return os.path.abspath(os.path.expanduser(path)) + (f":{weight}" if weight else "")
    return value


def _command(manifest: Path) -> str:
    program = EXAMPLES / "finetune_llama.py"
    return f"{launcher()} {shlex.join([str(program), '--from_manifest', str(manifest)])}"


def _earlier(checkpoint: Path | None) -> dict[str, Any]:
    """The calls that a run has behind it when it goes on from a checkpoint, the first one first."""
    path = checkpoint.parent / RUN_FILE if checkpoint else None
    before = read_json(path) if path and path.is_file() else {}
    names = ("date", "from", "commit", "versions", "device", "steps")
    call = {name: before[name] for name in names if name in before}
    return {"earlier": [*before.get("earlier", []), call]} if call else {}
