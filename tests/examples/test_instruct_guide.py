"""The table of docs/instruct.md: each field that it names is honoured, as it says."""

from __future__ import annotations

import re
from typing import Any

import pytest

from app.inputs.chat import encode
from app.inputs.conversations import conversation
from app.inputs.template import ChatTemplate
from chat_templates import CHATML, tokenizer_of
from conversation_rows import ANSWER, ASKED, CALL, TOOL, chat
from finetune_runs import ROOT

TABLE = re.findall(
    r"^\| (`.+?) \| (.*?) \| (read|error|passes)\b(.*) \|$", (ROOT / "docs" / "instruct.md").read_text(), re.M
)
HAS = chat({"role": "user", "content": "old?"}, {"role": "assistant", "content": "new"}, ASKED, ANSWER)
OTHER = {"role": "assistant", "content": "Milan"}
#: What each of the guide's names is given for a value; those without get a text.
VALUES: dict[str, Any] = {
    **dict.fromkeys(("weight", "train", "training", "trainable", "learn", "loss"), 0),
    "tool_calls": [CALL],
    "function_call": CALL["function"],
    "tools": [TOOL],
    "functions": [TOOL["function"]],
    "history": [["old?", "new"]],
    "documents": [{"title": "a", "text": "b"}],
    "chat_template_kwargs": {"enable_thinking": True},
    "content": [{"type": "text", "text": "in parts"}],
    "value": "in ShareGPT's words",
    "role": "system",
    "from": "tool",
    **{name: [ASKED, OTHER] for name in ("messages", "conversations", "conversation")},
}
#: A template that writes whatever it is given.
ALL = CHATML.replace(
    "{{ message.content }}",
    "{{ message.content }}{{ message.reasoning_content }}{{ message.tool_calls }}{{ message.name }}",
) + ("{{ tools }}{{ documents }}{{ enable_thinking }}")


def with_field(name: str, where: str) -> dict[str, Any]:
    """A row with one more column, or one more field in its second message."""
    value = VALUES.get(name, "something")
    if where == "message":
        twin = {"from": "role", "value": "content"}.get(name)
        second = {field: each for field, each in HAS["messages"][1].items() if field != twin}
        return chat(HAS["messages"][0], {**second, name: value}, *HAS["messages"][2:])
    if where == "row":
        return {**HAS, name: value}
    if where == "both":
        return {name: value}
    row = {"instruction": "of Italy?", "output": "Rome"}
    twins = next((names for names in TWINS if name in names), ())
    return {**{each: text for each, text in row.items() if each not in twins}, name: value}


TWINS = (("instruction", "question", "query", "prompt"), ("output", "response", "answer", "completion"))


@pytest.mark.parametrize(("names", "where", "verdict"), [(n, w, v) for n, w, v, _ in TABLE])
def test_the_table_of_the_guide(names: str, where: str, verdict: str) -> None:
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = ALL
    plain = HAS if where != "pair" else {"instruction": "of Italy?", "output": "Rome"}
    before = encode(conversation(plain), ChatTemplate(tokenizer))
    for name in re.findall(r"`(\w+)`", names):
        row = with_field(name, where)
        if verdict == "error":
            with pytest.raises(ValueError, match=rf"\b{name}\b"):
                encode(conversation(row), ChatTemplate(tokenizer))
        else:
            found = conversation(row)
            assert (encode(found, ChatTemplate(tokenizer)) == before) == (verdict == "passes"), name
            assert found.unread == ((name,) if verdict == "passes" and where == "row" else ()), name


def test_the_table_is_there() -> None:
    assert {verdict for _, _, verdict, _ in TABLE} == {"read", "error", "passes"} and len(TABLE) > 15
