"""The lower bounds in pyproject.toml hold: the oldest versions are installed, all at once, and pass the tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from patience import patience

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it under its older name
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
# With the oldest versions: what stands on other libraries. Kernels, builds and the checkout do not depend on them.
ROOMS = ("package", "examples")
# But for bitsandbytes, which is no part of what is installed here; FSDP, which needs newer ones; what installs versions
# itself; the shipped model and its text; finetune_zero, for its time; what is about today's transformers: the
# operations of its mixtures of experts, counted by hand, and its tokenizers of GGUF files (5.5 puts a token before);
# and what stands on torch alone, which is the same here.
LEFT_OUT = {"qlora", "fsdp", "older_transformers", "corpus", "tiny_llama", "finetune_zero", "plan_layers", "gguf"}
LEFT_OUT |= {"halo", "launch"}
TWO_AT_A_TIME = ["-n", "2", "--dist", "loadfile"]
ALL = {path.stem.removeprefix("test_"): path for room in ROOMS for path in (ROOT / "tests" / room).glob("test_*.py")}


def test_left_out_are_tests() -> None:
    assert ALL.keys() >= LEFT_OUT


def oldest() -> list[str]:
    """Every dependency at its lower bound, but torch at the version of this environment: an older one for a CPU is
    rarely at hand, and the library is built on an ABI that does not change from the oldest on. Without the extras
    `liger` and `qlora`: other tests check what is said where they are not installed."""
    pins = [f"torch=={torch.__version__.partition('+')[0]}"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["train"], *extras["trl"], *extras["tracking"], *extras["test"]]:
        requirement = Requirement(line)
        bounds = {specifier.operator: specifier.version for specifier in requirement.specifier}
        if requirement.name != "torch" and ">=" in bounds:
            pins.append(f"{requirement.name}=={bounds['>=']}")
    return pins


@pytest.mark.full
def test_oldest_versions(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    environment = os.environ | {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}", "DS_BUILD_OPS": "0"}
    environment["CUDACXX"] = ""  # no CUDA kernels: none of the versions is theirs
    pip = [venv / "bin" / "pip", "install", "-q"]
    pins = oldest()
    subprocess.run([*pip, *pins], check=True, env=environment)
    subprocess.run([*pip, "--no-deps", ROOT], check=True, env=environment)
    installed = subprocess.run([venv / "bin" / "pip", "check"], env=environment, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stdout
    files = [ALL[name] for name in sorted(ALL.keys() - LEFT_OUT)]
    command = [venv / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *TWO_AT_A_TIME, *files]
    log = tmp_path / "log"
    with log.open("w") as output:  # no pipe, which a process that is left behind would hold open, and keep us waiting
        limit = patience(3000)
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, timeout=limit)
    printed = log.read_text()
    print(" ".join(pins), printed[-3000:], sep="\n")
    assert done.returncode == 0, printed[-10000:]
