"""What is typed for a model (models/source.py): every program says the same of it, before it loads anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import evaluate
import finetune_llama
import generate
import plan
from app.models.source import find_model
from finetune_runs import make_model, make_text

PROGRAMS = [evaluate, finetune_llama, generate, plan]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "model")


def config_without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in names}))

    return change


#: What is done to a copy of the model, what is typed for it, and what is said of that.
MISTAKES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no such folder": (shutil.rmtree, "{folder}", "there is no such folder"),
    "of two levels": (shutil.rmtree, "finetuned/my-llama/adapter", "there is no such folder"),
    "nor one at home": (shutil.rmtree, "~/{folder}", "there is no such folder"),
    "nor on the hub": (shutil.rmtree, "nowhere", "there is no such folder, and on the hub: "),
    "a file": (lambda folder: None, "{folder}/model.safetensors", "this is a file: give the folder that it is in"),
    "nothing": (lambda folder: None, " ", "the name is empty"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "{folder}/", "there is no config.json in it"),
    "no length": (
        config_without("max_position_embeddings"),
        "{folder}",
        "its config says no max_position_embeddings, and transformers would take 2,048: write into it",
    ),
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda module: module.__name__)
def test_mistakes_are_one_line_and_the_same_for_all(
    program: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = str(make_text(tmp_path / "text.jsonl"))
    before = {
        evaluate: ["perplexity", "--text", text],
        finetune_llama: ["--train_file", text],
        generate: ["--file", text],
    }
    option = "--model_name_or_path" if program is finetune_llama else "--model"
    for damage, typed, message in MISTAKES.values():
        folder = shutil.copytree(model, tmp_path / "copy", dirs_exist_ok=True)
        damage(folder)
        with pytest.raises(SystemExit, match="2"):
            program.main([*before.get(program, []), option, typed.format(folder=folder)])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert line.startswith(f"{program.__name__}.py: error: {option} ") and f": {message}" in line


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (config_without("max_position_embeddings"), "its config says no max_position_embeddings"),
        (lambda folder: (folder / "config.json").write_text("{"), "It looks like the config file at "),
    ],
)
def test_a_plan_for_a_config_alone_asks_the_same_of_it(
    damage: Callable[[Path], Any], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(shutil.copy(model / "config.json", tmp_path))
    damage(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        plan.main(["--model", str(file)])
    assert f"plan.py: error: --model {file}: {message}" in capsys.readouterr().err


def test_spellings_of_one_folder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    monkeypatch.setenv("HOME", str(model.parent))
    for typed in ("model", "model/", "./model", "~/model", "../" + model.parent.name + "/model", str(model) + "/"):
        assert Path(find_model(typed)[0]).resolve() == model.resolve()
    assert find_model("meta-llama/Llama-2-7b-hf") == ("meta-llama/Llama-2-7b-hf", None)


def test_home_in_paths_that_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    options = evaluate.parse(["perplexity", "--output=~/out", "--text", "~/a", "~/b"])
    assert options.output == "/home/me/out" and options.text == ["/home/me/a", "/home/me/b"]
