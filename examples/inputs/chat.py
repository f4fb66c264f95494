"""From a conversation to token ids, and which of them are answers: loss is on those alone.

The model's own chat template writes the conversation, as it will when the model is used; a tokenizer without one gets
that of Llama 2, which is saved with it. Answers are found in one of two ways:

- The template marks them (`{% generation %}`): transformers tells their tokens. It is believed if it finds as many
  answers as there are; where an answer begins or ends with white space, it can miss some and take questions for others.
- Else by comparison, turn by turn: what the template makes of the messages up to an answer, with that answer and
  without it. What the two have in common is the prompt, what follows is the answer, with the token that ends it.

Some templates write the last answer otherwise than those before it (they leave earlier thoughts out). Such a
conversation becomes several samples, one up to each answer that is written anew, and each learns what was not learned
before.

Where a template ends no answer, the last one gets an end-of-sequence token, which is learned. Those before it get none:
between messages the model is to see what the template will write there when it is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from inputs.conversations import Message
from longlora_ext.loss import IGNORED_LABEL

#: What Llama 2 was trained with: the system's message goes into the first question.
LLAMA_2 = """\
{%- set offset = 0 -%}
{%- set system = '' -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set offset = 1 -%}
{%- set system = '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' -%}
{%- endif -%}
{%- for message in messages[offset:] -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('after the system message, user and assistant must take turns') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- bos_token }}{{ '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' -}}
{%- else -%}
{{- ' ' + message['content'] | trim + ' ' }}{{ eos_token -}}
{%- endif -%}
{%- endfor -%}
"""

MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoded(NamedTuple):
    """One sample: token ids, and the same with -100 in place of what is no answer."""

    input_ids: list[int]
    labels: list[int]


def give_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer without a chat template have that of Llama 2.

    Raises:
        ValueError: It has none and no end-of-sequence token either, so no model could learn to end its answers.
    """
    if tokenizer.chat_template:
        return
    if tokenizer.eos_token_id is None:
        raise ValueError("it has no chat template and no end-of-sequence token: nothing can say where an answer ends")
    tokenizer.chat_template = LLAMA_2


def encode(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """The samples of one conversation, mostly one.

    Args:
        messages: The conversation; an answer is its last message.
        tokenizer: With a chat template.

    Raises:
        ValueError: The template refuses the conversation, or the answers cannot be told from the rest.
    """
    try:
        samples = _by_marks(messages, tokenizer) or _by_comparison(messages, tokenizer)
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses it: {error}") from error
    return [_ended(sample, tokenizer) for sample in samples]


def _by_marks(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """The sample by the marks of the template; none if it has no marks, or they do not tell the answers."""
    if not (tokenizer.is_fast and MARKS_ANSWERS.search(tokenizer.get_chat_template())):
        return []
    found: Any = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, marked = found["input_ids"], found["assistant_masks"]
    answers = sum(message["role"] == "assistant" for message in messages)
    if answers != sum(here and not before for here, before in zip(marked, [0, *marked[:-1]], strict=True)):
        return []
    # Some templates mark the answer without its end. What follows the last answer, with no message behind it, can only
    # be an end; what follows the others may also begin the next message.
    last = len(marked) - marked[::-1].index(1)
    ends = _ends(tokenizer).intersection(ids[last : last + 1]) | {tokenizer.eos_token_id}
    labels = [
        token if here or (before and token in ends) else IGNORED_LABEL
        for token, here, before in zip(ids, marked, [0, *marked[:-1]], strict=True)
    ]
    return [Encoded(ids, labels)]


def _by_comparison(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    samples: list[Encoded] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _written(messages[:turn], tokenizer, ask=True)
        whole = _written(messages[: turn + 1], tokenizer)
        if not whole.startswith(_written(messages[:turn], tokenizer).rstrip()):
            raise ValueError(
                "the model's chat template writes the messages before an answer otherwise when the answer is there: "
                "mark the answers in it with {% generation %}"
            )
        ids = _tokens(whole, tokenizer)
        start = _common(_tokens(prompt, tokenizer), ids)
        if start == len(ids):
            raise ValueError("the model's chat template leaves the answer out")
        labels = [IGNORED_LABEL] * start + ids[start:]
        if samples and ids[: len(samples[-1].input_ids)] == samples[-1].input_ids:
            learned = samples.pop().labels
            labels[: len(learned)] = learned
        samples.append(Encoded(ids, labels))
    return samples


def _ended(sample: Encoded, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """The sample with an end-of-sequence token that is learned, if the template ends the last answer with nothing."""
    ids, labels = sample
    learned = (token for token in reversed(labels) if token != IGNORED_LABEL)
    last = next((token for token in learned if str(tokenizer.decode([token])).strip()), None)
    if tokenizer.eos_token_id is None or last in _ends(tokenizer):
        return sample
    return Encoded([*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id])


def _ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that can end an answer: the special ones, but for those that begin a text or stand for what is unknown."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return ({*tokenizer.all_special_ids, *added} - {tokenizer.bos_token_id, tokenizer.unk_token_id}) | {
        tokenizer.eos_token_id
    }


def _written(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, ask: bool = False) -> str:
    """What the template makes of messages; `ask`: up to where the model is to answer."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    differ = (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))
