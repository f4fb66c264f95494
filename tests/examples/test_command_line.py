"""How all programs end for a mistake, at Ctrl-C, and when nobody reads on (examples/app/runs/command_line.py)."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import evaluate
import finetune_llama
import generate
import import_longlora
import merge_adapter
import plan
import train_tiny_llama
from app.runs import launch
from app.runs.command_line import CLOSED, INTERRUPTED, HelpFormatter, Parser, as_program
from app.runs.errors import one_clear_error
from app.runs.full_disk import writing_to
from app.runs.launch import fail
from longlora_ext._errors import naming
from longlora_ext._processes import on_first_process

PROGRAMS = {
    "evaluate.py": evaluate, "finetune_llama.py": finetune_llama, "generate.py": generate,
    "import_longlora.py": import_longlora, "merge_adapter.py": merge_adapter, "plan.py": plan,
    "train_tiny_llama.py": train_tiny_llama,
}  # fmt: skip


def cause() -> None:
    raise ValueError("no room")


def chained() -> None:
    with naming("the model"):
        cause()


def by_one_clear_error() -> None:
    with one_clear_error("--model x: "):
        cause()


def by_a_chain() -> None:
    with one_clear_error():
        chained()


def by_fail_where_it_is_caught() -> None:
    try:
        cause()
    except ValueError as error:
        fail(str(error))


def by_the_first_process() -> None:
    with one_clear_error():
        on_first_process(cause)


def by_a_full_disk() -> None:
    with writing_to(Path("nowhere")):
        try:
            cause()
        except ValueError as error:
            raise OSError("No space left on device") from error


def by_an_option() -> None:
    def number(text: str) -> int:
        try:
            cause()
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return 0

    parser = Parser()
    parser.add_argument("--number", type=number)
    parser.parse_args(["--number", "x"])


WAYS = [
    by_one_clear_error, by_a_chain, by_fail_where_it_is_caught, by_the_first_process, by_a_full_disk, by_an_option,
]  # fmt: skip


def said_by(capsys: pytest.CaptureFixture[str], way: Callable[[], None]) -> list[str]:
    with pytest.raises(SystemExit) as stopped:
        way()
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_where_an_error_came_from_is_shown_if_asked_for(
    way: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for off in ("", "0", "false", "No", " off "):
        monkeypatch.setenv("LONGLORA_TRACEBACK", off)
        (line,) = said_by(capsys, way)
        assert line.startswith("finetune_llama.py: error: ")
    monkeypatch.setenv("LONGLORA_TRACEBACK", "1")
    *traceback, last = said_by(capsys, way)
    assert last == line
    assert traceback[0] == "Traceback (most recent call last):"
    assert any(shown.endswith("in cause") for shown in traceback) and "ValueError: no room" in traceback


def test_an_error_without_an_exception_shows_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LONGLORA_TRACEBACK", "1")
    *stack, last = said_by(capsys, lambda: plan.main(["--model", "llama-2-7b", "--gpus", "0"]))
    assert last.startswith("plan.py: error: --gpus must be above 0")
    assert any("plan.py" in line and line.endswith(", in parse") for line in stack)


def test_an_error_of_an_unusual_kind_says_how_to_see_where(capsys: pytest.CaptureFixture[str]) -> None:
    def way() -> None:
        with one_clear_error("--model x: "):
            {}["key"]  # type: ignore[index]

    (line,) = said_by(capsys, way)
    assert line == "finetune_llama.py: error: --model x: KeyError: 'key' (LONGLORA_TRACEBACK=1 shows where)"


def test_an_error_that_is_not_expected_goes_on_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Once the work has begun, only what a step names is the user's; any other is a bug, with its traceback."""
    with pytest.raises(KeyError), one_clear_error(only=(ValueError, OSError)):
        {}["key"]  # type: ignore[index]

    def way() -> None:
        with one_clear_error(only=(ValueError, OSError)):
            cause()

    assert said_by(capsys, way) == ["finetune_llama.py: error: no room"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_says_what_a_bug_report_needs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        PROGRAMS[name].main(["--help"])
    printed = capsys.readouterr().out
    assert "LONGLORA_TRACEBACK=1" in printed and "python -m longlora_ext.env" in printed


@pytest.mark.parametrize("told", ["so many. Default: all.", "so many; default: all"])
def test_a_default_that_the_text_tells_is_not_shown_again(told: str) -> None:
    parser = Parser(formatter_class=HelpFormatter)
    parser.add_argument("--told", default=3, help=told)
    parser.add_argument("--shown", default=3, help="so many")
    lines = parser.format_help().splitlines()
    assert [line.split("  ")[-1] for line in lines if "so many" in line] == [told, "so many (default: 3)"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_unknown_option_is_one_line_of_the_program(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said_by(capsys, lambda: PROGRAMS[name].main(["--nonsense", "1"]))
    assert line.startswith(f"{name}: error: ")


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    """An abbreviation may mean another option in a later version."""
    (line,) = said_by(capsys, lambda: plan.main(["--model", "llama-2-7b", "--cal"]))
    assert "unrecognized arguments: --cal" in line
    (line,) = said_by(capsys, lambda: evaluate.main(["passkey", "--trial", "3"]))
    assert "unrecognized arguments: --trial 3" in line


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_is_stopped_ends_quietly(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    with pytest.raises(SystemExit) as stopped:
        PROGRAMS[name].main([])
    assert stopped.value.code == INTERRUPTED
    assert "Traceback" not in capsys.readouterr().err


@pytest.fixture
def closed_pipe() -> Iterator[io.TextIOWrapper]:
    """Standard output as it is behind `| head` when head has ended."""
    reads, writes = os.pipe()
    os.close(reads)
    output = os.fdopen(writes, "w")
    yield output
    with suppress(BrokenPipeError):
        output.close()


@pytest.mark.parametrize(
    "name, given", [*((name, ["--help"]) for name in PROGRAMS), ("plan.py", ["--model", "llama-2-7b"])]
)
def test_output_that_nobody_reads_ends_a_program_quietly(
    name: str, given: list[str], closed_pipe: io.TextIOWrapper, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    monkeypatch.setattr(plan, "figures", lambda options: {})
    monkeypatch.setattr(plan, "table", lambda found: "a table")
    with pytest.raises(SystemExit) as stopped:
        PROGRAMS[name].main(given)
    assert capsys.readouterr().err == ""
    if "--help" in given:  # argparse may have let go of the text
        assert stopped.value.code in (0, CLOSED)
    else:
        assert stopped.value.code == CLOSED
        print("what is still printed goes nowhere", file=closed_pipe, flush=True)


def test_another_broken_pipe_is_an_error_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(BrokenPipeError), as_program("plan.py"):
            raise BrokenPipeError("of a socket")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_lacks_a_character_gets_an_escape(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))

    @as_program("plan.py")
    def main() -> None:
        launch.say("caf\u00e9 \u2014 \ud83d \udcff")  # the last two are no characters of any encoding

    main()
    shown = {"ascii": "caf\\xe9 \\u2014", "latin-1": "caf\u00e9 \\u2014", "utf-8": "caf\u00e9 \u2014"}[encoding]
    assert written.getvalue().decode(encoding) == f"{shown} \\ud83d \\udcff\n"
