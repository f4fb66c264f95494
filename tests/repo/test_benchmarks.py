"""The benchmark measures what it says: pairs are counted right, providers that differ are refused, tables follow."""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from torch import Tensor

import attention
import table
from attention import check, measure
from clock import Clock
from exercise import slowest
from finetune_runs import ROOT, torchrun
from longlora_ext import s2attn
from longlora_ext.reference import s2attn_mask
from providers import PROVIDERS, Attention, NotHere, Pattern, Point, original, s2_pattern
from table import MARKED, PAGES, tables, with_tables

POINT = Point("cpu", "float32", head_dim=16, heads=4, kv_heads=2, seqlen=96, batch=2, group_size=24)
RAGGED = replace(POINT, seqlen=101)
OURS, FLEX = ([name for name in PROVIDERS if name.startswith(kind)] for kind in ("ours", "flex"))


def mask_of(point: Point, pattern: Pattern, head: int) -> Tensor:
    shifted = head >= pattern.first_shifted_head
    return s2attn_mask(point.seqlen, pattern.group_size, shifted, sink=pattern.sink, window=pattern.window)


@pytest.mark.parametrize("point", [POINT, RAGGED, replace(POINT, seqlen=10)], ids=lambda point: str(point.seqlen))
def test_pairs_are_those_of_the_mask(point: Point) -> None:
    def pairs(pattern: Pattern) -> int:
        of_head = (mask_of(point, pattern, head).sum() for head in range(point.heads))
        return point.batch * int(sum(of_head))

    for name in (*OURS, "strided", "dense", "groups"):
        pattern = PROVIDERS[name].pattern(point)
        assert pattern.pairs(point) == pairs(pattern), name
    # Rolling wraps around: all heads attend as the unshifted ones do.
    assert PROVIDERS["rolled"].pattern(point).pairs(point) == PROVIDERS["groups"].pattern(point).pairs(point)


@pytest.mark.parametrize("name", [name for name, provider in PROVIDERS.items() if "cpu" in provider.devices])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_provider_computes_what_ours_does(name: str, kv_heads: int, dtype: str) -> None:
    point, provider = replace(POINT, kv_heads=kv_heads, dtype=dtype), PROVIDERS[name]
    if name in FLEX:
        with pytest.raises(NotHere, match="no backward on a CPU"):
            provider.make(point)
        return
    check(point, provider.pattern(point), provider.make(point), point.tensors())


def segments_one_by_one(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size) -> Tensor:
    """What torch's varlen attention computes, which runs on a GPU alone."""
    assert window_size == (-1, 0) and torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q.dtype == torch.int32
    assert max_q == max_k == cu_seq_q.diff().max()
    parts = []
    for begin, end in pairwise(cu_seq_q.tolist()):
        heads_first = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("point", [POINT, RAGGED], ids=["whole", "ragged"])
def test_original_computes_what_ours_does(point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", segments_one_by_one)
    check(point, s2_pattern(point), original(point), point.tensors())


@pytest.mark.parametrize("name", FLEX)
def test_mask_for_flex_attention(name: str) -> None:
    """That of ours beside it, as the definition has it."""
    pattern, i = PROVIDERS[name].pattern(RAGGED), torch.arange(RAGGED.seqlen)
    assert pattern == PROVIDERS[name.replace("flex", "ours")].pattern(RAGGED)
    for head in range(RAGGED.heads):
        mask = pattern.visible(torch.tensor(0), torch.tensor(head), i[:, None], i[None, :])
        assert torch.equal(mask, mask_of(RAGGED, pattern, head))


def test_the_window_has_as_many_pairs_as_the_groups() -> None:
    """But for a few at the edges: an average of half a group."""
    point = replace(POINT, seqlen=4096, group_size=1024)
    groups, window = (PROVIDERS[name].pattern(point).pairs(point) for name in ("ours", "ours_window"))
    assert window == pytest.approx(groups, rel=0.05)


def unshifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s2attn(q, k, v, POINT.group_size, first_shifted_head=POINT.heads)


def doubled_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s2attn(q, k, v + (v - v.detach()), POINT.group_size)


def not_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s2attn(q, k, v, POINT.group_size) * torch.nan


@pytest.mark.parametrize(("wrong", "name"), [(unshifted, "out"), (doubled_gradient, "dv"), (not_a_number, "out")])
def test_wrong_provider_is_refused(wrong: Attention, name: str) -> None:
    with pytest.raises(NotHere, match=f"^{name} differs from ours by"):
        check(POINT, s2_pattern(POINT), wrong, POINT.tensors())


def test_processor_time_leaves_out_what_others_take() -> None:
    _, elapsed = Clock("cpu", processor_time=True).time(lambda: time.sleep(0.5))
    assert elapsed() < 500


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    command = [str(argument) for argument in arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.full
def test_bytes_of_a_shared_sequence(tmp_path: Path) -> None:
    """The halo's are those of the formula; Ulysses' are half of q, k, v and the result, there and back."""
    file = tmp_path / "run.json"
    size = shlex.split("--seqlen 256 --heads 4 --kv_heads 2 --head_dim 16 --repeats 2")
    result = run(*torchrun(2), "benchmarks/shared_sequences.py", *size, "--output", file, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    halo, ulysses = (json.loads(file.read_text())["ways"][name] for name in ("halo", "ulysses"))
    assert halo["bytes sent by all"] == halo["bytes of the formula"] == 2 * 2 * 1 * 32 * 16 * 4
    assert ulysses["most bytes sent by a rank"] == 2 * (2 * 4 + 2 * 2) * 128 * 16 * 4 // 2
    assert all(way["median seconds"] > 0 and way["most peak MiB of a rank"] >= 0 for way in (halo, ulysses))


class QuickClock(Clock):
    """Leaves in the cache what is there: to write 256 MiB before each of 288 times takes six seconds."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.flush = self.flush[:1]


def test_run_from_measurement_to_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(program: ModuleType, *arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [str(program.__file__), *map(str, arguments)])
        program.main()
        return capsys.readouterr().out

    file = tmp_path / "results" / "run.json"
    size = shlex.split("--device cpu --seqlen 48 30 --head_dim 16 --heads 4 --kv_heads 2 1 --dtype float32 --rounds 3")
    monkeypatch.setattr(attention, "Clock", QuickClock)
    shown = printed(attention, *size, "--output", file, "--note", "A test.")
    measured = json.loads(file.read_text())
    assert measured["environment"]["threads"] == torch.get_num_threads()
    assert [(p["seqlen"], p["group_size"], p["kv_heads"]) for p in measured["points"]] == [
        (30, 6, 2), (30, 6, 1), (48, 12, 2), (48, 12, 1),
    ]  # fmt: skip
    expected = [name for name, provider in PROVIDERS.items() if "cpu" in provider.devices]
    for point in measured["points"]:
        assert list(point["results"]) == expected  # none is dropped without a word
        assert {name for name, result in point["results"].items() if "reason" in result} == (
            {*FLEX} | ({"rolled"} if point["kv_heads"] == 1 else set())
        )
        ours = point["results"]["ours"]
        for direction, operations in (("forward", 4), ("backward", 10)):
            rate = operations * 16 * ours["pairs"] / ours[direction]["ms"] * 1e-9
            assert ours[direction]["tflops"] == pytest.approx(rate, rel=1e-3)
            assert ours[direction]["min_ms"] <= ours[direction]["ms"] <= ours[direction]["max_ms"]
    assert file.with_suffix(".png").stat().st_size > 10_000
    assert shown == printed(table, file)
    assert "rolling half of the KV heads needs an even number of them (30, 48 tokens)" in shown
    assert shown.endswith("A test.\n")


def made_up_run() -> dict:
    def result(ms: float) -> dict:
        return {way: {"ms": ms, "tflops": 8 / ms} for way in ("forward", "backward")} | {"peak_bytes": 3 * 2**20}

    points = [
        {"device": "cuda", "dtype": "bfloat16", "head_dim": d, "heads": 4, "kv_heads": 2, "seqlen": 1024, "batch": 1}
        | {"group_size": 256}
        | {"results": {"ours": result(d / 32), "original": result(d / 8), "flex": {"reason": "no compiler"}}}
        for d in (64, 128)
    ]
    environment = {"device": "GPU X", "driver": "1.2", "torch": "9.9", "date": "2000-01-01 00:00 UTC", "commit": "abc"}
    return {"environment": environment | {"note": None}, "matmul_tflops": {"bfloat16": 16}, "points": points}


def test_tables_show_times_rates_memory_and_reasons() -> None:
    text = tables(made_up_run(), head_dim="64")
    assert "head dim 128" not in text
    assert "| 1,024 | backward | 2 ms (4) | 4.00x (1) | - |" in text
    assert "| 1,024 | 3 | 3 | - |" in text
    assert "- FlexAttention: no compiler (1,024 tokens)" in text
    assert text.endswith("GPU X, driver 1.2, torch 9.9, 2000-01-01, commit abc.")


def test_failing_provider_says_why_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(point: Point) -> Attention:
        return lambda q, k, v: q[10**6]

    monkeypatch.setitem(PROVIDERS, "dense", replace(PROVIDERS["dense"], make=broken))
    monkeypatch.setitem(PROVIDERS, "rolled", replace(PROVIDERS["rolled"], make=lambda point: unshifted))
    unfit: dict[str, str | None] = {}
    for _ in range(2):  # what was found to differ is remembered
        results = measure(POINT, ["ours", "dense", "rolled", "groups"], Clock("cpu"), unfit, SimpleNamespace(rounds=1))
        assert "out of bounds" in results["results"]["dense"]["reason"]
        assert "out differs from ours" in results["results"]["rolled"]["reason"]
        assert results["results"]["ours"]["rounds"] == results["results"]["groups"]["rounds"] == 1
    assert "out differs from ours" in str(unfit.pop("rolled")) and unfit == {"ours": None, "groups": None}


def test_marked_tables_are_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(made_up_run()))
    stale = f"before\n<!-- table of {file} head_dim=64 -->\nold figures\n<!-- end of table -->\nafter"
    fresh = with_tables(stale)
    assert "old figures" not in fresh and "2 ms (4)" in fresh and "head dim 128" not in fresh
    assert fresh.startswith("before\n") and fresh.endswith("\nafter") and with_tables(fresh) == fresh


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_show_the_results_that_are_checked_in(page: Path) -> None:
    text = page.read_text()
    assert MARKED.search(text) and with_tables(text) == text, "run `python benchmarks/table.py --readme`"


def test_profile_takes_the_slowest_point(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(made_up_run()))
    assert slowest(file).head_dim == 128


def test_session_says_what_it_had_no_time_for(tmp_path: Path) -> None:
    result = run("benchmarks/gpu_session.sh", tmp_path, "--cpu", SESSION_SECONDS="4")
    assert result.returncode == 1
    summary = (tmp_path / "summary.txt").read_text()
    assert result.stdout.endswith(summary)
    for name in ("environment", "library", "tests", "benchmark"):
        assert f"\n{name:<12} NOT RUN " in f"\n{summary}", summary


@pytest.mark.full
def test_session_rehearsal(tmp_path: Path) -> None:
    result = run("benchmarks/gpu_session.sh", tmp_path, "--cpu")
    assert result.returncode == 0, result.stdout
    assert len(json.loads((tmp_path / "attention_cpu.json").read_text())["points"]) == 4
