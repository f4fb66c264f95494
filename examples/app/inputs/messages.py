"""One message of a conversation: from any of its usual spellings to what a chat template takes.

A message is `{"role": ..., "content": ...}`, or `{"from": ..., "value": ...}` as in ShareGPT, with what else its author
wrote down. A chat template gets `role`, `content`, `tool_calls`, `reasoning_content` and all fields that are unknown
here: whether it makes use of them is for `template.py` to find out. Whether an answer is learned is no matter of the
template: those marks are taken out.
"""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"

#: The roles, by what they are called in chats, in ShareGPT, by LLaMA-Factory and by ms-swift.
ROLES = {
    "system": SYSTEM,
    "developer": "developer",
    "user": USER,
    "human": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "model": ASSISTANT,
    "tool": TOOL,
    "function": TOOL,
    "observation": TOOL,
    "tool_response": TOOL,
}

#: Roles of an assistant's message whose text is one call of a tool as JSON, or a list of them.
CALLING = ("function_call", "tool_call")

#: What says whether an answer is learned: OpenAI and Together, Axolotl (`train`, `training`), ms-swift (`loss`).
MARKS = ("weight", "train", "training", "trainable", "learn", "loss")

#: The thoughts before an answer. Templates read one of the three; each gets them.
REASONING = ("reasoning_content", "reasoning", "thinking")

TEXT_PARTS = ("text", "input_text", "output_text")


def read_message(given: Any, number: int) -> tuple[Message, bool]:
    """A message as a chat template takes it, and whether it is an answer to learn.

    Args:
        given: What stands in the file.
        number: Its place in the conversation, from 1 on.

    Raises:
        ValueError: What is wrong with it, with its number.
    """
    what = f"message {number}"
    if not isinstance(given, dict):
        raise ValueError(f'{what} is {shown(given)}; expected is {{"role": ..., "content": ...}}')
    fields = {name: value for name, value in given.items() if not is_absent(value)}
    said = _one_of(fields, ("role", "from"), what)
    calls = [*_calls(fields, what)]
    if said is None or (not calls and "content" not in given and "value" not in given):
        raise ValueError(f'{what} is {shown(given)}; expected is {{"role": ..., "content": ...}}')
    content = _one_of(fields, ("content", "value"), what)
    if said in CALLING:
        calls, content, role = [*calls, *_listed_calls(content, what)], None, ASSISTANT
    else:
        role = ROLES.get(said, "") if isinstance(said, str) else ""
    if not role:
        raise ValueError(f"{what} has the role {said!r}; known are {', '.join([*ROLES, *CALLING])}")
    learned = _is_learned(fields, role, what)
    message = {"role": role, "content": _content(content, what), **_thoughts(fields, what), **fields}
    if calls:
        message["tool_calls"] = calls
    if role == ASSISTANT and not message["content"].strip() and not calls:
        raise ValueError(f"{what}, an answer of the assistant, is empty")
    return message, learned


def is_absent(value: Any) -> bool:
    """Whether a field says nothing. Parquet gives all rows all fields, and fills up with null."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def without_null(value: Any) -> Any:
    """The same without entries that are null, which Parquet adds to the objects of a column."""
    if isinstance(value, dict):
        return {name: without_null(entry) for name, entry in value.items() if entry is not None}
    return [without_null(entry) for entry in value] if isinstance(value, list) else value


def from_json(value: Any, what: str) -> Any:
    """An object or a list that stands in the file as it is, or as text that is JSON."""
    if not isinstance(value, str):
        return without_null(value)
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{what} is {shown(value)}, which is no JSON") from error


def text_of(value: Any, what: str) -> str:
    """Text, empty for null."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{what} is {shown(value)}, not text")
    return value or ""


def shown(value: Any) -> str:
    """A value in an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def mark_of(name: str, value: Any, what: str) -> bool:
    """Whether a mark says "learn this"."""
    if isinstance(value, str) or value not in (0, 1):
        raise ValueError(f"{name} of {what} is {shown(value)}; known are 1 (true), learned, and 0 (false), not learned")
    return bool(value)


def _is_learned(fields: dict[str, Any], role: str, what: str) -> bool:
    """Take the marks out and say what they come to."""
    marks = {name: mark_of(name, fields.pop(name), what) for name in MARKS if name in fields}
    if role != ASSISTANT:
        if wrong := [name for name, value in marks.items() if value]:
            raise ValueError(f"{wrong[0]} of {what}, of the role {role}, says to learn it: answers alone are learned")
        return False
    if len(set(marks.values())) > 1:
        raise ValueError(f"{' and '.join(marks)} of {what} contradict each other")
    return all(marks.values())


def _content(value: Any, what: str) -> str:
    """The text of a message. Of several parts each begins a line, as servers of chat models join them."""
    if not isinstance(value, list):
        return text_of(value, f"the content of {what}")
    return "\n".join(_part(without_null(part), f"part {number} of {what}") for number, part in enumerate(value, 1))


def _part(part: Any, what: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS:
        kind = f"of the type {part['type']!r}" if isinstance(part, dict) and "type" in part else shown(part)
        raise ValueError(f'{what} is {kind}; known are parts of text, {{"type": "text", "text": ...}}')
    if others := [name for name, value in part.items() if name not in ("type", "text") and not is_absent(value)]:
        raise ValueError(f"{what} has {', '.join(others)}; known are type and text")
    return text_of(part.get("text"), f"the text of {what}")


def _thoughts(fields: dict[str, Any], what: str) -> dict[str, str]:
    """Take the thoughts out, and give them all their names."""
    found = {name: text_of(fields.pop(name), f"{name} of {what}") for name in REASONING if name in fields}
    if len(set(found.values())) > 1:
        raise ValueError(f"{' and '.join(found)} of {what} differ; one of them is expected")
    return dict.fromkeys(REASONING, next(iter(found.values()))) if found else {}


def _calls(fields: dict[str, Any], what: str) -> list[dict[str, Any]]:
    """Take the calls of tools out; `function_call` is what OpenAI had before `tool_calls`."""
    calls = _listed_calls(fields.pop("tool_calls"), what) if "tool_calls" in fields else []
    return calls + (_listed_calls(fields.pop("function_call"), what) if "function_call" in fields else [])


def _listed_calls(value: Any, what: str) -> list[dict[str, Any]]:
    found = from_json(value, f"the call in {what}")
    return [_call(call, f"call {number} in {what}") for number, call in enumerate(_as_list(found), 1)]


def _call(call: Any, what: str) -> dict[str, Any]:
    """A call of a tool. Its arguments become an object, which is what templates write as JSON."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise ValueError(f'{what} is {shown(call)}; expected is {{"name": ..., "arguments": {{...}}}}')
    outer = {} if inner is call else {name: value for name, value in call.items() if name != "function"}
    known = {"name", "arguments"} | (set() if outer else {"id", "type"})
    others = [name for name in inner if name not in known]
    others += [name for name in outer if name not in ("id", "type", "index")]
    if others:
        raise ValueError(f"{what} has {', '.join(others)}; known are id, type, name and arguments")
    arguments = from_json(inner.get("arguments") or {}, f"arguments of {what}")
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments of {what} are {shown(arguments)}, no object")
    number = outer.get("id", inner.get("id"))
    return {
        **({} if number is None else {"id": number}),
        "type": "function",
        "function": {"name": inner["name"], "arguments": arguments},
    }


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _one_of(fields: dict[str, Any], names: tuple[str, str], what: str) -> Any:
    """Take a field out that has two names."""
    found = [name for name in names if name in fields]
    if len(found) > 1:
        raise ValueError(f"{what} has both {names[0]} and {names[1]}")
    return fields.pop(found[0]) if found else None
