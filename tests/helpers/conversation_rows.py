"""Rows of conversations that several tests read."""

from __future__ import annotations

from typing import Any

ASKED, ANSWER = {"role": "user", "content": "of Italy?"}, {"role": "assistant", "content": "Rome"}
THOUGHT = {"role": "assistant", "content": "<think>\n51 = 50 + 1\n</think>\n\nIt is 51."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}


def chat(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}
