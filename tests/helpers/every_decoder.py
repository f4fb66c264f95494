"""Every causal decoder of transformers, small, and what becomes of it: it runs, or why not.

`verdict(kind)` builds one with random weights, and lets it do all that a training does. What a model cannot do must be
refused in words before it starts; anything else is an exception of this module's callers to deal with.
"""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from app.models.suitable import check_attention
from longlora_ext import check_documents_apart, load, lora_config, merge, prepare_model, save_adapter
from longlora_ext.attention import NAME, s2attn_forward
from longlora_ext.config import config_for
from longlora_ext.reference import s2attn_reference
from small_decoders import NOT_TRIED, ROPE, VOCABULARY, plain_attention, small_config

LONGER, GROUP, LENGTH = 128, 16, 40


@dataclass(frozen=True)
class Verdict:
    """What became of a model.

    Attributes:
        refusal: Why it cannot be trained, as the user is told; empty if it runs.
        programs: Why finetune_llama.py does not train it, though what it is made of might.
        layers: How many of its layers computed S2-Attn, and of how many.
        rows: "packed" if documents may share rows, "padded" if each must have its own.
    """

    refusal: str = ""
    programs: str = ""
    layers: tuple[int, int] = (0, 0)
    rows: str = "packed"


def verdict(kind: str, **changes: Any) -> Verdict:
    """Build the model, extend it, train it, save and load and merge it. Anything unforeseen is an error of its own.

    Args:
        kind: Its type.
        changes: Fields of its config.
    """
    if kind in NOT_TRIED:
        return Verdict(refusal="not tried: transformers itself does not run a small one")
    config = small_config(kind, **changes)
    programs = ""
    try:
        check_attention(config, LONGER)
    except ValueError as error:
        programs = str(error)
    try:
        extended = config_for(config, LONGER, group_size=GROUP, **ROPE.get(kind, {}))
        model = _built(extended, NAME)
        lora_config(model)
        rows = _rows(model)
    except ValueError as error:
        return Verdict(refusal=str(error), programs=programs)
    _check_dense(model, extended)
    layers = _check_s2(model)
    if rows == "packed":
        _check_packed(model)
    with tempfile.TemporaryDirectory() as folder:
        _check_adapter(config, extended, Path(folder))
    return Verdict(programs=programs, layers=layers, rows=rows)


def _rows(model: PreTrainedModel) -> str:
    """Whether documents may share rows. What a layer cannot compute is refused here, too."""
    model.config.use_cache = False  # as the Trainer has it: with a KV cache some layers learn of no documents
    try:
        check_documents_apart(model)
    except ValueError:
        check_documents_apart(model, packed=False)
        return "padded"
    finally:
        model.config.use_cache = True
    return "packed"


def _built(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """The same weights, whatever the attention. In eval mode."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).eval()


def _ids(length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def _close(actual: Tensor, expected: Tensor, what: str) -> None:
    scale = expected.abs().max().item()
    error = (actual - expected).abs().max().item()
    assert error <= 1e-4 * max(scale, 1e-3), f"{what}: off by {error:.3g} of {scale:.3g}"


def _check_dense(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Eval is what transformers' own attention computes, also of padded rows, and with a KV cache."""
    plain = _built(config, plain_attention(config.model_type))
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        _close(model(_ids()).logits, plain(_ids()).logits, "dense evaluation")
        both = [m.generate(_ids(), max_new_tokens=6, min_new_tokens=6, do_sample=False) for m in (model, plain)]
    assert torch.equal(*both), "greedy generation differs"


@dataclass
class Call:
    """What one attention layer was called with, and what it returned."""

    module: Any
    q: Tensor
    k: Tensor
    v: Tensor
    keywords: dict[str, Any]
    out: Tensor


@contextmanager
def _listening() -> Iterator[list[Call]]:
    """Keep what the attention layers compute."""
    calls: list[Call] = []

    def listen(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **keywords: Any) -> Any:
        out, weights = s2attn_forward(module, q, k, v, attention_mask, **keywords)
        calls.append(Call(module, q, k, v, keywords, out))
        return out, weights

    AttentionInterface.register(NAME, listen)
    try:
        yield calls
    finally:
        AttentionInterface.register(NAME, s2attn_forward)


def _check_s2(model: PreTrainedModel) -> tuple[int, int]:
    """In training each layer computes S2-Attn of its own q, k, v, by the definition. Returns how many layers do."""
    model.train()
    with torch.no_grad(), _listening() as calls:
        model(_ids(), use_cache=False)
    model.eval()
    assert calls, "no layer computed S2-Attn"
    for call in calls:
        q, k, v = (x.transpose(1, 2).double() for x in (call.q, call.k, call.v))
        window = _window_of(call)
        sinks = call.keywords.get("s_aux")
        expected, lse = s2attn_reference(q, k, v, GROUP, scale=call.keywords.get("scaling"), window=window)
        if sinks is not None:
            expected = expected * torch.sigmoid(lse - sinks.double()[None, :, None]).transpose(1, 2)[..., None]
        _close(call.out.double(), expected, f"S2-Attn in {type(call.module).__name__}")
    return len(calls), model.config.num_hidden_layers


def _window_of(call: Call) -> int | None:
    """The window of the layer, by what its model's config says of it."""
    config, layer = call.module.config, getattr(call.module, "layer_idx", None)
    types = getattr(config, "layer_types", None)
    if types:
        return config.sliding_window if "sliding" in types[layer] else None
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def _check_packed(model: PreTrainedModel) -> None:
    """Documents in one row get the logits that they get alone."""
    lengths = (17, 9, 14)
    rows = [_ids(length, seed=length) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            together = model(torch.cat(rows, dim=1), position_ids=positions, use_cache=False).logits
            alone = torch.cat([model(row, use_cache=False).logits for row in rows], dim=1)
        _close(together, alone, "documents packed into one row")
    model.eval()


def _check_adapter(config: PreTrainedConfig, extended: PreTrainedConfig, folder: Path) -> None:
    """Two steps change it; saved and loaded it is the same, and merged as well, without our attention."""
    _built(config, NAME).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "base", config=copy.deepcopy(extended), attn_implementation=NAME
    )
    with torch.no_grad():
        before = model.eval()(_ids(90)).logits
    prepared: Any = prepare_model(model, lora_config(model)).train()
    optimizer = torch.optim.AdamW([weight for weight in prepared.parameters() if weight.requires_grad], lr=1e-2)
    for step in range(2):
        loss = prepared(input_ids=_ids(90, seed=step), labels=_ids(90, seed=step), use_cache=False).loss
        assert loss.isfinite(), f"the loss is {loss.item()}"
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, weight in prepared.named_parameters() if "lora_B" in name and not weight.any()]
    assert not still, f"not trained: {still[0]}"
    save_adapter(prepared, folder / "adapter")
    merge(folder / "adapter", folder / "merged")
    loaded = load(folder / "adapter", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(
        folder / "merged", attn_implementation=plain_attention(config.model_type)
    ).eval()
    with torch.no_grad():
        after = prepared.eval()(input_ids=_ids(90)).logits
        assert (after - before).abs().max() > 0.01 * before.abs().max(), "two steps changed nothing"
        _close(loaded(input_ids=_ids(90)).logits, after, "the adapter, loaded")
        _close(merged(_ids(90)).logits, after, "the merged model")
        both = [m.generate(input_ids=_ids(90), max_new_tokens=6, do_sample=False) for m in (loaded, merged)]
    assert torch.equal(*both), "greedy generation of the merged model differs"
