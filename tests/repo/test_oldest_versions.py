"""The lower bounds in pyproject.toml hold: the oldest versions are installed, all at once, and pass the tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from own_venv import make_venv
from patience import patience

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it under its older name
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
# With the oldest versions: what stands on other libraries. Kernels, builds and the checkout do not depend on them.
ROOMS = ("package", "examples")
# But for bitsandbytes, which is no part of what is installed here; FSDP, which needs newer ones; what installs versions
# itself; the shipped model and its text; finetune_zero, for its time; and what is about today's transformers: its list
# of decoders, the operations of its mixtures of experts, counted by hand, and its tokenizers of GGUF files (5.5 puts a
# token before).
LEFT_OUT = {"qlora", "fsdp", "older_transformers", "corpus", "tiny_llama", "finetune_zero", "every_decoder"}
LEFT_OUT |= {"plan_layers", "gguf"}
# What stands on torch, the file system and Python alone, which are the same here.
LEFT_OUT |= {"halo", "halo_fsdp", "launch", "processes", "checkpoints", "command_line", "evaluate_arguments"}
LEFT_OUT |= {"evaluate_folder", "manifest", "mixture", "mixture_runs", "model_folders", "model_source", "reading"}
LEFT_OUT |= {"run_folder", "run_settings"}
# What asks more of the same: of the planner, which plan.py's tests run; of evaluate.py, its other tasks and tables;
# runs that cannot go on, where others are killed and resumed; and a page that is made of generate.py.
LEFT_OUT |= {"planner", "ruler", "ruler_task", "position", "stopped_runs", "demo"}
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
    """On top of this environment, whose torch and whatever else has its oldest version are not installed again: found
    in another folder, DeepSpeed compiles its operator anew, here and in the next test outside. longlora_ext is the
    checkout's, which Python finds first where it is started."""
    python = make_venv(tmp_path / "venv")
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "DS_BUILD_OPS": "0"}
    launcher = Path(sys.executable).with_name("deepspeed").read_text().partition("\n")[2]
    (python.parent / "deepspeed").write_text(f"#!{python}\n{launcher}")
    (python.parent / "deepspeed").chmod(0o755)
    pins = oldest()
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-compile", *pins], check=True, env=environment)
    names = [Requirement(pin).name for pin in pins]
    say = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    found = subprocess.run([python, "-c", say, *names], check=True, capture_output=True, text=True).stdout.split()
    versions = zip(pins, found, strict=True)
    assert all(Requirement(pin).specifier.contains(version) for pin, version in versions), found
    files = [ALL[name] for name in sorted(ALL.keys() - LEFT_OUT)]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TWO_AT_A_TIME, *files]
    log = tmp_path / "log"
    with log.open("w") as output:  # no pipe, which a process that is left behind would hold open, and keep us waiting
        limit = patience(3000)
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, timeout=limit)
    printed = log.read_text()
    print(" ".join(pins), printed[-3000:], sep="\n")
    assert done.returncode == 0, printed[-10000:]
