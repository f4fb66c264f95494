"""examples/evaluate.py as its users meet it: what it computes, of which models and by how many processes."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import evaluate
import forks
from app.evaluation import perplexity_task
from app.evaluation.perplexity_task import PerplexityTask
from app.inputs.files import load_documents
from app.inputs.tokens import tokenise
from evaluate_runs import make_adapter, refusal, run
from finetune_runs import CONTEXT, ROOT, deepspeed, environment
from longlora_ext.adapter import lora_config, merge, prepare_model, save_adapter
from longlora_ext.config import extend_config
from patience import patience
from plain_perplexity import brute_force

pytestmark = pytest.mark.usefixtures("alone")

LONGER = 4 * CONTEXT


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(model, tmp_path_factory.mktemp("adapter") / "adapter", LONGER)


def test_perplexity_is_that_of_each_token_by_itself(model: Path, books: Path) -> None:
    done = run("perplexity", "--model", model, "--text", books, "--lengths", 16, 8, 32, "--stride", 5)
    reference = AutoModelForCausalLM.from_pretrained(model).double().eval()
    tokenised = tokenise(load_documents([str(books)]), AutoTokenizer.from_pretrained(model))
    documents = [tokenised.ids(number) for number in (1, 2, 3)]
    expected = {str(length): brute_force(reference, documents, length, 5) for length in (8, 16, 32)}
    assert done["summary"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert list(done["summary"]["perplexity"]) == ["8", "16", "32"]
    settings = done["settings"]
    assert settings["tokens"] == 51 + 71 + 141 == done["summary"]["scored"]["32"] + 3
    assert (settings["documents"], settings["shorter_documents"]) == (3, "1 left out")
    assert settings["attention"] == "dense (sdpa)" and settings["dtype"] == "float32"
    assert settings["rope"]["rope_type"] == "default" and settings["stride"] == 5
    assert settings["versions"]["torch"] == torch.__version__
    assert done["made"]["command"].startswith("python ") and "--stride 5" in done["made"]["command"]


def test_what_the_numbers_depend_on_is_printed(model: Path, books: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(task: str, *given: object) -> dict[str, str]:
        settings = run(task, "--model", model, *given, output=task)["settings"]
        lines = (line.partition(":") for line in capsys.readouterr().out.splitlines())
        rows = {name: value.strip() for name, _, value in lines}
        assert rows.keys() >= {name.replace("_", " ") for name in settings.keys() - {"weights", "sha256"}}
        return rows

    scaled = ["--context_length", 512, "--rope_type", "yarn"]
    rows = printed("perplexity", *scaled, "--text", books, "--lengths", 16, 32, "--stride", 5, "--attention", "s2")
    assert rows["attention"] == "S2-Attn" and rows["group size"] == "128"
    assert "rope_type=yarn" in rows["rope"] and "factor=16" in rows["rope"]
    assert rows["lengths"] == "16 32" and rows["stride"] == "5" and rows["score"].startswith("each token once")
    rows = printed("passkey", *scaled, "--lengths", 400, "--depths", 0.5, "--trials", 1)
    assert rows["attention"] == "dense (sdpa)" and rows["decoding"].startswith("greedy")
    assert "'A pass key is hidden in this text." in rows["prompt"] and rows["prompt"].endswith("The pass key is'")
    assert rows["dtype"] == "float32" and f"torch={torch.__version__}" in rows["versions"]


def test_short_documents_are_kept_if_asked_for(model: Path, books: Path) -> None:
    given = ["--model", model, "--text", books, "--lengths", 32]
    done = run("perplexity", *given, "--keep_short", "--max_tokens", 40, "--max_documents", 2)
    assert done["settings"]["tokens"] == 21 + 40 and done["settings"]["shorter_documents"] == "kept"
    assert done["settings"]["stride"] == 16  # the paper's 256 is too long for this window


def test_json_and_parquet_are_the_same_text(model: Path, books: Path, tmp_path: Path) -> None:
    texts = datasets.Dataset.from_dict({"body": [path.read_text() for path in sorted(books.iterdir())]})
    texts.to_json(tmp_path / "texts.jsonl")
    texts.to_parquet(tmp_path / "texts.parquet")
    results = [
        run("perplexity", "--model", model, "--text", *text, "--lengths", 32, output=f"out{number}")
        for number, text in enumerate(
            ([books], ["texts.jsonl", "--text_column", "body"], ["texts.parquet", "--text_column", "body"])
        )
    ]
    assert len({result["settings"]["sha256"] for result in results}) == 1
    assert results[0]["cells"] == results[1]["cells"] == results[2]["cells"]


def test_the_papers_way_to_score_on_the_originals_data(model: Path, tmp_path: Path) -> None:
    """The mean over all full windows of the loss of a whole window, which is what transformers makes of labels."""
    ids = np.random.default_rng(0).integers(0, 257, 75)
    ids.astype("<u2").tofile(tmp_path / "test.bin")
    done = run("perplexity", "--model", model, "--text", "test.bin", "--lengths", 32, "--stride", 5, "--score", "all")
    reference = AutoModelForCausalLM.from_pretrained(model)
    windows = torch.tensor(np.array([ids[begin : begin + 32] for begin in range(0, 75 - 32 + 1, 5)]))
    losses = [reference(window[None], labels=window[None]).loss.item() for window in windows]
    assert done["summary"]["perplexity"]["32"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert done["summary"]["scored"]["32"] == 31 * len(losses) == 31 * 9
    assert done["settings"]["score"] == "all tokens of each window" and done["settings"]["tokens"] == 75


def test_files_of_token_ids_by_folder_and_pattern(
    model: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids").mkdir()
    for number in (1, 2):
        np.arange(40 + number).astype("<u2").tofile(tmp_path / "ids" / f"{number}.bin")
    for number, text in enumerate(("ids", "ids/*.bin", "**/?.bin")):
        done = run("perplexity", "--model", model, "--text", text, output=f"out{number}")
        assert done["settings"]["documents"] == 2 and done["settings"]["tokens"] == 41 + 42
    (tmp_path / "ids" / "notes.txt").write_text("text")
    assert "cannot be mixed" in refusal(capsys, "perplexity", "--model", model, "--text", "ids")
    (tmp_path / "none").mkdir()
    said = refusal(capsys, "perplexity", "--model", model, "--text", "none")
    assert "--text none: the folder holds no file to measure on; looked for .bin, .json" in said


def test_a_long_document_is_many_cells(model: Path, books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one book keeps all processes busy and is not begun anew after an interruption."""
    given = ["--model", model, "--text", books, "--lengths", 16, 32]
    whole = run("perplexity", *given, output="whole")
    monkeypatch.setattr(perplexity_task, "PART_TOKENS", 64)
    parts = run("perplexity", *given, output="parts")
    assert len(whole["cells"]) == 6 and len(parts["cells"]) > 15
    assert parts["summary"]["scored"] == whole["summary"]["scored"]
    assert parts["summary"]["perplexity"] == pytest.approx(whole["summary"]["perplexity"], rel=1e-6)


# --- which model, how far, which attention ----------------------------------------------------------------------


def test_adapter_and_merged_model_are_alike(model: Path, adapter: Path, books: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "merged")
    given = ["--text", books, "--lengths", 32, LONGER]
    of_adapter = run("perplexity", "--model", adapter, *given, output="a")
    of_merged = run("perplexity", "--model", tmp_path / "merged", *given, output="b")
    scaled = run("perplexity", "--model", model, "--context_length", LONGER, *given, output="c")
    assert of_merged["summary"]["perplexity"] == pytest.approx(of_adapter["summary"]["perplexity"], rel=1e-5)
    assert of_adapter["settings"]["kind"] == "adapter" and of_merged["settings"]["kind"] == "model"
    for name in ("rope", "context", "sha256"):
        assert of_adapter["settings"][name] == of_merged["settings"][name] == scaled["settings"][name]
    assert scaled["settings"]["scaled_without_training"] and not of_adapter["settings"]["scaled_without_training"]
    assert scaled["summary"]["perplexity"] != pytest.approx(of_adapter["summary"]["perplexity"], rel=1e-2)


def test_scaling_only_is_what_an_untrained_adapter_does(model: Path, books: Path, tmp_path: Path) -> None:
    config = extend_config(AutoConfig.from_pretrained(model), LONGER, rope_type="yarn")
    base = AutoModelForCausalLM.from_pretrained(model, config=config, attn_implementation="s2attn")
    save_adapter(prepare_model(base, lora_config(base)), tmp_path / "adapter")  # no tokenizer: it is the base model's
    given = ["perplexity", "--text", books, "--lengths", LONGER]
    of_adapter = run(*given, "--model", tmp_path / "adapter", output="a")
    scaled = run(*given, "--model", model, "--context_length", LONGER, "--rope_type", "yarn", output="b")
    assert of_adapter["summary"] == scaled["summary"]


@pytest.mark.parametrize("task", ["perplexity", "passkey"])
def test_a_length_beyond_the_trained_one_is_refused_unless_meant(
    model: Path, adapter: Path, books: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    text = ["--text", books] if task == "perplexity" else ["--depths", 0.5, "--trials", 1]
    said = refusal(capsys, task, "--model", adapter, *text, "--lengths", 512)
    assert "a length of 512 tokens is asked for, but" in said and "was trained on 128 tokens." in said
    assert "--beyond_trained_length" in said
    said = refusal(capsys, task, "--model", model, "--context_length", 64, *text, "--lengths", 512)
    assert "was scaled to 64 tokens." in said
    assert not Path("evaluated").exists()
    if task == "perplexity":
        run(task, "--model", model, *text, "--lengths", 64, "--beyond_trained_length")


def test_s2_at_test_time(adapter: Path, books: Path) -> None:
    """Equal to dense attention while even the first, halved group of the shifted heads holds all tokens."""
    results = {}
    for name, options in {
        "dense": [],
        "group 8": ["--attention", "s2", "--group_size", 8],
        "group 64": ["--attention", "s2", "--group_size", 64],
        "as in training": ["--attention", "s2"],
    }.items():
        given = ["--model", adapter, "--text", books, "--lengths", 32, "--max_documents", 1]
        results[name] = run("perplexity", *given, *options, output=name)
    perplexity = {name: result["summary"]["perplexity"]["32"] for name, result in results.items()}
    assert perplexity["group 64"] == pytest.approx(perplexity["dense"], rel=1e-5)
    assert perplexity["group 8"] != pytest.approx(perplexity["dense"], rel=1e-3)
    assert results["as in training"]["settings"]["group_size"] == LONGER // 4
    assert results["as in training"]["settings"]["attention"] == "S2-Attn"


#: What transformers makes of "auto" where the memory of GPUs, here the CPU's, has no room for the last layer.
TOO_MUCH = {"model.layers.1": "disk"} | dict.fromkeys(
    ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"), "cpu"
)


@pytest.mark.parametrize("kind", ["model", "adapter"])
@pytest.mark.parametrize("fits", [True, False])
def test_a_model_is_spread_over_gpus(
    kind: str, fits: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers is asked to, and nothing moves it to one device afterwards. What no GPU has room for is refused."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        path = str(request.getfixturevalue(kind))
        options = evaluate.parse(["perplexity", "--model", path, "--device_map", "auto"])
    asked = []

    def from_pretrained(*given: object, original=AutoModelForCausalLM.from_pretrained, **keywords: object) -> object:
        asked.append(keywords["device_map"])
        return original(*given, **keywords if fits else keywords | {"device_map": TOO_MUCH})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    for moved in (PreTrainedModel, PeftModel):
        monkeypatch.setattr(moved, "to", None)
    if fits:
        assert evaluate.open_model(options).description["kind"] == kind
    else:
        does_not_fit = "it does not fit into the memory of all GPUs"
        message = does_not_fit if kind == "model" else "does not fit: device_map leaves"
        with pytest.raises(ValueError, match=message):
            evaluate.open_model(options)
    assert asked == ["auto"]


def test_dynamic_rope_does_not_remember_the_text_before(model: Path, books: Path) -> None:
    """transformers keeps the frequencies of the longest text so far: which cells a process had before must not tell."""
    given = ["perplexity", "--model", model, "--context_length", LONGER, "--rope_type", "dynamic", "--text", books]
    options = evaluate.parse([*map(str, given), "--lengths", "128", "--keep_short"])
    opened = evaluate.open_model(options)
    task = PerplexityTask(options, opened)
    first = task.compute("length-128-document-1-tokens-0-51", lambda tokens: None)
    task.compute("length-128-document-3-tokens-0-141", lambda tokens: None)
    assert task.compute("length-128-document-1-tokens-0-51", lambda tokens: None) == first


def rounded(value: Any) -> Any:
    """Numbers to five places: sums of other numbers of threads differ in the last digits of float32."""
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("task", "by_deepspeed"),
    [
        pytest.param("perplexity", False, marks=pytest.mark.full),
        ("passkey", False),
        pytest.param("perplexity", True, marks=pytest.mark.full),
    ],
)
def test_two_processes_compute_what_one_computes(model: Path, books: Path, task: str, by_deepspeed: bool) -> None:
    given = ["--model", model, "--text", books, "--lengths", 16, 32]
    table = "perplexity of 263 tokens in 3 documents"
    if task == "passkey":
        given = ["--model", model, "--context_length", 512, "--lengths", 400, 512, "--depths", 0, 1, "--trials", 2]
        table = "share of questions for the pass key that were answered exactly, 2 in each cell"
    words = [str(ROOT / "examples" / "evaluate.py"), task, *map(str, given), "--output", "two"]
    if by_deepspeed:
        command = [*deepspeed(2), *words]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=patience())
    else:
        done = forks.run(words, environment(), processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads(Path("two/results.json").read_text())
    one = run(task, *given, output="one")
    assert two["made"]["processes"] == 2 and list(two["cells"]) == list(one["cells"])
    if task == "passkey":  # its answers too, word by word
        assert rounded(two["cells"]) == rounded(one["cells"]) and rounded(two["summary"]) == rounded(one["summary"])
    else:
        assert two["summary"]["perplexity"] == pytest.approx(one["summary"]["perplexity"], rel=1e-6)
    assert done.stdout.count(table) == 1 and "100%" in done.stderr


def test_an_adapter_takes_no_other_context(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "perplexity", "--model", adapter, "--context_length", 512)
    assert "an adapter brings the context that it was trained for" in said


def test_of_a_folder_hidden_files_are_left_alone_and_names_are_no_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "books[1]"
    for name in (".git/x.bin", "X.BIN", "a1.bin", "a[1].bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"ab")
    for named in (folder, folder / "*.[bB]*"):
        found = perplexity_task._expanded(str(named))
        assert [Path(file).name for file in found] == ["X.BIN", "a1.bin", "a[1].bin"]
    assert perplexity_task._expanded(str(folder / "a[1].bin")) == [str(folder / "a[1].bin")]
