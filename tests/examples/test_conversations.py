"""Rows of conversations in all their spellings: what a model is shown of them, what it learns, and what is an error."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.inputs.chat import LLAMA_2, encode
from app.inputs.conversations import conversation
from app.inputs.template import ChatTemplate
from byte_tokens import byte_tokenizer
from chat_templates import CHATML, DEEPSEEK, LLAMA_3_1, QWEN_3, SPLITS, tokenizer_of
from conversation_rows import ANSWER, ASKED, CALL, THOUGHT, TOOL, chat


def shown(row: dict[str, Any], template: str = QWEN_3) -> str:
    """What the model sees of a row; of several samples the last."""
    tokenizer = byte_tokenizer(template, eos_token="</s>") if template == LLAMA_2 else tokenizer_of(template)
    return tokenizer.decode(encode(conversation(row), ChatTemplate(tokenizer))[-1].input_ids)


def learned(row: dict[str, Any], template: str = QWEN_3) -> list[str]:
    """The texts that are learned of a row, piece by piece, of all its samples."""
    tokenizer = tokenizer_of(template)
    pieces: list[list[int]] = []
    for _, labels in encode(conversation(row), ChatTemplate(tokenizer)):
        begins = [n for n, label in enumerate(labels) if label != -100 and (n == 0 or labels[n - 1] == -100)]
        for begin in begins:
            ids = labels[begin:]
            pieces.append(ids[: ids.index(-100)] if -100 in ids else ids)
    return [tokenizer.decode(piece).strip() for piece in pieces]


def error(row: dict[str, Any], template: str = QWEN_3) -> str:
    with pytest.raises(ValueError) as raised:
        shown(row, template)
    return str(raised.value)


# --- what is learned --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": 0}])
@pytest.mark.parametrize("template", [QWEN_3, CHATML, LLAMA_3_1])
def test_an_answer_that_is_not_to_be_learned_is_context(mark: dict[str, Any], template: str) -> None:
    sure = {"role": "user", "content": "sure?"}
    row = chat({**ASKED, "weight": 0}, {**ANSWER, "content": "Milan", **mark}, sure, {**ANSWER, "weight": 1})
    assert "Milan" in shown(row, template)
    (piece,) = learned(row, template)
    assert piece.startswith("Rome") and "Milan" not in piece


def test_marks_within_marked_templates() -> None:
    marked = CHATML.replace(
        "{{ message.content }}<|im_end|>",
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ message.content }}<|im_end|>{% endif %}",
    )
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = marked
    row = chat(ASKED, {**ANSWER, "weight": 0}, ASKED, {**ANSWER, "content": "a"}, ASKED, {**ANSWER, "content": "b"})
    ((_, labels),) = encode(conversation(row), ChatTemplate(tokenizer))
    assert tokenizer.decode([label for label in labels if label != -100]) == "a<|im_end|>b<|im_end|>"


def test_what_follows_the_last_answer_to_learn_is_left_out() -> None:
    row = chat(ASKED, ANSWER, ASKED, {**ANSWER, "content": "Milan", "weight": 0})
    assert "Milan" not in shown(row)


@pytest.mark.parametrize("empty", [None, ""])
def test_of_several_spellings_of_a_column_the_one_that_holds_something_counts(empty: str | None) -> None:
    """As in a table of two that were put together. The later one counted, and what the first held was lost."""
    row: dict[str, Any] = {"instruction": "q", "input": "i", "output": "a", "Input": empty}
    for columns in (row, dict(reversed(row.items()))):
        assert [message["content"] for message in conversation(columns).messages] == ["q\n\ni", "a"]
    refused = {**chat(ASKED, ANSWER), "train": False, "Train": empty}
    assert "says not to learn it" in error(refused)


def test_a_system_message_that_a_column_repeats_is_there_once() -> None:
    """Where the message has both spellings of its fields, as a Parquet file of two tables gives them."""
    said = {"role": None, "from": "system", "content": None, "value": "Be brief."}
    parts = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    for first in (said, parts):
        roles = [message["role"] for message in conversation(chat(first, ASKED, ANSWER, system="Be brief.")).messages]
        assert roles == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat(ASKED, {**ANSWER, "weight": 0.5}), "weight of message 2 is 0.5; known are 1"),
        (chat(ASKED, {**ANSWER, "weight": "0"}), "weight of message 2 is '0'; known are 1"),
        (chat(ASKED, {**ANSWER, "weight": 2}), "weight of message 2 is 2; known are 1"),
        (chat({**ASKED, "weight": 1}, ANSWER), "weight of message 1, of the role user, says to learn it"),
        (chat({**ASKED, "train": True}, ANSWER), "train of message 1, of the role user, says to learn it"),
        (chat(ASKED, {**ANSWER, "weight": 1, "train": False}), "weight and train of message 2 contradict each other"),
        (chat(ASKED, {**ANSWER, "weight": 0}), "none of its answers is to be learned"),
        (chat(ASKED, {**ANSWER, "mask": 1}), "leaves out mask of message 2"),
        (chat(ASKED, {**ANSWER, "loss_scale": 2}), "leaves out loss_scale of message 2"),
        (chat(ASKED, {**ANSWER, "train_detail": [{"begin_offset": 0}]}), "leaves out train_detail of message 2"),
        (chat(ASKED, ANSWER, weight=0.5), "weight of the row is 0.5"),
        (chat(ASKED, ANSWER, weight=0), "its column 'weight' says not to learn it"),
    ],
)
def test_marks_that_cannot_be_honoured(row: dict[str, Any], message: str) -> None:
    assert message in error(row)


# --- other forms ------------------------------------------------------------------------------------------------


def test_alpaca_with_system_and_history() -> None:
    """The answers in a history are learned, as LLaMA-Factory does."""
    row = {"instruction": "of Italy?", "output": "Rome", "system": "Be brief.", "history": [["of France?", "Paris"]]}
    same = chat(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "of France?"},
        {"role": "assistant", "content": "Paris"},
        ASKED,
        ANSWER,
    )
    assert shown(row) == shown(same) and learned(row) == learned(same) == ["Paris<|im_end|>", "Rome<|im_end|>"]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "of Italy?"}, {"from": "gpt", "value": "Rome"}]},
        {"conversation": [{"from": "user", "value": "of Italy?"}, {"from": "assistant", "value": "Rome"}]},
        {"conversations": [{"role": "user", "content": "of Italy?"}, {"role": "assistant", "content": "Rome"}]},
        {"messages": json.dumps([ASKED, ANSWER])},
        {"messages": [{**part, "content": [{"type": "text", "text": part["content"]}]} for part in (ASKED, ANSWER)]},
        {"instruction": "of Italy?", "input": None, "output": "Rome", "history": None, "system": ""},
        {"question": "of Italy?", "response": "Rome"},
        {"query": "of Italy?", "answer": "Rome"},
        {"prompt": "of Italy?", "completion": "Rome"},
        {"prompt": [ASKED], "completion": [ANSWER]},
        {"Instruction": "of Italy?", "Output": "Rome"},
        chat(ASKED, ANSWER, prompt="of Italy?"),
        chat(ASKED, ANSWER, text="### User: of Italy? ### Bot: Rome"),
    ],
)
def test_spellings_of_one_conversation(row: dict[str, Any]) -> None:
    assert shown(row) == shown(chat(ASKED, ANSWER))


def test_answers_in_a_prompt_of_messages_are_context() -> None:
    row = {"prompt": [ASKED, {**ANSWER, "content": "Milan"}, ASKED], "completion": [ANSWER]}
    assert "Milan" in shown(row) and learned(row) == ["Rome<|im_end|>"]


def test_text_in_parts_begins_lines() -> None:
    parts = [{"type": "text", "text": "of Italy?", "image_url": None}, {"type": "text", "text": "Or of France?"}]
    assert "user\nof Italy?\nOr of France?<|im_end|>" in shown(chat({**ASKED, "content": parts}, ANSWER))


def test_tools_of_llama_factory() -> None:
    """ShareGPT with calls and observations, and tools as JSON in a column."""
    row = {
        "conversations": [
            {"from": "human", "value": "in Rome?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "It is sunny."},
        ],
        "system": "Be brief.",
        "tools": json.dumps([TOOL["function"]]),
    }
    same = chat(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", **CALL}]},
        {"role": "tool", "tool_call_id": "a", "name": "weather", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
        tools=[TOOL],
    )
    assert shown(row) == shown(same)
    assert '<tools>{"type": "function", "function": {"name": "weather"' in shown(row)
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call><|im_end|>'
    assert learned(row) == [call, "It is sunny.<|im_end|>"]


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [CALL["function"]]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]},
        {"tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome", "unit": None}}}]},
        {"function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}},
    ],
)
def test_spellings_of_a_call(calls: dict[str, Any]) -> None:
    row = chat(ASKED, {"role": "assistant", "content": "I look.", **calls})
    assert learned(row) == [
        'I look.<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call><|im_end|>'
    ]


def test_functions_are_tools() -> None:
    assert shown(chat(ASKED, ANSWER, functions=[TOOL["function"]])) == shown(chat(ASKED, ANSWER, tools=[TOOL]))


def test_a_template_that_puts_calls_together_from_text() -> None:
    row = chat(ASKED, {"role": "assistant", "content": "I look.", "tool_calls": [CALL]})
    assert learned(row, DEEPSEEK) == ['I look.<call>weather\n{"city": "Rome"}<|endoftext|>']
    printing = DEEPSEEK.replace("'\\n' + call.function.arguments", "'\\n' ~ call.function.arguments")
    assert printing != DEEPSEEK
    tokenizer = tokenizer_of(DEEPSEEK)
    tokenizer.chat_template = printing
    ((ids, _),) = encode(conversation(row), ChatTemplate(tokenizer))
    assert '<call>weather\n{"city": "Rome"}' in tokenizer.decode(ids)


def test_thoughts_are_learned_where_the_template_writes_them() -> None:
    """Each answer with its own, though the template leaves earlier ones out of the whole."""
    row = chat(ASKED, {**ANSWER, "thinking": "hm"}, ASKED, {**ANSWER, "reasoning_content": "well"})
    assert learned(row) == ["<think>\nhm\n</think>\nRome<|im_end|>", "<think>\nwell\n</think>\nRome<|im_end|>"]
    alone = {"instruction": "of Italy?", "output": "Rome", "reasoning": "well"}
    assert learned(alone) == ["<think>\nwell\n</think>\nRome<|im_end|>"]


def test_thoughts_in_the_content_are_learned_where_they_are_kept() -> None:
    assert learned(chat(ASKED, THOUGHT), CHATML) == [f"{THOUGHT['content']}<|im_end|>"]
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = SPLITS
    nothing = {**THOUGHT, "content": "<think>\n\n</think>\n\nIt is 51."}  # of which nothing is lost
    ((ids, _),) = encode(conversation(chat(ASKED, nothing)), ChatTemplate(tokenizer))
    assert "It is 51.<|im_end|>" in tokenizer.decode(ids)


def test_variables_of_the_template() -> None:
    row = chat(ASKED, ANSWER, chat_template_kwargs='{"date_string": "1 May 1999"}')
    assert "Today Date: 1 May 1999" in shown(row, LLAMA_3_1)


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat(ASKED, ANSWER, chosen="x"), "its column 'chosen' is for learning from preferences"),
        ({"prompt": "x", "completion": "y", "label": False}, "its column 'label' is for learning from preferences"),
        (chat(ASKED, ANSWER, images=["a.png"]), "its column 'images' holds what is no text"),
        (chat(ASKED, ANSWER, input_ids=[1]), "its column 'input_ids' holds tokens"),
        (chat(ASKED, ANSWER, loss_mask=[0, 1]), "its column 'loss_mask' says what is learned"),
        ({"question": "x", "choices": ["a"], "answer": "a"}, "its column 'choices' would change what the model sees"),
        (chat(ASKED, ANSWER, history=[["a", "b"]]), "its column 'history' goes with an instruction"),
        (chat(ASKED, ANSWER, input="more"), "its column 'input' says something that its conversation does not"),
        ({"instruction": "x", "question": "y", "answer": "z"}, "it has both instruction and question"),
        ({"instruction": "x", "output": "y", "answer": "z"}, "it has both output and answer"),
        ({**chat(ASKED, ANSWER), "conversations": [ASKED, ANSWER]}, "it has both messages and conversations"),
        (chat({**ASKED, "role": "system"}, ASKED, ANSWER, system="x"), "and the first of its messages differ"),
        (chat({"role": None, "from": "system", "value": "y"}, ASKED, ANSWER, system="x"), "its messages differ"),
        ({"System Prompt": "x", "system_prompt": "y", "question": "q", "answer": "a"}, "two columns 'system_prompt', "),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "round 1 of its history is ['a']; expected is"),
        ({"instruction": "x", "output": "y", "history": "a"}, "its history is 'a', which is no JSON"),
        (chat(ASKED, ANSWER, tools="weather"), "its tools is 'weather', which is no JSON"),
        (chat(ASKED, ANSWER, tools=[{"weather": 1}]), "tool 1 is {'weather': 1}; expected is"),
        (chat({**ASKED, "content": [{"type": "image_url"}]}, ANSWER), "part 1 of message 1 is of the type 'image_url'"),
        (chat({**ASKED, "from": "human"}, ANSWER), "message 1 has both role and from"),
        (chat(ASKED, {"role": "assistant", "content": None, "refusal": "no"}), "message 2, an answer of the assistant"),
        (chat(ASKED, {**ANSWER, "refusal": "no"}), "leaves out refusal of message 2"),
        (chat(ASKED, {**ANSWER, "audio": {"id": "x"}}), "leaves out audio of message 2"),
        (chat(ASKED, {**ANSWER, "tool_calls": [{"arguments": {}}]}), "call 1 in message 2 is {'arguments': {}}"),
        (chat(ASKED, {**ANSWER, "function_call": {"name": "f", "arguments": "x"}}), "2 is 'x', which is no JSON"),
        (chat(ASKED, {**ANSWER, "tool_calls": [{**CALL, "result": 1}]}), "call 1 in message 2 has result; known are"),
        ({"conversations": [{"from": "gpt", "value": "hi"}, ASKED, ANSWER]}, 'no message with the role "user" before'),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_honoured_says_why(row: dict[str, Any], message: str) -> None:
    assert message in error(row)
