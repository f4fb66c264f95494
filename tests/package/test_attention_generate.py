"""attn_implementation="s2attn" in eval mode: dense attention, generation equal to `sdpa`'s token by token."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, PreTrainedModel, StaticCache

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


@pytest.mark.filterwarnings("ignore:s2attn runs by torch")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.full)])
def test_documents_where_the_op_has_no_kernel(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in fp32 on CUDA, or on an old GPU. Compiled code always asks."""
    (several, _), (one, _) = packed([7, 20, 5]), packed([32])
    model = tiny_model()
    expected = [model(**batch, use_cache=False).logits for batch in (several, one)]
    monkeypatch.setattr("longlora_ext._attend._why_unsupported", lambda *where, **direction: "there are none")
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for batch, logits in zip((several, one), expected, strict=True):
        assert_close(run(**batch, use_cache=False).logits, logits)


def test_compiled_eval_keeps_documents_apart() -> None:
    batch, _ = packed([7, 20, 5])
    model = tiny_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(**batch, use_cache=False).logits, model(**batch).logits)


@pytest.mark.parametrize(
    "pattern",
    [{}, {"s2attn_sink": True, "s2attn_window": 3}, {"s2attn_dense_layers": [0]}],
    ids=["groups", "sink-window", "dense-layer"],
)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_mode_s2_with_a_cache_is_that_without(padding: str, pattern: dict) -> None:
    """Token by token and a prompt in parts."""
    ids, mask = prompts(2, padding)
    model = tiny_model(s2attn_mode="s2", **pattern)
    model.generation_config.eos_token_id = None
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    with_cache, without = (model.generate(ids, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(with_cache, without)

    whole = model(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False).logits
    cache, parts = DynamicCache(), []
    for begin, end in [(0, 4), (4, 5), (5, 13)]:
        positions = positions_of(mask)[:, begin:end]
        inputs = {"attention_mask": mask[:, :end], "position_ids": positions, "past_key_values": cache}
        parts.append(model(ids[:, begin:end], **inputs).logits)
    assert_close(torch.cat(parts, dim=1)[mask.bool()], whole[mask.bool()])


def test_mode_s2_takes_no_cache_with_room_to_spare() -> None:
    model = tiny_model(s2attn_mode="s2")
    with pytest.raises(ValueError, match=r"holds as many keys as there are tokens .* room for 32"):
        model(tokens(1, 5), past_key_values=StaticCache(config=model.config, max_cache_len=32))


def test_training_mode_goes_on_with_a_cache_where_its_mask_was_made_for_it() -> None:
    model = tiny_model().train()
    ids = tokens(1, 12)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    second = model(ids[:, 5:], past_key_values=cache).logits
    assert_close(second, model(ids, use_cache=False).logits[:, 5:])
    with pytest.raises(ValueError, match=r"1 tokens, 13 keys\): call model.eval\(\)"):
        model(ids[:, :1], past_key_values=cache)


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor, in elements, that is made while it is on."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *(x.untyped_storage().nbytes() // x.element_size() for x in tensors)])
        return result


@pytest.mark.parametrize("case", ["a prompt in parts", "packed documents", "S2 with a cache"])
def test_no_mask_of_all_pairs_is_made(case: str) -> None:
    """Memory grows with the tokens, not with their square."""
    model = tiny_model(dtype=default_dtype(), s2attn_mode="s2" if case.startswith("S2") else "auto")
    ids = tokens(1, 2048)
    with torch.no_grad(), Sizes() as sizes:
        if case == "packed documents":
            model(ids, position_ids=torch.cat([torch.arange(700), torch.arange(1348)])[None], use_cache=False)
        else:
            cache = DynamicCache()
            for part in ids.split(1024, dim=1):
                model(part, past_key_values=cache)
    assert sizes.largest <= 2048 * 64  # of the logits; a mask would have half a million


@pytest.mark.full
def test_torch_compile_makes_one_graph() -> None:
    model = tiny_model(dtype=default_dtype()).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for length in (16, 21):
        ids = tokens(2, length)
        assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
