"""Adapters without a launcher: what is saved, and what comes back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import forks
import merge_adapter
from finetune_runs import environment
from longlora_ext.adapter import load, lora_config, merge, prepare_model, save_adapter
from tiny_models import tokens
from tiny_training import CONTEXT, extended_model, is_tied, lora_a, moved, save_base, train

WEIGHTS = "adapter_model.safetensors"
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "merge_adapter.py"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base model `base`, the adapter `adapter` and of what was trained `lora_a.safetensors`."""
    folder = tmp_path_factory.mktemp("trained")
    model = extended_model(save_base(folder / "base", tie_word_embeddings=request.param))
    model = prepare_model(model, lora_config(model))
    save_file(lora_a(model), folder / "lora_a.safetensors")
    train(model)
    save_adapter(model, folder / "adapter", AutoTokenizer.from_pretrained(folder / "base"))
    return folder


# Training ---------------------------------------------------------------------------------------------------


def test_every_saved_weight_has_moved_after_20_steps(trained: Path) -> None:
    base, saved = load_file(trained / "base/model.safetensors"), load_file(trained / "adapter" / WEIGHTS)
    assert base["model.norm.weight"].dtype == torch.bfloat16
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    parts = moved(saved, base | load_file(trained / "lora_a.safetensors"))
    assert len([name for name in parts if name.endswith("norm.weight")]) == 5
    assert len([name for name in parts if ".lora_" in name]) == 16
    for name, part in parts.items():
        assert part > 0.9, (name, part)


# Saving -----------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_it_should(trained: Path) -> None:
    folder = trained / "adapter"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "longlora.json", "tokenizer.json"}
    assert "config.json" not in names  # with one, AutoModel would take the folder for a whole model
    record = json.loads((folder / "longlora.json").read_text())
    assert record["config"] == {"s2attn_group_size": CONTEXT // 4, "s2attn_context_length": CONTEXT}
    assert record["rope_parameters"] == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(trained / "base")
    assert not [path for path in trained.iterdir() if "unfinished" in path.name]


def test_nothing_is_overwritten(trained: Path, tmp_path: Path) -> None:
    model = load(trained / "adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match="nothing is overwritten"):
            save_adapter(model, tmp_path / name)
        with pytest.raises(FileExistsError, match="nothing is overwritten"):
            merge(trained / "adapter", tmp_path / name)
    assert (tmp_path / "full" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    fresh = prepare_model(base := extended_model(trained / "base"), lora_config(base))
    save_adapter(torch.compile(fresh), tmp_path / "empty")  # compiled when it is first called
    assert (tmp_path / "empty" / "longlora.json").is_file()


def test_a_folder_appears_complete_or_not_at_all(trained: Path, tmp_path: Path) -> None:
    model = prepare_model(base := extended_model(trained / "base"), lora_config(base))

    class DiskFull:
        def save_pretrained(self, folder: Path) -> None:
            assert (folder / "longlora.json").is_file() and not (tmp_path / "adapter").exists()
            raise OSError("no space left on device")

    with pytest.raises(OSError, match=r"cannot write .*adapter: no space left"):
        save_adapter(model, tmp_path / "adapter", DiskFull())
    assert list(tmp_path.iterdir()) == []


def test_only_prepared_models_are_saved(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="but it is a Linear"):
        save_adapter(torch.nn.Linear(2, 2), tmp_path / "adapter")
    model = PeftModel.from_pretrained(extended_model(trained / "base"), trained / "adapter", adapter_name="other")
    with pytest.raises(ValueError, match=r"it has \['other'\]"):
        save_adapter(model, tmp_path / "adapter")
    model = load(trained / "adapter")
    model.merge_adapter()  # the base model's weights are then others, by which it is known
    with pytest.raises(ValueError, match=r"the adapter is merged into the model.*: unmerge_adapter\(\) first"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    model.unmerge_adapter()
    save_adapter(model, tmp_path / "adapter")
    load(tmp_path / "adapter")


# Loading ----------------------------------------------------------------------------------------------------


def test_load_gives_the_trained_model(tmp_path: Path) -> None:
    """In fp32, so that equal is equal."""
    base = extended_model(save_base(tmp_path / "base"), torch.float32)
    model = prepare_model(base, lora_config(base))
    train(model)
    save_adapter(model, tmp_path / "adapter")
    again = load(tmp_path / "adapter", dtype=torch.float32)
    ids = tokens(2, 150)
    assert not again.training
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(again.train()(ids).logits, model.train()(ids).logits)
    assert again.config.max_position_embeddings == CONTEXT and again.config._attn_implementation == "s2attn"


def test_a_loaded_model_generates_in_one_dtype(trained: Path) -> None:
    model = load(trained / "adapter")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert is_tied(model) == model.config.tie_word_embeddings
    ids = tokens(1, 100)
    assert model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4).shape == (1, 104)
    plain = load(trained / "adapter", attn_implementation="sdpa", dtype=torch.float32)
    assert plain.config._attn_implementation == "sdpa" and plain.dtype == torch.float32


def test_a_moved_base_model_is_found(trained: Path, tmp_path: Path) -> None:
    moved_base = tmp_path / "elsewhere"
    moved_base.symlink_to(trained / "base")
    assert load(trained / "adapter", base_model=str(moved_base)) is not None
    with pytest.raises(FileNotFoundError, match=r"no longer at .*: pass base_model"):
        load(trained / "adapter", base_model=str(tmp_path / "nowhere"))


def test_another_base_model_is_refused(trained: Path, tmp_path: Path) -> None:
    tied = AutoModelForCausalLM.from_pretrained(trained / "base").config.tie_word_embeddings
    other = save_base(tmp_path / "other", seed=1, tie_word_embeddings=tied)
    with pytest.raises(ValueError, match=r"is not the base model of this adapter: .* other weights"):
        load(trained / "adapter", base_model=str(other))
    larger = save_base(tmp_path / "larger", num_hidden_layers=3, tie_word_embeddings=tied)
    with pytest.raises(ValueError, match="it has num_hidden_layers 3 instead of 2"):
        load(trained / "adapter", base_model=str(larger))


def test_folders_that_are_none_of_ours_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither adapter_config.json nor config.json"):
        load(tmp_path)
    PeftModel.from_pretrained(extended_model(trained / "base"), trained / "adapter").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"an adapter but no longlora.json"):
        load(tmp_path)
    (tmp_path / "longlora.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="has format 2, but this version reads format 1"):
        load(tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "name, damage, message",
    [
        (WEIGHTS, Path.unlink, f"has no {WEIGHTS}"),
        (WEIGHTS, cut, f"cannot load .*{WEIGHTS} as adapter_config.json describes it"),
        (
            "adapter_config.json",
            lambda path: change(path, r=4),
            f"cannot load .*{WEIGHTS} as adapter_config.json .* size",
        ),
        ("adapter_config.json", lambda path: path.write_text("{"), "cannot load .*adapter_config.json"),
        ("longlora.json", lambda path: path.write_text("{"), "longlora.json is no JSON file"),
        ("longlora.json", lambda path: path.write_text("[]"), "longlora.json has format None"),
        ("longlora.json", lambda path: path.write_text('{"format": 1}'), "longlora.json is incomplete: .* base_shape"),
    ],
)
def test_what_is_broken_is_named(trained: Path, tmp_path: Path, name: str, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    folder = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    damage(folder / name)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        merge(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_model_that_cannot_be_loaded_is_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot load the base model nowhere/model: "):
        load(trained / "adapter", base_model="nowhere/model")
    base = Path(shutil.copytree(trained / "base", tmp_path / "base"))
    cut(base / "model.safetensors")
    with pytest.raises(ValueError, match=r"cannot load the base model .*base: "):
        load(trained / "adapter", base_model=str(base))


# Full fine-tuning -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_full_fine_tuning_makes_a_plain_model_folder(tmp_path: Path, tied: bool) -> None:
    model = prepare_model(extended_model(save_base(tmp_path / "base", tie_word_embeddings=tied)), None)
    assert all(w.requires_grad and w.dtype == torch.float32 for w in model.parameters())
    train(model)
    save_adapter(model, tmp_path / "model", AutoTokenizer.from_pretrained(tmp_path / "base"))
    parts = moved(load_file(tmp_path / "model/model.safetensors"), load_file(tmp_path / "base/model.safetensors"))
    assert len(parts) == 20 + (not tied) and min(parts.values()) > 0.9
    for again in (load(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")):
        assert torch.equal(again(tokens(1, 90)).logits, model(tokens(1, 90)).logits)
        assert is_tied(again) == tied and again.config.rope_parameters["factor"] == 4.0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 61
    with pytest.raises(ValueError, match="a plain model folder already"):
        merge(tmp_path / "model", tmp_path / "merged")


# Merging ----------------------------------------------------------------------------------------------------

PLAIN_TRANSFORMERS = """
import sys, torch
sys.modules["longlora_ext"] = None  # any import of it fails
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save({
    "logits": model(torch.load(sys.argv[2])).logits,
    "tied": model.lm_head.weight is model.model.embed_tokens.weight,
    "tokens": len(AutoTokenizer.from_pretrained(sys.argv[1])),
}, sys.argv[3])
"""


def test_a_merged_model_needs_no_code_of_ours(trained: Path, tmp_path: Path) -> None:
    merge(trained / "adapter", tmp_path / "merged", dtype=torch.float32)
    assert "s2attn" not in (tmp_path / "merged/config.json").read_text()
    model, ids = load(trained / "adapter", dtype=torch.float32), tokens(2, 150)
    torch.save(ids, tmp_path / "ids.pt")
    arguments = [str(tmp_path / name) for name in ("merged", "ids.pt", "out.pt")]
    done = forks.run(["-c", PLAIN_TRANSFORMERS, *arguments], environment())
    assert done.returncode == 0, done.stderr
    plain = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(plain["logits"], model(ids).logits, rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(trained / "base", dtype=torch.float32)
    assert (plain["logits"] - base(ids).logits).abs().max() > 0.1
    assert plain["tied"] == base.config.tie_word_embeddings and plain["tokens"] == 61


def test_merging_keeps_the_dtype_of_the_base_model(trained: Path, tmp_path: Path) -> None:
    merge(trained / "adapter", tmp_path / "merged")
    assert {weight.dtype for weight in load_file(tmp_path / "merged/model.safetensors").values()} == {torch.bfloat16}


def test_merging_refuses_weights_that_are_not_finite(trained: Path, tmp_path: Path) -> None:
    for path in (trained / "adapter").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    broken = next(name for name in weights if ".lora_B." in name)
    weights[broken] = torch.full_like(weights[broken], torch.nan)
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is not finite once it is merged"):
        merge(tmp_path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_example_merges(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(trained / "adapter"), str(tmp_path / "merged")]
    done = forks.run([EXAMPLE, *arguments], environment())
    assert done.returncode == 0 and done.stdout.endswith(f"merged: {tmp_path / 'merged'}\n"), done.stderr
    assert "merging: 100%" in done.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.max_position_embeddings == CONTEXT
    with pytest.raises(SystemExit, match="2"):
        merge_adapter.main(arguments)
    assert "nothing is overwritten" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        merge_adapter.main(["--help"])
    teaches = capsys.readouterr().out
    assert "ADAPTER_FOLDER OUTPUT_FOLDER" in teaches and "without longlora_ext" in teaches
