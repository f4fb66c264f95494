"""Whether a model keeps apart what has nothing to do with each other: documents, rows of a batch, past and future.

Several documents share a row in training, and `position_ids` that restart tell them apart. Attention heeds that; many
state-space layers, linear attentions and convolutions do not, and say nothing. So the model itself is asked before it
is trained:

    check_documents_apart(model)                 # ValueError if a document moves the logits of another

Two experiments on a few short rows, in training mode. The first is exact and sees the weakest influence: the gradient
of a token's logits in the embeddings of all tokens is zero at those it must not see. The second sees what has no
gradient as well, such as a choice of experts: some tokens are changed, and the logits of others may not move by more
than rounding.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from longlora_ext._as_trained import in_training, setting, undisturbed
from longlora_ext._deepspeed_ulysses import sequence_parallel
from longlora_ext._movement import largest, movement, where_it_begins
from longlora_ext._sharded import device_of, gathered, is_sharded
from longlora_ext.adapter._save import unwrapped
from longlora_ext.attention import NAME
from longlora_ext.config import MODE

__all__ = ["check_documents_apart"]

#: Tokens of a row of the first experiment, which takes as many rows, and of the second, which takes three.
SHORT, LONG = 16, 96
#: A gradient or a movement below this share of a token's own is none, as of a convolution by FFT. Others give 0 itself.
NONE = 1e-7
#: Experts compute a token together with others, and may round otherwise if these are others, which shows in a row that
#: is not changed at all. Then logits may move so far, also in 16 bits, where rounding may choose another expert.
ROUNDING, ROUNDING_IN_16_BITS = 1e-3, 0.1

_OWN_ROWS = "give each document a row of its own (rows padded, packed=False)"
#: What may leak, and what to do about it; where there are several, the first is told.
_LEAKS = {
    "rows": ("rows of a batch see each other", "Documents are mixed, however they are laid out"),
    "future": ("tokens see those after them", "It cannot be trained to predict these"),
    "documents": ("documents packed into one row see each other", f"Either {_OWN_ROWS}, or train another model"),
}


def check_documents_apart(model: nn.Module, *, packed: bool = True) -> None:
    """Refuse a model in which documents are not independent of each other, or tokens not of those after them.

    It costs a few forward passes and a backward pass of some 300 tokens. Nothing of the model changes: weights and
    their gradients, buffers, modes, the states of random number generators. If the training is under `torch.autocast`,
    so is this to be. With ZeRO-3 or FSDP, where each process has a part of the weights, all processes call it, and the
    experiment with gradients is left out.

    Args:
        model: A causal language model of transformers, with an adapter or without, or a wrapper of it (torch.compile,
            DDP, DeepSpeed, FSDP). If its attention is `"s2attn"`, dense attention is tried besides its own mode.
        packed: Documents share rows and are told apart by `position_ids`. `False`: each has a row of its own, which may
            depend neither on other rows nor, at any token, on later ones.

    Raises:
        ValueError: Something leaks: what, how much of it, and the module where it begins. Or it cannot be found out:
            the model takes no `position_ids`, or several processes share its sequences already. (A model of NaN passes:
            its loss tells.)
    """
    if sequence_parallel()[1] > 1:
        raise ValueError(
            "documents cannot be checked when processes share sequences already: call check_documents_apart before the "
            "Trainer or DeepSpeed prepares the model"
        )
    probe = _Probe(model, packed)
    with torch.no_grad(), in_training(probe.whole), gathered(model):
        for mode in _modes(probe.config):
            with setting(probe.config, MODE, mode):
                probe.refuse_leaks()


class _Probe:
    """The experiments on one model. Their result is the largest share for each of `_LEAKS` that they look for."""

    def __init__(self, model: nn.Module, packed: bool) -> None:
        whole = unwrapped(model)
        self.whole: Any = whole
        base: Any = whole.get_base_model() if isinstance(whole, PeftModel) else whole
        self.base, self.config = base, base.config.get_text_config()
        self.is_sharded = is_sharded(model)
        self.model: nn.Module = model if self.is_sharded else self.whole
        self.packed = packed
        self.looked_for = ["future", "documents", "rows"] if packed else ["future", "rows"]
        self.takes_positions = "position_ids" in inspect.signature(self.base.forward).parameters
        if packed and not self.takes_positions:
            raise ValueError(
                f"{type(self.base).__name__} takes no position_ids, by which the documents of a packed row are told "
                f"apart: {_OWN_ROWS}"
            )

    def influence(self) -> dict[str, float]:
        """The first experiment: how token i of row i depends on each embedding, as a share of the largest."""
        rows = self._rows(SHORT)
        embeddings: list[Tensor] = []

        def begin_here(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            embeddings.append(output.detach().requires_grad_())
            return embeddings[-1]

        handle = self.base.get_input_embeddings().register_forward_hook(begin_here)
        try:
            with torch.enable_grad():
                logits = self._logits(rows.expand(rows.shape[1], -1))
                own = logits.float().diagonal().T  # [tokens, vocabulary]
                weights = torch.randn(own.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(own)
                gradients = torch.autograd.grad((own * weights).sum(), embeddings, allow_unused=True)
        finally:
            handle.remove()
        found = torch.zeros(2 * rows.shape[1:], dtype=torch.float64, device="cpu")
        for gradient in gradients:
            found += 0 if gradient is None else gradient.double().norm(dim=-1).cpu()
        shares = (found / found.amax(dim=1, keepdim=True)).nan_to_num(0.0)  # in fp16 gradients may overflow
        place = torch.arange(len(shares), device="cpu")
        document = place >= self._second(len(place))
        other = (document[:, None] != document[None, :]) & (place[:, None] > place[None, :])
        return {
            "future": largest(shares, place[:, None] < place[None, :]),
            "documents": largest(shares, other & self.packed),
        }

    def movement(self) -> dict[str, float]:
        """The second experiment: how far logits of tokens move that are not changed, in a row for each leak."""
        before, after, changed = self._before_and_after()
        shares = movement(self._logits(before), self._logits(after), changed)
        return {leak: largest(shares[row], ~changed[row]) for row, leak in enumerate(self.looked_for)}

    def rounding(self) -> float:
        """How far logits may move by rounding, in the dtype that the model computes in."""
        device = next(self.whole.parameters()).device.type
        dtypes = {weight.dtype for weight in self.whole.parameters() if weight.is_floating_point()}
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
        return ROUNDING_IN_16_BITS if any(torch.finfo(dtype).bits <= 16 for dtype in dtypes) else ROUNDING

    def leaks(self) -> list[str]:
        """What leaks, as both experiments say."""
        exact = {} if self.is_sharded else self.influence()
        moved = self.movement()
        tolerance = self.rounding() if moved["rows"] else NONE
        return [leak for leak in _LEAKS if exact.get(leak, 0.0) > NONE or moved.get(leak, 0.0) > tolerance]

    def refuse_leaks(self) -> None:
        """Raise `ValueError` for the first of `_LEAKS` that there is."""
        leaks = self.leaks()
        if not leaks:
            return
        what, advice = _LEAKS[leaks[0]]
        if leaks == ["documents"] and getattr(self.config, "use_cache", False):
            with setting(self.config, "use_cache", False):  # with a KV cache, some models' layers learn of no documents
                if not self.leaks():
                    advice = "Train it without a KV cache: config.use_cache=False, as the Trainer has it"
        before, after, changed = self._before_and_after()
        runs = (lambda: self._logits(before)), (lambda: self._logits(after))
        module = where_it_begins(self.model, *runs, changed, self.looked_for.index(leaks[0]))
        begins = f", beginning in {module}" if module else ""
        raise ValueError(
            f"in {type(self.base).__name__} {what}{begins}: to change tokens that logits must not depend on moves them "
            f"by {100 * self.movement()[leaks[0]]:.2g}% of what a change of their own does. {advice}"
        )

    def _rows(self, tokens: int, rows: int = 1) -> Tensor:
        """Random tokens, int64 [rows, tokens], the same on every process; fewer where the model takes no more."""
        tokens = min(tokens, getattr(self.config, "max_position_embeddings", None) or tokens)
        random = torch.Generator("cpu").manual_seed(0)
        return torch.randint(self.config.vocab_size, (rows, tokens), generator=random, device="cpu")

    def _before_and_after(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows as they are, as they are changed, and where."""
        before = self._rows(LONG, len(self.looked_for))
        place = torch.arange(before.shape[1], device="cpu")
        end, first, nowhere = place >= len(place) * 3 // 4, place < self._second(len(place)), place < 0
        where = {"future": end, "documents": first, "rows": nowhere}
        changed = torch.stack([where[leak] for leak in self.looked_for])
        # All to one token: where experts have a capacity, it is exceeded.
        return before, before.where(~changed, self.config.vocab_size // 2), changed

    @staticmethod
    def _second(tokens: int) -> int:
        """Where the second document of a row begins."""
        return tokens * 7 // 16

    def _logits(self, input_ids: Tensor) -> Tensor:
        """Of both documents of each row, or of its one document: [rows, tokens, vocabulary]."""
        place = torch.arange(input_ids.shape[1], device="cpu")
        second = self._second(len(place))
        positions = torch.where(self.packed & (place >= second), place - second, place).expand(len(input_ids), -1)
        inputs = {"input_ids": input_ids, **({"position_ids": positions} if self.takes_positions else {})}
        device = device_of(self.whole)
        with undisturbed(self.whole):
            logits: Tensor = self.model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
        return logits


def _modes(config: Any) -> list[str | None]:
    """The modes of attention to try: the model's own, and for S2-Attn dense attention too, which runs may end with."""
    own = getattr(config, MODE, None)
    return [own, "dense"] if config._attn_implementation == NAME and own != "dense" else [own]
