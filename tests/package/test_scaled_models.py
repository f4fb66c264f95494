"""Models whose RoPE is scaled already: how far they read, and that extending them never takes anything back."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    HunYuanDenseV1Config,
    MixtralConfig,
    NemotronConfig,
    Olmo3Config,
    PreTrainedConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import evaluate
import finetune_llama
import generate
import plan
from app.training.context import new_context
from app.training.options import ModelOptions
from longlora_ext.config import context_length, extend_config, group_size, settle_context
from tiny_models import SIZES, tiny_config, tiny_model, tokens

ORIGINAL = "original_max_position_embeddings"
LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}


def scaled(length: int = 128, **rope: object) -> PreTrainedConfig:
    """A Llama's config with that `max_position_embeddings`, RoPE being as said."""
    parameters = {"rope_theta": 10000.0, **rope}
    config = tiny_config("llama", max_position_embeddings=length, rope_parameters=parameters)
    del config.s2attn_group_size
    return config


def vicuna(folder: Path, spelling: str = "type") -> PreTrainedConfig:
    """As the models before transformers 5 say it."""
    written = {"model_type": "llama", "max_position_embeddings": 128, "rope_theta": 10000.0, "head_dim": 16}
    written["rope_scaling"] = {spelling: "linear", "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(written))
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_linear_scaling_that_can_be_read_in_two_ways_is_asked_about(spelling: str, tmp_path: Path) -> None:
    """Vicuna 16k keeps the original length in max_position_embeddings, DeepSeek Coder the scaled one."""
    config = vicuna(tmp_path, spelling)
    both = r"max_position_embeddings, 128, .* reads 512 tokens, .* reads 128: pass present_context_length 512 or 128"
    for asking in (lambda: context_length(config), lambda: extend_config(config, 1024)):
        with pytest.raises(ValueError, match=both):
            asking()
    with pytest.raises(ValueError, match=r"present_context_length must be 512 or 128, .* but it is 256"):
        settle_context(config, 256)
    assert (context_length(settle_context(config, 512)), context_length(settle_context(config, 128))) == (512, 128)
    with pytest.raises(ValueError, match="reads 512 tokens, or after"):  # it was not changed
        context_length(config)


@pytest.mark.parametrize("present, context, factor", [(512, 1024, 8.0), (512, 513, 8.0), (128, 512, 16.0)])
def test_linear_scaling_goes_on_from_the_reading_that_was_chosen(
    present: int, context: int, factor: float, tmp_path: Path
) -> None:
    extended = extend_config(vicuna(tmp_path), context, present_context_length=present)
    assert extended.rope_parameters == {"rope_type": "linear", "rope_theta": 10000.0, "factor": factor}
    assert context_length(extended) == extended.max_position_embeddings == context
    assert extended.original_max_position_embeddings == present / 4
    with pytest.raises(ValueError, match=f"above the model's present context of {present} tokens, but it is {present}"):
        extend_config(vicuna(tmp_path), present, present_context_length=present)


def test_the_trainer_asks_and_goes_on(tmp_path: Path) -> None:
    config = vicuna(tmp_path)
    with pytest.raises(ValueError, match="512 or 128"):
        new_context(config, ModelOptions(context_length=512))
    longer = new_context(settle_context(config, 512), ModelOptions(context_length=1024))
    assert longer.rope_parameters["factor"] == 8.0
    own = new_context(settle_context(config, 512), ModelOptions(context_length=512))
    assert own.rope_parameters["factor"] == 4.0 and context_length(own) == 512 and group_size(own) == 128
    with pytest.raises(ValueError, match="--context_length 256 is less than the model's own 512"):
        new_context(settle_context(config, 512), ModelOptions(context_length=256))


PROGRAMS = pytest.mark.parametrize(
    "program",
    [
        lambda *words: plan.main(["--model", *words]),
        lambda *words: evaluate.main(["passkey", "--model", *words]),
        lambda *words: generate.main(["--file", __file__, "--model", *words]),
        lambda *words: finetune_llama.main(["--model_name_or_path", *words]),
    ],
    ids=["plan", "evaluate", "generate", "finetune_llama"],
)


@PROGRAMS
def test_every_program_asks(program, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vicuna(tmp_path)
    both = "reads 512 tokens, or after it, so that it reads 128: pass present_context_length 512 or 128"
    with pytest.raises(SystemExit, match="2"):
        program(str(tmp_path))
    assert both in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        program(str(tmp_path), "--present_context_length", "64")
    assert "present_context_length must be 512 or 128" in capsys.readouterr().err


@pytest.mark.full
def test_the_programs_go_on_from_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vicuna(tmp_path)
    plan.main(["--model", str(tmp_path), "--context", "1024", "--present_context_length", "512", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["model_context"], found["context"]) == (512, 1024)
    words = ["--file", __file__, "--model", str(tmp_path), "--present_context_length", "512"]
    for context, message in (("512", "above the model's present context of 512"), ("1024", "has no weights|no file")):
        with pytest.raises(SystemExit, match="2"):
            generate.main([*words, "--context_length", context])
        assert re.search(message, capsys.readouterr().err)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}


@pytest.mark.parametrize(
    "length, rope, reads",
    [
        (128, {"rope_type": "dynamic", "factor": 4.0}, 512),  # InternLM 2
        (128, YARN, 512),  # Qwen 2.5, as its page says to write it
        (160, YARN, 512),  # Qwen 3, whose max_position_embeddings is the original length and the longest answer
        (512, YARN, 512),  # DeepSeek V2, and what an extension writes
        (500, YARN, 500),  # an extension to that many
        (1024, YARN, 512),
        (128, {"rope_type": "yarn", "factor": 4.0}, 512),  # without it the original is max_position_embeddings
        (2048, {**LLAMA3, "original_max_position_embeddings": 128}, 2048),  # Llama 3.1, where it is no ratio
        (128, {**LLAMA3, "original_max_position_embeddings": 128}, 1024),
        (512, {"rope_type": "longrope", **LONGROPE, "original_max_position_embeddings": 128}, 512),  # Phi 3
        (128, {"rope_type": "longrope", **LONGROPE, "original_max_position_embeddings": 128, "factor": 4.0}, 512),
        (128, {"rope_type": "linear", "factor": 1.0}, 128),
        (128, {"rope_type": "default"}, 128),
    ],
)
def test_how_far_a_scaled_model_reads(length: int, rope: dict, reads: int) -> None:
    config = scaled(length, **rope)
    assert context_length(config) == context_length(settle_context(config, reads)) == reads
    with pytest.raises(ValueError, match=f"present_context_length must be {reads}, .* but it is 64"):
        settle_context(config, 64)


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_an_original_length_is_a_whole_number(rope_type: str) -> None:
    """JSON may write it as 64.0. What is no number of tokens was passed over, so that the context came out wrong."""
    rope = {"rope_type": rope_type, "factor": 4.0, ORIGINAL: 64.0}
    whole = scaled(256, **rope)
    field = scaled(256, **{**rope, ORIGINAL: 64})
    field.original_max_position_embeddings = 64.0
    assert context_length(whole) == context_length(field) == 256
    short = scaled(64, rope_type="default")
    given = extend_config(short, 256, rope_type="yarn", rope_parameters={ORIGINAL: 32.0}).rope_parameters
    assert (given["factor"], given[ORIGINAL], type(given[ORIGINAL])) == (8.0, 32, int)
    for wrong in (True, "64", 64.5, 0, -64, math.inf):
        said = re.escape(f"{ORIGINAL} in rope_parameters must be a positive integer, but it is {wrong!r}")
        whole.rope_parameters[ORIGINAL] = wrong
        with pytest.raises(ValueError, match=said):
            context_length(whole)
        with pytest.raises(ValueError, match=said):
            extend_config(short, 256, rope_type="yarn", rope_parameters={ORIGINAL: wrong})
        field.original_max_position_embeddings = wrong
        with pytest.raises(
            ValueError, match=re.escape(f"config.{ORIGINAL} must be a positive integer, but it is {wrong!r}")
        ):
            context_length(field)


def test_layer_types_that_are_scaled_alike_are_read_as_one() -> None:
    """As OLMo 3's; where they differ, as Gemma 3's do, `max_position_embeddings` is the context."""
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    sizes = {**SIZES, "layer_types": ["full_attention"] * 2, "sliding_window": None, "max_position_embeddings": 128}
    config = Olmo3Config(**sizes)
    config.rope_parameters = {"full_attention": linear, "sliding_attention": dict(linear)}
    with pytest.raises(
        ValueError, match="reads 512 tokens, or after it, so that it reads 128: pass present_context_len"
    ):
        context_length(config)
    extended = extend_config(config, 1024, present_context_length=512)
    assert {rope["factor"] for rope in extended.rope_parameters.values()} == {8.0}
    assert extended.original_max_position_embeddings == 128 and context_length(extended) == 1024
    plain = copy.deepcopy(extended)
    del plain.s2attn_context_length
    assert context_length(plain) == 1024
    config.rope_parameters = {
        "full_attention": linear,
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert context_length(config) == 128


def test_a_theta_is_no_scaling() -> None:
    assert context_length(scaled(16384, rope_type="default", rope_theta=1e6)) == 16384  # Code Llama


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3", "longrope"])
def test_an_extension_can_be_extended(rope_type: str) -> None:
    """Without a question: what was written says how far it reads, without our fields too, but for longrope's lists."""
    given = LONGROPE if rope_type == "longrope" else None
    factors = []
    config = scaled(rope_type="default")
    for context in (300, 512, 1100):
        config = extend_config(config, context, rope_type=rope_type, rope_parameters=given)
        factors.append(config.rope_parameters["factor"])
        plain = PreTrainedConfig.from_dict(config.to_dict())
        del plain.s2attn_context_length
        assert context_length(config) == context
        assert context_length(plain) == context if rope_type != "dynamic" else context <= context_length(plain)
    assert factors == sorted(factors) and factors[-1] > factors[0]


@pytest.mark.parametrize("rope", [YARN, {"rope_type": "dynamic", "factor": 4.0}], ids=["yarn", "dynamic"])
def test_a_factor_never_becomes_smaller(rope: dict) -> None:
    config = scaled(**rope)  # 4 times 128 tokens: today's 256 would halve the factor
    kind = rope["rope_type"]
    with pytest.raises(ValueError, match="above the model's present context of 512 tokens, but it is 256"):
        extend_config(config, 256, rope_type=kind)
    assert extend_config(config, 513, rope_type=kind).rope_parameters["factor"] == 5.0
    with pytest.raises(ValueError, match="scaled by a factor of 4 already, which cannot become 2: a factor never"):
        extend_config(config, 1024, rope_type=kind, rope_parameters={"factor": 2.0})


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, YARN], ids=["not scaled", "scaled"])
@pytest.mark.parametrize("context, factor", [(640, 5.0), (700, 6.0)])
def test_a_factor_is_counted_from_the_original_length_that_is_given(rope: dict, context: int, factor: float) -> None:
    """Qwen 3 has a max_position_embeddings of 40960, and was trained at 32768."""
    given = {"original_max_position_embeddings": 128}
    config = scaled(160, **rope)
    assert extend_config(config, context, rope_type="yarn", rope_parameters=given).rope_parameters["factor"] == factor
    if rope["rope_type"] == "default":
        extended = extend_config(config, context, rope_type="llama3", rope_parameters=given)
        assert extended.rope_parameters["factor"] == factor
    with pytest.raises(ValueError, match="must be a positive integer, but it is '128'"):
        extend_config(config, 640, rope_type="yarn", rope_parameters={"original_max_position_embeddings": "128"})


def test_the_old_name_of_a_type_does_not_stay_beside_another() -> None:
    config = scaled(rope_type="default", type="default")
    assert "type" not in extend_config(config, 512, rope_type="yarn").rope_parameters


#: Families whose head_dim may be left open, and the dimensions of a head that are rotated.
OPEN = {
    "mixtral": (MixtralConfig, {"num_local_experts": 2, "sliding_window": None}, 8),
    "hunyuan": (HunYuanDenseV1Config, {}, 8),
    "nemotron": (NemotronConfig, {}, 4),
}


@pytest.mark.parametrize("family", OPEN)
@pytest.mark.parametrize("rope_type", [name for name in ROPE_INIT_FUNCTIONS if name != "proportional"])
def test_a_head_dim_that_a_config_leaves_open_is_filled_in(family: str, rope_type: str) -> None:
    kind, own, rotated = OPEN[family]
    config = kind(**{**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, **own})
    config.head_dim = None
    given = {name: values[: rotated // 2] for name, values in LONGROPE.items()} if rope_type == "longrope" else None
    extended = extend_config(config, 256, rope_type=rope_type, rope_parameters=given)
    assert config.head_dim is None and extended.head_dim == 8
    model = tiny_model(config=extended, dtype=torch.float32, attn_implementation="sdpa")
    assert model.model.rotary_emb.inv_freq.shape == (rotated // 2,)
    with torch.no_grad():
        assert model(tokens(1, 200)).logits.isfinite().all()


def test_scaling_by_alpha_is_not_extended() -> None:
    """Hunyuan's: with it a factor does nothing."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}
    config = HunYuanDenseV1Config(**SIZES, rope_parameters=rope)
    with pytest.raises(
        ValueError, match="scaled by alpha 1000, for all lengths: transformers does not look at a factor"
    ):
        extend_config(config, 256, rope_type="dynamic")
