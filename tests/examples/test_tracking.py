"""What is logged of each step, and the trackers that `--report_to` names (examples/app/training/step_log.py)."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import finetune_llama
import forks
from app.training.step_log import peak_memory
from finetune_runs import ROOT, environment, make_model, make_text, small_run

#: The last two of four steps are dense, and the text of two sequences a step has 128 tokens in each.
DENSE = ["--dense_steps", "2", "--gradient_accumulation_steps", "2"]
NUMBERS = ("loss", "tokens_per_second", "peak_memory_gb", "dense_attention")


@pytest.fixture
def arguments(alone: None, tmp_path: Path) -> list[str]:
    make_model(tmp_path / "model")
    make_text(tmp_path / "text.jsonl")
    return [*small_run(Path("model"), Path("text.jsonl"), Path("out"), steps=4), *DENSE, "--eval_tokens", "0"]


def with_examples() -> dict[str, str]:
    """The environment of a process that imports the program."""
    return {**environment(), "PYTHONPATH": f"{ROOT / 'examples'}:{environment()['PYTHONPATH']}"}


def logged(folder: Path, step: int = 4) -> dict[int, dict[str, Any]]:
    """The log of each step, as the checkpoint has it."""
    history = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry for entry in history if "loss" in entry}


def test_each_step_is_logged_with_its_numbers(arguments: list[str]) -> None:
    finetune_llama.main(arguments)
    entries = logged(Path("out"))
    assert [entries[step]["dense_attention"] for step in (1, 2, 3, 4)] == [0, 0, 1, 1]
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    for entry in entries.values():
        assert entry["tokens_per_second"] > 0
        if not torch.cuda.is_available():
            assert 0.1 < entry["peak_memory_gb"] <= most + 0.001  # it is rounded


def test_a_line_for_several_steps_counts_them_all(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("app.training.step_log.perf_counter", lambda: float(next(clock)))
    finetune_llama.main([*arguments, "--logging_steps", "3", "--save_steps", "3", "--max_steps", "3"])
    (entry,) = logged(Path("out"), 3).values()
    assert entry["dense_attention"] == pytest.approx(2 / 3)
    assert (
        entry["tokens_per_second"] == 3 * 2 * 2 * 128 / 2
    )  # steps, batches, sequences, tokens; the clock was read twice


def test_the_time_of_evaluating_is_not_counted(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two lines of the log too, where `--eval_steps` divides `--logging_steps`."""
    now = [0.0]
    monkeypatch.setattr("app.training.step_log.perf_counter", lambda: now[0])
    step, evaluation = Trainer.training_step, Trainer.evaluate

    def slow(method: Any, seconds: float) -> Any:
        def call(self: Trainer, *args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return method(self, *args, **kwargs)

        return call

    monkeypatch.setattr(Trainer, "training_step", slow(step, 1))
    monkeypatch.setattr(Trainer, "evaluate", slow(evaluation, 100))
    given = ["--logging_steps", "3", "--save_steps", "3", "--max_steps", "3", "--eval_strategy", "steps"]
    finetune_llama.main([*arguments, *given, "--eval_steps", "1"])
    (entry,) = logged(Path("out"), 3).values()
    assert entry["tokens_per_second"] == 2 * 128  # two batches a step, each of two sequences and a second


@pytest.mark.full
def test_the_tokens_of_all_processes_are_counted(arguments: list[str], tmp_path: Path) -> None:
    """With each its own sequences, and with sequences that they share: the same text, the same number."""
    code = (
        "import sys; import finetune_llama; from app.training import step_log as log; clock = iter(range(0, 999, 2)); "
        "log.perf_counter = lambda: float(next(clock)); finetune_llama.main(sys.argv[1:])"
    )
    (tmp_path / "timed.py").write_text(code)
    for output, words in (("own", []), ("shared", ["--sequence_parallel_size", "2"])):
        call = [tmp_path / "timed.py", *arguments, "--output_dir", output, "--dense_steps", "0", *words]
        done = forks.run(call, with_examples(), processes=2)
        assert done.returncode == 0, done.stdout + done.stderr
    sequences = {"own": 2 * 2 * 2, "shared": 2 * 2}
    for output, count in sequences.items():
        assert {entry["tokens_per_second"] for entry in logged(Path(output)).values()} == {count * 128 / 2}


def test_the_peak_of_a_process() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before // 8 + 2**24)  # half of what there was, and more
    assert peak_memory(torch.device("cpu")) >= before
    del held


@pytest.mark.parametrize("name", ["wandbb", "swanlab", ""])
def test_a_tracker_that_is_not_there_is_refused(
    arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        finetune_llama.main([*arguments, f"--report_to={name}"])
    assert stopped.value.code == 2
    assert f"error: --report_to {name}: transformers knows no such tracker" in capsys.readouterr().err


def test_tensorboard_gets_the_numbers(arguments: list[str]) -> None:
    pytest.importorskip("tensorboard", reason="the extra tracking is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finetune_llama.main([*arguments, "--report_to", "tensorboard"])
    (folder,) = Path("out/runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    entries = logged(Path("out"))
    for name in NUMBERS:
        written = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert written == pytest.approx({step: entry[name] for step, entry in entries.items()}, rel=1e-6)


@pytest.mark.full
@pytest.mark.skipif(not find_spec("trackio"), reason="the extra tracking is not installed")
def test_trackio_gets_the_numbers(arguments: list[str], tmp_path: Path) -> None:
    """In a process of its own, as trackio takes its folder from the environment when it is imported."""
    code = (
        "import json, sys; import finetune_llama; finetune_llama.main(sys.argv[1:]); "
        "from trackio.sqlite_storage import SQLiteStorage; logs = SQLiteStorage.get_logs('longer', 'first'); "
        f"print(json.dumps([[row['train/' + name] for name in {NUMBERS}] for row in logs if 'train/loss' in row]))"
    )
    call = [sys.executable, "-c", code, *arguments, "--report_to", "trackio"]
    env = {**with_examples(), "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [*call, "--project", "longer", "--run_name", "first"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[entry[name] for name in NUMBERS] for entry in logged(Path("out")).values()]
    assert json.loads(done.stdout.splitlines()[-1]) == [pytest.approx(row) for row in rows]
