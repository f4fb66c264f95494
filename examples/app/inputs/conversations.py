"""From files of questions and answers to conversations, each checked before anything is computed.

A row is one of these, told apart by its columns (docs/instruct.md has a table of all that is read):

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...]}
    {"instruction": "...", "output": "..."}         and perhaps "input", the text that the instruction is about

The second is ShareGPT's form, the third that of Alpaca and LongAlpaca. A column that changes what the model would see
is read, or it is an error. All others are left alone, and `Conversation.unread` names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets

from app.inputs.columns import ABOUT, ANSWERS, ASKED, LISTS, PREFERENCES, REFUSED, REPEATING, SYSTEMS, TOOLS
from app.inputs.files import read_tables
from app.inputs.messages import (
    ASSISTANT,
    MARKS,
    REASONING,
    SYSTEM,
    USER,
    Message,
    from_json,
    is_absent,
    mark_of,
    read_message,
    shown,
    text_of,
)

EXPECTED = (
    'rows of {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}, of '
    '{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]} or of '
    '{"instruction": ..., "output": ...} with or without "input"'
)


@dataclass(frozen=True)
class Conversation:
    """What the model is shown, and which parts of it are answers to learn.

    Attributes:
        messages: As a chat template takes them; the last one is an answer that is learned.
        learned: For each message, whether it is.
        context: What else the template gets: `tools`, `documents`, and the variables of `chat_template_kwargs`.
        unread: Columns of its row that were left alone.
    """

    messages: list[Message]
    learned: list[bool]
    context: dict[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


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


def conversation(row: dict[str, Any]) -> Conversation:
    """The conversation of one row, up to the last answer that is learned.

    Args:
        row: Its columns. What is null or empty counts as absent.

    Raises:
        ValueError: What is wrong with it, in words that follow "row 7: ".
    """
    columns = _columns(row)
    given = {name: value for name, value in columns.items() if not is_absent(value)}
    lists = [name for name in LISTS if name in given]
    pair = any(name in columns for name in ASKED) and any(name in columns for name in ANSWERS)
    if not lists and not pair:
        raise ValueError(f"it has the columns {', '.join(row) or 'none'}; --task sft takes {EXPECTED}")
    for why, names in REFUSED.items():
        if found := [name for name in names if name in given]:
            raise ValueError(f"its column {found[0]!r} {why}")
    system = _column(given, SYSTEMS)
    context = _context(given)
    _check_marks(given)
    turns = _listed(lists, given) if lists else _asked_and_answered(given)
    read = [read_message(turn, number) for number, turn in enumerate(turns, 1)]
    if system:
        first = read_message({"role": SYSTEM, "content": system}, 0)
        if not read or read[0][0]["role"] != SYSTEM:
            read.insert(0, first)
        elif read[0][0]["content"] != first[0]["content"]:
            raise ValueError("its column for the system's message and the first of its messages differ")
    messages, learned = [message for message, _ in read], [answer for _, answer in read]
    _check_turns(messages, learned)
    last = len(learned) - learned[::-1].index(True)
    said = [message["content"] for message in messages]
    for name in REPEATING:
        if name in given and not _repeats(name, given.pop(name), said):
            raise ValueError(f"its column {name!r} says something that its conversation does not: drop one of them")
    return Conversation(messages[:last], learned[:last], context, tuple(sorted(given)))


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    """A row's columns by their plain names. Of several spellings of one, as tables that were put together have them,
    one may hold something."""
    columns: dict[str, Any] = {}
    for name, value in row.items():
        there = columns.get(plain := _plain(name))
        if plain not in columns or is_absent(there):
            columns[plain] = value
        elif not is_absent(value) and value != there:
            raise ValueError(f"it has two columns {plain!r}, spelt differently, that differ: drop one of them")
    return columns


def _listed(names: list[str], given: dict[str, Any]) -> list[Any]:
    """The messages of a row that has a list of them."""
    if len(names) > 1:
        raise ValueError(f"it has both {' and '.join(names)}: drop one of them")
    for name in ("history", *REASONING):
        if name in given:
            raise ValueError(f"its column {name!r} goes with an instruction, not with {names[0]}: write it into them")
    messages = given.pop(names[0])
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = from_json(messages, names[0])
    if not isinstance(messages, list):
        raise ValueError(f"its {names[0]} are {shown(messages)}, not a list; expected are {EXPECTED}")
    return messages


def _asked_and_answered(given: dict[str, Any]) -> list[Any]:
    """The messages of an instruction and its output, with those of its history before them."""
    asked_name, answer_name = _only(given, ASKED), _only(given, ANSWERS)
    asked, answer = given.pop(asked_name, None), given.pop(answer_name, None)
    about = _column(given, ABOUT)
    if isinstance(asked, list) or isinstance(answer, list):  # a prompt and a completion of messages, as TRL has them
        if not (isinstance(asked, list) and isinstance(answer, list)) or about or "history" in given:
            raise ValueError(f"of its {asked_name} and {answer_name} both are lists of messages, or both are text")
        prompt = [{**turn, "weight": 0} if isinstance(turn, dict) else turn for turn in asked]
        return [*prompt, *answer]
    question, reply = text_of(asked, f"its {asked_name}"), text_of(answer, f"its {answer_name}")
    if not question.strip() and not about.strip():
        raise ValueError(f"its {asked_name} is empty")
    if not reply.strip():
        raise ValueError(f"its {answer_name} is empty: there is no answer to learn")
    question = "\n\n".join(part for part in (question, about) if part.strip())
    turns = []
    for number, turn in enumerate(_rounds(given), 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"round {number} of its history is {shown(turn)}; expected is [question, answer]")
        turns += [{"role": role, "content": text} for role, text in zip((USER, ASSISTANT), turn, strict=True)]
    thoughts = {name: given.pop(name) for name in REASONING if name in given}
    return [*turns, {"role": USER, "content": question}, {"role": ASSISTANT, "content": reply, **thoughts}]


def _rounds(given: dict[str, Any]) -> list[Any]:
    history = from_json(given.pop("history", []), "its history")
    if not isinstance(history, list):
        raise ValueError(f"its history is {shown(history)}; expected is [[question, answer], ...]")
    return history


def _context(given: dict[str, Any]) -> dict[str, Any]:
    """What the template gets beside the messages."""
    name = _only(given, TOOLS)
    context: dict[str, Any] = {}
    tools = from_json(given.pop(name, []), f"its {name}")
    if not isinstance(tools, list):
        raise ValueError(f"its {name} are {shown(tools)}, not a list")
    if tools:
        context["tools"] = [_tool(from_json(tool, f"tool {n}"), f"tool {n}") for n, tool in enumerate(tools, 1)]
    documents = from_json(given.pop("documents", []), "its documents")
    if not isinstance(documents, list) or not all(isinstance(document, dict) for document in documents):
        raise ValueError(f"its documents are {shown(documents)}, not a list of objects")
    if documents:
        context["documents"] = documents
    variables = from_json(given.pop("chat_template_kwargs", {}), "its chat_template_kwargs")
    if not isinstance(variables, dict):
        raise ValueError(f"its chat_template_kwargs are {shown(variables)}, no object")
    return {**variables, **context}


def _tool(tool: Any, what: str) -> dict[str, Any]:
    """A tool as templates take it: `{"type": "function", "function": {"name": ..., ...}}`."""
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise ValueError(f'{what} is {shown(tool)}; expected is {{"type": "function", "function": {{"name": ...}}}}')
    return tool if inner is not tool else {"type": "function", "function": tool}


def _check_marks(given: dict[str, Any]) -> None:
    """Marks of a whole row: one that says "learn it" says nothing new."""
    for name in MARKS:
        if name in given and not mark_of(name, given.pop(name), "the row"):
            raise ValueError(f"its column {name!r} says not to learn it: leave the row out")
    if isinstance(given.get("label"), bool):
        raise ValueError(f"its column 'label' {PREFERENCES}")


def _check_turns(messages: list[Message], learned: list[bool]) -> None:
    roles = [message["role"] for message in messages]
    if ASSISTANT not in roles:
        raise ValueError('none of its messages has the role "assistant": there is no answer to learn')
    if USER not in roles[: roles.index(ASSISTANT)]:
        raise ValueError('its first answer has no message with the role "user" before it')
    if not any(learned):
        raise ValueError("none of its answers is to be learned: leave the row out")


def _only(given: dict[str, Any], names: Sequence[str]) -> str:
    """Which of columns with one meaning is there, the first where none is."""
    found = [name for name in names if name in given]
    if len(found) > 1:
        raise ValueError(f"it has both {' and '.join(found)}: which of them is meant? Drop the others")
    return found[0] if found else names[0]


def _column(given: dict[str, Any], names: Sequence[str]) -> str:
    """Take a column of text out."""
    name = _only(given, names)
    return text_of(given.pop(name, None), f"its {name}")


def _repeats(name: str, value: Any, said: Sequence[str]) -> bool:
    """Whether a column is in the conversation anyway, or is all of it as text, as Alpaca's own data have it."""
    if not isinstance(value, str):
        return False
    paragraphs = (part.strip() for text in said for part in text.split("\n\n"))
    return any(value.strip() in text for text in said) or (name == "text" and all(part in value for part in paragraphs))


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")
