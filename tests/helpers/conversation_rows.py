"""Rows of conversations that several tests read."""

from __future__ import annotations

from typing import Any

ASKED, ANSWER = {"role": "user", "content": "of Italy?"}, {"role": "assistant", "content": "Rome"}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}


def chat(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}
