"""What attn_implementation="s2attn" cannot express is refused, by the layer or by the mask, and named."""

import pytest
import torch
from transformers import Gemma2Config, GemmaConfig, MistralConfig
from transformers.models.llama.modeling_llama import LlamaAttention

import longlora_ext.attention as attention
from longlora_ext._mask import s2attn_mask
from tiny_models import mask_of, tiny_config, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("device")


def test_sliding_windows_are_refused() -> None:
    config = MistralConfig(**{**tiny_config("mistral").to_dict(), "sliding_window": 4})
    for model in (tiny_model(config=config), tiny_model(config=config).train()):
        with pytest.raises(ValueError, match=r"sliding-window .*set config.sliding_window=None"):
            model(tokens(1, 9))


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
        ({"sliding_window": 4}, "sliding window"),
        ({"softcap": 30.0}, "soft-capping"),
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"position_bias": torch.zeros(1, 4, 9, 9)}, "position bias"),
        ({"dropout": 0.1}, r"attention dropout \(it is 0.1"),
        ({"is_causal": False}, "is_causal=False"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"v_head_dim": 16}, r"head dim of v \(16\) other than that of q and k \(8\)"),
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
    v_head_dim = arguments.pop("v_head_dim", 8) if "v_head_dim" in (arguments := dict(arguments)) else 8
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, v_head_dim)
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
