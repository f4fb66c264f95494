"""What attn_implementation="s2attn" cannot express is refused, by the layer or by the mask, and named."""

import pytest
import torch
from transformers import AutoConfig, Gemma2Config, GemmaConfig, LlamaConfig, MistralConfig
from transformers.models.llama.modeling_llama import LlamaAttention

import longlora_ext.attention as attention
from longlora_ext._mask import s2attn_mask
from longlora_ext.adapter import lora_config, prepare_model
from op_checks import default_dtype
from tiny_models import SIZES, assert_close, mask_of, tiny_config, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("device")


def test_a_window_of_no_tokens_is_refused() -> None:
    config = MistralConfig(**{**tiny_config("mistral").to_dict(), "sliding_window": 0})
    for model in (tiny_model(config=config), tiny_model(config=config).train()):
        with pytest.raises(ValueError, match=r"a window of no tokens: this model asks for 0 tokens, and there are \d"):
            model(tokens(1, 9))


@pytest.mark.parametrize("training", [True, False])
def test_chunked_attention_is_refused(training: bool) -> None:
    config = AutoConfig.for_model("llama4_text", **SIZES, attention_chunk_size=4, num_local_experts=2)
    with pytest.raises(ValueError, match=r"cannot express chunked attention.*4 tokens, and there are 9"):
        tiny_model(config=config, dtype=default_dtype()).train(training)(tokens(1, 9))


@pytest.mark.parametrize("training", [True, False])
def test_a_window_that_holds_all_tokens_is_none(training: bool) -> None:
    """Packed or not, and in `generate` for as long as that is so."""
    config = MistralConfig(**{**tiny_config("mistral").to_dict(), "sliding_window": 12})
    windowed, full = tiny_model(config=config).train(training), tiny_model("mistral").train(training)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    for inputs in ({}, {"position_ids": positions}, {"attention_mask": torch.arange(12)[None] < 9}):
        assert torch.equal(windowed(tokens(1, 12), **inputs).logits, full(tokens(1, 12), **inputs).logits)
    if not training:
        ids = tokens(1, 5)
        longer = [model.generate(ids, max_new_tokens=7, do_sample=False) for model in (windowed, full)]
        assert torch.equal(*longer)
        differ = [model(tokens(1, 13)).logits for model in (windowed, full)]
        assert not torch.equal(*differ)


def test_a_window_that_holds_all_tokens_makes_no_documents() -> None:
    """Which would be a row of zeros that every kernel reads, and no views of groups where there is no kernel."""
    masks = []
    model = tiny_model("mistral", sliding_window=12).train()
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda _, args, given: masks.append(given["attention_mask"]), with_kwargs=True)
    model(tokens(1, 12))
    assert masks == [None]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("qwen2_moe", {"use_sliding_window": False, "sliding_window": 0, "num_experts": 2, "num_experts_per_tok": 1}),
        ("qwen2_moe", {"use_sliding_window": False, "sliding_window": 4, "num_experts": 2, "num_experts_per_tok": 1}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"] * 2}),
        ("olmo3", {"sliding_window": 4, "layer_types": ["full_attention"] * 2}),
        ("ministral", {"sliding_window": 0, "layer_types": ["full_attention"] * 2}),
    ],
)
def test_a_window_that_no_layer_uses_is_none(kind: str, fields: dict[str, object]) -> None:
    """transformers makes the mask all the same."""
    config = AutoConfig.for_model(kind, **{**SIZES, **fields})
    assert attention.attention_window(config) is None
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    model = tiny_model(config=config, dtype=default_dtype()).train()
    packed = model(tokens(1, 12), position_ids=positions).logits[:, 5:]
    assert_close(packed, model(tokens(1, 12)[:, 5:]).logits)


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"sliding_window": 4}, 4),
        ({"sliding_window": None}, None),
        ({"sliding_window": 4, "use_sliding_window": False}, None),
        ({"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}, 4),
        ({"sliding_window": None, "layer_types": ["full_attention", "sliding_attention"]}, 0),
        ({"sliding_window": 4, "layer_types": ["full_attention", "linear_attention"]}, None),
        ({"attention_chunk_size": 6, "layer_types": ["chunked_attention", "full_attention"]}, 6),
    ],
)
def test_the_window_of_a_config(fields: dict[str, object], window: int | None) -> None:
    assert attention.attention_window(LlamaConfig(num_hidden_layers=2, **fields)) == window


def test_a_model_with_soft_capping_and_windows_is_refused() -> None:
    config = Gemma2Config(**{**tiny_config("gemma").to_dict(), "model_type": "gemma2"})
    with pytest.raises(ValueError, match="cannot express"):
        tiny_model(config=config).train()(tokens(1, 9))


def test_bidirectional_attention_is_refused() -> None:
    gemma = GemmaConfig(**{**tiny_config("gemma").to_dict(), "use_bidirectional_attention": True})
    with pytest.raises(ValueError, match="bidirectional"):
        tiny_model(config=gemma).train()(tokens(1, 9))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"softcap": 30.0}, "soft-capping"),
        ({"position_bias": torch.zeros(1, 4, 9, 9)}, "position bias"),
        ({"dropout": 0.1}, r"attention dropout \(it is 0.1"),
        ({"is_causal": False}, "is_causal=False"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"attention_mask": torch.zeros(1, 1, 9, 9)}, "takes a 2-D attention_mask .* but it got a 4-D mask"),
        ({"attention_mask": torch.ones(1, 9, dtype=torch.bool)}, "but it got a 2-D mask"),
        ({"position_ids": torch.zeros(3, 1, 9, dtype=torch.long)}, r"position_ids must be \[1, 9\]"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 4, 8], dtype=torch.int32)},
            r"end at the row's length 9, but is \[0, 4, 8\]",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_the_op_cannot_express_is_refused(arguments: dict[str, object], message: str, training: bool) -> None:
    layer = LlamaAttention(tiny_config(attn_implementation="s2attn"), 0).train(training)
    arguments = dict(arguments)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    mask = arguments.pop("attention_mask", None)
    with pytest.raises(ValueError, match=message):
        attention.s2attn_forward(layer, q, k, v, mask, **arguments)


@pytest.mark.parametrize("training", [True, False])
def test_masks_of_four_dimensions_are_refused_by_the_whole_model(training: bool) -> None:
    causal = torch.ones(9, 9, dtype=torch.bool).tril().expand(1, 1, 9, 9)
    with pytest.raises(ValueError, match="4-D mask"):
        tiny_model().train(training)(tokens(1, 9), attention_mask=causal)


def test_mask_functions_of_a_model_s_own_are_refused() -> None:
    def image(batch: object, head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query < 4) & (key < 4)

    def near(batch: object, head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return key > query - 4

    for own in ({"or_mask_function": image}, {"and_mask_function": near}):
        with pytest.raises(ValueError, match="a mask function of its own"):
            mask_of(**own)
    with pytest.raises(ValueError, match="bidirectional attention"):
        s2attn_mask(batch_size=1, q_length=12, kv_length=12, mask_function=image, device=torch.device("cpu"))


@pytest.mark.only("cpu", "on a GPU a device-side assertion says so, which ends the process")
@pytest.mark.parametrize("training", [True, False])
def test_masks_with_holes_are_refused(training: bool) -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 4] = 0
    with pytest.raises(ValueError, match="unbroken run of tokens"):
        tiny_model().train(training)(tokens(2, 9), attention_mask=mask)


NOT_ZEROS_AND_ONES = {
    "documents": [1, 1, 2, 2],
    "documents as floats": [1.0, 1.0, 2.0, 2.0],
    "padding and documents": [0, 1, 1, 2],
    "all 2": [2, 2, 2, 2],
    "a half": [0.5, 0.5, 1.0, 1.0],
    "minus one": [-1, -1, -1, -1],
    "additive": [0.0, 0.0, float("-inf"), float("-inf")],
}


@pytest.mark.only("cpu", "on a GPU a device-side assertion says so, which ends the process")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", NOT_ZEROS_AND_ONES)
def test_masks_of_other_values_are_refused(what: str, training: bool) -> None:
    """transformers makes them boolean before it has the mask made: 2 would be what 1 is."""
    mask = torch.tensor([NOT_ZEROS_AND_ONES[what]])
    model = tiny_model().train(training)
    adapted = prepare_model(tiny_model(), lora_config(model)).train(training)
    message = r"attention_mask must hold 0 and 1, but holds \[.*\]; packed documents are told by position_ids"
    for run in (model, model.model, adapted):
        with pytest.raises(ValueError, match=message):
            run(tokens(1, 4), attention_mask=mask)
    with pytest.raises(ValueError, match=message):
        model(tokens(1, 4), mask)
    with pytest.raises(ValueError, match=message):
        s2attn_mask(batch_size=1, q_length=4, kv_length=4, attention_mask=mask)
    with pytest.raises(ValueError, match=message):
        model.eval().generate(tokens(1, 4), attention_mask=mask, max_new_tokens=2)


@pytest.mark.full
@pytest.mark.only("cpu", "on a GPU a device-side assertion says so, which ends the process")
def test_masks_of_other_values_are_refused_when_compiled() -> None:
    model = torch.compile(tiny_model(), backend="aot_eager", fullgraph=True)
    for mask in ([0, 1, 1, 1], [1, 1, 1, 1]):
        model(tokens(1, 4), attention_mask=torch.tensor([mask]), use_cache=False)
    with pytest.raises(RuntimeError, match="attention_mask must hold 0 and 1"):
        model(tokens(1, 4), attention_mask=torch.tensor([[1, 1, 2, 2]]), use_cache=False)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float16], ids=str)
def test_masks_of_zeros_and_ones_may_have_any_dtype(dtype: torch.dtype) -> None:
    model, mask = tiny_model().train(), torch.tensor([[1, 1, 1, 0]])
    logits = [model(tokens(1, 4), attention_mask=m).logits for m in (mask, mask.to(dtype))]
    assert torch.equal(*logits)


def test_models_for_other_attention_may_have_any_mask() -> None:
    tiny_model(attn_implementation="sdpa")(tokens(1, 4), attention_mask=torch.tensor([[1, 1, 2, 2]]))


def test_dropout_and_output_attentions_are_refused_by_the_whole_model() -> None:
    with pytest.raises(ValueError, match=r"attention_dropout=0.0"):
        tiny_model(attention_dropout=0.1).train()(tokens(1, 9))
    with pytest.raises(ValueError, match="output_attentions"):
        tiny_model()(tokens(1, 9), output_attentions=True)


def test_heads_split_over_ranks_are_refused_in_training() -> None:
    layer = LlamaAttention(tiny_config(attn_implementation="s2attn"), 0).train()
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 1, 9, 8)
    with pytest.raises(ValueError, match="num_attention_heads is 4, but this layer has 2 heads"):
        attention.s2attn_forward(layer, q, k, k, None)
