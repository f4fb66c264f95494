"""What rows see beside their group, through a model: `s2attn_sink`, `s2attn_window`, and windows of its own."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, MistralConfig, PreTrainedModel, Qwen3Config

import longlora_ext.attention  # noqa: F401
from longlora_ext import _dense
from longlora_ext.ops import s2attn
from op_checks import default_dtype
from packed_rows import packed, pad, positions_of
from tiny_models import SIZES, assert_close, tiny_config, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("device")

BOTH = {"s2attn_sink": True, "s2attn_window": 3}
MIXED = ["full_attention", "sliding_attention"]
# Some tell the window to their layers, others (qwen2_moe) by the mask alone.
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {},
    "starcoder2": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "layer_types": MIXED},
    "qwen2_moe": {
        "use_sliding_window": True,
        "layer_types": ["sliding_attention"] * 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    },
    "olmo3": {"layer_types": MIXED},
    "phi3": {},
    "ministral": {"layer_types": MIXED},
    "gemma3_text": {"layer_types": MIXED},
    "cohere2": {"layer_types": MIXED},
    "exaone4": {"layer_types": MIXED},
}


DTYPES = {"qwen2_moe": default_dtype()}  # its experts know no fp64


def windowed(kind: str, implementation: str = "s2attn", window: int = 5, **fields: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **{**SIZES, **WINDOWED[kind], **fields}, sliding_window=window)
    return tiny_model(attn_implementation=implementation, config=config, dtype=DTYPES.get(kind))


@pytest.mark.parametrize("kind", WINDOWED)
def test_eval_of_a_model_with_a_window_is_that_of_sdpa(kind: str) -> None:
    """Whole, padded, in parts with a cache, and token by token."""
    ours, theirs = windowed(kind), windowed(kind, "sdpa")
    ids = tokens(2, 21)
    assert_close(ours(ids).logits, theirs(ids).logits)
    assert (ours(ids).logits - windowed(kind, window=64)(ids).logits).abs().max() > 0.01  # it matters

    padded, mask = pad([tokens(1, 13, seed=1), tokens(1, 21, seed=2)], "left")
    logits = [m(padded, attention_mask=mask, position_ids=positions_of(mask)).logits for m in (ours, theirs)]
    assert_close(*(x[mask.bool()] for x in logits))

    results = []
    for model in (ours, theirs):
        cache, parts = DynamicCache(config=model.config), []
        for begin, end in [(0, 9), (9, 16), (16, 17), (17, 21)]:
            parts.append(model(ids[:, begin:end], past_key_values=cache).logits)
        results.append(torch.cat(parts, dim=1))
    assert_close(*results)

    for model in (ours, theirs):
        model.generation_config.eos_token_id = None
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(*(model.generate(padded, **options) for model in (ours, theirs)))


@pytest.mark.parametrize("kind", WINDOWED)
def test_packed_documents_of_a_model_with_a_window(kind: str) -> None:
    """In training and in eval: each gets what it gets alone."""
    for training in (True, False):
        model = windowed(kind).train(training)
        batch, rows = packed([17, 8, 14])
        logits = model(**batch, use_cache=False).logits
        alone = torch.cat([model(row, use_cache=False).logits for row in rows], dim=1)
        assert_close(logits, alone)


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_document_does_not_depend_on_how_long_its_row_is(kind: str) -> None:
    """Though a window of 9 hides something in a row of 17 tokens, and nothing in one of 8."""
    model = windowed(kind, window=9, s2attn_sink=True, s2attn_group_size=4).train()
    batch, rows = packed([8, 9])
    alone = torch.cat([model(row, use_cache=False).logits for row in rows], dim=1)
    assert_close(model(**batch, use_cache=False).logits, alone)


def test_a_prompt_in_parts_whose_first_keys_are_gone() -> None:
    """The cache of a window lets go of them. Then padding may hide where groups begin."""

    def in_parts(model: PreTrainedModel, ids: Tensor, **inputs: Tensor) -> Tensor:
        cache, parts = DynamicCache(config=model.config), []
        for begin, end in [(0, 9), (9, 16), (16, 21)]:
            mask = {name: whole[:, :end] for name, whole in inputs.items()}
            parts.append(model(ids[:, begin:end], past_key_values=cache, **mask).logits)
        return torch.cat(parts, dim=1)

    ids, padding = tokens(2, 21), torch.ones(2, 21, dtype=torch.int64)
    padding[0, :4] = 0
    for mode in ("s2", "dense"):
        model = windowed("mistral", s2attn_mode=mode).train()
        assert_close(in_parts(model, ids), model(ids, use_cache=False).logits)
    model.config.s2attn_mode = "s2"
    with pytest.raises(ValueError, match="counts groups from a row's first token, which padding hides once"):
        in_parts(model, ids, attention_mask=padding)


@pytest.mark.parametrize("kind", WINDOWED)
def test_training_of_a_model_with_a_window_is_eager_attention_with_both_masks(kind: str) -> None:
    """Layers with a window: the groups' part of it. Full layers: the groups."""
    from longlora_ext.reference import s2attn_mask

    ours, eager = windowed(kind).train(), windowed(kind, "eager").train()
    ids, heads = tokens(2, 21), ours.config.num_attention_heads

    def additive(window: int | None) -> Tensor:
        seen = torch.stack([s2attn_mask(21, 8, head >= heads // 2, window=window) for head in range(heads)])
        mask = torch.zeros(seen.shape, dtype=eager.dtype).masked_fill(~seen, torch.finfo(eager.dtype).min)
        return mask.expand(2, -1, -1, -1)

    masks: Any = {"full_attention": additive(None), "sliding_attention": additive(5)}
    if "layer_types" not in WINDOWED[kind] and not isinstance(getattr(ours.config, "layer_types", None), list):
        masks = masks["sliding_attention"]
    assert_close(ours(ids).logits, eager(ids, attention_mask=masks).logits)


@pytest.mark.parametrize("kind", ["mistral", "qwen2_moe"])
@pytest.mark.parametrize("own, asked, expected", [(5, None, 5), (5, 3, 3), (3, 5, 3), (100, 5, 5)])
def test_the_op_takes_the_smaller_window(
    kind: str, own: int, asked: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(*args: Tensor, **kwargs: Any) -> Tensor:
        seen.append(kwargs["window"])
        return s2attn(*args, **kwargs)

    monkeypatch.setattr(_dense, "s2attn", spy)
    model = windowed(kind, window=own, **({} if asked is None else {"s2attn_window": asked})).train()
    model(tokens(1, 21))
    assert seen == [expected] * 2
    model.config.s2attn_mode = "dense"  # its own alone, as in eval
    model(tokens(1, 21))
    assert seen[2:] == [own if own < 21 else None] * 2


def visible(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    """[tokens, tokens]: whose embedding the logits of a one-layer model depend on."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False, **inputs).logits[0].pow(2).sum(-1)
    rows = [torch.autograd.grad(row, embedded, retain_graph=True)[0][0].abs().sum(-1) > 0 for row in logits]
    return torch.stack(rows)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("documents", ["one", "packed", "padded"])
@pytest.mark.parametrize("pattern", [{}, {"s2attn_sink": True}, {"s2attn_window": 3}, BOTH], ids=str)
def test_a_model_sees_what_its_config_says(pattern: dict, documents: str, checkpointing: bool) -> None:
    from longlora_ext.reference import s2attn_mask

    model = tiny_model(num_hidden_layers=1, **pattern).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    starts, inputs = torch.zeros(1, 27, dtype=torch.int32), {}
    if documents == "packed":
        starts[:, 11:] = 11
        inputs = {"position_ids": torch.cat([torch.arange(11), torch.arange(16)])[None]}
    elif documents == "padded":
        starts[:, 4:] = 4
        inputs = {"attention_mask": (torch.arange(27) >= 4).long()[None]}
    sees = {name.removeprefix("s2attn_"): value for name, value in pattern.items()}
    masks = [s2attn_mask(27, 8, shifted, starts, **sees)[0] for shifted in (False, True)]
    assert torch.equal(visible(model, tokens(1, 27), **inputs), masks[0] | masks[1])


def test_a_config_without_the_fields_is_one_of_before() -> None:
    with_none = tiny_model(s2attn_sink=False, s2attn_window=None).train()
    ids = tokens(2, 21)
    assert torch.equal(with_none(ids).logits, tiny_model().train()(ids).logits)
    assert not torch.equal(tiny_model(**BOTH).train()(ids).logits, tiny_model().train()(ids).logits)
    assert torch.equal(tiny_model(**BOTH)(ids).logits, tiny_model()(ids).logits)  # dense evaluation does not change


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("s2attn_window", 0, "config.s2attn_window must be a positive integer, but it is 0"),
        ("s2attn_window", True, "config.s2attn_window must be a positive integer, but it is True"),
        ("s2attn_window", "512", "config.s2attn_window must be a positive integer, but it is '512'"),
        ("s2attn_sink", "yes", "config.s2attn_sink must be true or false, but it is 'yes'"),
        ("s2attn_sink", 1, "config.s2attn_sink must be true or false, but it is 1"),
    ],
)
def test_wrong_fields_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(**{field: value}).train()(tokens(1, 9))


def test_a_layer_with_a_window_of_its_own_has_no_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    """It never had one; a full layer of the same model has."""
    seen = []
    monkeypatch.setattr(_dense, "s2attn", lambda *a, **k: seen.append(k["sink"]) or s2attn(*a, **k))
    windowed("qwen3", s2attn_sink=True).train()(tokens(1, 21))
    assert seen == [True, False]


@pytest.mark.parametrize(
    "options, context, fields, words",
    [
        ({"sink": True}, None, (64, True, None), "groups of 64 tokens, and the first token"),
        ({"window": 16}, None, (64, None, 16), "groups of 64 tokens, in them a window of 16"),
        ({"sink": True, "window": 16, "group_size": 512}, None, (512, True, 16),
         "one group of all tokens, in them a window of 16, and the first token"),
        ({"sink": True, "window": 16}, 64, (16, True, 16), "groups of 16 tokens, in them a window of 16, and the"),
        ({}, 64, (16, None, None), "groups of 16 tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_the_program_s_options_reach_the_config(options: dict, context: int | None, fields: tuple, words: str) -> None:
    """At a longer context and at the model's own; the banner says it."""
    from app.training.context import new_context
    from app.training.options import ModelOptions
    from app.training.report import seen

    base = tiny_config(s2attn_group_size=None)
    config = new_context(base, ModelOptions(context_length=context, **options))
    names = ("s2attn_group_size", "s2attn_sink", "s2attn_window")
    assert tuple(getattr(config, name, None) for name in names) == fields
    assert seen(config).startswith(words)


def test_a_sink_that_the_model_s_own_windows_leave_out_is_not_claimed() -> None:
    """Neither in all layers nor in some: what rows see there is tested above."""
    from app.training.report import seen

    mistral = MistralConfig(num_hidden_layers=3, sliding_window=16, s2attn_group_size=32, s2attn_sink=True)
    assert seen(mistral).endswith("and the first token in 0 of 3 layers (the others have windows)")
    mixed = Qwen3Config(num_hidden_layers=3, use_sliding_window=True, sliding_window=16, max_window_layers=2)
    mixed.s2attn_group_size, mixed.s2attn_sink = 32, True
    assert seen(mixed).endswith("and the first token in 2 of 3 layers (the others have windows)")
    mixed.s2attn_sink = False
    assert "first token" not in seen(mixed)
    whole = MistralConfig(num_hidden_layers=3, sliding_window=64, max_position_embeddings=64, s2attn_group_size=32)
    whole.s2attn_sink = True
    assert seen(whole).endswith("and the first token")  # its windows hide nothing, as those of Phi-3-mini-128k
