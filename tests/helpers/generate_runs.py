"""The ways to run examples/generate.py."""

from __future__ import annotations

import pytest

import generate


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """What the program prints, and says beside."""
    generate.main([str(argument) for argument in arguments])
    return capsys.readouterr()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        generate.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("generate.py: error: ")]
    assert len(said) == 1
    return said[0]
