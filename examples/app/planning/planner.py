"""What a fine-tuning run would take, memory of each GPU by part and computation, from a model's config alone.

Weights and what the optimizer keeps are arithmetic. What a step holds and computes is counted on models of two layers
that run without numbers (`dry_run`), one model for each kind of layers (`layers.py`), and on one of three: each further
layer takes what that third one added.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from app.planning import shared_sequences
from app.planning.dry_run import Step, cuda_scratch, dry_run
from app.planning.layers import Kind, keep_layers, kinds, layers_of, shortened, structure
from app.runs.command_line import EXAMPLES
from app.training.recipe import CHECKPOINTING
from longlora_ext._rope import NTK
from longlora_ext.adapter import lora_config, prepare_model
from longlora_ext.attention import NAME
from longlora_ext.config import DEFAULT_GROUP_RATIO, config_for, context_length, even_group_size, rope_type_of
from longlora_ext.loss import tile_loss, why_not_tiled

#: Bytes that no tensor shows: CUDA's context, the libraries' workspaces, gaps in the allocator. Assumed, not computed.
UNSEEN = 2 * 10**9
#: ZeRO-3 keeps up to so many parameters gathered: DeepSpeed's `stage3_max_live_parameters`, by default.
LIVE_PARAMETERS = 10**9
#: Bytes of a weight in 4 bits: its own half, and what scales 64 of them, a byte, of which 256 share a float.
FOUR_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)
#: A context that is searched for is a multiple of this.
GRAIN = 1024
#: No longer one is searched for.
MOST = 2**24

DS_CONFIGS = EXAMPLES / "ds_configs"


@dataclass(frozen=True)
class PlannedRun:
    """How a model is trained."""

    zero: int = 2
    offload: bool = False
    gpus: int = 1
    batch: int = 1  # sequences on a GPU at a time
    full_finetune: bool = False
    lora_r: int = 8
    load_in_4bit: bool = False
    sequence_parallel_size: int = 1
    group_size: int | None = None  # a quarter of the context
    sink: bool = False
    window: int | None = None
    dense_layers: int | list[int] | None = None
    sequence_parallel: str = "auto"  # by halo or Ulysses, as for finetune_llama.py
    dtype: torch.dtype = torch.bfloat16
    scratch: Callable[[torch.Tensor], int] = cuda_scratch  # bytes of the attention's own, given q


@dataclass(frozen=True)
class Way:
    """What it does about activations."""

    checkpointing: bool = True
    tiled_loss: bool = True
    dense: bool = False


def _extended(config: PreTrainedConfig, context: int, pattern: dict[str, Any]) -> PreTrainedConfig:
    """The config to train with. How RoPE is scaled changes nothing that is counted; Phi-3 takes ntk, but not linear."""
    try:
        return config_for(config, context, **pattern)
    except ValueError as error:
        with suppress(ValueError):
            return config_for(config, context, rope_type=NTK, **pattern)
        raise error


class Plan:
    """
    A model of a config, trained on sequences of `tokens` tokens.

    Args:
        config: The base model's. If its context is shorter it is extended.
        tokens: The context.
        run: How it is trained.
        of: The kinds of the model's layers, where they are known already.

    Raises:
        ValueError: The model cannot be extended so far, or has layers that cannot be counted.
    """

    def __init__(self, config: PreTrainedConfig, tokens: int, run: PlannedRun, of: tuple[Kind, ...] = ()) -> None:
        self.base, self.tokens, self.run = config, tokens, run
        # Less than the model's own context is planned for in a search: in groups of that, and RoPE as it is.
        context = max(tokens, context_length(config))
        group_size = run.group_size and min(run.group_size, 2 * context)
        pattern: dict[str, Any] = {
            "group_size": group_size or even_group_size(tokens * DEFAULT_GROUP_RATIO),
            "sink": run.sink,
            "window": run.window,
            "dense_layers": run.dense_layers,
        }
        self.config = _extended(config, context, pattern)
        self.config.sequence_parallel_size = run.sequence_parallel_size
        self.config.sequence_parallel = run.sequence_parallel
        self.kinds = of or kinds(self.config)
        self.step = cache(self._step)

    @cached_property
    def parameters(self) -> dict[str, int]:
        """How many are trained (of these LoRA's), and how many are not (of these in 4 bits).

        PEFT keeps the base model's embedding and norms beside those that are trained: they count as not trained.
        """
        model = self.model(Way())
        named = dict(model.named_parameters())
        trainable = {name: parameter.numel() for name, parameter in named.items() if parameter.requires_grad}
        return {
            "trainable": sum(trainable.values()),
            "lora": sum(count for name, count in trainable.items() if ".lora_" in name),
            "frozen": sum(parameter.numel() for parameter in named.values()) - sum(trainable.values()),
            "in_4_bits": sum(weight.numel() for weight in self._packed(model)),
        }

    def _packed(self, model: Any) -> list[torch.Tensor]:
        """The weights that bitsandbytes packs: the frozen ones of all projections but the output layer."""
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        weights = [module.weight for module in linear if module is not model.get_output_embeddings()]
        return [weight for weight in weights if not weight.requires_grad] if self.run.load_in_4bit else []

    def model(self, way: Way, layers: Sequence[int] | None = None, device: str = "meta") -> Any:
        """The model, by default on the meta device, as DeepSpeed trains it: its fp32 masters are elsewhere.

        Of its layers it has those that are named, or all.
        """
        config = copy.deepcopy(self.config) if layers is None else shortened(self.config, max(layers) + 1)
        if way.dense:
            config.s2attn_mode = "dense"
        attention = NAME if self.run.sequence_parallel_size == 1 else shared_sequences.NAME
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=self.run.dtype)
            if layers is not None:
                self._check_kinds(layers_of(model))
                keep_layers(model, layers)
            lora = None if self.run.full_finetune else lora_config(model, r=self.run.lora_r)
            model = prepare_model(model, lora)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.run.dtype)
        if way.checkpointing:
            getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
        if way.tiled_loss and why_not_tiled(model) is None:
            tile_loss(model)
        return model.train()

    def _check_kinds(self, layers: torch.nn.ModuleList) -> None:
        """The first layers are to be those of the whole model."""
        for kind in self.kinds:
            if any(structure(layers[index]) != kind.structure for index in kind.layers if index < len(layers)):
                raise ValueError("its first layers depend on how many layers follow, so it cannot be planned")

    def _step(self, way: Way) -> Step:
        """One forward and backward pass of the whole model on one GPU.

        Operations, and bytes that are kept, add up. At the peak there is what is kept and the work of one layer, or of
        the loss. The backward pass comes to a layer when what the later ones kept is gone.
        """
        pairs = [self._run([kind.first] * 2, way) for kind in self.kinds]
        three = self._run([self.kinds[0].first] * 3, way)
        amounts = [Counter({**step.flops, "kept": step.kept}) for step in (*pairs, three)]
        names = set().union(*amounts)
        rest = {name: 3 * amounts[0][name] - 2 * amounts[-1][name] for name in names}  # what is there without layers
        each = [{name: (two[name] - rest[name]) // 2 for name in names} for two in amounts[:-1]]
        total = Counter(rest)
        for kind, one in zip(self.kinds, each, strict=True):
            total.update({name: len(kind.layers) * amount for name, amount in one.items()})

        def gone(kind: Kind) -> int:
            return sum(one["kept"] * later.after(kind) for later, one in zip(self.kinds, each, strict=True))

        work = [pair.peak - pair.kept - gone(kind) for kind, pair in zip(self.kinds, pairs, strict=True)]
        kept = total.pop("kept")
        return Step(kept, kept + max(work), total)

    def _run(self, layers: Sequence[int] | None, way: Way) -> Step:
        tokens = -(-self.tokens // self.run.sequence_parallel_size)
        return dry_run(self.model(way, layers), self.run.batch, tokens, self.run.scratch)

    def memory(self, way: Way) -> dict[str, int]:
        """Bytes of each GPU by part."""
        run, size = self.run, self.run.dtype.itemsize
        trainable, frozen = self.parameters["trainable"], self.parameters["frozen"]
        cut = {stage: run.gpus if run.zero >= stage else 1 for stage in (1, 2, 3)}  # by what each stage divides
        on_gpu, in_4_bits = 0 if run.offload else 1, self.parameters["in_4_bits"]
        parts = {
            "frozen weights": on_gpu * (size * (frozen - in_4_bits) + int(FOUR_BITS * in_4_bits)) // cut[3],
            "trained weights": on_gpu * size * trainable // cut[3],
            "gradients": on_gpu * 4 * trainable // cut[2],  # summed up in fp32, as ds_configs/ ask for
            "fp32 masters, Adam's moments": on_gpu * (12 if size == 2 else 8) * trainable // cut[1],
            "ZeRO's buffers": self._buffers(),
            "activations kept": self.step(way).kept,
            "work of a layer or the loss": self.step(way).peak - self.step(way).kept,
            "CUDA and gaps (assumed)": UNSEEN,
        }
        if in_4_bits:
            parts["a weight unpacked"] = size * max(weight.numel() for weight in self._packed(self.model(way)))
        return parts

    def host_memory(self) -> int:
        """Bytes of the host's memory that each GPU's process fills, with offload."""
        trainable, frozen = self.parameters["trainable"], self.parameters["frozen"]
        return self.run.offload * (2 * (trainable + frozen) + 14 * trainable) // self.run.gpus

    def _buffers(self) -> int:
        """What ZeRO gathers and reduces in, as the configurations of ds_configs/ have it."""
        run, total = self.run, self.parameters["trainable"] + self.parameters["frozen"]
        if run.zero == 0:
            return 4 * self.parameters["trainable"] if run.gpus > 1 else 0  # DDP's buckets, of fp32
        zero = json.loads((DS_CONFIGS / f"zero{3 if run.zero == 3 else 2}.json").read_text())["zero_optimization"]
        bucket = zero["reduce_bucket_size"]
        bucket = self.config.hidden_size**2 if bucket == "auto" else bucket  # as transformers fills it in
        elements = 2 * min(bucket, self.parameters["trainable"])  # one is filled while the other is sent
        return run.dtype.itemsize * (elements + (min(total, LIVE_PARAMETERS) if run.zero == 3 else 0))

    def flops(self, dense: bool = False) -> dict[str, int]:
        """Floating-point operations of a forward and backward pass of one sequence, activations computed again."""
        if self.run.sequence_parallel_size > 1:
            return Plan(self.base, self.tokens, replace(self.run, sequence_parallel_size=1), self.kinds).flops(dense)
        flops = self.step(Way(dense=dense)).flops
        attention = sum(count for op, count in flops.items() if op.startswith("longlora."))
        return {"attention": attention // self.run.batch, "all": sum(flops.values()) // self.run.batch}

    def flops_of(self, layers: Sequence[int]) -> int:
        """Operations of a forward and backward pass of one sequence, by these layers, the embedding and the loss."""
        return self._run(layers, Way()).flops.total() // self.run.batch

    def longest(self, way: Way, memory: int) -> int:
        """The longest context, a multiple of `GRAIN` up to `MOST`, that fits in so many bytes; 0 if there is none.

        Of a model whose RoPE needs factors from a search for a longer context, none is longer than its own.
        """
        room = memory - sum(self.memory(way).values()) + self.step(way).peak

        def peak(tokens: int) -> int:
            return Plan(self.base, tokens, self.run, self.kinds).step(way).peak

        limit = context_length(self.base) if rope_type_of(self.base) == "longrope" else MOST
        low, high, most, peaks = 0, None, limit // GRAIN, {0: 0}  # the longest that fits, the shortest that does not
        last, guess = 0, min(8, most)
        while low < most and high != low + 1:  # a peak is nearly a straight line of the tokens
            peaks[guess] = peak(guess * GRAIN)
            last, low, high = (low, guess, high) if peaks[guess] <= room else (low, low, guess)
            a, b = (last, low) if high is None else (low, high)
            line = low + (room - peaks[low]) * (b - a) // max(1, peaks[b] - peaks[a])
            guess = min(max(line, low + 1), most if high is None else high - 1)
        return low * GRAIN
