"""The command plan.py: its table, its hours, and what it refuses."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    GPT2Config,
    Llama4TextConfig,
    MambaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
)

import finetune_llama
import plan as command
from app.planning import calibration
from app.planning.dry_run import Counts, cpu_scratch
from app.planning.planner import Plan, PlannedRun, Way
from longlora_ext.reference import s2attn_mask
from measured_peak import small


@pytest.mark.parametrize(
    "asked",
    [{"sink": True}, {"window": 40}, {"sink": True, "window": 40}, {"sink": True, "window": 40, "group_size": 512}],
)
def test_the_sink_and_the_window_are_counted(asked: dict, tmp_path: Path, capsys, monkeypatch) -> None:
    """By the command, as the pairs of the definition; dense attention has neither."""
    monkeypatch.setattr(Plan, "longest", lambda *_: 0)  # which takes seconds
    small().save_pretrained(tmp_path)
    options = [f"--{name}" if value is True else f"--{name}={value}" for name, value in asked.items()]
    command.main(["--model", str(tmp_path), "--context", "256", *options, "--json"])
    found = json.loads(capsys.readouterr().out)
    pattern = {"group_size": 64, **asked}
    pairs = sum(4 * int(s2attn_mask(256, shifted=shifted, **pattern).sum()) for shifted in (False, True))
    dense = 8 * 256 * 257 // 2
    flops = found["flops_of_a_sequence"]
    assert flops["s2"]["attention"] * dense == flops["dense"]["attention"] * pairs
    assert {name: found["run"][name] for name in asked} == asked


def test_a_model_whose_rope_needs_factors_is_planned_at_its_own_context(tmp_path: Path, capsys) -> None:
    """The search for the longest context that fits asked for a longer one, and the plan ended in an error."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 1024, **factors}
    config = small(2)
    config.max_position_embeddings, config.rope_parameters = 4096, rope
    config.save_pretrained(tmp_path)
    command.main(["--model", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["context"] == found["longest_context"]["default"] == 4096
    with pytest.raises(SystemExit, match="2"):
        command.main(["--model", str(tmp_path), "--context", "8192"])
    assert "needs factors for a longer context: plan it at --context 4096, its own" in capsys.readouterr().err


def test_a_model_whose_rope_is_not_linear_is_planned(tmp_path: Path, capsys, monkeypatch) -> None:
    """Phi-3's config takes longrope alone, beside a larger theta."""
    monkeypatch.setattr(Plan, "longest", lambda *_: 0)
    sizes = {name: getattr(small(2), name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    Phi3Config(**sizes, num_attention_heads=4, max_position_embeddings=256).save_pretrained(tmp_path)
    command.main(["--model", str(tmp_path), "--context", "1024", "--json"])
    assert json.loads(capsys.readouterr().out)["context"] == 1024


def test_what_a_token_sees_is_named(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Plan, "longest", lambda *_: 0)
    small().save_pretrained(tmp_path)
    command.main(["--model", str(tmp_path), "--context", "1024", "--sink", "--window", "40"])
    named = "groups of 256 tokens, in them a window of 40, and the first token"
    assert f"attention: {named} in training\n" in capsys.readouterr().out


def test_the_table_and_its_numbers(tmp_path: Path, capsys) -> None:
    small().save_pretrained(tmp_path)  # a config.json and no weights
    options = ["--gpus", "8", "--zero", "3", "--gpu_memory", "2.1"]
    command.main(["--model", str(tmp_path / "config.json"), "--context", "1024", *options])
    printed = capsys.readouterr().out
    assert "256 -> 1,024 tokens, 8 GPUs, ZeRO-3, batch 1 a GPU, bf16, LoRA r=8, embedding and norms" in printed
    command.main(["--model", str(tmp_path), *options, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["context"] == 1024 and found["run"]["gpus"] == 8
    for way, parts in found["memory"].items():
        assert found["total"][way] == sum(parts.values())
        assert f"{parts['activations kept'] / 1e9:,.2f}" in printed
    flops = found["flops_of_a_sequence"]
    assert 4 < flops["dense"]["attention"] / flops["s2"]["attention"] < 4.5


def test_a_context_that_a_run_refuses_is_refused(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Plan, "longest", lambda *_: 0)  # which takes seconds
    small().save_pretrained(tmp_path)
    given = ["--model", str(tmp_path), "--context"]
    command.main([*given, "256"])
    assert f"{tmp_path}: 256 tokens, the model's own, 1 GPU" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command.main([*given, "128"])
    assert "--context 128 is less than the model's own 256: give more to extend it" in capsys.readouterr().err


@pytest.mark.parametrize(("context", "chunk", "fits"), [("64", 64, True), ("256", 128, False), (None, 128, True)])
def test_chunks_are_compared_with_the_planned_context(
    context: str | None, chunk: int, fits: bool, tmp_path: Path, capsys, monkeypatch
) -> None:
    """As by finetune_llama.py: a chunk that holds the whole context is full attention. Four times its own is 128."""

    def planned(*_: object) -> None:
        raise ValueError("this is planned")

    monkeypatch.setattr(command, "Plan", planned)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Llama4TextConfig(
        **sizes,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=257,
        max_position_embeddings=32,
        attention_chunk_size=chunk,
    )
    config.save_pretrained(tmp_path)
    words = [] if context is None else [context]
    for main, model, option, next_step in (
        (command.main, "--model", "--context", "this is planned"),
        (finetune_llama.main, "--model_name_or_path", "--context_length", "the tokenizer of"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([model, str(tmp_path), *([option] if words else []), *words])
        assert (next_step if fits else "tokens, which S2-Attn cannot express") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(), "GPT2Config has no "),
        (MambaConfig(), "attn_implementation='s2attn' does not reach the attention of MambaForCausalLM"),
        (BertConfig(), "BertConfig has no "),
    ],
    ids=["gpt2", "mamba", "bert"],
)
def test_models_of_other_kinds_are_refused(config: PreTrainedConfig, reason: str, tmp_path, capsys) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command.main(["--model", str(tmp_path)])
    said = capsys.readouterr().err
    assert f"plan.py: error: --model {tmp_path}: {reason}" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "nowhere/none"], "plan.py: error: --model nowhere/none: "),
        (["--model", "llama-2-7b", "--gpus", "0"], "--gpus must be above 0 and below a billion, got 0"),
        (["--model", "llama-2-7b", "--offload", "--zero", "2"], "--offload goes with --zero 3"),
        (["--model", "Llama-2-7B", "--full_finetune", "--lora_r", "8"], "--lora_r has no effect with --full_finetune"),
        (["--model", "llama-2-7b", "--zero", "4"], "invalid choice"),
        (["--model", "llama-2-7b", "--zero", "3", "--load_in_4bit"], "--load_in_4bit is for frozen weights"),
        (["--model", "llama-2-7b", "--full_finetune", "--load_in_4bit"], "--load_in_4bit is for frozen weights"),
        (["--model", "llama-2-7b", "--gpus", "3", "--sequence_parallel_size", "2"], "does not divide --gpus 3"),
        (
            ["--model", "llama-2-7b", "--gpus=3", "--sequence_parallel_size=3", "--sequence_parallel=ulysses"],
            "--sequence_parallel ulysses: sequence_parallel_size 3 with by='ulysses': 3 ranks do not divide 32",
        ),
        (["--model", "llama-2-7b", "--sequence_parallel", "halo"], "are about --sequence_parallel_size above 1"),
        (["--model", "llama-2-7b", "--window", "0"], "--window must be above 0 and below a billion, got 0"),
        (["--model", "llama-2-7b", "--group_size", "7"], "group_size must be an even integer"),
        (
            ["--model", "llama-2-7b", "--gpu_memory", "inf"],
            "must be a number of GB, or one with a unit such as 24564MiB",
        ),
        (["--model", "llama-2-7b", "--gpu_memory", "1.2.3"], "must be a number of GB, or one with a unit"),
        (["--model", "llama-2-7b", "--gpu_memory", "0"], "must be a number of GB, or one with a unit"),
        (["--model", "llama-2-7b", "--gpu_memory", "24564"], "nvidia-smi's MiB are 24564MiB here"),
        (["--model", "llama-2-7b", "--batch", "1000000"], "--batch must be from 1 to 4,096, got 1000000"),
    ],
)
def test_mistakes_end_in_one_line(options: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("said", "bytes_"), [("80", 80e9), ("24564MiB", 24564 * 2**20), ("1.5 gib", 1.5 * 2**30)])
def test_the_memory_of_a_gpu_has_a_unit(said: str, bytes_: float) -> None:
    assert command.parse(["--model", "llama-2-7b", "--gpu_memory", said]).gpu_memory * 1e9 == pytest.approx(bytes_)


def test_a_config_that_is_none_is_said_to_be_none(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(SystemExit, match="2"):
        command.main(["--model", str(tmp_path)])
    assert "its config.json is no JSON object" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--context=8192", "--calibrate", "--json"])
def test_what_a_table_of_contexts_takes_no_notice_of_is_refused(option: str, capsys) -> None:
    shared = ["--model", "llama-2-7b", "--gpus", "2", "--sequence_parallel_size", "2", "--contexts", "8192"]
    with pytest.raises(SystemExit, match="2"):
        command.main([*shared, option])
    name = option.partition("=")[0]
    assert f"{name} has no effect with --contexts, which prints a table of its own" in capsys.readouterr().err


def test_contexts_are_given_in_one_list(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--model", "llama-2-7b", "--contexts", "8192", "--contexts", "16384"])
    assert "--contexts is given more than once: all its values go after one" in capsys.readouterr().err


def test_hours_follow_from_one_measured_rate() -> None:
    run = PlannedRun(zero=0, gpus=2)
    plan = Plan(small(2), 512, run)
    rate = calibration.measure_rate(plan, enough=0.0)  # the first step is long enough
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    assert (rate.tokens, rate.layers, rate.dtype) == (128, 2, dtype)
    flops = {"s2": plan.flops(), "dense": plan.flops(dense=True)}
    found = {"rate": asdict(rate), "run": asdict(run), "context": 512, "flops_of_a_sequence": flops}
    lines = {line[:32].strip(): line[32:].split() for line in calibration.rate_lines(found)}
    for column, name in enumerate(flops):
        speed, of_a_sequence = 2 * rate.flops_a_second, flops[name]["all"]
        assert lines["tokens a second"][column] == f"{speed / of_a_sequence * 512:,.4g}"
        assert lines["hours of 1,000 steps"][column] == f"{1000 * 64 * of_a_sequence / speed / 3600:,.4g}"


def test_a_mixture_of_experts_has_a_rate() -> None:
    """Its experts are counted by an operation that knows bfloat16 alone, and run here in float32."""
    sizes = {name: getattr(small(2), name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = MixtralConfig(**sizes, num_attention_heads=8, num_local_experts=2, max_position_embeddings=256)
    assert calibration.measure_rate(Plan(config, 256, PlannedRun(zero=0)), enough=0.0).flops_a_second > 0


def test_the_rate_is_of_the_operations_that_run() -> None:
    """Two layers of the model, embedding and loss, as they run on real tensors."""
    plan = Plan(small(), 512, PlannedRun(zero=0))
    rate = calibration.measure_rate(plan, enough=0.0)
    model = Plan(small(2), 512, PlannedRun(zero=0, dtype=torch.float32, scratch=cpu_scratch)).model(Way(), device="cpu")
    ids = torch.zeros(1, rate.tokens, dtype=torch.long)
    with Counts(model, cpu_scratch) as counts:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert rate.flops_a_second * rate.seconds == pytest.approx(counts.flops.total(), rel=1e-6)
