"""examples/evaluate.py as its users meet it: what it computes, refuses, keeps and goes on from."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import evaluate
import generate
from evaluation import evaluation_folder, perplexity_task
from evaluation.perplexity_task import PerplexityTask
from evaluation.retrieval_task import RetrievalTask
from finetune_runs import CONTEXT, ROOT, deepspeed, environment, make_model, torchrun
from inputs.files import load_documents
from inputs.tokens import tokenise
from longlora_ext.adapter import lora_config, merge, prepare_model, save_adapter
from longlora_ext.context import extend_config
from models import use_model
from test_perplexity import brute_force
from test_run_folder import held

LONGER = 4 * CONTEXT


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test in a folder of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of texts: one shorter than the model's context, two longer ones, one four times as long."""
    folder = tmp_path_factory.mktemp("books")
    for number, size in enumerate((20, 50, 70, 140)):
        (folder / f"{number}.txt").write_text("".join(chr(97 + (i * i + number) % 26) for i in range(size)))
    return folder


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter to four times the context that changes what the model says, as training would."""
    config = extend_config(AutoConfig.from_pretrained(model), LONGER)
    base = AutoModelForCausalLM.from_pretrained(model, config=config, attn_implementation="s2attn")
    trained = prepare_model(base, lora_config(base))
    torch.manual_seed(1)
    for name, weight in trained.named_parameters():
        if "lora_B" in name or ("norm" in name and weight.requires_grad):
            torch.nn.init.normal_(weight, std=0.5)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(trained, folder, AutoTokenizer.from_pretrained(model))
    return folder


def run(task: str, *arguments: object, output: str = "out") -> dict:
    """What the program writes."""
    evaluate.main([task, "--output", output, *map(str, arguments)])
    return json.loads((Path(output) / "results.json").read_text())


def refusal(capsys: pytest.CaptureFixture[str], task: str, *arguments: object) -> str:
    """What the program says when it refuses."""
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([task, *map(str, arguments)])
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluate.py: error: ")]
    assert len(said) == 1
    return said[0]


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
        message = "the GPUs have no room for all of it" if kind == "model" else "does not fit: device_map leaves"
        with pytest.raises(ValueError, match=message):
            evaluate.open_model(options)
    assert asked == ["auto"]


@pytest.mark.parametrize("program", [evaluate, generate])
def test_a_model_is_spread_by_one_process_and_over_gpus(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ["perplexity"] if program is evaluate else ["--file", "-"]
    for processes, message in ((1, "spreads a model over GPUs, and there is none"), (2, "gives one process all GPUs")):
        monkeypatch.setattr(use_model, "WORLD_SIZE", processes)
        with pytest.raises(SystemExit, match="2"):
            program.main([*given, "--device_map", "auto"])
        assert f"{program.__name__}.py: error: --device_map auto {message}" in capsys.readouterr().err


def test_dynamic_rope_does_not_remember_the_text_before(model: Path, books: Path) -> None:
    """transformers keeps the frequencies of the longest text so far: which cells a process had before must not tell."""
    given = ["perplexity", "--model", model, "--context_length", LONGER, "--rope_type", "dynamic", "--text", books]
    options = evaluate.parse([*map(str, given), "--lengths", "128", "--keep_short"])
    opened = evaluate.open_model(options)
    task = PerplexityTask(options, opened)
    first = task.compute("length-128-document-1-tokens-0-51", lambda tokens: None)
    task.compute("length-128-document-3-tokens-0-141", lambda tokens: None)
    assert task.compute("length-128-document-1-tokens-0-51", lambda tokens: None) == first


# --- interrupted, divided, repeated -----------------------------------------------------------------------------


def test_a_killed_run_goes_on_where_it_was(
    model: Path, books: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", model, "--text", books, "--lengths", 16, 32]
    whole = run("perplexity", *given, output="whole")
    computed: list[str] = []

    def compute(self: PerplexityTask, cell: str, progress: object, original=PerplexityTask.compute) -> dict:
        computed.append(cell)
        if len(computed) == 3:
            raise KeyboardInterrupt
        return original(self, cell, progress)

    monkeypatch.setattr(PerplexityTask, "compute", compute)
    with pytest.raises(SystemExit) as stopped:
        run("perplexity", *given)
    assert stopped.value.code == 130
    assert capsys.readouterr().err.endswith("\nstopped; the same command goes on\n")
    assert len(list(Path("out/cells").iterdir())) == 2 and not Path("out/results.json").exists()
    other = refusal(capsys, "perplexity", *given, "--stride", 4, "--output", "out")
    assert "--output out belongs to another evaluation: stride was 8 and is 4" in other
    done = run("perplexity", *given)
    assert "going on: 2 of 6 parts are computed" in capsys.readouterr().out
    assert done["cells"] == whole["cells"] and done["summary"] == whole["summary"]
    assert sorted(computed) == sorted([*whole["cells"], computed[2]])  # none twice but the one that was interrupted
    assert not Path("out/cells").exists()

    written = Path("out/results.json").read_bytes()
    run("perplexity", *given)
    assert "out is complete: nothing is computed again" in capsys.readouterr().out
    assert Path("out/results.json").read_bytes() == written and len(computed) == 7
    assert "belongs to another evaluation" in refusal(capsys, "perplexity", *given, "--stride", 4, "--output", "out")
    assert Path("out/results.json").read_bytes() == written


def test_what_was_changed_by_hand_is_not_believed(model: Path, books: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", model, "--text", books]
    whole = run("perplexity", *given)
    results, settings = Path("out/results.json"), Path("out/settings.json")
    first, second, *_ = whole["cells"]
    cut = {**whole, "cells": {first: whole["cells"][first], second: {"scored": None}}}
    for content in ({}, [], {"cells": {}}, {"cells": {}, "summary": {}}, cut):
        results.write_text(json.dumps(content))
        assert run("perplexity", *given)["summary"] == whole["summary"]
    results.unlink()
    Path("out/cells").mkdir()
    for cell, content in ((first, "{}"), (second, '"x"')):
        Path(f"out/cells/{cell}.json").write_text(content)
    assert run("perplexity", *given)["cells"] == whole["cells"]
    results.write_text("{")
    assert "out/results.json cannot be read, it is no JSON: Expecting" in refusal(
        capsys, "perplexity", *given, "--output", "out"
    )
    before = settings.read_text()
    for content, message in (
        ("{}", "belongs to another evaluation: one of the two has no attention"),
        ("[]", "belongs to another evaluation: settings.json holds no settings"),
        ("", "out/settings.json cannot be read, it is no JSON: Expecting"),
    ):
        settings.write_text(content)
        assert message in refusal(capsys, "perplexity", *given, "--output", "out")
        assert settings.read_text() == content != before


def test_a_model_with_a_broken_or_missing_part_is_refused(
    model: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(file: str, content: str) -> str:
        broken = shutil.copytree(model, tmp_path / "broken", dirs_exist_ok=True)
        (broken / file).write_text(content)
        return refusal(capsys, "perplexity", "--model", broken, "--text", books)

    assert ": ValueError: " not in refused("config.json", "{")
    rope = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}}
    said = refused("config.json", json.dumps(json.loads((model / "config.json").read_text()) | rope))
    assert "broken: KeyError: " in said or "factor" in said
    assert "broken: " in refused("tokenizer.json", '{"a": 1}')
    shutil.rmtree(tmp_path / "broken")
    weights = load_file(model / "model.safetensors")
    gone = sorted(weights)[-1]
    broken = shutil.copytree(model, tmp_path / "broken")
    save_file({name: weight for name, weight in weights.items() if name != gone}, broken / "model.safetensors")
    said = refusal(capsys, "perplexity", "--model", broken, "--text", books)
    assert f"broken is incomplete: its files have no {gone}" in said


def test_nothing_of_others_is_overwritten(
    model: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", model, "--text", books]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "mine is not empty and no evaluation" in refusal(capsys, "perplexity", *given, "--output", "mine")
    said = refusal(capsys, "perplexity", *given, "--output", "mine/thesis.tex")
    assert "is a file; it must be a folder" in said
    said = refusal(capsys, "perplexity", *given, "--output", "mine/thesis.tex/out")
    assert "cannot be written to: Not a directory" in said


def test_a_folder_belongs_to_one_process(model: Path, books: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(Path("out/.lock")):
        said = refusal(capsys, "perplexity", "--model", model, "--text", books, "--output", "out")
    assert "--output out: another process is writing to it" in said


def test_a_folder_is_found_where_none_is_given(model: Path, books: Path) -> None:
    for stride in (5, 6, 5):
        evaluate.main(["perplexity", "--model", str(model), "--text", str(books), "--stride", str(stride)])
    assert sorted(path.name for path in Path("evaluated").iterdir()) == ["tiny-perplexity", "tiny-perplexity-2"]


def test_a_folder_that_cannot_be_read_is_named(
    model: Path, books: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("evaluated/tiny-perplexity")
    folder.mkdir(parents=True)

    def iterdir(path: Path, original=Path.iterdir) -> Iterator[Path]:
        if path.resolve() == folder.resolve():  # as for who may not read it
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    given = ["perplexity", "--model", model, "--text", books]
    for output in ([], ["--output", folder]):
        assert f"Permission denied: '{folder}'" in refusal(capsys, *given, *output)


def test_a_full_disk_keeps_what_is_complete(
    model: Path, books: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(path: Path, content: object, original=evaluation_folder.write_json) -> None:
        if "document-2" in path.stem:
            raise OSError(28, "No space left on device")
        original(path, content)

    monkeypatch.setattr(evaluation_folder, "write_json", write)
    said = refusal(capsys, "perplexity", "--model", model, "--text", books, "--output", "out")
    assert "out cannot be written to: No space left on device. What is computed so far is kept" in said
    assert len(list(Path("out/cells").iterdir())) == 2


@pytest.mark.parametrize("file", ["results.txt", "heat_map.png", "results.json"])
def test_a_disk_that_is_full_at_the_end_is_one_clear_error(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    """The system's own: the file, or what it is written as at first, is another name of /dev/full by then."""
    given = ["--model", model, "--context_length", 512, "--lengths", 400, "--depths", 0.5, "--trials", 1]
    full = Path("out") / (f"{file}.tmp" if file == "results.json" else file)

    def compute(*arguments: object, original=evaluate.compute) -> dict:
        full.symlink_to("/dev/full")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "compute", compute)
        said = refusal(capsys, "passkey", *given, "--output", "out")
    assert "out cannot be written to: No space left on device. What is computed so far is kept" in said
    full.unlink()
    monkeypatch.setattr(RetrievalTask, "compute", None)  # nothing is left to compute
    assert run("passkey", *given)["summary"]["asked"] == 1


@pytest.mark.parametrize(
    ("task", "launcher"),
    [
        ("perplexity", torchrun(2)),
        ("passkey", torchrun(2)),
        pytest.param("perplexity", deepspeed(2), marks=pytest.mark.full),
    ],
    ids=["perplexity torchrun", "passkey torchrun", "perplexity deepspeed"],
)
def test_two_processes_compute_what_one_computes(
    model: Path, books: Path, task: str, launcher: tuple[str, ...]
) -> None:
    given = ["--model", model, "--text", books, "--lengths", 16, 32]
    table = "perplexity of 263 tokens in 3 documents"
    if task == "passkey":
        given = ["--model", model, "--context_length", 512, "--lengths", 400, 512, "--depths", 0, 1, "--trials", 2]
        table = "share of questions for the pass key that were answered exactly, 2 in each cell"
    command = [*launcher, str(ROOT / "examples" / "evaluate.py"), task, *map(str, given), "--output", "two"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads(Path("two/results.json").read_text())
    one = run(task, *given, output="one")
    assert two["made"]["processes"] == 2 and list(two["cells"]) == list(one["cells"])
    if task == "passkey":  # its answers too, word by word
        assert two["cells"] == one["cells"] and two["summary"] == one["summary"]
    else:
        assert two["summary"]["perplexity"] == pytest.approx(one["summary"]["perplexity"], rel=1e-6)
    assert done.stdout.count(table) == 1 and "100%" in done.stderr


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for given, expected in ((["--help"], "what scaling RoPE alone does"), (["passkey", "--help"], "--depths")):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(given)
        assert stopped.value.code == 0 and expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("perplexity --stride 0", "--stride must be 1 or more, got 0"),
        ("perplexity --lengths 1 8", "--lengths must be 2 or more, got 1"),
        ("perplexity --lengths 8 --stride 8", "--stride must be less than the shortest length of 8, got 8"),
        ("perplexity --lengths 32 --max_tokens 16", "--max_tokens 16 is less than the longest length of 32"),
        ("perplexity --max_documents 0", "--max_documents must be 1 or more, got 0"),
        ("perplexity --group_size 8", "--group_size is for --attention s2"),
        ("perplexity --attention s2 --group_size 7", "--group_size must be even and at least 2, got 7"),
        ("perplexity --score some", "invalid choice: 'some'"),
        ("perplexity --text {ids} {books}", "files of token ids (.bin) and of text cannot be mixed"),
        ("perplexity --text {ids}", "the text has the token id 300, but the model's vocabulary has 257 tokens"),
        ("perplexity --text {odd}", "odd.bin is no file of token ids of 16 bits"),
        ("perplexity --attention eager", "invalid choice: 'eager'"),
        ("perplexity --text gone.txt", "gone.txt: no such file, folder or glob pattern"),
        ("perplexity --text {books} --lengths 512 --beyond_trained_length", "longest of 4 has 141"),
        ("perplexity --text {empty}", "no document of 32 tokens is there, the longest of 0 has 0"),
        ("perplexity --rope_type yarn", "--rope_type and --rope_parameters need --context_length"),
        ("perplexity --context_length 16", "error: --context_length 16 --rope_type linear: context_length must be an "),
        ("perplexity --context_length 64 --rope_type none", "rope_type must be one of default, "),
        ("perplexity --rope_parameters 5", "argument --rope_parameters: must be a JSON object, got '5'"),
        ("perplexity --base_model x", "--base_model is for adapters"),
        ("perplexity --model nowhere", "--model nowhere: "),
        ("passkey --depths 1.5", "--depths must be in 0..1, got 1.5"),
        ("passkey --trials 0", "--trials must be 1 or more, got 0"),
        ("passkey --lengths 32", "--lengths 32: this prompt and its answer have "),
        ("passkey", "reads 32 tokens, and this prompt has "),
        ("needles --needles 1", "--needles must be in 2..100, got 1"),
        ("passkey --needles 3", "unrecognized arguments: --needles 3"),
        ("summary", "invalid choice: 'summary'"),
        ("", "the following arguments are required: TASK"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_one_clear_error(
    model: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, message: str
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "ids.bin").write_bytes(np.full(40, 300, "<u2").tobytes())
    (tmp_path / "odd.bin").write_bytes(b"odd")
    files = {name.partition(".")[0]: tmp_path / name for name in ("empty.txt", "ids.bin", "odd.bin")}
    words = given.format(books=books, **files).split()
    at = 1 if words[:1] and words[0] in evaluate.TASKS and "--model" not in words else None
    if at:
        words[1:1] = ["--model", str(model)]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(words)
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(said) == 1 and said[0].startswith("evaluate.py") and message in said[0]
    assert not Path("evaluated").exists()


def test_an_adapter_takes_no_other_context(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "perplexity", "--model", adapter, "--context_length", 512)
    assert "an adapter brings the context that it was trained for" in said


def test_the_deepspeed_launchers_argument_is_taken(model: Path, books: Path) -> None:
    evaluate.main(["--local_rank=0", "perplexity", "--model", str(model), "--text", str(books)])
    assert Path("evaluated/tiny-perplexity/results.json").is_file()
