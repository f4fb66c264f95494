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

An answer that is not to be learned is shown like all others, and has no labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from app.inputs.conversations import Conversation
from app.inputs.messages import ASSISTANT, USER
from app.inputs.prompt import shared_start
from app.inputs.template import ChatTemplate
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
{%- elif message['role'] == 'assistant' -%}
{{- ' ' + message['content'] | trim + ' ' }}{{ eos_token -}}
{%- else -%}
{{- raise_exception('messages have the roles system, user and assistant') -}}
{%- endif -%}
{%- endfor -%}
"""


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


def encode(conversation: Conversation, template: ChatTemplate) -> list[Encoded]:
    """The samples of one conversation, mostly one.

    Args:
        conversation: Its last message is an answer that is learned.
        template: What writes it.

    Raises:
        ValueError: The template refuses the conversation, leaves out something of it, or the answers cannot be told
            from the rest.
    """
    conversation = template.fitted(conversation)
    samples = _by_marks(conversation, template) or _by_comparison(conversation, template)
    return [_ended(sample, conversation, template.tokenizer) for sample in samples]


def ends(samples: Sequence[Encoded], conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that end the answers in samples of a conversation, sorted."""
    found: set[int | None] = set()
    for _, labels in samples:
        for begin, label in enumerate(labels):
            if label != IGNORED_LABEL and (begin == 0 or labels[begin - 1] == IGNORED_LABEL):
                after = next((n for n in range(begin, len(labels)) if labels[n] == IGNORED_LABEL), len(labels))
                found.add(_end(labels[begin:after], conversation, tokenizer))
    return sorted(token for token in found if token is not None)


def answer_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that end an answer as the chat template of a tokenizer writes it; none if it takes none."""
    example = Conversation([{"role": USER, "content": "2 + 2?"}, {"role": ASSISTANT, "content": "4"}], [False, True])
    try:
        return ends(encode(example, ChatTemplate(tokenizer)), example, tokenizer)
    except ValueError:  # it is one to ask with, not to answer
        return []


def _by_marks(conversation: Conversation, template: ChatTemplate) -> list[Encoded]:
    """The sample by the marks of the template; none if it has no marks, or they do not tell the answers."""
    messages, tokenizer = conversation.messages, template.tokenizer
    if not (tokenizer.is_fast and template.marks_answers and _grows(conversation, template)):
        return []
    found: Any = template.apply(
        messages, conversation.context, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, marked = found["input_ids"], _with_whole_characters(found)
    begins = [here > before for here, before in zip(marked, [0, *marked[:-1]], strict=True)]
    learned = [
        answer for message, answer in zip(messages, conversation.learned, strict=True) if message["role"] == ASSISTANT
    ]
    if len(learned) != sum(begins):
        return []
    # Some templates mark the answer without its end. What follows the last answer, with no message behind it, can only
    # be an end; what follows the others may also begin the next message.
    last = len(marked) - marked[::-1].index(1)
    behind = _ends(tokenizer).intersection(ids[last : last + 1]) | {tokenizer.eos_token_id}
    labels, answer = [], -1
    for token, here, before, begin in zip(ids, marked, [0, *marked[:-1]], begins, strict=True):
        answer += begin
        is_answer = here or (before and token in behind)
        labels.append(token if is_answer and learned[answer] else IGNORED_LABEL)
    return [Encoded(ids, labels)]


def _with_whole_characters(found: Any) -> list[int]:
    """The mask of the answers. transformers ends it with the first token of the last character, which may have more."""
    marked = list(found["assistant_masks"])
    for place in range(1, len(marked)):
        if marked[place - 1] and not marked[place]:
            before, here = (found.token_to_chars(token) for token in (place - 1, place))
            marked[place] = int(before is not None and here is not None and here.start < before.end)
    return marked


def _grows(conversation: Conversation, template: ChatTemplate) -> bool:
    """Whether all answers stand in the whole as they do where they are the last one."""
    messages, context = conversation.messages, conversation.context
    whole = template.write(messages, context)
    answers = [turn for turn, message in enumerate(messages, 1) if message["role"] == ASSISTANT]
    return all(whole.startswith(template.write(messages[:turn], context).rstrip()) for turn in answers)


def _by_comparison(conversation: Conversation, template: ChatTemplate) -> list[Encoded]:
    samples: list[Encoded] = []
    messages, context, tokenizer = conversation.messages, conversation.context, template.tokenizer
    for turn, learned in enumerate(conversation.learned):
        if not learned:
            continue
        prompt = template.write(messages[:turn], context, ask=True)
        whole = template.write(messages[: turn + 1], context)
        # Some templates end a conversation that no answer is asked for, which is no part of the messages.
        before = prompt[: shared_start(prompt, template.write(messages[:turn], context))]
        if not whole.startswith(before.rstrip()):
            raise ValueError(
                "the model's chat template writes the messages before an answer otherwise when the answer is there: "
                "mark the answers in it with {% generation %}"
            )
        ids = _tokens(whole, tokenizer)
        start = shared_start(_tokens(prompt, tokenizer), ids)
        content = messages[turn]["content"]
        if content and not whole.startswith(prompt.rstrip()):
            # What asking adds, such as <think>, is not in this answer. Letters that both begin with are the answer's.
            another = {**messages[turn], "content": "1" if content.strip().startswith("0") else "0"}
            head = whole[: shared_start(whole, template.write([*messages[:turn], another], context))]
            start = min(start, shared_start(_tokens(head, tokenizer), ids))
        if start == len(ids):
            raise ValueError("the model's chat template leaves the answer out")
        labels = [IGNORED_LABEL] * start + ids[start:]
        if samples and ids[: len(samples[-1].input_ids)] == samples[-1].input_ids:
            known = samples.pop().labels
            labels[: len(known)] = known
        samples.append(Encoded(ids, labels))
    return samples


def _ended(sample: Encoded, conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """The sample with an end-of-sequence token that is learned, if the template ends the last answer with nothing."""
    ids, labels = sample
    if tokenizer.eos_token_id is None or _end(labels, conversation, tokenizer) is not None:
        return sample
    return Encoded([*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id])


def _end(labels: Sequence[int], conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that ends the last answer in labels, perhaps with white space behind it."""
    learned = (token for token in reversed(labels) if token != IGNORED_LABEL)
    last = next((token for token in learned if str(tokenizer.decode([token])).strip()), None)
    if last is None or last not in _ends(tokenizer):
        return None
    within = any(str(tokenizer.decode([last])) in message["content"] for message in conversation.messages)
    return None if within and last != tokenizer.eos_token_id else last


def _ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that can end an answer: the special ones, but for those that begin a text or stand for what is unknown."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return ({*tokenizer.all_special_ids, *added} - {tokenizer.bos_token_id, tokenizer.unk_token_id}) | {
        tokenizer.eos_token_id
    }


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
