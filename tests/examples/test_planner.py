"""The planner against what is: parameters of models, memory that an allocator saw, operations that the paper counts."""

import json
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

import measured_peak
import plan as command
from app.planning import shared_sequences
from app.planning.dry_run import Counts, cpu_scratch, cuda_scratch
from app.planning.planner import GRAIN, Plan, PlannedRun, Way
from finetune_runs import environment, torchrun
from longlora_ext._flops import attended_pairs
from longlora_ext.adapter import lora_config, prepare_model
from longlora_ext.loss import tile_loss
from longlora_ext.ops import s2attn
from longlora_ext.reference import s2attn_mask
from measured_peak import TILE, TOKENS, peak_of_a_step, small, with_numbers
from patience import patience
from tiny_models import CONFIGS, tiny_config

LLAMA_2_7B = command.read_config("llama-2-7b")


# Parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_parameters_are_those_of_the_model_that_trains(family: str, full: bool) -> None:
    config = tiny_config(family, num_hidden_layers=4)
    model = AutoModelForCausalLM.from_config(config)
    model = prepare_model(model, None if full else lora_config(model, r=4))
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    found = Plan(config, 128, PlannedRun(full_finetune=full, lora_r=4)).parameters
    assert (found["trainable"], found["frozen"]) == (counts[True], counts[False])
    assert (found["lora"] > 0) == (not full)


def test_parameters_of_llama_2_7b() -> None:
    found = Plan(LLAMA_2_7B, 32768, PlannedRun()).parameters
    embedding, norms = 32000 * 4096, 65 * 4096
    trainable, frozen = 8_388_608 + embedding + norms, 6_738_415_616
    assert found == {"trainable": trainable, "lora": 8_388_608, "frozen": frozen, "in_4_bits": 0}
    packed = Plan(LLAMA_2_7B, 32768, PlannedRun(load_in_4bit=True)).parameters
    assert packed == found | {"in_4_bits": frozen - 2 * embedding - norms}


# Memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way",
    [Way(), Way(tiled_loss=False), Way(checkpointing=False), Way(dense=True)],
    ids=["default", "whole logits", "no checkpoints", "dense"],
)
def test_activations_take_what_the_allocator_saw(way: Way, tmp_path: Path, monkeypatch) -> None:
    """The peak of a step on the CPU, by torch's profiler, within 5%. The plan runs two and three layers of six."""
    monkeypatch.setattr(tile_loss, "__defaults__", (TILE,))
    plan = Plan(small(), TOKENS, PlannedRun(dtype=torch.float32, scratch=cpu_scratch))
    planned = plan.step(way).peak
    measured = peak_of_a_step(with_numbers(plan.model(way)), torch.randint(0, 3000, (1, TOKENS)), tmp_path)
    assert planned == pytest.approx(measured, rel=0.05)
    assert planned > 5e6


@pytest.mark.full
def test_what_a_shared_sequence_takes(tmp_path: Path, monkeypatch) -> None:
    """The peak of each of two processes, within 5%."""
    command = [*torchrun(2), measured_peak.__file__, str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=patience())
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads((tmp_path / "peak.json").read_text())
    monkeypatch.setattr(tile_loss, "__defaults__", (TILE,))
    planned = {}
    for by in ("halo", "ulysses"):
        shared = {"sequence_parallel_size": 2, "sequence_parallel": by}
        plan = Plan(small(), TOKENS, PlannedRun(dtype=torch.float32, scratch=cpu_scratch, **shared))
        ways = {"default": Way(), "no checkpoints": Way(checkpointing=False)}
        planned |= {f"{by}, {name}": plan.step(way).peak for name, way in ways.items()}
    assert planned == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("heads, kv_heads, gpus", [(8, 2, 4), (8, 8, 8), (8, 1, 2)])
def test_of_a_shared_sequence_each_gpu_has_a_part(heads: int, kv_heads: int, gpus: int) -> None:
    config = small()
    config.num_attention_heads, config.num_key_value_heads = heads, kv_heads
    alone, shared = (Plan(config, 4096, PlannedRun(gpus=gpus, sequence_parallel_size=n)) for n in (1, gpus))
    assert alone.step(Way()).kept / shared.step(Way()).kept == pytest.approx(gpus, rel=0.01)
    assert 1 / gpus < shared.step(Way()).peak / alone.step(Way()).peak < 1
    assert shared.flops() == alone.flops() and shared.parameters == alone.parameters


@pytest.mark.parametrize(
    "config, dense_layers, way, by, window",
    [
        (small(), None, Way(), "halo", None),
        (small(), list(range(small().num_hidden_layers)), Way(), "ulysses", None),
        (small(), None, Way(dense=True), "ulysses", None),
        (tiny_config("mistral", sliding_window=64), None, Way(dense=True), "halo", 64),
        (tiny_config("mistral", sliding_window=64), None, Way(), "halo", 64),
        (tiny_config("mistral", sliding_window=4096), None, Way(dense=True), "ulysses", None),
    ],
    ids=["S2-Attn", "dense layers", "dense", "dense windows", "windows in groups", "windows longer than the context"],
)
def test_a_shared_sequence_is_planned_as_it_is_run(
    monkeypatch: pytest.MonkeyPatch,
    config: PreTrainedConfig,
    dense_layers: list[int] | None,
    way: Way,
    by: str,
    window: int | None,
) -> None:
    """By the halo where attention is short, layer by layer, if nobody says otherwise; with the layer's own window."""
    by_heads = Mock(wraps=shared_sequences.attend_by_heads)
    monkeypatch.setattr(shared_sequences, "attend_by_heads", by_heads)
    for asked, expected in (("auto", by), ("halo", "halo"), ("ulysses", "ulysses")):
        by_heads.reset_mock()
        run = PlannedRun(sequence_parallel_size=2, sequence_parallel=asked, dense_layers=dense_layers)
        Plan(config, 2048, run).step(way)
        assert by_heads.called == (expected == "ulysses")
        assert {call.kwargs["window"] for call in by_heads.call_args_list} <= {window}


def test_what_zero_divides() -> None:
    """The formulas of the ZeRO paper, for 16 bits and Adam, but gradients in fp32; trained and frozen weights."""
    config, gpus = small(), 4
    parameters = Plan(config, 1024, PlannedRun()).parameters
    trained, frozen = parameters["trainable"], parameters["frozen"]
    states = ("frozen weights", "trained weights", "gradients", "fp32 masters, Adam's moments")
    expected = {
        0: 2 * frozen + 18 * trained,
        1: 2 * frozen + 6 * trained + 12 * trained // gpus,
        2: 2 * frozen + 2 * trained + 16 * trained // gpus,
        3: (2 * frozen + 18 * trained) // gpus,
    }
    for zero, want in expected.items():
        memory = Plan(config, 1024, PlannedRun(zero=zero, gpus=gpus)).memory(Way())
        assert sum(memory[part] for part in states) == pytest.approx(want, abs=gpus)
    offload = Plan(config, 1024, PlannedRun(zero=3, gpus=gpus, offload=True))
    parts = offload.memory(Way())
    assert [parts[part] for part in states] == [0, 0, 0, 0]  # gradients too go to the optimizer in the host's memory
    assert offload.host_memory() > (2 * frozen + 14 * trained) // gpus


def test_the_longest_context_is_the_longest() -> None:
    run, way = PlannedRun(zero=3, gpus=8), Way()
    config = command.read_config("llama-2-13b")
    longest = Plan(config, 65536, run).longest(way, 80 * 10**9)
    total = [sum(Plan(config, tokens, run).memory(way).values()) for tokens in (longest, longest + GRAIN)]
    assert total[0] <= 80 * 10**9 < total[1]
    assert longest > 65536  # what the paper trained on such a machine (Table 4), with the logits whole
    assert Plan(config, 65536, PlannedRun(zero=2)).longest(way, 10 * 10**9) == 0


def test_the_attention_scratch_is_counted() -> None:
    plan = Plan(LLAMA_2_7B, 8192, PlannedRun())
    q = torch.empty(1, 8192, 32, 128, device="meta")
    without = Plan(LLAMA_2_7B, 8192, PlannedRun(scratch=lambda q: 0))
    model = plan.model(Way(), [0])
    peaks = []
    for scratch in (lambda q: 0, cuda_scratch):
        counts = Counts(model, scratch)
        with counts:
            x = q.clone().requires_grad_()
            s2attn(x, x, x, 2048).sum().backward()
        peaks.append(counts.peak)
    assert peaks[1] - peaks[0] > 0.9 * 4 * q.numel()
    assert plan.step(Way()).peak >= without.step(Way()).peak


# Computation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, group, first", [(37, 8, 2), (64, 16, 0), (7, 16, 4), (50, 100, 4)])
def test_pairs_are_those_of_the_definition(tokens: int, group: int, first: int) -> None:
    for window in (None, 1, 3, 10, 100):
        for sink in (False, True):
            masks = [s2attn_mask(tokens, group, shifted, sink=sink, window=window) for shifted in (False, True)]
            seen = [int(mask.sum()) for mask in masks]
            expected = first * seen[0] + (4 - first) * seen[1]
            assert attended_pairs(tokens, group, 4, first, window, sink) == expected


def test_torch_counts_the_operator() -> None:
    """Two products of matrices in the forward pass and five in the backward pass, on half of a square."""
    q, k, v = (torch.randn(2, 256, 4, 16, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        s2attn(q, k, v, 256, first_shifted_head=4).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * 16 * 2 * 4 * 256 * 257 // 2


@pytest.mark.parametrize("tokens, full, s2", [(32768, 996, 574), (65536, 3118, 1429)])
def test_table_11_of_the_paper(tokens: int, full: float, s2: float) -> None:
    """
    TFLOPs of Llama-2-7B's forward pass, https://arxiv.org/abs/2309.12307.

    The paper counts whole squares of scores: of the sequence, and of its four groups. Ours are the pairs on and below
    the diagonal, half of a square; and the first group of a shifted head has half the length, which makes S2-Attn
    15/64 of dense attention, not 1/4. The rest is equal: projections, MLP, and the output layer.
    """
    counted = {}
    for dense in (False, True):
        plan = Plan(LLAMA_2_7B, tokens, PlannedRun(full_finetune=True))
        step = plan.step(Way(checkpointing=False, tiled_loss=False, dense=dense))
        # Of three products one is of the forward pass; of full fine-tuning, where each weight has its gradient.
        rest = step.flops["aten.mm"] / 3 / 1e12
        counted[dense] = step.flops["longlora.s2attn_fwd"] / 1e12, rest
    (ours_s2, rest), (ours_dense, _) = counted[False], counted[True]
    assert rest + 2 * ours_dense == pytest.approx(full, rel=1e-3)
    assert rest + 2 * ours_dense / 4 == pytest.approx(s2, rel=1e-3)
    assert ours_s2 / ours_dense == pytest.approx(15 / 64, rel=1e-3)


@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_groups_are_a_quarter_of_the_context(tokens: int) -> None:
    """As in a run: of the context, whether it is the model's own or not, and whatever groups the model had before."""
    config = small()
    config.s2attn_group_size = 32
    s2, dense = (Plan(config, tokens, PlannedRun()).flops(dense=dense)["attention"] for dense in (False, True))
    pairs = attended_pairs(tokens, tokens // 4, 8, 4)
    assert s2 / dense == pytest.approx(pairs / (8 * tokens * (tokens + 1) / 2))
