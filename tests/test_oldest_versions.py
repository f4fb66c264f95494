"""The lower bounds in pyproject.toml hold: the oldest versions are installed, all at once, and pass the tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it under its older name
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
# Not with the oldest versions: kernels and builds, which do not depend on them; what is about the checkout alone;
# bitsandbytes, which is no part of what is installed here; FSDP, which needs newer ones; and finetune_zero, for its
# time.
LEFT_OUT = {
    "build",
    "cpu_exp2",
    "cpu_pairs",
    "cuda_emulated",
    "cuda_host",
    "cuda_mutants",
    "cuda_sanitized",
    "simt",
    "resources",
}
LEFT_OUT |= {"op_cuda", "op_errors", "op_numerics", "op_torch"}
LEFT_OUT |= {"benchmarks", "corpus", "docs", "readme", "tiny_llama", "oldest_versions"}
LEFT_OUT |= {"qlora", "fsdp", "finetune_zero"}
TWO_AT_A_TIME = ["-n", "2", "--dist", "loadfile"]
ALL = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}


def test_left_out_are_tests() -> None:
    assert LEFT_OUT <= ALL


def oldest() -> list[str]:
    """Every dependency at its lower bound, but torch at the version of this environment: an older one for a CPU is
    rarely at hand, and the library is built on an ABI that does not change from the oldest on. Without the extras
    `liger` and `qlora`: other tests check what is said where they are not installed."""
    pins = [f"torch=={torch.__version__.partition('+')[0]}"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["train"], *extras["test"]]:
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
    files = [f"tests/test_{name}.py" for name in sorted(ALL - LEFT_OUT)]
    command = [venv / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *TWO_AT_A_TIME, *files]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(" ".join(pins), result.stdout[-3000:], sep="\n")
    assert result.returncode == 0, result.stdout[-10000:]
