"""What is in an adapter folder beside the weights: the model card, and the files of docs/adapter_format.md."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from peft import IA3Config, LoraConfig
from transformers import AutoTokenizer

from longlora_ext.adapter import load, lora_config, merge, prepare_model, save_adapter
from longlora_ext.adapter._card import write_card
from longlora_ext.config import CONFIG_FIELDS
from tiny_training import CONTEXT, extended_model, save_base

FORMAT = (Path(__file__).resolve().parents[2] / "docs" / "adapter_format.md").read_text()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    model = extended_model(save_base(folder / "base"))
    model = prepare_model(model, lora_config(model))
    save_adapter(model, folder / "adapter", AutoTokenizer.from_pretrained(folder / "base"))
    return folder / "adapter"


def table(title: str) -> dict[str, str]:
    """The first two columns of the table below a title."""
    section = re.split(r"\n#+ ", FORMAT.split(f"{title}\n")[1])[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {row[0]: row[1] for row in rows}


# The card ---------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_adapter_is(adapter: Path) -> None:
    card = ModelCard.load(adapter / "README.md")
    assert card.data.library_name == "longlora_ext" and "long-context" in card.data.tags
    assert card.data.base_model is None and str(adapter.parent) not in card.content  # a folder is no model of the hub
    assert f"# base, {CONTEXT} tokens" in card.text
    for row in (
        "| base model | `base` |",
        "| context | 256 tokens |",
        "| RoPE | rope_theta 10000.0, rope_type linear, factor 4.0 |",
        "| group size of S2-Attn | 64 tokens, in training; attention is dense in use |",
        "| LoRA | rank 8, alpha 16, on `k_proj`, `o_proj`, `q_proj`, `v_proj` |",
        "| trained in full | `embed_tokens`, `input_layernorm`, `norm`, `post_attention_layernorm` |",
    ):
        assert row in card.text, card.text


def test_the_code_of_the_card_runs(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.S)
    names: dict[str, object] = {}
    exec(code.replace("PATH_OF_THIS_FOLDER", str(adapter)), names)
    assert names["model"].config.max_position_embeddings == CONTEXT  # type: ignore[attr-defined]


def test_the_card_of_an_adapter_is_not_that_of_the_merged_model(adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged" / "README.md").exists()
    (tmp_path / "copy").mkdir()
    for path in adapter.iterdir():
        if path.name != "README.md":
            (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    load(tmp_path / "copy")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LoraConfig(base_model_name_or_path="meta-llama/Llama-2-7b-hf", target_modules=["q_proj"]), "on `q_proj`"),
        (LoraConfig(base_model_name_or_path="meta-llama/Llama-2-7b-hf", target_modules=".*q_proj"), "on `.*q_proj`"),
        (IA3Config(base_model_name_or_path="meta-llama/Llama-2-7b-hf"), "| base model |"),
    ],
)
def test_cards_of_models_on_the_hub(config: object, expected: str, tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.5] * 64}
    write_card(tmp_path, {"context_length": 32768, "config": {}, "rope_parameters": rope}, config)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "meta-llama/Llama-2-7b-hf" and card.data.base_model_relation == "adapter"
    assert "# meta-llama/Llama-2-7b-hf, 32,768 tokens" in card.text and expected in card.text
    assert "rope_type longrope, short_factor of 64 numbers" in card.text and "2.5" not in card.text
    assert "group size" not in card.text and "None" not in card.text


def test_a_card_without_a_base_model(tmp_path: Path) -> None:
    """It has been made of a config, and has no name."""
    rope = {"full_attention": {"rope_type": "linear", "factor": 4.0}}
    record = {"context_length": 1024, "config": {"s2attn_group_size": 2048}, "rope_parameters": rope}
    write_card(tmp_path, record, SimpleNamespace(base_model_name_or_path=None, peft_type="LORA"))
    card = ModelCard.load(tmp_path / "README.md")
    assert "base_model" not in card.data.to_dict() and "# Adapter, 1,024 tokens" in card.text
    assert "full_attention (rope_type linear, factor 4.0)" in card.text and "2,048 tokens" in card.text


# The format -------------------------------------------------------------------------------------------------


def test_the_fields_are_those_of_the_page(adapter: Path) -> None:
    record = json.loads((adapter / "longlora.json").read_text())
    kinds = {"integer": int, "object": dict, "list": list}
    described = {name.strip("`"): kinds[kind] for name, kind in table("## The fields of `longlora.json`").items()}
    assert described.keys() == record.keys()
    assert all(isinstance(record[name], kind) for name, kind in described.items())
    row = next(line for line in FORMAT.splitlines() if line.startswith("| `config`"))
    assert {*CONFIG_FIELDS, *record["config"]} <= set(re.findall(r"`(s2attn_\w+)`", row))


def test_the_files_are_those_of_the_page(adapter: Path) -> None:
    named = re.findall(r"`([^`]+)`", " ".join(table("# The format of an adapter folder")))
    there = {path.name for path in adapter.iterdir() if not path.name.startswith("tokenizer")} | {"tokenizer.json"}
    assert {*there, "run.json", "import.json"} == set(named)


def test_the_tokenizer_does_not_cut_texts_to_the_old_context(tmp_path: Path) -> None:
    """In the adapter folder, in the merged model, and after full fine-tuning; a larger limit stays."""
    base = save_base(tmp_path / "base")
    for limit, want in ((64, 256), (10**30, 10**30)):
        tokenizer = AutoTokenizer.from_pretrained(base, model_max_length=limit)
        folder = tmp_path / str(want)
        model = extended_model(base)
        save_adapter(prepare_model(model, lora_config(model)), folder / "adapter", tokenizer)
        save_adapter(prepare_model(extended_model(base), None), folder / "model", tokenizer)
        merge(folder / "adapter", folder / "merged")
        for name in ("adapter", "model", "merged"):
            assert AutoTokenizer.from_pretrained(folder / name).model_max_length == want, name
        assert tokenizer.model_max_length == limit  # the caller's own
    AutoTokenizer.from_pretrained(base, model_max_length=64).save_pretrained(tmp_path / "256" / "adapter")  # as before
    merge(tmp_path / "256" / "adapter", tmp_path / "again")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "again")("w3 " * 200, truncation=True)["input_ids"]) == 200
