"""run.json: a run can be done again by one command (examples/app/training/manifest.py)."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune_llama
import forks
import merge_adapter
from app.training import manifest
from finetune_runs import deepspeed, environment, losses, make_model, make_text, run, small_run
from patience import patience


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with relative paths and with settings that are no defaults; the folder it was started in."""
    folder = tmp_path_factory.mktemp("first")
    make_model(folder / "model")
    make_text(folder / "text.jsonl")
    words = small_run(Path("model"), Path("text.jsonl"), Path("out"), steps=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finetune_llama.main(
            [*words, "--dense_steps=1", "--rope_type", "dynamic", "--lora_r=4", "--local_rank=0", "--hub_token=secret"]
        )
    return folder


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_the_stored_command_does_the_run_again(first: Path, tmp_path: Path) -> None:
    command = manifest_of(first / "out")["command"]
    program, *words = shlex.split(command)
    assert program == "python"
    done = forks.run(words, environment(), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    again = tmp_path / "finetuned" / "model-128"
    assert losses(again) == pytest.approx(losses(first / "out"), abs=1e-6) and len(losses(again)) == 4
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first / "out", again)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-6)
    then, now = manifest_of(first / "out"), manifest_of(again)
    assert now["settings"] == then["settings"] and now["arguments"] == then["arguments"]


@pytest.mark.full
def test_the_stored_command_starts_as_many_processes(first: Path, tmp_path: Path) -> None:
    """Two under ZeRO-2, which the deepspeed launcher brings along; one process is refused."""
    words = small_run(first / "model", first / "text.jsonl", tmp_path / "out", steps=2)
    done = run(*words, launcher=deepspeed(2), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    program, *command = shlex.split(manifest_of(tmp_path / "out")["command"])
    assert [program, *command[:2]] == ["deepspeed", "--num_accelerators", "2"]
    launcher = [*deepspeed(), *command[:2]]
    again = subprocess.run(
        [*launcher, *command[2:]], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=patience()
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert losses(tmp_path / "finetuned" / "model-128") == pytest.approx(losses(tmp_path / "out"), abs=1e-6)
    alone = run(*command[3:], cwd=tmp_path)
    assert alone.returncode == 2 and "processes was 2 and is 1" in alone.stderr


def test_the_manifest_says_what_made_the_folder(first: Path) -> None:
    made = manifest_of(first / "out")
    assert made["rope"]["rope_type"] == "dynamic" and made["rope"]["factor"] == 4
    assert made["attention"] == {
        "training": "s2attn", "group_size": 32, "sink": True, "layers_with_sink": 2, "window": None, "shift": 16,
        "shifted_heads": [2, 3], "dense_layers": [], "dense_steps": 1.0,
        "evaluation": "dense",
    }  # fmt: skip
    assert made["outcome"] == {"steps": 4, "first_dense_step": 4}
    assert (made["context"], made["from"], made["settings"]["train_documents"]) == (128, None, 38)
    assert made["versions"]["torch"] == torch.__version__ and made["versions"]["python"]
    assert made["effective"]["learning_rate"] == 1e-2 and made["effective"]["lora_alpha"] == 16
    assert str(first / "text.jsonl") in made["arguments"]
    assert not [word for word in made["arguments"] if "output_dir" in word or "local_rank" in word]
    assert "secret" not in (first / "out" / "run.json").read_text()


def test_it_goes_along_with_the_adapter_and_the_merged_model(first: Path, tmp_path: Path) -> None:
    made = manifest_of(first / "out")
    assert manifest_of(first / "out" / "adapter") == made
    merge_adapter.main([str(first / "out" / "adapter"), str(tmp_path / "merged")])
    assert manifest_of(tmp_path / "merged") == made


def test_a_run_that_went_on_says_so_and_does_not_lose_where_it_began(first: Path, tmp_path: Path) -> None:
    again = ["--from_manifest", str(first / "out" / "run.json"), "--output_dir", str(tmp_path / "out")]
    finetune_llama.main([*again, "--resume_from_checkpoint", str(first / "out" / "checkpoint-2")])
    assert losses(tmp_path / "out") == pytest.approx(losses(first / "out"), abs=1e-6)
    then, now = manifest_of(first / "out"), manifest_of(tmp_path / "out")
    assert now["from"] == str(first / "out" / "checkpoint-2")
    assert [call["date"] for call in now["earlier"]] == [then["date"]]


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        finetune_llama.main(words)
    assert stopped.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("finetune_llama.py: error: "))
    return line


def test_another_run_is_refused(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["--from_manifest", str(first / "out" / "run.json"), "--output_dir", str(tmp_path / "out")]
    said = refusal([*again, "--seed", "8"], capsys)
    assert "this is not the run that --from_manifest names: seed was 7 and is 8. It was: python " in said

    text = shutil.copy(first / "text.jsonl", tmp_path)
    with open(text, "a") as file:
        file.write('{"text": "more"}\n')
    assert "names: train_documents was 38 and is 39; " in refusal([*again, "--train_file", text], capsys)
    assert os.listdir(tmp_path / "out") == [".lock"]


def test_other_versions_are_said(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = manifest_of(first / "out")
    made["versions"]["peft"] = "0.0.1"
    (tmp_path / "run.json").write_text(json.dumps(made))
    finetune_llama.main(["--from_manifest", str(tmp_path / "run.json"), "--output_dir", str(tmp_path / "out")])
    assert "note: the same run with other versions: peft was '0.0.1' and is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("{", "not the run.json of a run"),
        ('{"seed": 1}', "not the run.json"),
        ('{"arguments": "a b", "settings": {}, "versions": {}, "command": ""}', "not the run.json"),
    ],
)
def test_what_is_no_manifest_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert message in refusal(["--from_manifest", str(tmp_path / "run.json")], capsys)


def test_paths_that_are_there_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run takes them: a name is no pattern, and ~ is the home folder. What is not there stays as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path in ("books[1]/a.txt", "home/b.txt"):
        Path(path).parent.mkdir()
        Path(path).touch()
    inline = json.dumps({"zero_optimization": {"stage": 3}, "comment": 256 * "x", "nvme_path": "/gone"})
    given = ["books[1]/a.txt", "books[1]/*.txt:0.5", "~/b.txt", "owner/name", "--deepspeed", inline, "--lora_r", "home"]
    there = [str(tmp_path / path) for path in ("books[1]/a.txt", "books[1]/*.txt:0.5", "home/b.txt")]
    assert manifest._absolute(["--train_file", *given]) == ["--train_file", *there, *given[3:]]
