"""The loss of a causal language model without the logits of all its tokens.

At 32k tokens and a vocabulary of 128k the logits are 16 GiB in fp32, and their gradient as much again: more than
all else together. But the loss is a sum over tokens, so `tile_loss` has it computed for some of them at a time,
their logits made anew in the backward pass:

    model = tile_loss(model)                       # after prepare_model; train with any trainer
    model(input_ids=ids, labels=ids).loss          # the same loss, the same gradients

Nothing is patched: a model has a loss function to set, and its modules take hooks. Why not a tiled loss of a library?
DeepSpeed's TiledFusedLogitsLoss runs the backward pass within the forward one and cannot scale the output layer's
gradient afterwards, as gradient accumulation and several processes ask for; torch's linear_cross_entropy (2.13) takes
a weight, where ZeRO-3 and PEFT want the layer called. Liger's (`--use_liger_kernel`) is faster, on a GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.loss.loss_utils import ForCausalLMLoss

__all__ = ["IGNORED_LABEL", "tile_loss", "why_not_tiled"]

#: Logits that may exist at once: 256 MiB of them in fp32.
TILE = 2**26
#: The label of a token that is not learned.
IGNORED_LABEL = -100

# Fields of a config with which some models change the logits after their output layer.
_CHANGES_LOGITS = (
    "final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier",
)  # fmt: skip

Model = TypeVar("Model", bound=PreTrainedModel | PeftModel)


def why_not_tiled(model: PreTrainedModel | PeftModel) -> str | None:
    """Why `tile_loss` cannot tile the loss of a model, or None if it can."""
    base = _causal_lm(model)
    changed = next((name for name in _CHANGES_LOGITS if getattr(base.config, name, None) is not None), None)
    if changed is not None:
        return f"its logits are more than its output layer's result (config.{changed})"
    if base.get_output_embeddings() is None:
        return "it has no output layer"
    if "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return "its forward takes no logits_to_keep"
    loss = base.loss_function
    if loss is not ForCausalLMLoss and not isinstance(loss, _TiledLoss):
        return f"its loss function is {getattr(loss, '__name__', type(loss).__name__)}, not transformers' cross entropy"
    return None


def tile_loss(model: Model, tile: int = TILE) -> Model:
    """Let a causal language model compute its loss without the logits of all tokens.

    It acts where `labels` are given. The output's `logits` are then those of the last token alone, in training and
    evaluation alike.

    Args:
        model: It is changed. Padded labels (-100), `num_items_in_batch`, `shift_labels`, LoRA on the output layer, tied
            embeddings, DDP, and ZeRO are as they were.
        tile: How many logits may exist at once. Up to that many for a whole batch are not computed twice.

    Returns:
        The model.

    Raises:
        ValueError: `why_not_tiled` gives a reason, the loss is tiled already, or `tile` is not positive; and in the
            first forward pass if the model's logits turn out not to be its output layer's.
    """
    if tile < 1:
        raise ValueError(f"tile must be 1 or more, got {tile}")
    reason = why_not_tiled(model)
    base = _causal_lm(model)
    if isinstance(getattr(base, "loss_function", None), _TiledLoss):
        reason = "it is tiled already"
    if reason is not None:
        raise ValueError(f"the loss of {type(base).__name__} cannot be tiled: {reason}")
    base.loss_function = _TiledLoss(model, tile)
    return model


def _causal_lm(model: PreTrainedModel | PeftModel) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


class _TiledLoss:
    """The loss function of a model, called by its forward after the output layer.

    Before it, two hooks have prepared for it: one lets the output layer see the last token alone, the other keeps
    what the decoder gave. So the loss is computed within the model's forward, where DDP and DeepSpeed expect it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tile: int) -> None:
        self.model = _causal_lm(model)
        self.tile = tile
        self.plain: Callable[..., Tensor] = self.model.loss_function
        self.hidden: Tensor | None = None
        self.is_due = False
        self.is_checked = False
        # On what is called: before 0.21 PEFT goes past the hooks of the model that it wraps.
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.model.get_decoder().register_forward_hook(self._keep)

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if getattr(model, "_is_replica", False):
            raise ValueError(
                "tile_loss does not go with nn.DataParallel, which the Trainer uses where one process sees several "
                "GPUs: start a process for each, torchrun --nproc_per_node GPUS, or set CUDA_VISIBLE_DEVICES=0"
            )
        self.is_due = kwargs.get("labels") is not None and "logits_to_keep" not in kwargs
        return args, {**kwargs, "logits_to_keep": 1} if self.is_due else kwargs

    def _keep(self, decoder: nn.Module, args: Any, output: Any) -> None:
        self.hidden = output[0] if self.is_due else None

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden, self.hidden = self.hidden, None
        if hidden is None:
            return self.plain(logits, labels, *args, **kwargs)
        if self.is_sharded or not self.is_checked:
            self._check(hidden, logits)
        return self._loss(hidden, labels, logits.shape[-1], **kwargs)

    @property
    def is_sharded(self) -> bool:
        """Whether the output layer is one that FSDP gathers by itself, or in a group with the embedding or a norm."""
        return any(isinstance(module, FSDPModule) for module in self.model.get_output_embeddings().modules())

    def _check(self, hidden: Tensor, logits: Tensor) -> None:
        """Raise `ValueError` if the logits are not what the output layer gives.

        Under FSDP this is done in every step, as it also has the group that the output layer is in begin its forward
        pass anew, without a gradient. Were a tile the first to be seen, FSDP would reduce the group's gradients and
        free its weights behind that tile, and the part of a tied embedding or of a norm would be lost.
        """
        with torch.no_grad():
            own = self._head(hidden[:, -1:])
        if not torch.allclose(own.float(), logits.float(), rtol=1e-2, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"the loss of {type(self.model).__name__} cannot be tiled: its logits are more than its output layer's "
                "result. Train it without tile_loss"
            )
        self.is_checked = True

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        vocabulary: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED_LABEL,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """What transformers' `ForCausalLMLoss` gives for the logits of `hidden` `[batch, tokens, hidden size]`."""
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:]
        target = shift_labels.flatten().to(hidden.device)
        tiles = self._tiles(target.numel() * vocabulary, hidden.device)

        def part(hidden: Tensor, target: Tensor) -> Tensor:
            logits = self._head(hidden).float()
            return nn.functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")

        parts = zip(hidden.flatten(0, 1).tensor_split(tiles), target.tensor_split(tiles), strict=True)
        if tiles == 1:
            total = part(*next(parts))
        else:
            total = torch.stack([checkpoint(part, *tensors, use_reentrant=False) for tensors in parts]).sum()
        count = (target != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)

    def _tiles(self, logits: int, device: torch.device) -> int:
        tiles = -(-logits // self.tile)
        if is_deepspeed_zero3_enabled() or self.is_sharded:  # all processes gather the layer's weight equally often
            most = torch.tensor(tiles, device=device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            tiles = int(most)
        return tiles
