"""The folder that examples/evaluate.py writes to: interrupted, gone on with, changed by others, on a full disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import evaluate
from app.evaluation import evaluation_folder
from app.evaluation.perplexity_task import PerplexityTask
from app.evaluation.retrieval_task import RetrievalTask
from evaluate_runs import refusal, run
from held_folder import held

pytestmark = pytest.mark.usefixtures("alone")


def test_another_chat_template_or_stop_is_another_evaluation(
    model: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may be mended in the folder of a model that was evaluated before."""
    here = tmp_path / "here"
    shutil.copytree(model, here)
    given = ["--model", here, "--lengths", 1000, "--beyond_trained_length", "--depths", 0.5, "--trials", 1]
    run("passkey", *given)
    (here / "generation_config.json").write_text('{"eos_token_id": [5]}')
    assert "--output out belongs to another evaluation: stops was" in refusal(
        capsys, "passkey", *given, "--output", "out"
    )
    (here / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert "tokenizer was" in refusal(capsys, "passkey", *given, "--output", "out")


def test_another_config_is_another_evaluation(
    model: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in fields that no weight has a part in. What a config says of its origin alone changes no number."""
    here = shutil.copytree(model, tmp_path / "here")
    given = ["--model", here, "--text", books]
    run("perplexity", *given)
    config = json.loads((here / "config.json").read_text())
    (here / "config.json").write_text(json.dumps(config | {"transformers_version": "5.0.0", "s2attn_group_size": 8}))
    run("perplexity", *given)
    assert "out is complete: nothing is computed again" in capsys.readouterr().out
    (here / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    said = refusal(capsys, "perplexity", *given, "--output", "out")
    assert "--output out belongs to another evaluation: config was" in said


def test_a_killed_run_goes_on_where_it_was(
    model: Path, books: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", model, "--text", books, "--lengths", 16, 32]
    whole = run("perplexity", *given, output="whole")
    computed: list[str] = []

    def compute(self: PerplexityTask, cell: str, progress: object, original=PerplexityTask.compute) -> dict:
        computed.append(cell)
        if len(computed) == 3:
            raise KeyboardInterrupt
        return original(self, cell, progress)

    monkeypatch.setattr(PerplexityTask, "compute", compute)
    with pytest.raises(SystemExit) as stopped:
        run("perplexity", *given)
    assert stopped.value.code == 130
    assert capsys.readouterr().err.endswith("\nstopped; the same command goes on\n")
    assert len(list(Path("out/cells").iterdir())) == 2 and not Path("out/results.json").exists()
    other = refusal(capsys, "perplexity", *given, "--stride", 4, "--output", "out")
    assert "--output out belongs to another evaluation: stride was 8 and is 4" in other
    done = run("perplexity", *given)
    assert "going on: 2 of 6 parts are computed" in capsys.readouterr().out
    assert done["cells"] == whole["cells"] and done["summary"] == whole["summary"]
    assert sorted(computed) == sorted([*whole["cells"], computed[2]])  # none twice but the one that was interrupted
    assert not Path("out/cells").exists()

    written = Path("out/results.json").read_bytes()
    run("perplexity", *given)
    assert "out is complete: nothing is computed again" in capsys.readouterr().out
    assert Path("out/results.json").read_bytes() == written and len(computed) == 7
    assert "belongs to another evaluation" in refusal(capsys, "perplexity", *given, "--stride", 4, "--output", "out")
    assert Path("out/results.json").read_bytes() == written


def test_what_was_changed_by_hand_is_not_believed(model: Path, books: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", model, "--text", books]
    whole = run("perplexity", *given)
    results, settings = Path("out/results.json"), Path("out/settings.json")
    first, second, *_ = whole["cells"]
    cut = {**whole, "cells": {first: whole["cells"][first], second: {"scored": None}}}
    for content in ({}, [], {"cells": {}}, {"cells": {}, "summary": {}}, cut):
        results.write_text(json.dumps(content))
        assert run("perplexity", *given)["summary"] == whole["summary"]
    results.unlink()
    Path("out/cells").mkdir()
    for cell, content in ((first, "{}"), (second, '"x"')):
        Path(f"out/cells/{cell}.json").write_text(content)
    assert run("perplexity", *given)["cells"] == whole["cells"]
    results.write_text("{")
    assert "out/results.json cannot be read, it is no JSON: Expecting" in refusal(
        capsys, "perplexity", *given, "--output", "out"
    )
    before = settings.read_text()
    for content, message in (
        ("{}", "belongs to another evaluation: one of the two has no attention"),
        ("[]", "belongs to another evaluation: settings.json holds no settings"),
        ("", "out/settings.json cannot be read, it is no JSON: Expecting"),
    ):
        settings.write_text(content)
        assert message in refusal(capsys, "perplexity", *given, "--output", "out")
        assert settings.read_text() == content != before


def test_nothing_of_others_is_overwritten(
    model: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", model, "--text", books]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "mine is not empty and no evaluation" in refusal(capsys, "perplexity", *given, "--output", "mine")
    said = refusal(capsys, "perplexity", *given, "--output", "mine/thesis.tex")
    assert "is a file; it must be a folder" in said
    said = refusal(capsys, "perplexity", *given, "--output", "mine/thesis.tex/out")
    assert "cannot be written to: Not a directory" in said


def test_a_folder_belongs_to_one_process(model: Path, books: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(Path("out/.lock")):
        said = refusal(capsys, "perplexity", "--model", model, "--text", books, "--output", "out")
    assert "--output out: another process is writing to it" in said


def test_a_folder_is_found_where_none_is_given(model: Path, books: Path) -> None:
    for stride in (5, 6, 5):
        evaluate.main(["perplexity", "--model", str(model), "--text", str(books), "--stride", str(stride)])
    assert sorted(path.name for path in Path("evaluated").iterdir()) == ["tiny-perplexity", "tiny-perplexity-2"]


def test_a_folder_that_cannot_be_read_is_named(
    model: Path, books: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("evaluated/tiny-perplexity")
    folder.mkdir(parents=True)

    def iterdir(path: Path, original=Path.iterdir) -> Iterator[Path]:
        if path.resolve() == folder.resolve():  # as for who may not read it
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    given = ["perplexity", "--model", model, "--text", books]
    for output in ([], ["--output", folder]):
        assert f"Permission denied: '{folder}'" in refusal(capsys, *given, *output)


def test_a_full_disk_keeps_what_is_complete(
    model: Path, books: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(path: Path, content: object, original=evaluation_folder.write_json) -> None:
        if "document-2" in path.stem:
            raise OSError(28, "No space left on device")
        original(path, content)

    monkeypatch.setattr(evaluation_folder, "write_json", write)
    said = refusal(capsys, "perplexity", "--model", model, "--text", books, "--output", "out")
    assert "out cannot be written to: No space left on device. What is computed so far is kept" in said
    assert len(list(Path("out/cells").iterdir())) == 2


@pytest.mark.parametrize("file", ["results.txt", "heat_map.png", "results.json"])
def test_a_disk_that_is_full_at_the_end_is_one_clear_error(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    """The system's own: the file, or what it is written as at first, is another name of /dev/full by then."""
    given = ["--model", model, "--context_length", 512, "--lengths", 400, "--depths", 0.5, "--trials", 1]
    full = Path("out") / (f"{file}.tmp" if file == "results.json" else file)

    def compute(*arguments: object, original=evaluate.compute) -> dict:
        full.symlink_to("/dev/full")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "compute", compute)
        said = refusal(capsys, "passkey", *given, "--output", "out")
    assert "out cannot be written to: No space left on device. What is computed so far is kept" in said
    full.unlink()
    monkeypatch.setattr(RetrievalTask, "compute", None)  # nothing is left to compute
    assert run("passkey", *given)["summary"]["asked"] == 1
