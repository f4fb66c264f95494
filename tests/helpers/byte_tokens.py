"""A tokenizer of a token a byte, and short chat templates."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

#: A turn is <|role|>content<|end|> and a line break; answers are not marked.
PLAIN = """\
{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


#: Only the last answer is written with its thoughts, as Qwen's and others' templates have it.
FORGETFUL = """\
{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' and not loop.last %}\
{{ message.content.split('#')[-1] }}{% else %}{{ message.content }}{% endif %}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


#: Nothing ends an answer.
ENDLESS = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


#: The answer alone is marked.
MARK = """\
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}\
{% else %}{{ message.content }}{% endif %}"""


#: A special token begins each message, and nothing ends one.
BEGINNINGS = f"{{% for message in messages %}}<|end|>{MARK}{{% endfor %}}"


ASKED = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "a#yes"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "b#no"},
]


def byte_tokenizer(template: str | None, trim_offsets: bool = False, **special: str) -> PreTrainedTokenizerFast:
    """One token a byte and one for each special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)
