"""What two processes compute together is what one computes alone: the tiled loss under ZeRO, and Ulysses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_runs import environment, torchrun

from longlora_ext._ulysses import first_shifted_head, sequence_parallel

WORKER = Path(__file__).with_name("parallel_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result = tmp_path_factory.mktemp("parallel") / "result.json"
    command = [*torchrun(2), str(WORKER), str(result)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(result.read_text())


@pytest.mark.parametrize("case", ["zero2 tied", "zero2 full", "zero3 tied", "zero3 full"])
def test_the_tiled_loss_trains_what_the_plain_one_trains(found: dict[str, Any], case: str) -> None:
    plain, tiled = found[case]["losses"]
    assert tiled == pytest.approx(plain, rel=1e-5)
    assert plain[2] < plain[0] - 0.1
    assert found[case]["distance"] < 1e-5


@pytest.mark.parametrize("case", ["ulysses", "ulysses tiled"])
def test_two_halves_of_a_row_are_the_row(found: dict[str, Any], case: str) -> None:
    alone, together = found[case]["losses"]
    assert together == pytest.approx(alone, rel=1e-6)
    assert found[case]["distance"] < 1e-6


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
        monkeypatch.setattr("longlora_ext._ulysses.sequence_parallel", lambda rank=rank: (rank, ranks))
        assert first_shifted_head(heads, heads // ranks) == first[rank]
    assert sum(heads // ranks - each for each in first) == heads - heads // 2


def test_heads_split_in_another_way_are_refused() -> None:
    with pytest.raises(ValueError, match="num_attention_heads is 8, but this layer has 4 heads"):
        first_shifted_head(8, 4)
