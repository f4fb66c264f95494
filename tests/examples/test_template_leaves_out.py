"""What a chat template leaves out of a conversation is an error, and what only the template knows is shown."""

from __future__ import annotations

import re
from typing import Any

import pytest

from app.inputs.chat import LLAMA_2, encode
from app.inputs.conversations import conversation
from app.inputs.template import ChatTemplate
from chat_templates import CHATML, GEMMA, LLAMA_3_1, QWEN_3, SPLITS, SPLITS_STRIPPED, tokenizer_of
from conversation_rows import ANSWER, ASKED, CALL, THOUGHT, TOOL, chat


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (CHATML, chat(ASKED, {**ANSWER, "tool_calls": [CALL]}), "leaves out tool_calls, call 1, of message 2"),
        (LLAMA_2, chat(ASKED, {**ANSWER, "tool_calls": [CALL]}), "leaves out tool_calls, call 1, of message 2"),
        (LLAMA_3_1, chat(ASKED, {**ANSWER, "tool_calls": [CALL]}), "leaves out the content of message 2"),
        (LLAMA_3_1, chat(ASKED, {"role": "assistant", "tool_calls": [CALL, CALL]}), "only single tool-calls at once!"),
        (CHATML, chat(ASKED, ANSWER, tools=[TOOL]), "leaves its tools out"),
        (QWEN_3, chat(ASKED, ANSWER, documents=[{"title": "a", "text": "b"}]), "leaves its documents out"),
        (CHATML, chat(ASKED, {**ANSWER, "reasoning_content": "hm"}), "leaves out reasoning_content of message 2"),
        (CHATML, chat(ASKED, {**ANSWER, "thinking": "hm"}), "leaves out reasoning_content of message 2"),
        (SPLITS, chat(ASKED, THOUGHT), "leaves out what stands before </think> in message 2"),
        (SPLITS_STRIPPED, chat(ASKED, THOUGHT), "leaves out what stands before </think> in message 2"),
        (CHATML, chat(ASKED, {**ANSWER, "prefix": True}), "leaves out prefix of message 2"),
        (QWEN_3, chat({**ASKED, "role": "developer"}, ASKED, ANSWER), "leaves out the content of message 1, of"),
        (GEMMA, chat({**ASKED, "role": "system"}, ASKED, ANSWER), "System role not supported"),
        (GEMMA, chat(ASKED, ASKED, ANSWER), "roles must alternate"),
        (LLAMA_2, chat(ASKED, {**ANSWER, "role": "tool"}, ASKED, ANSWER), "messages have the roles system, user and"),
        (CHATML, chat({**ASKED, "name": "A"}, ANSWER, {**ASKED, "name": "B"}, ANSWER), "leaves out name, which tells"),
        (QWEN_3, chat(ASKED, ANSWER, chat_template_kwargs={"mood": 1}), "has no variable 'mood'"),
        (QWEN_3, chat(ASKED, ANSWER, enable_thinking=False), "its column 'enable_thinking' is called like a variable"),
        ("{% for m in messages %}{% if m.role == 'user' %}Q{% else %}A{% endif %}{{ m.content }}{% endfor %}",
         chat({**ASKED, "role": "system"}, ASKED, ANSWER), "writes message 1, of the role system, as one of the"),
    ],
)  # fmt: skip
def test_what_the_template_leaves_out_is_an_error(template: str, row: dict[str, Any], message: str) -> None:
    tokenizer = tokenizer_of(template if template in (CHATML, QWEN_3, LLAMA_3_1, GEMMA) else CHATML)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=re.escape(message)):
        encode(conversation(row), ChatTemplate(tokenizer))


def test_a_field_that_only_the_template_knows_is_shown() -> None:
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = CHATML.replace("{{ message.role }}", "{{ message.role }} {{ message.mood or '' }}")
    ((ids, _),) = encode(conversation(chat({**ASKED, "mood": "curious"}, ANSWER)), ChatTemplate(tokenizer))
    assert "<|im_start|>user curious\n" in tokenizer.decode(ids)
