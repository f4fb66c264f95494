"""Conversations: what is read as one, how it is written, and which tokens of it are learned."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from app.inputs.chat import LLAMA_2, Encoded, give_template
from app.inputs.chat import encode as encode_conversation
from app.inputs.conversations import Conversation, conversation
from app.inputs.template import ChatTemplate
from byte_tokens import ASKED, BEGINNINGS, ENDLESS, FORGETFUL, MARK, PLAIN, byte_tokenizer
from chat_templates import CHATML
from finetune_runs import ROOT

MARKED = """\
{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}\
{% generation %}{{ message.content }}<|end|>{% endgeneration %}{% else %}{{ message.content }}<|end|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""

#: The end of an answer is outside of the mark.
MARKED_SHORT = MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")


#: The same with marks, which find each answer, and of the first one not all.
FORGETFUL_MARKED = MARKED.replace(
    "{% generation %}{{ message.content }}",
    "{% generation %}{{ message.content if loop.last else message.content.split('#')[-1] }}",
)

#: The prompt to answer says more than the conversation has there.
THINKING = PLAIN.replace("<|assistant|>{% endif %}", "<|assistant|>think: {% endif %}")


def encode(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """The samples of a conversation all answers of which are learned."""
    answers = [message["role"] == "assistant" for message in messages]
    return encode_conversation(Conversation(messages, answers), ChatTemplate(tokenizer))


def learned(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]] = ASKED) -> list[list[str]]:
    """Of each sample the texts that are learned, piece by piece."""
    samples = []
    for ids, labels in encode(messages, tokenizer):
        assert len(ids) == len(labels) and all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        pieces: list[list[int]] = [[]]
        for label in labels:
            if label != -100:
                pieces[-1].append(label)
            elif pieces[-1]:
                pieces.append([])
        samples.append([tokenizer.decode(piece) for piece in pieces if piece])
    return samples


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, [["a#yes<|end|>\n", "b#no<|end|>\n"]]),
        (MARKED, [["a#yes<|end|>", "b#no<|end|>"]]),
        (MARKED_SHORT, [["a#yes<|end|>", "b#no<|end|>"]]),
        (FORGETFUL, [["a#yes<|end|>\n"], ["b#no<|end|>\n"]]),
        (FORGETFUL_MARKED, [["a#yes<|end|>"], ["b#no<|end|>"]]),
        (THINKING, [["a#yes<|end|>\n", "b#no<|end|>\n"]]),
        (ENDLESS, [["assistant: a#yes\n", "assistant: b#no\n<eos>"]]),
        (LLAMA_2, [[" a#yes <eos>", " b#no <eos>"]]),
    ],
    ids=["plain", "marked", "marked short", "forgetful", "forgetful marked", "thinking", "endless", "llama 2"],
)
def test_answers_alone_are_learned_with_their_ends(template: str, expected: list[list[str]]) -> None:
    assert learned(byte_tokenizer(template, eos_token="<eos>", bos_token="<bos>")) == expected


@pytest.mark.parametrize(
    ("content", "marked"), [("<|think|>a<|/think|>yes", False), ("<|think|>a<|/think|>yes", True), ("yes?<unk>", False)]
)
def test_special_tokens_within_an_answer_do_not_end_it(content: str, marked: bool) -> None:
    template = ENDLESS.replace("{{ message.content }}", MARK) if marked else ENDLESS
    tokenizer = byte_tokenizer(template, eos_token="<eos>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|think|>", "<|/think|>"]})
    (pieces,) = learned(tokenizer, [ASKED[1], {"role": "assistant", "content": content}])
    assert "".join(pieces).endswith("<eos>") and "".join(pieces).count("<eos>") == 1


def test_what_begins_a_message_is_no_end() -> None:
    """The answers are marked, nothing ends them, and a special token begins each message."""
    tokenizer = byte_tokenizer(BEGINNINGS, eos_token="<eos>")
    assert learned(tokenizer, ASKED[1:]) == [["a#yes", "b#no<eos>"]]  # it tells no roles apart


@pytest.mark.parametrize("space", ["before", "behind"])
def test_white_space_at_the_border_of_a_mark_confuses_nothing(space: str) -> None:
    """transformers finds no token for it in tokenizers that trim, and skips answers or learns the next question."""
    where = ("{% generation %}", "{% generation %} ") if space == "before" else ("{% endgen", "\n{% endgen")
    tokenizer = byte_tokenizer(MARKED.replace(*where), trim_offsets=True, eos_token="<eos>")
    assert [[piece.strip() for piece in sample] for sample in learned(tokenizer)] == [["a#yes<|end|>", "b#no<|end|>"]]


@pytest.mark.parametrize("template", [MARKED, MARKED_SHORT, FORGETFUL_MARKED, PLAIN])
def test_the_last_character_of_an_answer_is_learned_whole(template: str) -> None:
    """transformers' mask ends with its first token, where it has several."""
    tokenizer = byte_tokenizer(template, eos_token="<eos>")
    rows = [ASKED[1], {"role": "assistant", "content": "to help 🤗"}, ASKED[1], {"role": "assistant", "content": "鯖"}]
    pieces = [piece.rstrip() for sample in learned(tokenizer, rows) for piece in sample]
    assert pieces == ["to help 🤗<|end|>", "鯖<|end|>"]


def test_what_is_not_learned_is_what_the_model_will_be_asked() -> None:
    tokenizer = byte_tokenizer(PLAIN, eos_token="<eos>")
    ((ids, labels),) = encode(ASKED, tokenizer)
    for turn in (2, 4):
        asked = tokenizer.apply_chat_template(ASKED[:turn], add_generation_prompt=True)["input_ids"]
        assert ids[: len(asked)] == asked
        assert labels[len(asked) - 1] == -100 and labels[len(asked)] == ids[len(asked)]


@pytest.mark.parametrize("answer", ["<tool>x</tool>", "<thought>no</thought> 4", "<think", "four", "0"])
def test_letters_that_an_answer_shares_with_the_prompt_to_think_are_learned(answer: str) -> None:
    """The template asks with <think>, which its answers lack: what they begin with alike was taken for the prompt."""
    asking = "<|im_start|>assistant\n<think>\n"
    tokenizer = byte_tokenizer(CHATML.replace("<|im_start|>assistant\n", asking), eos_token="<eos>")
    rows = [*ASKED[:2], {"role": "assistant", "content": answer}]
    ((piece,),) = learned(tokenizer, rows)
    assert piece.rstrip() == f"{answer}<|im_end|><eos>" or piece.rstrip() == f"{answer}<|im_end|>\n<eos>", piece


def test_llama_2_prompt() -> None:
    tokenizer = byte_tokenizer(None, eos_token="</s>", bos_token="<s>")
    give_template(tokenizer)
    ((ids, _),) = encode(ASKED, tokenizer)
    assert tokenizer.decode(ids) == (
        "<s>[INST] <<SYS>>\nbe brief\n<</SYS>>\n\none? [/INST] a#yes </s><s>[INST] two? [/INST] b#no </s>"
    )


def test_a_tokenizer_that_merges_across_the_borders() -> None:
    """Of subwords, with the same token for beginning and end, and none of it marked."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny_llama")
    give_template(tokenizer)
    assert learned(tokenizer) == [[" a#yes <|endoftext|>", " b#no <|endoftext|>"]]


def test_the_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(None, eos_token="</s>")
    give_template(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == LLAMA_2
    own = byte_tokenizer(PLAIN, eos_token="</s>")
    give_template(own)
    assert own.chat_template == PLAIN


def test_a_tokenizer_that_cannot_end_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="no chat template and no end-of-sequence token"):
        give_template(byte_tokenizer(None))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system messages') }}", "the model's chat template refuses it: no system messages"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
            "writes the messages before an answer otherwise",
        ),
        (
            "{{ messages[0].role + messages[0].content }}<|end|>",
            "leaves out the content of message 2, of the role user",
        ),
    ],
)
def test_a_template_that_cannot_be_used_says_why(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(ASKED, byte_tokenizer(template, eos_token="<eos>"))


def test_llama_2_takes_turns() -> None:
    with pytest.raises(ValueError, match="user and assistant must take turns"):
        encode([ASKED[1], *ASKED[1:3]], byte_tokenizer(LLAMA_2, eos_token="<eos>"))


# --- rows -------------------------------------------------------------------------------------------------------


def test_both_forms_of_a_row() -> None:
    asked, answer = {"role": "user", "content": "do it"}, {"role": "assistant", "content": "done"}
    assert conversation({"instruction": "do it", "output": "done"}).messages == [asked, answer]
    assert conversation({"instruction": "do it", "input": "", "output": "done", "file": "x"}).messages == [
        asked,
        answer,
    ]
    with_text = conversation({"instruction": "do it", "input": "with this", "output": "done"})
    assert with_text.messages[0]["content"] == "do it\n\nwith this"
    assert conversation({"messages": [{**asked, "name": None}, answer, asked]}).messages == [asked, answer]


def said(role: str | None, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": " ", "output": "x"}, "its instruction is empty"),
        ({"instruction": "x", "output": ""}, "its output is empty: there is no answer to learn"),
        ({"instruction": "x", "output": None}, "its output is empty"),
        ({"instruction": "x", "output": 5}, "its output is 5, not text"),
        ({"messages": "hello"}, "its messages are 'hello', not a list; expected are rows of"),
        ({"messages": None}, "it has the columns messages; --task sft takes rows of"),
        ({"messages": ["hello"]}, "message 1 is 'hello'; expected is"),
        ({"messages": [{"by": "human", "text": "x"}]}, "message 1 is {'by': 'human', 'text': 'x'}; expected is"),
        ({"messages": [said("bot", "x")]}, "message 1 has the role 'bot'; known are system, developer, user, human"),
        ({"messages": [said("user", "x"), said("assistant", " ")]}, "message 2, an answer of the assistant, is empty"),
        ({"messages": [said("user", {"type": "text"})]}, "the content of message 1 is .*, not text"),
        ({"messages": [said("user", "x")]}, 'none of its messages has the role "assistant"'),
        ({"messages": []}, "it has the columns messages; --task sft takes rows of"),
        ({"messages": [said("system", "x"), said("assistant", "y")]}, 'no message with the role "user" before it'),
    ],
)
def test_a_bad_row_says_what_is_wrong(row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conversation(row)
