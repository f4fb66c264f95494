"""attn_implementation="s2attn" in eval mode: dense attention, generation equal to `sdpa`'s token by token."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, PreTrainedModel, StaticCache

import longlora_ext.attention as attention
from op_checks import default_dtype
from packed_rows import packed, pad, positions_of
from tiny_models import CONFIGS, assert_close, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("device")
NEW = 12


def both(family: str = "llama") -> tuple[PreTrainedModel, PreTrainedModel]:
    """In fp64, on CUDA too: without packed documents both are sdpa's business."""
    models = tiny_model(family, dtype=torch.float64), tiny_model(family, "sdpa", torch.float64)
    for model in models:
        model.generation_config.eos_token_id = None  # the same number of tokens whatever they are
        model.generation_config.disable_compile = True  # as generate would, on CUDA, with a static cache
    return models


def prompts(batch: int, padding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The shortest row is padded even if it is the only one."""
    rows = [tokens(1, 8, seed=1), tokens(1, 13, seed=2)][:batch]
    ids, mask = pad([*rows, tokens(1, 13)], "left" if padding == "none" else padding)
    ids, mask = ids[:batch], mask[:batch]
    return (ids, torch.ones_like(mask)) if padding == "none" else (ids, mask)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_generation_is_that_of_sdpa(family: str, batch: int, padding: str, cache: str) -> None:
    ids, mask = prompts(batch, padding)
    options = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": cache}
    ours, theirs = (model.generate(ids, attention_mask=mask, **options) for model in both(family))
    assert ours.shape == (batch, ids.shape[1] + NEW)
    assert torch.equal(ours, theirs)


def test_generation_without_a_cache_and_for_one_token() -> None:
    ids, mask = prompts(2, "left")
    for options in (
        {"use_cache": False, "max_new_tokens": 5},
        {"cache_implementation": "static", "max_new_tokens": 1},
    ):
        ours, theirs = (m.generate(ids, attention_mask=mask, do_sample=False, **options) for m in both())
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_second_prefill_is_that_of_sdpa(batch: int, padding: str, kind: str) -> None:
    """Several tokens at once on a cache that holds some: a chat that goes on."""
    ids, mask = prompts(batch, padding)
    more = tokens(batch, 6, seed=5)
    results = []
    for model in both():
        cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=32)
        first = model(ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache)
        whole = torch.cat([mask, torch.ones_like(more)], dim=1)
        second = model(
            more,
            attention_mask=whole,
            position_ids=positions_of(whole)[:, -6:],
            past_key_values=first.past_key_values,
        )
        results.append((first.logits[mask.bool()], second.logits))
    assert_close(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1])
    # and, where transformers' static cache is right, what one prefill of everything gives
    if kind == "static" and Version(transformers.__version__) < Version("5.4"):
        return  # sdpa itself is not
    model, _ = both()
    full = model(torch.cat([ids, more], dim=1), attention_mask=whole, position_ids=positions_of(whole)).logits
    assert_close(results[0][1], full[:, -6:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", [1, 2])
def test_eval_is_sdpa_even_at_padding(batch: int, side: str) -> None:
    ids, mask = prompts(batch, side)
    ours, theirs = (model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits for model in both())
    rows = mask.bool() if side == "left" else torch.ones_like(mask, dtype=torch.bool)
    assert_close(ours[rows], theirs[rows])


@pytest.mark.parametrize("compiled", [False, True])
def test_documents_where_the_op_has_no_kernel(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in fp32 on CUDA, or on an old GPU: sdpa stands in for it, with a mask. Compiled code always asks."""
    (several, _), (one, _) = packed([7, 20, 5]), packed([32])
    model = tiny_model()
    expected = [model(**batch, use_cache=False).logits for batch in (several, one)]
    monkeypatch.setattr(attention, "_runs", lambda *_: False)
    monkeypatch.setattr(attention, "s2attn", None)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for batch, logits in zip((several, one), expected, strict=True):
        assert_close(run(**batch, use_cache=False).logits, logits)


def test_compiled_eval_keeps_documents_apart() -> None:
    batch, _ = packed([7, 20, 5])
    model = tiny_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(**batch, use_cache=False).logits, model(**batch).logits)


def test_mode_s2_in_eval_takes_no_cache() -> None:
    ids = tokens(1, 13)
    model = tiny_model(s2attn_mode="s2")
    with pytest.raises(ValueError, match="pass use_cache=False"):
        model.generate(ids, max_new_tokens=3)
    longer = model.generate(ids, max_new_tokens=3, use_cache=False, do_sample=False)
    assert torch.equal(longer[0, -1], model(longer[:, :-1]).logits[0, -1].argmax())


def test_training_mode_takes_no_cache() -> None:
    model = tiny_model().train()
    cache = model(tokens(1, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"a KV cache makes them 2 and 7: call model.eval\(\)"):
        model(tokens(1, 2), past_key_values=cache)


@pytest.mark.full
def test_torch_compile_makes_one_graph() -> None:
    model = tiny_model(dtype=default_dtype()).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for length in (16, 21):
        ids = tokens(2, length)
        assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
