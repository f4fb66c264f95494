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


def test_settings_are_compared_when_they_become_known(tmp_path: Path) -> None:
    """Those of the command line when the run is opened, those of the text later; each with what was recorded."""
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (tmp_path / "run.json").write_text("{}")
    marker = {"step": 2, "resumable": True, "settings": {"seed": 1, "train_sha256": "a", "template_date": "2024-07-26"}}
    (checkpoint / "complete.json").write_text(json.dumps({**marker, "perplexity": {"before": 2.0}}))
    run = Run.open(str(tmp_path), "latest", "model-64", {"seed": 1})
    assert (run.step, run.marker["perplexity"], run.recorded("template_date")) == (2, {"before": 2.0}, "2024-07-26")
    with pytest.raises(ValueError, match="checkpoint-2 belongs to another run: train_sha256 was 'a' and is 'b'"):
        run.settle({"train_sha256": "b"})
    assert run.settings == {"seed": 1}
    run.settle({"train_sha256": "a", "new in this version": True})
    assert run.settings == {"seed": 1, "train_sha256": "a", "new in this version": True}


def test_a_run_that_is_done_again_has_the_settings_of_the_first(tmp_path: Path) -> None:
    first = {"settings": {"seed": 1, "train_sha256": "a"}, "command": "python x.py"}
    with pytest.raises(
        ValueError, match=r"not the run that --from_manifest names: seed was 1 and is 2. It was: python"
    ):
        Run.open(str(tmp_path), None, "model-64", {"seed": 2}, first)
    run = Run.open(str(tmp_path), None, "model-64", {"seed": 1}, first)
    assert (run.step, run.recorded("train_sha256"), run.recorded("template_date")) == (0, "a", None)
    with pytest.raises(ValueError, match="--from_manifest names: train_sha256 was 'a' and is 'b'"):
        run.settle({"train_sha256": "b"})


def test_the_manifest_tells_the_outcome_and_goes_along_with_the_result(tmp_path: Path) -> None:
    run = Run.open(str(tmp_path), None, "model-64", {"seed": 1})
    run.begin({"settings": run.settings})
    (tmp_path / "adapter").mkdir()
    run.record_outcome(tmp_path / "adapter", {"steps": 3})
    for folder in (tmp_path, tmp_path / "adapter"):
        assert json.loads((folder / "run.json").read_text()) == {"settings": {"seed": 1}, "outcome": {"steps": 3}}


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


def test_the_model_of_an_attempt_without_a_checkpoint_is_not_trained_on(tmp_path: Path) -> None:
    """It was made of a GGUF file, and the next attempt may name another. With a checkpoint the settings say that."""
    (tmp_path / "run.json").write_text("{}")
    made = tmp_path / "base_model"
    made.mkdir()
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "complete.json").write_text(json.dumps({"step": 2, "resumable": True, "settings": {"seed": 1}}))
    claim(tmp_path, "latest")
    assert made.is_dir()
    (checkpoint / "complete.json").unlink()
    claim(tmp_path, "latest")
    assert not made.exists()


def test_what_another_program_writes_there_stays(tmp_path: Path) -> None:
    """A merge into the run's folder, say, that goes on while the run is made longer."""
    (tmp_path / ".merged.unfinished-1").mkdir()
    (tmp_path / "run.json").write_text("{}")
    with held(tmp_path / ".merged.unfinished-1.lock"):
        claim(tmp_path, "latest")
    assert (tmp_path / ".merged.unfinished-1").is_dir() and (tmp_path / ".merged.unfinished-1.lock").exists()


def test_rows_made_in_another_way_are_another_run(tmp_path: Path) -> None:
    """Also where the checkpoint is of a time when packed rows were not named."""
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (tmp_path / "run.json").write_text("{}")
    marker = {"step": 2, "resumable": True, "settings": {"seed": 1, "train_sha256": "a"}}
    (checkpoint / "complete.json").write_text(json.dumps(marker))
    run = Run.open(str(tmp_path), "latest", "model-64", {"seed": 1})
    with pytest.raises(ValueError, match="checkpoint-2 belongs to another run: rows was 'packed' and is 'padded'"):
        run.settle({"train_sha256": "a", "rows": "padded"})
    run.settle({"train_sha256": "a", "rows": "packed"})


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
