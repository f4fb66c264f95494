"""JSON: files that are there whole or not at all, and objects on a command line."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that it is there whole or not at all.

    JSON has no infinite numbers. They are written as text, which `float` reads: "inf", "-inf", "nan".
    """
    scratch = path.with_name(path.name + ".tmp")
    with open(scratch, "w", encoding="utf-8") as file:
        json.dump(_finite(content), file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: It is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read, it is no JSON: {error}") from error


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def with_numbers(content: Any) -> Any:
    """What a file holds, with numbers where `write_json` wrote one that is not finite as text."""
    if isinstance(content, dict):
        return {name: with_numbers(value) for name, value in content.items()}
    if isinstance(content, list):
        return [with_numbers(value) for value in content]
    return float(content) if content in ("inf", "-inf", "nan") else content


def json_object(text: str) -> dict[str, Any]:
    """A JSON object on the command line, or `argparse.ArgumentTypeError`."""
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return parsed


def json_option(name: str, value: str) -> dict[str, Any]:
    """The JSON object that is the value of an option, or in the file that this names.

    Raises:
        ValueError: There is none.
    """
    try:
        parsed = json.loads(value if value.startswith("{") else Path(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--{name} {value}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--{name} {value}: no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"--{name} {value}: no JSON object")
    return parsed
