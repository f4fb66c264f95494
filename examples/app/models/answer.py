"""An answer to a question about a text: its prompt, the room for it, how it is sampled, and its words as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Event, Thread

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

from app.inputs.chat import answer_ends
from app.inputs.messages import USER
from app.inputs.prompt import prompt_ids
from app.inputs.template import ChatTemplate
from app.models.use_model import OpenedModel
from longlora_ext.adapter import stops

Stop = Callable[..., torch.Tensor]  # as a StoppingCriteria is called: bool [1]
DEFAULT_NEW_TOKENS = 512
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")

#: What a model's own generation_config may ask for, and no answer that comes as it is made can have: several at once,
#: and ways of decoding that transformers fetches from the hub. The last one would hide scores that are no numbers.
NOT_FOR_ONE_ANSWER = (
    "num_beams", "num_beam_groups", "diversity_penalty", "early_stopping", "length_penalty", "num_return_sequences",
    "constraints", "force_words_ids", "penalty_alpha", "dola_layers", "remove_invalid_values",
)  # fmt: skip


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
        opened: The model, whose own is afterwards without `NOT_FOR_ONE_ANSWER`.
        new: Tokens of the answer at most.
        question: Whether a question was asked, which is a message where there is a chat template.
        sampling: Those of `SAMPLING` that were given; a temperature of 0 takes the likeliest token each time.

    Raises:
        ValueError: What was given has no effect with the model's own.
    """
    own = opened.model.generation_config.to_dict()
    own = {name: value for name, value in own.items() if name not in NOT_FOR_ONE_ANSWER}
    config = GenerationConfig.from_dict(own)
    for module in (opened.model, opened.base):  # `generate` takes from it what the config leaves open
        module.generation_config = GenerationConfig.from_dict(own)
    if sampling.get("temperature", config.temperature) == 0:
        if dropped := [name for name in ("top_p", "top_k") if name in sampling]:
            raise ValueError(
                f"--{dropped[0]} has no effect with a temperature of 0, which the model's generation_config has: "
                "--temperature sets another"
            )
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


def write(opened: OpenedModel, ids: torch.Tensor, config: GenerationConfig, to: BaseStreamer, *stops: Stop) -> None:
    """Answer.

    Args:
        opened: The model.
        ids: The prompt, int64 [1, tokens].
        config: What `generation_config` returns.
        to: What takes the tokens as they come.
        stops: What may end the answer before its time.

    Raises:
        ValueError: What the model computes is no number.
    """
    ids = ids.to(opened.model.device)
    opened.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        tokenizer=opened.tokenizer,  # for the stop_strings of the model's own config
        streamer=to,
        logits_processor=LogitsProcessorList([_numbers]),
        stopping_criteria=StoppingCriteriaList(stops),
    )


def _numbers(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The scores of the next token as they are. Of NaN the greedy choice would be token 0, without a word."""
    if not (largest := scores.max()).isfinite():  # NaN if any is; -inf alone is a token that is ruled out
        raise ValueError(
            f"the model computes {largest.item()} where numbers should be: its weights are damaged, or its --dtype "
            "cannot hold what it computes"
        )
    return scores


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
            write(opened, ids, config, streamer, stop)
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
