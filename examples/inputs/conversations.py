"""From files of questions and answers to conversations, each checked before anything is computed.

A row is either of these, told apart by its columns:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    {"instruction": "...", "output": "..."}         and perhaps "input", the text that the instruction is about

The second is the form of LongAlpaca. A conversation is a list of messages, `{"role": ..., "content": ...}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import datasets

from inputs.files import read_tables

ROLES = ("system", "user", "assistant")
EXPECTED = (
    'rows of {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]} or of '
    '{"instruction": ..., "output": ...} with or without "input"'
)

Message = dict[str, str]


def load_conversations(sources: Sequence[str]) -> Iterator[tuple[str, datasets.Dataset]]:
    """The tables of conversations that `--train_file` names.

    Args:
        sources: JSON, JSON Lines and Parquet files, folders and glob patterns of them, or hub datasets.

    Returns:
        Each file (or hub dataset) with its rows in the column `row`, as JSON, for `conversation` to read.

    Raises:
        FileNotFoundError: A source that is not there.
        ValueError: A file that cannot be read, or that has no rows.
    """
    for name, rows in read_tables(sources):
        if not len(rows):
            raise ValueError(f"{name} has no rows; --task sft takes {EXPECTED}")
        yield name, rows


def conversation(row: dict[str, Any]) -> list[Message]:
    """The conversation of one row, up to its last answer.

    Raises:
        ValueError: What is wrong with it, in words that follow "row 7: ".
    """
    if "messages" not in row and not {"instruction", "output"} <= row.keys():
        raise ValueError(f"it has the columns {', '.join(row) or 'none'}; --task sft takes {EXPECTED}")
    if row.get("messages") is None and "instruction" in row:
        asked, about, answer = (_text(row.get(name), f"its {name}") for name in ("instruction", "input", "output"))
        if not asked.strip() and not about.strip():
            raise ValueError("its instruction is empty")
        if not answer.strip():
            raise ValueError("its output is empty: there is no answer to learn")
        asked = "\n\n".join(part for part in (asked, about) if part.strip())
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    messages = row["messages"]
    if not isinstance(messages, list):
        raise ValueError(f"its messages are {_shown(messages)}, not a list; expected are {EXPECTED}")
    checked = [_message(message, number) for number, message in enumerate(messages, 1)]
    answers = [place for place, message in enumerate(checked) if message["role"] == "assistant"]
    if not answers:
        raise ValueError('none of its messages has the role "assistant": there is no answer to learn')
    if "user" not in {message["role"] for message in checked[: answers[0]]}:
        raise ValueError('its first answer has no message with the role "user" before it')
    return checked[: answers[-1] + 1]


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f'message {number} is {_shown(message)}; expected is {{"role": ..., "content": ...}}')
    role, content = message["role"], _text(message["content"], f"the content of message {number}")
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {role!r}; known are {', '.join(ROLES)}")
    if role == "assistant" and not content.strip():
        raise ValueError(f"message {number}, an answer of the assistant, is empty")
    return {"role": role, "content": content}


def _text(value: Any, what: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{what} is {_shown(value)}, not text")
    return value or ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
