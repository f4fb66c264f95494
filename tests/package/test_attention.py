"""attn_implementation="s2attn": what it attends to, against eager attention with the mask spelled out."""

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

import longlora_ext.attention as attention
from longlora_ext.config import group_size
from packed_rows import packed, pad, positions_of
from tiny_models import CONFIGS, assert_close, deterministic, mask_of, op_dtype, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("device")


def s2_mask(lengths: list[int], group_size: int, heads: int, first_shifted: int) -> torch.Tensor:
    """[heads, tokens, tokens], True where a query sees a key: same document, same group, not later."""
    mask = torch.zeros(heads, sum(lengths), sum(lengths), dtype=torch.bool)
    for head in range(heads):
        offset = group_size // 2 if head >= first_shifted else 0
        begin = 0
        for length in lengths:
            for query in range(length):
                for key in range(query + 1):
                    same = (query + offset) // group_size == (key + offset) // group_size
                    mask[head, begin + query, begin + key] = same
            begin += length
    return mask


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def expected(family: str, ids: torch.Tensor, lengths: list[int], group_size: int, **inputs: torch.Tensor):
    """Logits and gradients of the same model with eager attention and the explicit mask: in fp64, in the op's dtype."""

    def results(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        heads = model.config.num_attention_heads
        mask = additive(s2_mask(lengths, group_size, heads, heads // 2), model.dtype)
        logits = model(ids, attention_mask=mask.expand(len(ids), -1, -1, -1), **inputs).logits
        logits.square().mean().backward()
        return {"logits": logits} | {name: weight.grad for name, weight in model.named_parameters()}

    exact = results(tiny_model(family, "eager").double().train())
    return exact, exact if op_dtype() == torch.float64 else results(tiny_model(family, "eager").train())


@pytest.mark.parametrize("length", [21, 32])
@pytest.mark.parametrize("family", CONFIGS)
def test_training_is_eager_attention_with_the_s2_mask(family: str, length: int) -> None:
    ids = tokens(2, length)
    exact, plain = expected(family, ids, [length], 8)
    model = tiny_model(family).train()
    ours = model(ids).logits
    assert_close(ours, exact["logits"], plain=plain["logits"])
    ours.square().mean().backward()
    for name, weight in model.named_parameters():
        assert_close(weight.grad, exact[name], plain=plain[name])


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_packed_training_is_eager_attention_with_the_s2_mask(family: str, cache: bool) -> None:
    lengths = [5, 19, 8]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = tokens(1, sum(lengths))
    exact, plain = expected(family, ids, lengths, 8, position_ids=positions)
    ours = tiny_model(family).train()(ids, position_ids=positions, use_cache=cache).logits
    assert_close(ours, exact["logits"], plain=plain["logits"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_flash_attn_kwargs": True},
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
    ],
    ids=["position_ids", "both", "cu_seq_lens"],
)
def test_a_packed_batch_is_its_documents_apart(options: dict[str, bool], training: bool) -> None:
    batch, documents = packed([7, 20, 1, 12], **options)
    model = tiny_model().train(training)
    together = model(**batch).logits[0]
    apart = torch.cat([model(document).logits[0] for document in documents])
    assert_close(together, apart)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows_apart(side: str, training: bool) -> None:
    rows = [tokens(1, 9, seed=1), tokens(1, 22, seed=2)]
    ids, mask = pad(rows, side)
    model = tiny_model().train(training)
    together = model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
    for row, real, alone in zip(together, mask.bool(), rows, strict=True):
        assert_close(row[real], model(alone).logits[0])


@pytest.mark.parametrize("training", [True, False])
def test_padding_and_packing_together(training: bool) -> None:
    documents = [tokens(1, 6, seed=1), tokens(1, 11, seed=2)]
    ids, mask = pad([torch.cat(documents, dim=1), tokens(1, 20, seed=3)], "right")
    positions = torch.arange(20).repeat(2, 1)
    positions[0, 6:17] = torch.arange(11)
    positions[0, 17:] = 1  # what a collator may write at padding
    model = tiny_model().train(training)
    together = model(ids, attention_mask=mask, position_ids=positions).logits[0, :17]
    assert_close(together, torch.cat([model(d).logits[0] for d in documents]))


@pytest.mark.parametrize("family", ["llama", "llama-1-head"])
def test_nothing_sees_the_future_or_another_document(family: str) -> None:
    lengths = [18, 13]
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model = tiny_model(family).train()
    before = model(ids, position_ids=positions).logits[0]
    for changed in range(sum(lengths)):
        other = ids.clone()
        other[0, changed] = 3 + (ids[0, changed] - 2) % 50
        after = model(other, position_ids=positions).logits[0]
        first = 0 if changed < lengths[0] else lengths[0]
        last = first + (lengths[0] if first == 0 else lengths[1])
        same = torch.ones(len(before), dtype=torch.bool)
        same[changed:last] = False
        assert torch.equal(before[same], after[same]), changed
        assert not torch.equal(before[changed], after[changed])


def test_group_size_comes_from_the_config() -> None:
    ids = tokens(1, 24)
    model = tiny_model(s2attn_group_size=12).train()
    for size in (12, 8):
        model.config.s2attn_group_size = size
        exact, plain = expected("llama", ids, [24], size)
        assert_close(model(ids).logits, exact["logits"], plain=plain["logits"])


@pytest.mark.parametrize("training", [True, False])
def test_the_scale_of_the_layer_is_used(training: bool) -> None:
    batch, documents = packed([9, 15])
    model, eager = tiny_model().train(training), tiny_model("llama", "eager")
    for layer in (*model.model.layers, *eager.model.layers):
        layer.self_attn.scaling = 1.5
    if training:
        mask = additive(s2_mask([9, 15], 8, 4, 2), eager.dtype)[None]
        theirs = eager(batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"]).logits[0]
    else:
        theirs = torch.cat([eager(document).logits[0] for document in documents])
    assert_close(model(**batch).logits[0], theirs)


@pytest.mark.parametrize("context, size", [(64, 16), (70, 16), (4, 2), (8192, 2048)])
def test_group_size_is_a_quarter_of_the_context_without_a_field(context: int, size: int) -> None:
    assert group_size(LlamaConfig(max_position_embeddings=context)) == size


@pytest.mark.parametrize("size", [0, -4, 7, 8.0, "8", True])
def test_a_wrong_group_size_is_refused(size: object) -> None:
    model = tiny_model().train()
    model.config.s2attn_group_size = size
    with pytest.raises(ValueError, match=r"s2attn_group_size must be a positive even integer, but it is"):
        model(tokens(1, 9))


def test_mode_s2_and_mode_dense_hold_in_training_and_eval() -> None:
    ids = tokens(2, 24)
    auto = tiny_model()
    s2, dense = auto.train()(ids).logits, auto.eval()(ids).logits
    assert not torch.allclose(s2, dense, atol=1e-3)
    for training in (True, False):
        for mode, result in (("s2", s2), ("dense", dense)):
            model = tiny_model(s2attn_mode=mode).train(training)
            assert_close(model(ids).logits, result)
    with pytest.raises(ValueError, match="s2attn_mode must be one of 'auto', 's2', 'dense', but it is 'flash'"):
        tiny_model(s2attn_mode="flash")(ids)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    batch, _ = packed([7, 20, 5])
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with deterministic():
            model(**batch).logits.square().mean().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training: bool, device: str) -> None:
    ids, mask = pad([tokens(1, 20), tokens(1, 13)], "right")
    model = tiny_model(dtype=torch.float32).train(training)
    with torch.autocast(device, dtype=torch.bfloat16):
        low = model(ids, attention_mask=mask).logits
    with torch.device("cpu"):  # where the op has kernels for fp32
        exact = model.cpu()(ids.cpu(), attention_mask=mask.cpu()).logits.to(device)
    real = mask.bool()
    assert low.dtype == torch.bfloat16
    error = (low[real].float() - exact[real]).norm() / exact[real].norm()
    assert error < 0.05


def test_mixed_dtypes_compute_in_that_of_v() -> None:
    """With fp32 norms, q and k may come in fp32 out of the rotation, and v in bf16 out of its projection."""
    model = tiny_model(dtype=torch.bfloat16).train()
    layer = model.model.layers[0].self_attn
    q, k = (torch.randn(1, heads, 9, 8) for heads in (4, 2))
    v = torch.randn(1, 2, 9, 8, dtype=torch.bfloat16)
    out, weights = attention.s2attn_forward(layer, q, k, v, None, scaling=0.3)
    assert out.dtype == torch.bfloat16 and out.shape == (1, 9, 4, 8) and weights is None


def test_a_layer_that_gets_no_position_ids_is_told_the_documents_by_the_mask() -> None:
    assert mask_of(position_ids=torch.arange(12)[None]) is None
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    assert mask_of(position_ids=positions).tolist() == [[[[0] * 5 + [5] * 7]] * 2] * 2
