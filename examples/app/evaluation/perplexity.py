"""Perplexity by a sliding window, the way long-context papers report it.

A window of `window` tokens moves over a document by `stride` tokens; each token is scored once, in the
first window that reaches it, so with up to `window` and (behind the first window) at least `window -
stride` tokens of context. A longer window scores the very same tokens with more context: a model that can
use the longer context has the lower perplexity there, and one that cannot has a higher one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from longlora_ext.loss import IGNORED_LABEL

LOSS_TOKENS = 1024  # whose logits exist at once


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) of a document, the last `scored` of which are scored."""

    document: int
    begin: int
    end: int
    scored: int


def windows(lengths: Sequence[int], window: int, stride: int, *, score_all: bool = False) -> Iterator[Window]:
    """The windows over documents of these lengths.

    Args:
        lengths: Tokens of each document; a document of fewer than 2 has nothing to score.
        window: Tokens of a window, 2 or more.
        stride: Tokens it moves by, in 1..window - 1.
        score_all: Score every window as a whole, tokens that the one before scored too, and leave out a last window
            that is not full. So does the program that the LongLoRA paper was measured with: it tells how well a model
            reads with anything from 1 to `window - 1` tokens of context, and is higher than with the most context.

    Raises:
        ValueError: A window or stride outside its range.
    """
    if window < 2:
        raise ValueError(f"window must be 2 or more, got {window}")
    if not 1 <= stride < window:
        raise ValueError(f"stride must be in 1..{window - 1} (below the window), got {stride}")
    for document, length in enumerate(lengths):
        if score_all:
            begins = range(0, max(1, length - window + 1), stride)
            ends = (min(begin + window, length) for begin in begins)
            yield from (Window(document, b, e, e - b - 1) for b, e in zip(begins, ends, strict=True) if e - b > 1)
            continue
        scored_up_to = 1  # the first token has nothing to be predicted from
        for begin in range(0, length, stride):
            end = min(begin + window, length)
            if end > scored_up_to:
                yield Window(document, begin, end, end - scored_up_to)
            scored_up_to = max(scored_up_to, end)
            if end == length:
                break


@torch.no_grad()
def sliding_window_perplexity(
    model: torch.nn.Module,
    documents: Sequence[np.ndarray],
    window: int,
    stride: int,
    *,
    labels: Sequence[np.ndarray] | None = None,
    device: torch.device | str = "cpu",
    batch_tokens: int = 8192,
) -> float:
    """The perplexity of documents under a causal language model.

    Where a process group is up, the windows are shared out among its processes; every process calls this
    and gets the result. All make the same number of forward passes, as ZeRO-3 and DDP need.

    Args:
        model: A transformers causal language model, bare or wrapped (DeepSpeed engine, DDP). It is put in
            eval mode, where `s2attn` attends densely, and back.
        documents: Token ids, integers [length] each.
        window: Tokens of a window.
        stride: Tokens it moves by.
        labels: What to score, integers [length] for each document: the tokens themselves, or -100 for one that is only
            read. Default: all.
        device: Where the model takes its inputs.
        batch_tokens: How many tokens go through the model at once; one window always does.

    Returns:
        exp(mean negative log-likelihood) over all scored tokens, accumulated in float64.

    Raises:
        ValueError: A window or stride outside its range, or no document with a token to score.
    """
    all_windows = list(windows([len(d) for d in documents], window, stride))
    if labels is not None:
        all_windows = [w for w in all_windows if (_targets(w, labels) != IGNORED_LABEL).any()]
    targets = documents if labels is None else labels
    batches = _batches(all_windows, max(1, batch_tokens // window))
    if not batches:
        raise ValueError("no document has the 2 tokens that are needed to score one")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    total = torch.zeros(2, dtype=torch.float64, device=device)  # negative log-likelihood, tokens
    was_training = model.training
    model.eval()
    head = _output_layer(model, device)
    for turn in range(0, len(batches), world):
        mine = turn + rank
        batch = batches[min(mine, len(batches) - 1)]
        pieces = max(map(_pieces, batches[turn : turn + world]))  # ZeRO-3 gathers the output layer for each
        nll = _score(model, head, batch, pieces, documents, device, targets).sum()
        if mine < len(batches):
            scored = sum(int((_targets(w, targets) != IGNORED_LABEL).sum()) for w in batch)
            total += torch.stack([nll, nll.new_tensor(scored)])
    model.train(was_training)

    if world > 1:
        dist.all_reduce(total)
    return perplexity_of(*total.tolist())


def perplexity_of(loss: float, tokens: float) -> float:
    """The perplexity by the sum of negative log-likelihoods in nats; infinite if it is too large for a number."""
    try:
        return math.exp(loss / tokens)
    except OverflowError:
        return math.inf


@torch.no_grad()
def windows_loss(
    model: torch.nn.Module,
    documents: Sequence[np.ndarray],
    some_windows: Sequence[Window],
    *,
    device: torch.device | str = "cpu",
    batch_tokens: int = 8192,
    progress: Callable[[int], object] = lambda scored: None,
) -> tuple[float, int]:
    """What some windows add to the perplexity, on this process alone.

    Args:
        model: A model in the mode to measure it in.
        documents: Token ids, integers [length] each.
        some_windows: Windows over them, at least one.
        device: Where the model takes its inputs.
        batch_tokens: How many tokens go through the model at once; one window always does.
        progress: Called with the number of tokens scored since its last call.

    Returns:
        The sum of the negative log-likelihoods in nats, accumulated in float64, and how many tokens were scored.
    """
    total, tokens = 0.0, 0
    head = _output_layer(model, device)
    for batch in _batches(some_windows, max(1, batch_tokens // max(w.end - w.begin for w in some_windows))):
        scored = sum(w.scored for w in batch)
        nll = _score(model, head, batch, _pieces(batch), documents, device, documents).sum()
        total, tokens = total + float(nll), tokens + scored
        progress(scored)
    return total, tokens


@torch.no_grad()
def losses_by_position(
    model: torch.nn.Module,
    documents: Sequence[np.ndarray],
    window: Window,
    *,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """The negative log-likelihood of each scored token of a window, on this process alone, float64 [scored]."""
    head = _output_layer(model, device)
    return _score(model, head, [window], _pieces([window]), documents, device, documents).cpu().numpy()


def fingerprint(documents: Sequence[np.ndarray]) -> str:
    """SHA-256 of documents as token ids."""
    lengths = np.array([len(document) for document in documents])
    return hashlib.sha256(np.concatenate([lengths, *documents]).astype("<i8").tobytes()).hexdigest()


def _targets(window: Window, targets: Sequence[np.ndarray]) -> np.ndarray:
    """What a window scores."""
    return targets[window.document][window.end - window.scored : window.end]


def _batches(all_windows: Sequence[Window], size: int) -> list[list[Window]]:
    """Windows of one shape side by side, at most `size` of them; short ones first.

    RoPE of the type "dynamic" keeps the frequencies of the longest text so far: these are then each window's own.
    """
    by_shape: dict[tuple[int, int], list[Window]] = {}
    for w in all_windows:
        by_shape.setdefault((w.end - w.begin, w.scored), []).append(w)
    return [group[i : i + size] for _, group in sorted(by_shape.items()) for i in range(0, len(group), size)]


def _pieces(batch: list[Window]) -> int:
    """In how many pieces the logits of a batch are made."""
    return -(-len(batch) * batch[0].scored // LOSS_TOKENS)


def _output_layer(model: torch.nn.Module, device: torch.device | str) -> torch.nn.Module | None:
    """The layer whose results a model's logits are; None if the model does anything more to them.

    The model reads a few tokens for it, on all processes alike; one alone may be padding, with logits of 0. With that,
    RoPE of the type "dynamic" forgets the frequencies of the longest text so far.
    """
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    head: torch.nn.Module | None = base.get_output_embeddings() if base is not None else None
    made: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda layer, given, logits: made.append(logits)) if head is not None else None
    logits = model(input_ids=torch.arange(4, device=device)[None], use_cache=False).logits
    if hook is not None:
        hook.remove()
    alone = len(made) == 1 and torch.equal(made[0].to(logits.device).float().nan_to_num(), logits.float().nan_to_num())
    return head if alone else None


@contextmanager
def _losses(head: torch.nn.Module, wanted: torch.Tensor, pieces: int) -> Iterator[list[torch.Tensor]]:
    """Within it, one forward pass leaves here what its output layer gives for each piece of the tokens `wanted`.

    The layer is called within the forward pass, where ZeRO-3 and autocast expect it. The logits of all tokens would
    take more memory than the model. The pass itself gets those of the last token.
    """
    losses: list[torch.Tensor] = []

    def in_pieces(layer: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hook.remove()  # the layer is called again here
        hidden = given[0][:, :-1].flatten(0, 1).tensor_split(pieces)
        parts = wanted.tensor_split(pieces)
        losses.extend(_loss(layer(part), target) for part, target in zip(hidden, parts, strict=True))
        return (given[0][:, -1:], *given[1:])

    # Before ZeRO-3's own hook, which gathers the weights for one call.
    hook = head.register_forward_pre_hook(in_pieces, prepend=True)
    try:
        yield losses
    finally:
        hook.remove()


def _loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihoods of some tokens, float64 [tokens].

    Of a model that is spread over GPUs, the output layer may be on another one than the tokens.
    """
    return torch.nn.functional.cross_entropy(logits.float(), wanted.to(logits.device), reduction="none").double()


def _score(
    model: torch.nn.Module,
    head: torch.nn.Module | None,
    batch: list[Window],
    pieces: int,
    documents: Sequence[np.ndarray],
    device: torch.device | str,
    targets: Sequence[np.ndarray],
) -> torch.Tensor:
    """The negative log-likelihoods of the scored tokens of windows of one shape, one after the other, float64."""
    ids = torch.stack([torch.as_tensor(documents[w.document][w.begin : w.end], dtype=torch.long) for w in batch])
    wanted = torch.stack([torch.as_tensor(_targets(w, targets), dtype=torch.long) for w in batch]).to(device).flatten()
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "use_cache": False, "logits_to_keep": batch[0].scored + 1}
    if head is not None:
        with _losses(head, wanted, pieces) as losses:
            model(**inputs)
    else:
        rows = model(**inputs).logits[:, :-1].flatten(0, 1).split(LOSS_TOKENS)
        losses = [_loss(*part) for part in zip(rows, wanted.split(LOSS_TOKENS), strict=True)]
    return torch.cat(losses)
