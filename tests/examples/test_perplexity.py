"""Perplexity by a sliding window (examples/app/evaluation/perplexity.py), and the table made of it
(examples/app/training/measure.py)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import dispatch_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

import longlora_ext.attention  # noqa: F401
from app.evaluation import perplexity
from app.evaluation.perplexity import Window, _batches, sliding_window_perplexity, windows
from app.runs.json_files import write_json
from app.training import measure
from app.training.measure import lengths_to_measure
from longlora_ext.config import extend_config
from loss_models import LiveBytes, cohere, prepared
from plain_perplexity import brute_force
from tiny_models import tiny_config, tiny_model
from tiny_texts import tokenised

CONFIG = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=16, initializer_range=0.3,
)  # fmt: skip


def make_model(config: LlamaConfig = CONFIG) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, attn_implementation="s2attn")


def make_documents(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, CONFIG.vocab_size, n) for n in lengths]


@pytest.mark.parametrize(("window", "stride"), [(8, 3), (8, 4), (8, 7), (64, 16), (2, 1)])
def test_perplexity_is_that_of_each_token_by_itself(window: int, stride: int) -> None:
    model = make_model().double().eval()
    documents = make_documents(33, 8, 9, 1, 2, 16)
    expected = brute_force(model, documents, window, stride)
    assert sliding_window_perplexity(model, documents, window, stride) == pytest.approx(expected, rel=1e-6)
    assert sliding_window_perplexity(model, documents, window, stride, batch_tokens=1) == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("case", ["full", "adapter tied", "adapter lora head", "adapter saved head"])
def test_losses_in_pieces_are_those_at_once(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    model, documents = prepared(case), make_documents(33, 16)
    with monkeypatch.context() as whole:
        whole.setattr(perplexity, "_output_layer", lambda model, device: None)
        at_once = sliding_window_perplexity(model, documents, 16, 5)
    assert sliding_window_perplexity(model, documents, 16, 5) == pytest.approx(at_once, rel=1e-6)
    monkeypatch.setattr(perplexity, "LOSS_TOKENS", 4)
    assert sliding_window_perplexity(model, documents, 16, 5) == pytest.approx(at_once, rel=1e-6)


def test_the_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most memory that tensors take at any time, in the first window, which scores all of its tokens."""
    logits, peaks = 1023 * 2048 * 4, []  # bytes
    model = tiny_model(config=tiny_config(vocab_size=2048, num_hidden_layers=1), dtype=torch.float32)
    for tokens in (1024, 16):
        monkeypatch.setattr(perplexity, "LOSS_TOKENS", tokens)
        with LiveBytes() as live:
            sliding_window_perplexity(model, [np.arange(1024)], 1024, 512)
        peaks.append(live.peak)
    print(f"bytes of logits {logits:,}, peak {peaks[0]:,}, in pieces {peaks[1]:,}")
    assert peaks[0] > logits
    assert peaks[1] < 0.5 * logits


def test_a_model_that_changes_its_logits_gives_them_whole() -> None:
    """It is found out by what it does, known or not."""
    model, documents = cohere().eval(), make_documents(33)
    layer, as_usual = perplexity._output_layer, sliding_window_perplexity(model, documents, 16, 5)
    assert layer(model, "cpu") is None and layer(make_model(), "cpu") is not None
    assert as_usual == pytest.approx(brute_force(model, documents, 16, 5), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_model_spread_over_gpus_has_its_logits_on_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Than its tokens. Fake tensors have no numbers, and tell devices apart that no machine has."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no such device
    first, last = "lazy:0", "lazy:1"
    places = {"model.embed_tokens": first, "model.rotary_emb": first, "model.layers.0": first}
    with FakeTensorMode(), torch.device(first):
        model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="sdpa").eval()
        for name in ("model.layers.1", "model.norm", "lm_head"):
            places[name] = last
            for module in model.get_submodule(name).modules():
                for weight, value in list(module.named_parameters(recurse=False)):
                    setattr(module, weight, torch.nn.Parameter(value.to(last)))
        dispatch_model(model, places, force_hooks=True)
        monkeypatch.setattr(torch, "equal", lambda one, other: one.device == other.device)
        head, documents = perplexity._output_layer(model, model.device), make_documents(20)
        assert head is model.lm_head
        loss = perplexity._score(model, head, [Window(0, 0, 16, 15)], 2, documents, model.device, documents)
    assert (str(model.device), str(loss.device)) == (first, last)


def test_a_perplexity_beyond_all_numbers_is_infinite(tmp_path: Path) -> None:
    assert perplexity.perplexity_of(710.0 * 3, 3) == math.inf
    model = make_model()
    torch.nn.init.normal_(model.lm_head.weight, std=1e6)
    assert sliding_window_perplexity(model, make_documents(30), 16, 8) == math.inf
    write_json(tmp_path / "some.json", {"rows": [math.inf, (1.5, -math.inf)], "nan": math.nan})
    read = json.loads((tmp_path / "some.json").read_text(), parse_constant=pytest.fail)
    assert read == {"rows": ["inf", [1.5, "-inf"]], "nan": "nan"}


@settings(max_examples=200)
@given(data=st.data(), lengths=st.lists(st.integers(0, 100), max_size=5), window=st.integers(2, 40))
def test_windows_score_each_token_once_with_enough_context(
    data: st.DataObject, lengths: list[int], window: int
) -> None:
    stride = data.draw(st.integers(1, window - 1))
    scored: dict[tuple[int, int], int] = {}
    for w in windows(lengths, window, stride):
        assert 0 <= w.begin < w.end <= lengths[w.document] and w.end - w.begin <= window
        for token in range(w.end - w.scored, w.end):
            assert (w.document, token) not in scored
            scored[w.document, token] = token - w.begin
    assert set(scored) == {(d, t) for d, n in enumerate(lengths) for t in range(1, n)}
    for (_, token), context in scored.items():
        assert min(token, window - stride) <= context < window


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [(1, 1, "window must be 2 or more, got 1"), (8, 0, r"stride must be in 1..7 .*got 0"), (8, 8, "got 8")],
)
def test_bad_windows_are_refused(window: int, stride: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(windows([10], window, stride))


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ValueError, match="no document has the 2 tokens"):
        sliding_window_perplexity(make_model(), make_documents(1, 0), 8, 4)


def test_evaluation_is_dense_and_leaves_the_mode_as_it_was() -> None:
    config = extend_config(CONFIG, 64, group_size=8)
    documents = make_documents(64)
    trained, dense = make_model(config).train(), make_model(config)
    dense.config.s2attn_mode, trained.config.s2attn_mode = "dense", "auto"
    result = sliding_window_perplexity(trained, documents, 64, 32)
    assert trained.training
    assert result == sliding_window_perplexity(dense, documents, 64, 32)
    dense.config.s2attn_mode = "s2"
    assert result != pytest.approx(sliding_window_perplexity(dense, documents, 64, 32), rel=1e-4)


def _share(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    perplexity.LOSS_TOKENS = 5
    model, calls = make_model(), []
    model.lm_head.register_forward_hook(lambda *args: calls.append(1))
    result = sliding_window_perplexity(model, make_documents(37, 8, 9), 8, 4, batch_tokens=16)
    (folder / str(rank)).write_text(json.dumps([result, len(calls)]))
    dist.destroy_process_group()


@pytest.mark.full
def test_processes_share_the_work_and_agree(tmp_path: Path) -> None:
    """An odd number of batches for two processes: one of them has to go along with the last without counting it."""
    assert len(_batches(list(windows([37, 8, 9], 8, 4)), 2)) % 2 == 1
    torch.multiprocessing.spawn(_share, (tmp_path,), nprocs=2)
    expected = sliding_window_perplexity(make_model(), make_documents(37, 8, 9), 8, 4, batch_tokens=16)
    results = [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    assert results[0][0] == results[1][0] == pytest.approx(expected, rel=1e-6)
    assert results[0][1] == results[1][1]  # ZeRO-3 gathers the layer's weight for each call, from all


# --- the table --------------------------------------------------------------------------------------------------


def test_dynamic_rope_reads_each_window_as_if_it_were_its_first() -> None:
    model = make_model(extend_config(CONFIG, 64, rope_type="dynamic"))
    documents, counts = make_documents(50, 30, 40), (49, 29, 39)
    each = [math.log(sliding_window_perplexity(model, [document], 64, 32)) for document in documents]
    mean = sum(loss * count for loss, count in zip(each, counts, strict=True)) / sum(counts)
    assert math.log(sliding_window_perplexity(model, documents, 64, 32)) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize(
    ("base", "context", "expected"),
    [
        (256, 1024, [256, 512, 1024]),
        (256, 1000, [256, 512, 1000]),
        (256, 257, [256, 257]),
        (8192, 1024, [1024]),
        (512, 512, [512]),
    ],
)
def test_lengths_to_measure(base: int, context: int, expected: list[int]) -> None:
    assert lengths_to_measure(base, context) == expected


def test_long_documents_are_measured_first_and_the_budget_kept() -> None:
    held_out = tokenised([[1] * 10, [2] * 500, [3], [4] * 90, [5] * 300, [], [6] * 200])
    chosen = held_out.to_measure(400, longest=100)[0]
    assert [(int(ids[0]), len(ids)) for ids in chosen] == [(2, 100), (5, 100), (6, 100), (4, 90), (1, 10)]
    assert [len(ids) for ids in held_out.to_measure(150, longest=100)[0]] == [100, 50]
    assert [len(ids) for ids in held_out.to_measure(2400, longest=100)[0]] == [342, 300, 200, 90, 10]
    assert held_out.to_measure(0, longest=100)[0] == []
    (whole,) = tokenised([[1] * 900]).to_measure(800, longest=50)[0]  # of one there are no eight parts
    assert len(whole) == 800


def test_the_new_context_is_measured_or_it_is_said_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default, however long it is; where fewer tokens are asked for, not for want of a document."""
    long = tokenised([[1] * 100_000])
    data: Any = SimpleNamespace(held_out=long)
    run: Any = SimpleNamespace(folder=tmp_path, marker={})
    made = measure.make_measurement(data, None, CONFIG, extend_config(CONFIG, 90_000), run)
    assert made is not None and made.record["tokens"] == 90_000 and not capsys.readouterr().out
    assert measure.make_measurement(data, 65536, CONFIG, extend_config(CONFIG, 90_000), run) is not None
    assert "context of 90,000 tokens is not put to the test: --eval_tokens is less" in capsys.readouterr().out
    tokenised([[1] * 300]).to_measure(1000, longest=500)
    assert "context of 500 tokens is not put to the test: no held-out document is so long" in capsys.readouterr().out


def test_table_shows_the_rows_there_are(tmp_path: Path) -> None:
    measurement = measure.Measurement(tmp_path, CONFIG, extend_config(CONFIG, 64), make_documents(30, 20))
    measurement.rows["after"] = {"16": 12.3456, "32": 1.0, "64": 123456.0}
    table = measurement.table()
    assert "50 held-out tokens in 2 documents (dense attention, sliding window, stride half the context)" in table
    assert table.splitlines()[-1].split() == ["after", "12.35", "1.00", "123456.00"]
    assert "before" not in table


def test_rows_come_along_only_if_they_were_measured_likewise(tmp_path: Path) -> None:
    def measurement(before: dict | None, *lengths: int, context: int = 64) -> measure.Measurement:
        return measure.Measurement(tmp_path, CONFIG, extend_config(CONFIG, context), make_documents(*lengths), before)

    rows = {"before": {"16": 1.0, "32": 2.0, "64": math.inf}}
    write_json(tmp_path / "some.json", {**measurement(None, 30, 20).record, "perplexity": rows})
    record = json.loads((tmp_path / "some.json").read_text())
    assert measurement(record, 30, 20).rows == rows
    for changed in (measurement(record, 30, 21), measurement(record, 20, 30), measurement(record, 30, 20, context=128)):
        assert changed.rows == {} and "before" not in changed.table()


def test_rows_do_not_come_along_where_other_answers_are_scored(tmp_path: Path) -> None:
    """Of the same text: marks of what is learned were changed."""
    documents = make_documents(10)

    def measurement(answer: int, before: dict | None = None) -> measure.Measurement:
        labels = [np.where(np.arange(10) < answer, -100, documents[0])]
        return measure.Measurement(tmp_path, CONFIG, extend_config(CONFIG, 64), documents, before, labels)

    record = {**measurement(5).record, "perplexity": {"before": {"64": 3.0}}}
    assert measurement(5, record).rows == record["perplexity"]
    assert measurement(9, record).rows == {}
