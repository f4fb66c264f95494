"""The tiled loss: the same numbers as the plain one's, without the logits of all tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from longlora_ext.adapter import lora_config, prepare_model
from longlora_ext.loss import tile_loss, why_not_tiled
from loss_models import LiveBytes, cohere, model_of, prepared
from tiny_models import VOCABULARY, tiny_config, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("device")
BATCH, LENGTH = 2, 24
LOGITS = BATCH * LENGTH * VOCABULARY


def batch() -> dict[str, torch.Tensor]:
    """Two rows, some labels of which are masked, all of one tile's among them."""
    ids = tokens(BATCH, LENGTH)
    labels = ids.clone()
    labels[0, 3:14] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: torch.nn.Module, **inputs: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and, in training mode, the gradients of all that trains."""
    model.train()
    model.zero_grad()
    loss = model(**inputs).loss
    (3 * loss).backward()  # scaled, as trainers do
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "case",
    [
        "full", "full tied", "full gemma", "adapter", "adapter tied", "adapter tied bf16", "adapter bf16",
        "adapter lora head", "adapter saved head",
    ],
)  # fmt: skip
@pytest.mark.parametrize("items", [None, 17])
def test_loss_and_gradients_are_the_plain_ones(case: str, items: int | None) -> None:
    plain = prepared(case)
    tiled = tile_loss(copy.deepcopy(plain), tile=5 * VOCABULARY)
    inputs: dict[str, Any] = batch()
    if items is not None:
        inputs["num_items_in_batch"] = torch.tensor(items)
    expected, found = gradients(plain, **inputs), gradients(tiled, **inputs)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if "bf16" not in case else {"rtol": 1e-2, "atol": 1e-2}
    # How a product of bfloat16 rounds may depend on its shape, which instructions it is computed with at that.
    assert found[0] == pytest.approx(expected[0], rel=1e-5 if "bf16" not in case else 1e-3)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, **tolerance)


def test_labels_that_are_shifted_already() -> None:
    """As sequence parallelism hands them in, which cuts sequences between a token and its label."""
    inputs = batch()
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    model = prepared("full")
    expected, _ = gradients(model, **inputs)
    found, _ = gradients(tile_loss(model, tile=1), **{**inputs, "labels": shifted, "shift_labels": shifted})
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_logits_of_all_tokens_never_exist(checkpointing: bool) -> None:
    """The most memory that tensors take at any time of a step: less than one copy of the logits, not three."""
    ids, peaks = tokens(1, 1024), []
    logits = 1024 * 2048 * 4  # bytes
    for tile in (None, 16 * 2048):
        config = tiny_config(vocab_size=2048, tie_word_embeddings=True, num_hidden_layers=1)
        model = model_of(dtype=torch.bfloat16, config=config)
        model = prepare_model(model, lora_config(model)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if tile is not None:
            tile_loss(model, tile)
        with LiveBytes() as live:
            model(input_ids=ids, labels=ids).loss.backward()
        peaks.append(live.peak)
    print(f"bytes of logits {logits:,}, peak {peaks[0]:,}, tiled {peaks[1]:,}")
    assert peaks[0] > 2 * logits
    assert peaks[1] < 0.5 * logits


def test_a_batch_of_one_tile_is_not_computed_twice() -> None:
    model = tile_loss(prepared("adapter"), tile=LOGITS)
    calls = []
    model.get_base_model().get_output_embeddings().register_forward_hook(lambda *args: calls.append(args[1][0].shape))
    gradients(model, **batch())
    gradients(model, **batch())
    # of the last token, the check of it (once), of all
    assert [shape.numel() // 32 for shape in calls] == [2, 2, 48, 2, 48]


def test_without_labels_and_with_logits_asked_for_nothing_is_different() -> None:
    plain = model_of()
    tiled = tile_loss(copy.deepcopy(plain), tile=1)
    inputs = batch()
    assert torch.equal(tiled(inputs["input_ids"]).logits, plain(inputs["input_ids"]).logits)
    given = tiled(**inputs, logits_to_keep=LENGTH)
    assert given.logits.shape == (BATCH, LENGTH, VOCABULARY)
    assert given.loss.item() == plain(**inputs).loss.item()
    assert tiled(**inputs).logits.shape == (BATCH, 1, VOCABULARY)
    assert tiled(**inputs).loss.item() == pytest.approx(given.loss.item(), rel=1e-6)
    generated = tiled.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, plain.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False))


def test_models_that_change_their_logits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cohere()
    assert why_not_tiled(model) == "its logits are more than its output layer's result (config.logit_scale)"

    with pytest.raises(ValueError, match=r"CohereForCausalLM cannot be tiled: .*config\.logit_scale"):
        tile_loss(model)
    monkeypatch.setattr("longlora_ext.loss._CHANGES_LOGITS", ())  # as for a model that nobody has thought of
    tile_loss(model)
    with pytest.raises(ValueError, match="cannot be tiled: its logits are more than its output layer's result"):
        model(**batch())


def test_a_loss_function_of_one_s_own_is_kept() -> None:
    model = tiny_model()

    def with_something_besides(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> None:
        raise AssertionError

    model.loss_function = with_something_besides
    reason = "its loss function is with_something_besides, not transformers' cross entropy"
    assert why_not_tiled(model) == reason
    with pytest.raises(ValueError, match=reason):
        tile_loss(model)


class FloatLogits(LlamaForCausalLM):
    """As some models have it: float32 logits of an output layer in bfloat16."""

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, labels: torch.Tensor, logits_to_keep: int = 0
    ) -> CausalLMOutput:
        logits = self.lm_head(self.model(input_ids).last_hidden_state[:, -logits_to_keep:]).float()
        return CausalLMOutput(loss=self.loss_function(logits, labels, vocab_size=VOCABULARY), logits=logits)


def test_logits_in_another_dtype_than_the_output_layer_are_tiled() -> None:
    model = FloatLogits(tiny_config()).bfloat16().train()
    loss = model(**batch()).loss.item()
    assert tile_loss(model)(**batch()).loss.item() == pytest.approx(loss, rel=1e-3)


def test_other_refusals() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="tile must be 1 or more, got 0"):
        tile_loss(model, tile=0)
    tile_loss(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be tiled: it is tiled already"):
        tile_loss(model)
    from transformers import AutoModel

    with pytest.raises(ValueError, match="LlamaModel cannot be tiled: it has no output layer"):
        tile_loss(AutoModel.from_config(tiny_config()))


def test_copies_of_the_model_in_one_process_are_refused() -> None:
    """What `nn.DataParallel` makes, as the Trainer does where a script is started by python and sees several GPUs."""
    replica = tile_loss(prepared("full"))._replicate_for_data_parallel()
    with pytest.raises(ValueError, match=r"does not go with nn\.DataParallel.*torchrun --nproc_per_node"):
        replica(**batch())
