"""What processes compute together is what one computes alone: the tiled loss under ZeRO, and Ulysses."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from finetune_runs import ROOT, found_by, make_model, make_text, run
from longlora_ext._deepspeed_ulysses import first_shifted_head, sequence_parallel
from parallel_worker import SHARED, ULYSSES


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found_by("parallel_worker.py", tmp_path_factory.mktemp("parallel"), processes=2)


@pytest.mark.parametrize("case", ["zero2 tied", "zero2 full", "zero3 tied", "zero3 full"])
def test_the_tiled_loss_trains_what_the_plain_one_trains(found: dict[str, Any], case: str) -> None:
    plain, tiled = found[case]["losses"]
    assert tiled == pytest.approx(plain, rel=1e-5)
    assert plain[2] < plain[0] - 0.1
    assert found[case]["distance"] < 1e-5


@pytest.mark.parametrize("case", ULYSSES)
def test_two_halves_of_a_row_are_the_row(found: dict[str, Any], case: str) -> None:
    alone, together = found[case]["losses"]
    assert together == pytest.approx(alone, rel=1e-6)
    assert found[case]["distance"] < 1e-6


@pytest.mark.parametrize("case", SHARED)
def test_a_model_shares_its_rows(found: dict[str, Any], case: str) -> None:
    alone, together = found[case]["losses"]
    assert together == pytest.approx(alone, rel=1e-6)
    assert found[case]["distance"] < 1e-6
    assert found[case]["layers"] == 2


def test_documents_are_told_by_positions_alone(found: dict[str, Any]) -> None:
    said = found["no position_ids"]
    for case in ("none", "mask"):
        assert "by position_ids alone: pass these, and neither cu_seq_lens_q nor a mask with padding" in said[case]
    assert "have no KV cache" in said["cache"]
    assert "cannot share sequences with rope_type 'dynamic'" in said["dynamic"]


def test_padding_is_refused_where_it_would_not_reach_the_attention(found: dict[str, Any]) -> None:
    assert "no attention_mask with padding under sequence parallelism" in found["mask"]["error"]


@pytest.mark.parametrize(
    ("heads", "ranks", "first"),
    [(8, 2, [4, 0]), (6, 2, [3, 0]), (6, 3, [2, 1, 0]), (9, 3, [3, 1, 0]), (4, 4, [1, 1, 0, 0]), (7, 1, [3])],
)
def test_every_rank_shifts_its_share_of_the_second_half(
    monkeypatch: pytest.MonkeyPatch, heads: int, ranks: int, first: list[int]
) -> None:
    assert sequence_parallel() == (0, 1)
    for rank in range(ranks):
        monkeypatch.setattr("longlora_ext._deepspeed_ulysses.sequence_parallel", lambda rank=rank: (rank, ranks))
        assert first_shifted_head(heads, heads // ranks) == first[rank]
    assert sum(heads // ranks - each for each in first) == heads - heads // 2


def test_heads_split_in_another_way_are_refused() -> None:
    with pytest.raises(ValueError, match="num_attention_heads is 8, but this layer has 4 heads"):
        first_shifted_head(8, 4)


Run = tuple[list[tuple[float, float]], list[float]]
#: What a token sees of its group, and besides.
PATTERNS: dict[str, dict[str, Any]] = {"group": {}, "window and sink": {"window": 5, "sink": True}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """The loss and the gradient's norm of each step of a run of the trainer, four sequences a step, and evaluations."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_text("".join(f"{n * n} " for n in range(3000))[: 128 * 60 - 1])  # one document, no padding
    options: dict[str, Any] = {
        "model_name_or_path": make_model(folder / "model"), "train_file": text,
        "eval_file": make_text(folder / "held_out.jsonl"), "eval_tokens": 256, "max_steps": 3, "save_steps": 3,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "learning_rate": 1e-2, "warmup_steps": 0,
        "logging_steps": 1, "max_grad_norm": 1e9, "dense_steps": 1, "eval_strategy": "steps", "eval_steps": 2,
    }  # fmt: skip

    def steps(processes: int | None = None, **more: Any) -> Run:
        output = folder / f"out{len(list(folder.glob('out*')))}"
        given = [str(part) for name, value in (options | more).items() for part in (f"--{name}", value)]
        done = run(*given, "--output_dir", output, processes=processes)
        assert done.returncode == 0, done.stdout + done.stderr
        history = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
        evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        return [(entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry], evaluated

    return steps


@pytest.fixture(scope="module")
def alone(trained: Callable[..., Run]) -> Callable[[str], Run]:
    return cache(lambda pattern: trained(**PATTERNS[pattern]))


def sharding(config: str) -> dict[str, object]:
    """The options under which each process has a part of the model, or "whole", all of it."""
    others: dict[str, dict[str, object]] = {"whole": {}, "fsdp": {"fsdp": "full_shard"}}
    return others.get(config, {"deepspeed": ROOT / "examples" / "ds_configs" / f"{config}.json"})


@pytest.mark.parametrize(
    ("processes", "config", "by", "pattern"),
    [
        (2, "zero2", "auto", "group"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                (4, "zero2", "halo", "window and sink"), (4, "zero3", "auto", "window and sink"),
                (2, "zero2", "ulysses", "window and sink"), (2, "zero3", "ulysses", "group"),
                (2, "zero3_offload", "auto", "group"), (2, "whole", "halo", "window and sink"),
                (4, "whole", "ulysses", "group"), (2, "fsdp", "auto", "group"),
                (2, "fsdp", "ulysses", "window and sink"),
            )
        ),
    ],
)  # fmt: skip
def test_the_trainer_shares_sequences(
    trained: Callable[..., Run], alone: Callable[[str], Run], processes: int, config: str, by: str, pattern: str
) -> None:
    """Pairs of processes, in all steps and their last, dense one."""
    found, evaluated = trained(
        processes,
        sequence_parallel_size=2,
        sequence_parallel=by,
        gradient_accumulation_steps=4 * 2 // processes,
        **PATTERNS[pattern],
        **sharding(config),
    )
    assert len(found) == 3 and len(evaluated) == 2
    losses_alone, evaluated_alone = alone(pattern)
    assert evaluated == pytest.approx(evaluated_alone, rel=1e-4)
    for ours, theirs in zip(found, losses_alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("config", ["zero2", "zero3", "fsdp"])
def test_the_sink_and_the_window_reach_the_operator(
    trained: Callable[..., Run], alone: Callable[[str], Run], config: str
) -> None:
    """On two processes, which have a sequence each. Evaluation is dense, and so is the last step."""
    found, _ = trained(2, **PATTERNS["window and sink"], gradient_accumulation_steps=2, **sharding(config))
    for ours, theirs in zip(found, alone("window and sink")[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    norms = [steps[0][1] for steps in (found, alone("group")[0])]  # the gradient's of the first step
    assert norms[0] != pytest.approx(norms[1], rel=1e-3)
