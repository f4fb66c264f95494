"""The README keeps its word: its code runs, its paths exist, its numbers have a source."""

import json
import re
from pathlib import Path

from extending.show import summary

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_operator_example_runs() -> None:
    (example,) = (block for block in blocks("python") if "s2attn(q, k, v" in block)
    scope: dict = {}
    exec(example, scope)
    assert scope["q"].grad.shape == scope["q"].shape


def test_training_example_runs(tmp_path: Path, monkeypatch) -> None:
    """With the tiny Llama as `base`, 1024 for the context, and a backward pass for the training."""
    (example,) = (block for block in blocks("python") if "extend_config" in block)
    monkeypatch.chdir(tmp_path)
    example = example.replace("32768", "1024").replace(
        "...  #", "model.train()(input_ids=ids, labels=ids).loss.backward()  #"
    )
    import torch

    scope = {"base": str(ROOT / "examples" / "tiny_llama"), "ids": torch.arange(300)[None]}
    exec(example, scope)
    assert scope["config"].max_position_embeddings == 1024
    assert scope["model"].get_base_model().config.rope_parameters["factor"] == 4


def test_paths_exist() -> None:
    folders = "csrc|longlora_ext|examples|tests|docs|benchmarks"
    paths = re.findall(rf"`((?:{folders})/[\w./]*)`|\]\(((?:{folders})/[^)#]*)", README)
    assert paths
    for code, link in paths:
        assert (ROOT / (code or link)).exists(), code or link


def test_the_table_has_a_source() -> None:
    (table,) = re.findall(r"^perplexity of [^`]*", README, flags=re.MULTILINE)
    assert "after" in table and table in (ROOT / "benchmarks" / "results" / "demo_cpu.txt").read_text()


def test_what_it_does_to_a_real_model_is_what_was_measured() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "extension_cpu.json").read_text())
    guide = (ROOT / "docs" / "extend.md").read_text()
    some = summary(found, "base,yarn,s2,s2-sink,window8-sink,short,short-drawn-alone,dense", "5e-4")
    assert some in README and summary(found) in guide and 3 < some.count("\n") < summary(found).count("\n")


def test_two_commands_do_the_set_up() -> None:
    commands = [line for line in "".join(blocks("bash")).splitlines() if "venv" in line]
    assert [command.rsplit("&& ", 1)[1] for command in commands] == [
        "deepspeed examples/finetune_llama.py",
        "pytest -n 2 --dist loadfile",
    ]
    assert {command.rsplit(" && ", 1)[0] for command in commands} == {
        line.removeprefix("RUN ") for line in (ROOT / "Dockerfile").read_text().splitlines() if "venv .venv" in line
    }
