"""What a model's chat template makes of a conversation, and whether that is all of it.

Templates are programs: most leave out what they do not know, without a word. So each part of a conversation that ought
to show is taken away once, and what the template then writes must differ.

Many templates print today's date, by `strftime_now`. A `ChatTemplate` can be given another day, so that a run that goes
on tomorrow has the samples of today.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from functools import cache
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.defaults import DEFAULT_NAMESPACE
from transformers import PreTrainedTokenizerBase

from app.inputs.conversations import Conversation
from app.inputs.messages import ASSISTANT, REASONING, USER, Message, shown

MARKS_ANSWERS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
CLOCK = "strftime_now"

#: What may follow % in a format of a date, and with - between them, as the C library has it.
DIRECTIVES = "aAbBcdDeFgGhHIjklmMnprRsStTuUVwWxXyYzZ"

#: Where reasoning ends that is written into the content, and where it begins.
THOUGHT_ENDS = re.compile(r"</(think|thinking|reasoning)>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>")
THOUGHT_BEGINS = re.compile(r"<(think|thinking|reasoning)>|\[THINK\]|◁think▷|<\|begin_of_thought\|>")

#: Fields of a message that a template may leave out: names of things, and what was noted about a message.
MAY_BE_LEFT_OUT = {
    "annotations", "country", "created", "created_at", "create_time", "date", "finish_reason", "hash", "hashed_ip",
    "header", "id", "index", "info", "language", "lang", "meta", "metadata", "message_id", "model", "model_name",
    "name", "parent_id", "provider", "redacted", "source", "state", "time", "timestamp", "token_count", "tokens",
    "tool_call_id", "toxic", "turn", "turn_identifier", "type", "update_time", "usage", "uuid",
}  # fmt: skip

#: What `apply_chat_template` itself takes: no variables of a template.
NO_VARIABLES = {
    "messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_dict", "return_tensors", "tools", "documents", CLOCK,
}  # fmt: skip


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, on one day.

    Args:
        tokenizer: It has a chat template.
        day: What the template takes for today; None: the day that it is.
    """

    tokenizer: PreTrainedTokenizerBase
    day: date | None = None

    @property
    def marks_answers(self) -> bool:
        """Whether it says which parts of what it writes are answers."""
        return bool(MARKS_ANSWERS.search(self.tokenizer.get_chat_template()))

    def write(self, messages: Sequence[Message], context: dict[str, Any], ask: bool = False) -> str:
        """The text of a conversation; `ask`: up to where the model is to answer.

        Raises:
            ValueError: The template refuses it.
        """
        return str(self.apply(messages, context, tokenize=False, add_generation_prompt=ask))

    def apply(self, messages: Sequence[Message], context: dict[str, Any], **options: Any) -> Any:
        """`apply_chat_template`, with what a conversation has beside its messages.

        Raises:
            ValueError: The template refuses it.
        """
        source = self.tokenizer.get_chat_template(tools=context.get("tools"))
        if self.day is not None:
            source = _clock(self.day) + source
        try:
            return self.tokenizer.apply_chat_template(list(messages), chat_template=source, **context, **options)
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses it: {error}") from error
        except (TypeError, LookupError, AttributeError, ArithmeticError) as error:  # a template is a program
            raise ValueError(f"the model's chat template fails on it: {type(error).__name__}: {error}") from error

    def fitted(self, conversation: Conversation) -> Conversation:
        """The conversation with the arguments of its calls as the template takes them: objects, or JSON as text.

        Raises:
            ValueError: The template leaves out something of it, or refuses it.
        """
        text = replace(conversation, messages=[_with_text(message) for message in conversation.messages])
        if text.messages != conversation.messages:
            try:
                written = self.write(conversation.messages, conversation.context)
                arguments = [call["function"]["arguments"] for call in _calls(conversation.messages)]
                as_text = any(each and str(each) in written for each in arguments)  # {'a': 1} is no JSON
            except ValueError:
                as_text = self._written(text.messages, text.context) is not None
            if as_text:
                conversation = text
        self._check(conversation)
        return conversation

    def _check(self, conversation: Conversation) -> None:
        """Raise `ValueError` for what would not show."""
        messages, context = conversation.messages, conversation.context
        variables = _variables(self.tokenizer.get_chat_template(tools=context.get("tools")))
        for name in context:
            if name not in ("tools", "documents", *variables):
                raise ValueError(f"the model's chat template has no variable {name!r}, which chat_template_kwargs sets")
        if wrong := sorted(variables.intersection(conversation.unread)):
            raise ValueError(
                f"its column {wrong[0]!r} is called like a variable of the model's chat template: write it into "
                "the column chat_template_kwargs, or drop it"
            )
        for name in ("tools", "documents"):
            others = {other: value for other, value in context.items() if other != name}
            if name in context and self.write(messages, context) == self._written(messages, others):
                raise ValueError(f"the model's chat template leaves its {name} out")
        for number, message in enumerate(messages):
            end = next(n for n in range(number, len(messages)) if messages[n]["role"] == ASSISTANT) + 1
            whole = self.write(messages[:end], context)
            for what, without in _parts(message, f"message {number + 1}"):
                if whole == self._written([*messages[:number], without, *messages[number + 1 : end]], context):
                    raise ValueError(f"the model's chat template {what}")
        for role in (USER, ASSISTANT):
            names = {message["name"] for message in messages if message["role"] == role and "name" in message}
            nameless = [{field: value for field, value in each.items() if field != "name"} for each in messages]
            if len(names) > 1 and self.write(messages, context) == self._written(nameless, context):
                raise ValueError(f"the model's chat template leaves out name, which tells {len(names)} speakers apart")

    def _written(self, messages: Sequence[Message], context: dict[str, Any]) -> str | None:
        """The text of a conversation, if the template takes it."""
        try:
            return self.write(messages, context)
        except ValueError:
            return None


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template of a tokenizer asks for today's date."""
    template: Any = tokenizer.chat_template
    return CLOCK in (" ".join(template.values()) if isinstance(template, dict) else template or "")


def _clock(day: date) -> str:
    """A macro that takes the place of the function `strftime_now`, and has another day."""
    midnight = datetime.combine(day, time())
    known = {f"%{flag}{letter}": midnight.strftime(f"%{flag}{letter}") for flag in ("", "-") for letter in DIRECTIVES}
    known["%%"] = "%"
    chain = "".join(f"|replace({json.dumps(each)}, {json.dumps(value)})" for each, value in known.items())
    # The line break is of the macro's: a break behind a block is left out.
    return f"{{%- macro {CLOCK}(format) -%}}{{{{ format{chain} }}}}{{%- endmacro %}}\n"


def template_of_json(text: str) -> str:
    """The template in a file: all of its text, or the `chat_template` of an object of JSON, as hubs have it.

    Raises:
        ValueError: That is no text.
    """
    try:
        found = json.loads(text)
    except ValueError:
        return text
    if not isinstance(found, dict):
        return text
    template = found.get("chat_template")
    if not isinstance(template, str):
        raise ValueError(f"it is a JSON object, whose chat_template must be text, not {shown(template)}")
    return template


def parsed(source: str) -> nodes.Template:
    """A template as Jinja reads it; it is not run.

    Raises:
        ValueError: It is none.
    """
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return environment.parse(MARKS_ANSWERS.sub("", source))
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno} of the chat template is no Jinja: {error.message}") from error


@cache
def _variables(source: str) -> frozenset[str]:
    """Names that a template reads, and does not set, for its users to give."""
    return frozenset(meta.find_undeclared_variables(parsed(source)) - NO_VARIABLES - DEFAULT_NAMESPACE.keys())


def _parts(message: Message, name: str) -> Iterator[tuple[str, Message]]:
    """All of a message that ought to show: what an error says of it, and the message without it."""
    if message["content"].strip():
        yield f"leaves out the content of {name}, of the role {message['role']}", {**message, "content": ""}
    if message["role"] == ASSISTANT and (thought := THOUGHT_ENDS.search(message["content"])):
        before, behind = message["content"][: thought.start()], message["content"][thought.end() :]
        if THOUGHT_BEGINS.sub("", before).strip():
            for rest in (behind, behind.lstrip()):  # templates cut white space off, or do not
                yield f"leaves out what stands before {thought[0]} in {name}", {**message, "content": rest}
    if message["role"] not in (USER, ASSISTANT):
        yield f"writes {name}, of the role {message['role']}, as one of the assistant", {**message, "role": ASSISTANT}
    calls = message.get("tool_calls", [])
    for place, call in enumerate(calls):
        before, behind = calls[:place], calls[place + 1 :]
        rest = {"tool_calls": before + behind} if before or behind else {}
        yield f"leaves out tool_calls, call {place + 1}, of {name}", {**_without(message, "tool_calls"), **rest}
        if call["function"]["arguments"] not in ({}, "{}"):
            nothing = "{}" if isinstance(call["function"]["arguments"], str) else {}
            empty = {**call, "function": {**call["function"], "arguments": nothing}}
            changed = {**message, "tool_calls": [*before, empty, *behind]}
            yield f"leaves out the arguments in tool_calls, call {place + 1}, of {name}", changed
    known = {"role", "content", "tool_calls", *REASONING, *MAY_BE_LEFT_OUT}
    for field in message:
        if field not in known:
            yield f"leaves out {field} of {name}", _without(message, field)
    if REASONING[0] in message:
        yield f"leaves out {REASONING[0]} of {name}", _without(message, *REASONING)


def _without(message: Message, *fields: str) -> Message:
    return {field: value for field, value in message.items() if field not in fields}


def _calls(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [call for message in messages for call in message.get("tool_calls", [])]


def _with_text(message: Message) -> Message:
    """A message with the arguments of its calls as text."""
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [{**each, "arguments": json.dumps(each["arguments"], ensure_ascii=False)} for each in functions]
    calls = [{**call, "function": text} for call, text in zip(message["tool_calls"], texts, strict=True)]
    return {**message, "tool_calls": calls}
