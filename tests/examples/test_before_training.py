"""What is measured of a model as it came (examples/app/training/before_training.py)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import longlora_ext.attention  # noqa: F401
from app.evaluation.perplexity import sliding_window_perplexity
from app.training.before_training import BEFORE, SCALED, BeforeTraining, old_rotary_embedding, why_not_before
from app.training.measure import Measurement
from app.training.retrieval_guard import Advice, RetrievalGuard
from finetune_runs import ROOT
from longlora_ext.config import extend_config
from tiny_models import tiny_config, tiny_model, tokens

CONFIG = tiny_config(max_position_embeddings=16)
DOCUMENTS = [tokens(1, 80)[0].numpy()]


def model_of(config: Any) -> Any:
    return tiny_model(config=config, dtype=torch.float32)


def perplexity(model: torch.nn.Module) -> float:
    return sliding_window_perplexity(model, DOCUMENTS, 64, 32)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_the_row_before_is_the_model_as_it_came(rope_type: str) -> None:
    extended, original = model_of(extend_config(CONFIG, 64, rope_type=rope_type)), model_of(CONFIG)
    scaled = perplexity(extended)
    with old_rotary_embedding(extended, CONFIG):
        before = perplexity(extended)
    assert before == perplexity(original)
    assert before != pytest.approx(scaled, rel=1e-3)
    assert perplexity(extended) == scaled
    extended(input_ids=torch.zeros((1, 200), dtype=torch.long))  # as training does: "dynamic" would remember it
    assert perplexity(extended) == scaled


def with_thetas() -> tuple[Any, Any]:
    """A model that rotates by a module for each theta, as granite_swa does."""
    config = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=256)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert why_not_before(model, config) is None
    model.model.rotary_embs = torch.nn.ModuleList([model.model.rotary_emb])
    del model.model.rotary_emb
    return model, config


def test_models_that_the_old_positions_do_not_reach() -> None:
    """Moshi's has one in each layer. Nor where attention scales by what RoPE's factor says, as DeepSeek's does."""
    model, config = with_thetas()
    (model.model.rotary_emb,) = model.model.rotary_embs
    del model.model.rotary_embs
    assert why_not_before(model, config) is None
    model.model.layers[0].self_attn.rotary_emb = type(model.model.rotary_emb)(config)
    assert "rotary_emb counts positions as well" in str(why_not_before(model, config))
    assert "model.rotary_embs.0 counts positions as well" in str(why_not_before(*with_thetas()))
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale_all_dim": 0.7}
    scaled = LlamaConfig(rope_parameters={**rope, "original_max_position_embeddings": 512})
    assert "mscale_all_dim" in str(why_not_before(torch.nn.Module(), scaled))


def perplexities(folder: Path, config: Any) -> BeforeTraining:
    return Measurement(folder, config, extend_config(config, 512), DOCUMENTS)


def pass_keys(folder: Path, config: Any) -> BeforeTraining:
    return RetrievalGuard(
        folder, AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny_llama"), config, config, Advice([], [])
    )


@pytest.mark.parametrize("make", [perplexities, pass_keys])
def test_rows_are_measured_where_they_are_true(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a run's first step, with the old RoPE, and not again where it goes on."""
    config = tiny_config(max_position_embeddings=256)
    extended = model_of(extend_config(config, 512, rope_type="yarn"))
    measured: list[tuple[str, bool]] = []
    asked = make(tmp_path, config)

    def measure(model: Any, args: Any, row: str) -> None:
        measured.append((row, model.model.rotary_emb.rope_type == "default"))

    monkeypatch.setattr(asked, "measure", measure)

    def begin(model: Any, step: int = 0) -> None:
        asked.on_train_begin(None, SimpleNamespace(global_step=step), None, model=model)

    begin(extended)
    scaled = [(SCALED, False)] if make is perplexities else []
    assert measured == [(BEFORE, True), *scaled]
    begin(extended, 3)
    assert measured == [(BEFORE, True), *scaled]
    assert not capsys.readouterr().out
    measured.clear()
    model, asked.base_config = with_thetas()
    model.model.rotary_emb = extended.model.rotary_emb  # what is looked at above
    begin(model)
    assert measured == scaled
    assert "before RoPE is scaled: model.rotary_embs.0 counts positions as well" in capsys.readouterr().out
