"""benchmarks/step_time.py: each way attends as it says, and one that has too little memory stops none of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import step_time
from clock import Clock

ON_A_CPU = ["s2_sink", "s2", "dense", "sdpa"]


def run(file: Path, *words: str) -> dict[str, Any]:
    step_time.main(["--device", "cpu", "--layers", "1", "--seqlen", "64", "--output", str(file), *words])
    return json.loads(file.read_text())


def test_ways_attend_as_they_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = run(tmp_path / "r.json", "--steps", "3")
    (point,) = measured["points"]
    results, losses = point["results"], {name: found["loss"] for name, found in point["results"].items()}
    assert list(results) == ON_A_CPU and point["group_size"] == 16
    assert losses["dense"] == pytest.approx(losses["sdpa"], abs=1e-3)
    assert len({round(loss, 3) for loss in losses.values()}) == 3  # groups, with and without the first token; dense
    for found in results.values():
        assert len(found["seconds"]) == 3 and found["least"] <= found["median"] <= found["most"]
        assert found["tokens_a_second"] * found["median"] == pytest.approx(64)
    assert measured["environment"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert printed.startswith("1 of the 2 layers") and "| 64 | S2-Attn and the first token |" in printed


def test_out_of_memory_is_said_and_the_others_go_on(tmp_path: Path, monkeypatch, capsys) -> None:
    """It may come as late as in a step that counts."""
    turns: list[int] = []
    time = Clock.time

    def short_of_memory(self: Clock, work: Any) -> Any:
        turns.append(1)
        result = time(self, work)
        if len(turns) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return result

    monkeypatch.setattr(Clock, "time", short_of_memory)
    (point,) = run(tmp_path / "r.json", "--steps", "2", "--ways", "s2_sink", "s2", "sdpa")["points"]
    assert point["results"]["s2"] == {"reason": "out of memory"} and len(turns) == 8
    assert all(len(point["results"][name]["seconds"]) == 2 for name in ("s2_sink", "sdpa"))
    assert "| 64 | S2-Attn as published | out of memory |" in capsys.readouterr().out


def test_ours_must_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Clock, work: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(Clock, "time", broken)
    with pytest.raises(SystemExit, match="ours did not run: no kernel"):
        run(tmp_path / "r.json", "--ways", "s2", "sdpa")


def test_a_gpu_has_ways_of_its_own() -> None:
    shape = step_time.SHAPES["cuda"]
    assert shape["hidden_size"] // shape["num_attention_heads"] == 128 and shape["num_hidden_layers"] == 32
    on_a_gpu = [name for name, way in step_time.WAYS.items() if "cuda" in way.devices]
    assert on_a_gpu == ["s2_sink", "s2", "dense", "flash", "cudnn"]
    assert step_time.parse(["--device", "cuda"]).seqlen == [16384, 32768, 65536, 102400]
