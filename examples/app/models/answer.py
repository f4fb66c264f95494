"""An answer to a question about a text: its prompt, the room for it, how it is sampled, and its words as they come."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event, Thread

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList, TextIteratorStreamer

from app.inputs.chat import answer_ends
from app.inputs.messages import USER
from app.inputs.prompt import prompt_ids
from app.inputs.template import ChatTemplate
from app.models.use_model import OpenedModel
from longlora_ext.adapter import stops

DEFAULT_NEW_TOKENS = 512
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


def tokens(tokenizer: PreTrainedTokenizerBase, text: str, question: str | None) -> torch.Tensor:
    """The prompt, int64 [1, tokens].

    Without a question it is the text alone. With one it is a user's message in the chat template, where there is one.

    Raises:
        ValueError: The template fails or leaves something out, or the tokenizer makes nothing of the text.
    """
    if question is None:
        prompt = text
    elif tokenizer.chat_template is None:
        prompt = f"{text.rstrip()}\n\nQuestion: {question}\nAnswer:"
    else:
        message = {"role": USER, "content": f"{text.rstrip()}\n\n{question}"}
        prompt = ChatTemplate(tokenizer).write([message], {}, ask=True)
        begins = text.strip().partition("\n")[0][:100].rstrip()  # not all of it: templates change white space
        for what, part in (("the beginning of the text", begins), ("the question", question.strip())):
            if part not in prompt:
                raise ValueError(f"the chat template cannot be used: it leaves {what} out")
    if question is not None and tokenizer.chat_template is not None:  # it brings its own special tokens
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = prompt_ids(tokenizer, prompt)
    if not ids:
        raise ValueError("the model's tokenizer makes no tokens of the text")
    return torch.tensor([ids])


def room_for(opened: OpenedModel, prompt: int, wanted: int | None = None, beyond: bool = False) -> int:
    """How many tokens the answer may have.

    Args:
        opened: The model.
        prompt: Tokens of the prompt.
        wanted: Tokens of the answer at most; default: what is left of the context, up to `DEFAULT_NEW_TOKENS`.
        beyond: Allow more tokens than the model was trained on.

    Raises:
        ValueError: Text and answer have more tokens than the model was trained on.
    """
    left = opened.trained_length - prompt
    new = wanted or (DEFAULT_NEW_TOKENS if beyond else max(1, min(DEFAULT_NEW_TOKENS, left)))
    what = f"the prompt has {prompt:,} tokens, with {new:,} for the answer {prompt + new:,}"
    opened.check_length(prompt + new, beyond, what)
    return new


def generation_config(opened: OpenedModel, new: int, question: bool, **sampling: float) -> GenerationConfig:
    """The model's own, with what was asked for. The answer is over at the end of a text, or of a message.

    Args:
        opened: The model.
        new: Tokens of the answer at most.
        question: Whether a question was asked, which is a message where there is a chat template.
        sampling: Those of `SAMPLING` that were given; a temperature of 0 takes the likeliest token each time.
    """
    config = GenerationConfig.from_dict(opened.model.generation_config.to_dict())
    if sampling.get("temperature") == 0:
        config.do_sample = False
        config.temperature = config.top_p = config.top_k = None
        sampling = {name: value for name, value in sampling.items() if name == "repetition_penalty"}
    elif sampling.keys() & {"temperature", "top_p", "top_k"}:
        config.do_sample = True
    config.update(max_new_tokens=new, max_length=None, **sampling)
    tokenizer = opened.tokenizer
    messages = answer_ends(tokenizer) if question and tokenizer.chat_template is not None else ()
    ends = [*stops(config), *messages, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    config.eos_token_id = list(dict.fromkeys(ends)) or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return config


def stream(opened: OpenedModel, ids: torch.Tensor, config: GenerationConfig) -> Iterator[str]:
    """The answer as it comes, in pieces. Whoever closes the iterator stops the model.

    Args:
        opened: The model.
        ids: The prompt, int64 [1, tokens].
        config: What `generation_config` returns.
    """
    opened.forget_length()
    streamer = TextIteratorStreamer(opened.tokenizer, skip_prompt=True, skip_special_tokens=True)
    enough, failed = Event(), []

    def stop(ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.full(ids.shape[:1], enough.is_set(), device=ids.device)

    def generate() -> None:
        try:
            opened.model.generate(
                input_ids=ids.to(opened.model.device),
                attention_mask=torch.ones_like(ids, device=opened.model.device),
                generation_config=config,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        except Exception as error:
            failed.append(error)
            streamer.end()  # or who reads would wait for ever

    thread = Thread(target=generate)
    thread.start()
    try:
        yield from streamer
    finally:
        enough.set()
        thread.join()
    if failed:
        raise failed[0]
