"""Attention on sequences that processes share: results, bytes on the wire, and what goes wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import forks
from finetune_runs import environment
from halo_cases import CASES, HEAD_DIM, Case
from longlora_ext.parallel._layout import Layout, rows_before
from longlora_ext.reference import s2attn_mask
from patience import patience

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
RANKS = [2, *(pytest.param(ranks, marks=pytest.mark.full) for ranks in (3, 4, 8))]


@pytest.fixture(scope="module", params=RANKS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    result = tmp_path_factory.mktemp("halo") / "result.json"
    environment_here = environment()
    path = f"{HELPERS}:{ROOT / 'benchmarks'}:{environment_here['PYTHONPATH']}"
    words = [HELPERS / "halo_worker.py", result]
    done = forks.run(words, environment_here | {"PYTHONPATH": path}, request.param, modules=("torch.distributed",))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(result.read_text())


@pytest.mark.parametrize("name", CASES)
def test_ranks_attend_as_one(found: list[dict[str, Any]], name: str) -> None:
    ways = [way for way in (name, f"ulysses {name}") if way in found[0]]
    assert max(rank[way]["distance"] for rank in found for way in ways) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_only_what_is_seen_is_sent(found: list[dict[str, Any]], name: str) -> None:
    """Each rank gets the rows that the mask shows its own rows, and sends their gradients back."""
    case, ranks = CASES[name], len(found)
    rows = 2 * 8 * HEAD_DIM * sum(rows_seen(case, ranks, rank) for rank in range(ranks))  # of k and v, in fp64
    assert sum(rank[name]["forward"] for rank in found) == rows
    assert sum(rank[name]["backward"] for rank in found) == rows


def rows_seen(case: Case, ranks: int, rank: int) -> int:
    """Rows of other ranks that a rank's rows see, from the first one on, for each KV head, and the sinks' rows."""
    begin, seqlen = rank * case.length, ranks * case.length
    places = case.places(ranks)
    doc_start = torch.arange(seqlen) - places
    first_shifted = case.heads // 2 if case.first_shifted_head is None else case.first_shifted_head
    of_head = []
    for shifted in (False, True):
        mask = s2attn_mask(seqlen, case.group_size, shifted, doc_start, window=case.window)
        seen = mask[:, begin : begin + case.length, :begin].any(1)  # [B, rows before]
        of_head.append(max(begin - int(row.nonzero()[0]) if row.any() else 0 for row in seen))
    each = case.heads // case.kv_heads
    rows = 0
    for head in range(case.kv_heads):
        its = [of_head[query >= first_shifted] for query in range(head * each, (head + 1) * each)]
        rows += max(its) * case.batch
    return rows + (case.kv_heads * int((places[:, begin] > 0).sum()) if case.sink else 0)


def test_the_bytes_of_the_design(found: list[dict[str, Any]]) -> None:
    """2 * (Hkv/2) * (G/2) * D numbers to one neighbour where L is a multiple of G, or G/2."""
    for name, group in (("a multiple of the group", 8), ("the group", 16), ("half of the group", 32)):
        expected = 2 * (2 // 2) * (group // 2) * HEAD_DIM * 8
        if name != "half of the group":
            assert [rank[name]["forward"] for rank in found] == [expected] * (len(found) - 1) + [0]
        else:  # ranks lack it in turns for one half of the heads and for the other
            assert [rank[name]["forward"] for rank in found] == [expected] * (len(found) - 1) + [0]
            assert found[0][name]["forward"] == 2 * 1 * 16 * HEAD_DIM * 8
    if "ulysses the group" in found[0]:
        ranks = len(found)
        numbers = (2 * 4 + 2 * max(2, ranks)) * 16 * HEAD_DIM * (ranks - 1) // ranks
        assert {rank["ulysses the group"]["forward"] for rank in found} == {numbers * 8}


def test_bf16_goes_over_the_wire_and_sums_are_exact(found: list[dict[str, Any]]) -> None:
    case = Case(length=32, group_size=64)
    ranks = len(found)
    rows = sum(rows_seen(case, ranks, rank) for rank in range(ranks))
    assert sum(rank["bf16"]["sent"] for rank in found) == 2 * 2 * 2 * HEAD_DIM * rows  # bf16, forward and back
    assert max(rank["bf16"]["ours"] for rank in found) <= 2 * max(rank["bf16"]["plain"] for rank in found)


def test_what_ranks_have_to_know_is_asked_once(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["again"]["same"] and rank["again"]["asked"] == [1, 2]
        assert rank["again"]["distance"] < 1e-6


def test_a_mistake_after_a_good_call_is_an_error_at_once(found: list[dict[str, Any]]) -> None:
    """The rank that made it waited for others, which had no reason to come."""
    assert found[-1]["errors"]["after a good call"].startswith("halo_s2attn: scale must be finite")


MESSAGES = {
    "length": "seqlen must be the same on all ranks, but is 8 on rank 0 and 6 on rank {last}; the number of ranks must",
    "group": "group_size must be the same on all ranks, but is 8 on rank 0 and 10 on rank {last}",
    "odd": "rank {last} of {ranks}: group_size must be a positive even number, but is 7",
    "shape": "rank {last} of {ranks}: position_ids must be [1, 8] or [1, 8], but are [1, 7]",
    "dtype": "rank {last} of {ranks}: v must have q's dtype torch.float32, but is torch.float64",
    "before": "position_ids of rank 0 begin with 1 in sequence 0, but only 0 tokens precede them",
    "gap": "rank 0 of {ranks}: position_ids must count each document from 0, but go from 2 to 7 at its token 3",
    "negative": "rank 0 of {ranks}: position_ids must not be negative, but begin with -1",
    "scale": "scale must be the same on all ranks, but is 1.0 on rank 0 and 0.5 on rank {last}",
    "no number": "rank 0 of {ranks}: scale must be finite and at most 1e+30, but is nan",
    "local": "position_ids of rank 1 begin with 5 in sequence 0, but those of rank 0 end with 7",
}


@pytest.mark.parametrize("attend", ["halo_s2attn", "ulysses_s2attn"])
@pytest.mark.parametrize("name", MESSAGES)
def test_a_mistake_of_one_rank_is_the_same_error_on_all(found: list[dict[str, Any]], attend: str, name: str) -> None:
    message = MESSAGES[name].format(last=len(found) - 1, ranks=len(found))
    for rank in found:
        assert rank["errors"][f"{attend} {name}"].startswith(f"{attend}: {message}")


def test_the_halo_has_nothing_but_kernels(found: list[dict[str, Any]]) -> None:
    for rank in found:
        said = rank["errors"]["halo_s2attn kernel"]
        assert said.startswith(f"halo_s2attn: rank 0 of {len(found)}: there is no kernel, and only ulysses_s2attn can")
        assert "head_dim" in said and "ulysses_s2attn kernel" not in rank["errors"]


DIES = """
import os, sys
from datetime import timedelta
import torch, torch.distributed as dist
from longlora_ext.parallel import _exchange, halo_s2attn
_exchange.ROLL_CALL = 1.0
rank, how = int(sys.argv[1]), sys.argv[3]
store = "file://" + sys.argv[2]
dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
group = dist.new_group(timeout=timedelta(seconds=2 if how == "late" else 60))
x, places = torch.ones(1, 8, 2, 8, requires_grad=True), torch.arange(8)[None] + 8 * rank
out = halo_s2attn(x, x, x, 32, places, group=group)
if rank == 1:
    sys.stdin.read() if how == "late" else os._exit(0)
try:
    halo_s2attn(x, x, x, 32, places.clone() if "agreed" in how else places, group=group).sum().backward()
except RuntimeError as error:
    print(error, flush=True)
os._exit(0)
"""


def test_a_rank_that_died_is_named(found: list[dict[str, Any]]) -> None:
    """Alone with two ranks; of more, those that wait for it cannot be told from it."""
    last = len(found) - 1
    said = re.match(
        rf"rank 0 of the {len(found)} that share a sequence waited in vain for (?:rank|one of ranks) ([\d, ]+)"
        r"( \(others of these may wait for it too\))?, which failed, or took",
        found[0]["dead"],
    )
    assert said, found[0]["dead"]
    named = [int(rank) for rank in said[1].split(", ")]
    assert last in named and 0 not in named and (len(named) > 1) == bool(said[2])
    assert named == [1] or last > 1


@pytest.mark.full
@pytest.mark.parametrize("how", ["dead", "late", "dead before it is agreed"])
def test_who_does_not_come_is_named(how: str, tmp_path: Path) -> None:
    """By the ranks that wait for it, within the group's timeout: none hangs."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DIES, str(rank), str(tmp_path / "store"), how],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    said = processes[0].stdout.read()  # type: ignore[union-attr]
    for process in processes:
        process.communicate(timeout=patience())
    assert "rank 0 of the 2 that share a sequence waited in vain for rank 1, which failed, or took longer" in said


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(("parts", "most"), [(1, 1.0), (2, 1.0), (4, 5 / 3)])
def test_work_is_balanced_without_a_zigzag(ranks: int, parts: int, most: float) -> None:
    """Pairs of a query and a key, in both halves of the heads; L = G / parts. Ranks where groups begin have less."""
    group = 64
    length, seqlen = group // parts, ranks * group // parts
    pairs = sum(s2attn_mask(seqlen, group, shifted).sum(1) for shifted in (False, True)).view(ranks, length).sum(1)
    others = pairs[parts:].double() if ranks > parts else pairs[1:].double()
    assert others.max() / others.min() <= most + 0.02
    assert pairs.max() == pairs[1:].max()


def test_a_layout_is_arithmetic() -> None:
    """A row's reach, and who sends what where L < G / 2: several neighbours to the left."""
    assert [rows_before(position, 8, False, None) for position in (0, 7, 8, 13)] == [0, 7, 0, 5]
    assert [rows_before(position, 8, True, None) for position in (0, 3, 4, 11, 12)] == [0, 3, 0, 7, 0]
    assert rows_before(13, 8, False, 3) == 2
    layout = Layout(4, 4, ((0,), (4,), (8,), (12,)), 4, 2, 32, 2)
    assert [(part.halo, part.kv_heads) for part in layout.parts(3)] == [(12, slice(0, 2))]
    assert [layout.numbers_sent(source, 3) for source in range(4)] == [2 * 2 * 4] * 3 + [0]
