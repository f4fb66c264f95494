"""The folder of a run (examples/app/runs/run.py): nothing is overwritten, and one run at a time has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.runs.run import Run
from held_folder import held


def claim(folder: Path | str, resume: str | None = None, settings: dict | None = None) -> tuple[Path, Path | None]:
    settings = settings or {"seed": 1}
    run = Run.open(str(folder), resume, "model-64", settings)
    run.begin(settings)
    return run.folder, run.checkpoint


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert claim(out) == (out, None)
    assert json.loads((out / "run.json").read_text()) == {"seed": 1}
    assert claim(out, settings={"seed": 2}) == (out, None)  # the run before failed before it had begun
    (out / "perplexity.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not empty, and nothing is overwritten.*--resume_from_checkpoint latest"):
        claim(out)
    assert claim(out, "latest") == (out, None)
    (out / "adapter").mkdir()
    with pytest.raises(ValueError, match="a finished run without checkpoints"):
        claim(out, "latest")
    (out / "run.json").unlink()
    with pytest.raises(ValueError, match="no run of this program"):
        claim(out, "latest")


def test_a_folder_is_found_where_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        names.append(claim("")[0])
        (names[-1] / "loss.png").touch()
    assert names == [Path("finetuned") / name for name in ("model-64", "model-64-2", "model-64-3")]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (tmp_path / "run.json").write_text("{}")
    marker = {"step": 2, "resumable": True, "settings": {"seed": 1, "context_length": 64}}
    (checkpoint / "complete.json").write_text(json.dumps(marker))
    assert claim(tmp_path, "latest", {"seed": 1, "context_length": 64}) == (tmp_path, checkpoint)
    with pytest.raises(ValueError, match="checkpoint-2 belongs to another run: context_length was 64 and is 128"):
        claim(tmp_path, "latest", {"seed": 1, "context_length": 128})
    (checkpoint / "complete.json").write_text(json.dumps({**marker, "resumable": False}))
    with pytest.raises(ValueError, match="--save_only_model"):
        claim(tmp_path, "latest", {"seed": 1, "context_length": 64})


@pytest.mark.parametrize("content", ["[]", "null", '{"step": 2}', '{"step": "2", "resumable": true, "settings": {}}'])
def test_a_marker_that_was_changed_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "checkpoint-2" / "complete.json").write_text(content)
    with pytest.raises(ValueError, match=r"checkpoint-2/complete.json is not as it was written"):
        claim(tmp_path, "latest")
    (tmp_path / "checkpoint-2" / "complete.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoint-2/complete.json cannot be read, it is no JSON: Expecting"):
        claim(tmp_path, "latest")


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    for name in (".adapter.unfinished-123", "checkpoint-2"):
        (tmp_path / name).mkdir()
    (tmp_path / ".adapter.unfinished-123.lock").touch()
    (tmp_path / "run.json").write_text("{}")
    claim(tmp_path, "latest")
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", ".lock"}

    (tmp_path / "run.json").rename(tmp_path / "run.json.tmp")  # killed when it was about to be renamed
    assert claim(tmp_path, "latest") == (tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", ".lock"}


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with held(tmp_path / "finetuned" / "model-64" / ".lock"):
        for resume in (None, "latest"):
            with pytest.raises(ValueError, match="another run is writing to it"):
                claim("finetuned/model-64", resume)
        assert claim("")[0] == Path("finetuned/model-64-2")
    assert claim("finetuned/model-64")[0] == Path("finetuned/model-64")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output_dir .*file/out cannot be written to: Not a directory"):
        claim(tmp_path / "file" / "out")
