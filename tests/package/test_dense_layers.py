"""Layers that attend densely in training (`s2attn_dense_layers`), through models, adapters and the program."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import finetune_llama
import longlora_ext
import longlora_ext.attention as attention
import plan as plan_command
from app.planning.layers import kinds
from app.planning.planner import Plan, PlannedRun, Way
from app.training.dense_layers import asked_layers
from finetune_runs import losses, make_model, make_text, small_run
from longlora_ext import _dense
from longlora_ext._flops import attended_pairs
from longlora_ext._pattern import in_words
from longlora_ext.config import config_for, extend_config
from longlora_ext.ops import s2attn
from longlora_ext.trainer import DenseTail
from tiny_models import tiny_config, tiny_model, tokens


def groups_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The group size of each call of the operator, from here on."""
    seen: list[int] = []
    monkeypatch.setattr(
        _dense, "s2attn", lambda q, k, v, size, *a, **kw: seen.append(size) or s2attn(q, k, v, size, *a, **kw)
    )
    return seen


@pytest.mark.parametrize(
    "asked, layers",
    [(1, [3]), (4, [0, 1, 2, 3]), ([0], [0]), ([2, 0, 2], [0, 2]), ([-1], [3]), ((-4, 3), [0, 3])],
)
def test_a_count_or_indices(asked: Any, layers: list[int]) -> None:
    base = tiny_config(num_hidden_layers=4)
    assert extend_config(base, 256, dense_layers=asked).s2attn_dense_layers == layers
    assert config_for(base, dense_layers=asked).s2attn_dense_layers == layers  # at the model's own context
    assert not hasattr(extend_config(base, 256), "s2attn_dense_layers")


@pytest.mark.parametrize(
    "asked, message",
    [
        (0, "a number of layers from 1 to 2, but it is 0"),
        (3, "a number of layers from 1 to 2, but it is 3"),
        (True, "a number of layers or a list of their indices, but it is True"),
        ("1", "a number of layers or a list of their indices, but it is '1'"),
        ([], "a number of layers or a list of their indices"),
        ([2], "has 2, but the model's layers are 0 to 1"),
        ([-3], "has -3, but the model's layers are 0 to 1"),
        ([0.0], "has 0.0, but the model's layers are 0 to 1"),
        ([True], "has True, but the model's layers are 0 to 1"),
    ],
)
def test_layers_that_are_none(asked: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extend_config(tiny_config(), 256, dense_layers=asked)


@pytest.mark.parametrize("value", [3, "1", [True], ["0"], [-1]])
def test_a_wrong_field_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"config.s2attn_dense_layers must be a list of layer indices, but it is"):
        tiny_model(s2attn_dense_layers=value).train()(tokens(1, 9))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "mistral"])
def test_these_layers_and_no_others_are_dense_in_training(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(2, 21)
    fields: dict[str, Any] = {"s2attn_group_size": 8, "s2attn_sink": True}
    model = tiny_model(config=tiny_config(kind, s2attn_dense_layers=[1], **fields))
    plain = tiny_model(config=tiny_config(kind, **fields))
    seen = groups_seen(monkeypatch)
    model.train()(ids, use_cache=False)
    assert seen == [8, 22]
    all_dense = tiny_model(config=tiny_config(kind, s2attn_dense_layers=[0, 1], **fields)).train()
    torch.testing.assert_close(all_dense(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    torch.testing.assert_close(model.eval()(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    none = tiny_model(config=tiny_config(kind, s2attn_dense_layers=None, **fields)).train()
    assert torch.equal(none(ids, use_cache=False).logits, plain.train()(ids, use_cache=False).logits)
    assert (model.train()(ids, use_cache=False).logits - plain(ids, use_cache=False).logits).abs().max() > 1e-3


def test_s2_at_test_time_has_them_too_and_documents_are_apart() -> None:
    fields: dict[str, Any] = {"s2attn_group_size": 8, "s2attn_dense_layers": [0]}
    ids, positions = tokens(1, 30), torch.cat([torch.arange(13), torch.arange(17)])[None]
    trained = tiny_model(**fields).train()(ids, position_ids=positions, use_cache=False).logits
    tested = tiny_model(**fields, s2attn_mode="s2")(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(trained, tested)
    alone = tiny_model(**fields).train()(ids[:, 13:], use_cache=False).logits
    torch.testing.assert_close(trained[:, 13:], alone)


def test_dense_steps_make_the_other_layers_dense_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(s2attn_group_size=8, s2attn_dense_layers=[0]).train()
    seen = groups_seen(monkeypatch)
    tail = DenseTail(model.config, 1)
    model(tokens(1, 20))
    model.config.s2attn_mode = "dense"
    model(tokens(1, 20))
    model.config.s2attn_mode = tail.mode
    model(tokens(1, 20))
    assert seen == [20, 8, 20, 20, 20, 8]


def test_a_model_whose_layers_have_no_number_is_an_error() -> None:
    model = tiny_model(s2attn_dense_layers=[0]).train()
    del model.model.layers[1].self_attn.layer_idx
    with pytest.raises(ValueError, match="LlamaAttention has no layer_idx"):
        attention._wants_s2(model.model.layers[1].self_attn)


@pytest.mark.parametrize("layers, words", [([], ""), ([5], "5"), ([0, 1], "0-1"), ([0, 27, 28, 29], "0, 27-29")])
def test_layers_in_words(layers: list[int], words: str) -> None:
    assert in_words(layers) == words


@pytest.mark.parametrize("text, asked", [(None, None), ("3", 3), ("0,5,29", [0, 5, 29]), ("5,", [5]), ("-1,", [-1])])
def test_the_option(text: str | None, asked: Any) -> None:
    assert asked_layers(text) == asked


@pytest.mark.parametrize("text", ["", "all", "1.5", "1,x", "0 5"])
def test_an_option_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="--dense_layers must be a number of last layers"):
        asked_layers(text)


@pytest.mark.parametrize("dense", [[0, 2, 3], [1, 3], [2, 3, 5]], ids=str)
def test_the_planner_counts_them_as_dense(dense: list[int]) -> None:
    """Also where it runs a model of as many layers as the list is long."""
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    once, tokens_ = Way(checkpointing=False, tiled_loss=False), 256
    plan = Plan(config, tokens_, PlannedRun(dense_layers=dense))
    others = [layer for layer in range(6) if layer not in dense]
    pairs = len(others) * attended_pairs(tokens_, 64, 4, 2) + len(dense) * attended_pairs(tokens_, tokens_, 4, 4)
    flops = plan.step(once).flops
    assert sum(count for name, count in flops.items() if name.startswith("longlora.")) == (2 + 5) * 2 * 8 * pairs
    assert [list(kind.layers) for kind in plan.kinds] == sorted([dense, others])
    whole = plan._run(None, once)
    assert (plan.step(once).flops, plan.step(once).kept) == (whole.flops, whole.kept)
    assert len(kinds(config)) == 1
    shared = Plan(config, tokens_, PlannedRun(dense_layers=dense, gpus=2, sequence_parallel_size=2))
    assert shared.flops()["attention"] == plan.flops()["attention"]


def test_the_planning_program_takes_the_option(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Plan, "longest", lambda *_: 0)
    make_model(tmp_path / "base")
    found = {}
    for dense in ("1", "0,1"):
        plan_command.main(["--model", str(tmp_path / "base"), "--dense_layers", dense, "--json"])
        found[dense] = json.loads(capsys.readouterr().out)["flops_of_a_sequence"]
    assert found["1"]["s2"]["attention"] < found["0,1"]["s2"]["attention"] == found["0,1"]["dense"]["attention"]
    with pytest.raises(SystemExit):
        plan_command.main(["--model", str(tmp_path / "base"), "--dense_layers", "last"])
    assert "--dense_layers must be a number of last layers" in capsys.readouterr().err


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return make_model(folder / "base"), make_text(folder / "text.jsonl")


def test_a_run_with_them_resumes_and_says_so(inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In banner, manifest, card and adapter; with ntk, sink and dense steps besides."""
    recipe = ["--dense_layers", "1", "--rope_type", "ntk", "--sink", "--dense_steps", "1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finetune_llama.main([*small_run(*inputs, whole, steps=4), *recipe])
    said = capsys.readouterr().out
    assert "and the first token, dense in layers 1 in training" in said
    for words in (["--save_steps", "2"], ["--resume_from_checkpoint", "latest"]):
        finetune_llama.main([*small_run(*inputs, cut, steps=4), *recipe, *words])
        if "--save_steps" in words:  # as if it had been killed behind step 2
            for path in [*cut.glob("checkpoint-4/*"), cut / "checkpoint-4"]:
                path.rmdir() if path.is_dir() else path.unlink()
    assert losses(cut) == losses(whole)
    manifest = json.loads((whole / "run.json").read_text())
    assert manifest["attention"]["dense_layers"] == [1] and manifest["rope"]["rope_type"] == "default"
    assert "| layers dense in training | 1 |" in (whole / "adapter" / "README.md").read_text()
    model = longlora_ext.load(whole / "adapter")
    assert model.config.s2attn_dense_layers == [1]
    assert model.config.rope_parameters["rope_theta"] == pytest.approx(10000 * 4 ** (8 / 6))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        finetune_llama.main(
            [
                *small_run(*inputs, cut, steps=6),
                *recipe[2:],
                "--dense_layers",
                "0,",
                "--resume_from_checkpoint",
                "latest",
            ]
        )
    assert re.search(r"dense_layers was '1' and is '0,'", capsys.readouterr().err)
    longlora_ext.merge(whole / "adapter", tmp_path / "merged")
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "s2attn_dense_layers" not in merged and merged["max_position_embeddings"] == 128


def test_answers_are_learned_with_them(inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": f"Say {n}.", "output": f"{n}"} for n in range(8)]
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    seen = groups_seen(monkeypatch)
    words = small_run(inputs[0], tmp_path / "samples.json", tmp_path / "out", steps=1)
    finetune_llama.main(
        [*words, "--task", "sft", "--dense_layers", "0,", "--eval_tokens", "0", "--context_length", "256"]
    )
    assert {64, 256} <= set(seen)


def test_more_layers_than_there_are_is_an_error_before_anything_is_read(inputs, tmp_path, capsys) -> None:
    for asked, message in (("3", "a number of layers from 1 to 2"), ("7,", "has 7, but the model's layers are 0 to 1")):
        with pytest.raises(SystemExit):
            finetune_llama.main([*small_run(*inputs, tmp_path / "out"), "--dense_layers", asked])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
