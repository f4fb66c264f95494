"""A model and a text small enough to run examples/finetune_llama.py in seconds, and the ways to run it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import forks
import longlora_ext
from patience import patience

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "finetune_llama.py"
CONTEXT = 32


def make_model(folder: Path) -> Path:
    """A random Llama of context 32 with a tokenizer of one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "<eos>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_text(path: Path) -> Path:
    """JSON Lines of 40 documents of 50 to 440 bytes."""
    rows = [{"text": f"document {n}: " + " ".join(f"{n * m % 97}" for m in range(10 + 3 * n))} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def environment() -> dict[str, str]:
    """For a subprocess: the same longlora_ext, one thread, no hub, and none of a launcher's variables."""
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE"}
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    package = str(Path(longlora_ext.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package, kept.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(
    *arguments: object, launcher: tuple[str, ...] = (), processes: int | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """Run the script: by the `launcher` that a user types before it, or else quickly, in a fork or as torchrun does."""
    if not launcher:
        return forks.run([SCRIPT, *arguments], environment(), processes, folder=cwd)
    command = [*launcher, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment(), cwd=cwd, capture_output=True, text=True, timeout=patience())


def found_by(worker: str, folder: Path, processes: int) -> dict[str, Any]:
    """What processes of a worker of this folder have found, as the first one writes it."""
    result = folder / "result.json"
    done = forks.run([Path(__file__).with_name(worker), result], environment(), processes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(result.read_text())


def deepspeed(processes: int | None = None) -> tuple[str, ...]:
    """The deepspeed launcher of this interpreter's environment, on a port that is free."""
    count = () if processes is None else ("--num_accelerators", str(processes))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return (str(Path(sys.executable).with_name("deepspeed")), "--master_port", port, *count)


def torchrun(processes: int) -> tuple[str, ...]:
    """torch's own launcher."""
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")


def small_run(model: Path, text: Path, output: Path, steps: int = 6) -> list[str]:
    """Arguments of a run of a few steps that saves every second one and logs each."""
    options = {
        "model_name_or_path": model, "train_file": text, "output_dir": output, "max_steps": steps,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "warmup_steps": 2, "logging_steps": 1, "save_steps": 2, "eval_tokens": 512, "seed": 7,
    }  # fmt: skip
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def losses(output: Path) -> dict[int, float]:
    """The loss of each step, from the newest complete checkpoint."""
    states = sorted(output.glob("checkpoint-*/complete.json"), key=lambda p: int(p.parent.name.split("-")[1]))
    history = json.loads((states[-1].parent / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
