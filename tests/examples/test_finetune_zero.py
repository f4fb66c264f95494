"""examples/finetune_llama.py on several processes, under FSDP and every configuration of examples/ds_configs, against
one."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from app.runs.checkpoints import complete_checkpoints
from app.training.shared_memory import SHARED_MEMORY
from finetune_runs import ROOT, SCRIPT, deepspeed, environment, losses, make_model, make_text, run, small_run, torchrun
from longlora_ext.adapter import load
from patience import wait_until
from same_run import assert_same_run

CONFIGS = sorted(path.stem for path in (ROOT / "examples" / "ds_configs").glob("*.json"))
EVERY = [*CONFIGS, "fsdp"]
FULL = pytest.mark.full
#: What is started by the launcher itself.
REALLY = ("zero2", "torchrun")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str]]:
    """The command line of a run of six steps, four sequences each, to an output folder: all that the pattern can be,
    the first token too, which is the default."""
    folder = tmp_path_factory.mktemp("inputs")
    inputs = make_model(folder / "model"), make_text(folder / "text.jsonl")
    return lambda output: [*small_run(*inputs, output), "--window", "20", "--dense_layers", "1"]


@pytest.fixture(scope="module")
def alone(arguments: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process trains, without DeepSpeed."""
    output = tmp_path_factory.mktemp("alone") / "out"
    done = run(*arguments(output))
    assert done.returncode == 0, done.stderr
    assert "in them a window of 20, and the first token, dense in layers 1 in training" in done.stdout
    return output


def under(config: str) -> list[str]:
    """What is added to the command line for two processes: half the accumulation makes the same steps."""
    sharding = {"torchrun": [], "fsdp": ["--fsdp", "full_shard"]}
    zero = ["--deepspeed", str(ROOT / "examples" / "ds_configs" / f"{config}.json")]
    return ["--gradient_accumulation_steps", "1", *sharding.get(config, zero)]


def launcher(config: str) -> tuple[str, ...]:
    """What a user starts two processes with."""
    return torchrun(2) if config in ("torchrun", "fsdp") else deepspeed(2)


def run_two(config: str, *arguments: str) -> subprocess.CompletedProcess:
    """By the launcher under two of the configurations. The others are as in torchrun's processes, but start faster."""
    return run(*arguments, *under(config), launcher=launcher(config) if config in REALLY else (), processes=2)


@pytest.fixture(scope="module")
def together(arguments: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What two processes train under a configuration, undisturbed."""
    made: dict[str, Path] = {}

    def outcome(config: str) -> Path:
        if config not in made:
            output = tmp_path_factory.mktemp(config) / "out"
            done = run_two(config, *arguments(output))
            assert done.returncode == 0, done.stdout + done.stderr
            if config in REALLY and "--master_port" in done.args:  # it is part of the names in the machine's memory
                port = done.args[done.args.index("--master_port") + 1]
                assert not list(SHARED_MEMORY.glob(f"*_{port}_*"))
            assert done.stdout.count("measuring perplexity: before") == 1
            stage = re.fullmatch(r"zero(\d).*", config)
            said = {"torchrun": "2, no DeepSpeed", "fsdp": "2, FSDP"}
            assert (f"2, ZeRO-{stage[1]}" if stage else said[config]) in done.stdout
            made[config] = output
        return made[config]

    return outcome


def perplexities(output: Path) -> dict[str, dict[str, float]]:
    return json.loads((output / "perplexity.json").read_text())["perplexity"]


def test_there_are_the_configurations_that_are_tested() -> None:
    assert CONFIGS == ["zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize("config", ["zero3", "fsdp", *(pytest.param(c, marks=FULL) for c in CONFIGS if c != "zero3")])
def test_two_processes_train_what_one_process_trains(alone: Path, together: Callable[[str], Path], config: str) -> None:
    output = together(config)
    assert list(losses(output)) == [1, 2, 3, 4, 5, 6]
    assert losses(output) == pytest.approx(losses(alone), abs=1e-3)
    ours, theirs = perplexities(output), perplexities(alone)
    for row, tolerance in (("before", 1e-4), ("scaling only", 1e-4), ("after", 1e-2)):
        assert ours[row] == pytest.approx(theirs[row], rel=tolerance)
    load(output / "adapter")


@FULL
def test_two_processes_without_deepspeed(alone: Path, together: Callable[[str], Path]) -> None:
    assert losses(together("torchrun")) == pytest.approx(losses(alone), abs=1e-3)


@FULL
@pytest.mark.parametrize("config", EVERY)
def test_a_killed_run_goes_on(
    arguments: Callable[[Path], list[str]], together: Callable[[str], Path], tmp_path: Path, config: str
) -> None:
    """The kill takes all processes, launcher included, as the end of a machine's lease does."""
    given = [*arguments(tmp_path / "out"), "--resume_from_checkpoint", "latest"]
    process = subprocess.Popen(
        [*launcher(config), str(SCRIPT), *given, *under(config)],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    # Where the machine is busy, the run gets further before it is killed, perhaps to its end.
    wait_until((tmp_path / "out" / "checkpoint-4").exists, lambda: process.poll() in (None, 0))
    every = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in every:  # they are of several sessions: torchrun gives each process one of its own
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(every)

    assert set(complete_checkpoints(tmp_path / "out")) <= {2, 4, 6}
    done = run_two(config, *given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from checkpoint-" in done.stdout
    assert_same_run(tmp_path / "out", together(config))


@pytest.fixture(scope="module")
def alone_in_bf16(arguments: Callable[[Path], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone_in_bf16") / "out"
    done = run(*arguments(output), "--bf16")
    assert done.returncode == 0, done.stderr
    return output


@FULL
@pytest.mark.parametrize("config", EVERY)
def test_in_bf16(arguments: Callable[[Path], list[str]], alone_in_bf16: Path, tmp_path: Path, config: str) -> None:
    """The losses are those of one process, also from a checkpoint on. bf16 rounds weights, but no count of tokens."""
    given = [*arguments(tmp_path / "out"), "--bf16", "--resume_from_checkpoint", "latest"]
    goes_on = config in ("zero2", "fsdp")  # for the others, test_a_killed_run_goes_on has to do
    for more in (["--max_steps", "4"], []) if goes_on else ([],):
        done = run_two(config, *given, *more)
        assert done.returncode == 0, done.stdout + done.stderr
    assert ("going on from checkpoint-4" in done.stdout) == goes_on
    assert losses(tmp_path / "out") == pytest.approx(losses(alone_in_bf16), abs=3e-3)


@FULL
def test_all_weights_under_fsdp(arguments: Callable[[Path], list[str]], tmp_path: Path) -> None:
    """The losses are those of one process, also from a checkpoint on."""
    given = [*arguments(tmp_path / "out"), "--full_finetune", "--resume_from_checkpoint", "latest"]
    runs = [
        run(*arguments(tmp_path / "alone"), "--full_finetune"),
        run_two("fsdp", *given, "--max_steps", "4"),
        run_two("fsdp", *given),
    ]
    for done in runs:
        assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from checkpoint-4" in runs[-1].stdout
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "alone"), abs=1e-3)
