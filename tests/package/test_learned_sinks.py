"""Learned sinks, a logit a head beside the scores (gpt-oss): in training, in evaluation, with padding and a cache."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

import longlora_ext.attention as attention
from every_decoder import GROUP
from longlora_ext.reference import s2attn_mask
from op_checks import default_dtype
from packed_rows import pad, positions_of
from small_decoders import small_config
from tiny_models import assert_close, tiny_config, tiny_model, tokens


def kinds(*names: str) -> list:
    """Model types, of which an older version of transformers may not have all."""
    missing = pytest.mark.skip(reason="this version of transformers does not have that model")
    return [pytest.param(name, marks=[] if name in CONFIG_MAPPING else [missing]) for name in names]


def model_of(kind: str, implementation: str, **changes: Any) -> PreTrainedModel:
    config = small_config(kind, s2attn_group_size=GROUP, **changes)
    model = tiny_model(attn_implementation=implementation, config=config, dtype=default_dtype())
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "sink" in name:
            torch.nn.init.normal_(weight, std=2.0)  # so that one that is left out shows
    return model


@pytest.mark.parametrize("kind", kinds("gpt_oss", "granite_swa", "mimo_v2_flash"))
def test_eval_is_that_of_eager_attention(kind: str) -> None:
    """Whole, padded, in parts with a cache, and in `generate`."""
    ours, theirs = model_of(kind, "s2attn"), model_of(kind, "eager")
    ids = tokens(2, 30)
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits)
        padded, mask = pad([tokens(1, 23, seed=1), tokens(1, 30, seed=2)], "left")
        logits = [m(padded, attention_mask=mask, position_ids=positions_of(mask)).logits for m in (ours, theirs)]
        assert_close(*(x[mask.bool()] for x in logits))
        results = []
        for model in (ours, theirs):
            cache = DynamicCache(config=model.config)
            parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in [(0, 13), (13, 29), (29, 30)]]
            results.append(torch.cat(parts, dim=1))
            model.generation_config.eos_token_id = None
        assert_close(*results)
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(*(model.generate(padded, **options) for model in (ours, theirs)))


@pytest.mark.parametrize("kind", kinds("gpt_oss", "granite_swa"))
def test_training_is_eager_attention_with_the_s2_mask(kind: str) -> None:
    """The logits, and all gradients, those of the sinks too."""
    changes: dict[str, Any] = {"layer_types": ["full_attention"] * 2}
    ours, theirs = (model_of(kind, name, **changes).train() for name in ("s2attn", "eager"))
    ids = tokens(1, 30)
    heads = ours.config.num_attention_heads
    seen = torch.stack([s2attn_mask(30, GROUP, head >= heads // 2) for head in range(heads)])[None]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for model, inputs in ((ours, {}), (theirs, {"attention_mask": {"full_attention": mask}})):
        model.logits = model(ids, use_cache=False, **inputs).logits
        model.logits.square().mean().backward()
    assert_close(ours.logits, theirs.logits)
    gradients = dict(theirs.named_parameters())
    assert any("sink" in name and weight.grad.any() for name, weight in ours.named_parameters())
    for name, weight in ours.named_parameters():
        expected = gradients[name].grad
        if expected is not None:
            torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item() + 1e-7)


def test_with_shared_sequences_they_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each process has a share of the heads, and all the sinks."""
    monkeypatch.setattr(attention, "sequence_parallel", lambda: (0, 2))
    layer = LlamaAttention(tiny_config(attn_implementation="s2attn"), 0)
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    with pytest.raises(ValueError, match="cannot express learned sinks where processes share sequences"):
        attention.s2attn_forward(layer, q, k, k, None, s_aux=torch.zeros(4))


def test_values_of_fewer_dimensions() -> None:
    """As those of latent attention (DeepSeek): what is computed of keys padded with zeros by hand."""
    layer = LlamaAttention(tiny_config(attn_implementation="s2attn"), 0).train()
    q, k, v = torch.randn(1, 4, 20, 16), torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 8, requires_grad=True)
    out, _ = attention.s2attn_forward(layer, q, k, v, None)
    wide = torch.nn.functional.pad(v, (0, 8))
    expected, _ = attention.s2attn_forward(layer, q, k, wide, None)
    assert out.shape == (1, 20, 4, 8)
    torch.testing.assert_close(out, expected[..., :8])
    assert torch.autograd.grad(out.sum(), v)[0].any()
