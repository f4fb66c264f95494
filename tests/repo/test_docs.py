"""The guides keep their word: commands run, options exist, links lead somewhere.

A ```bash block in docs/ is run, or its first line says why not: "# needs a GPU: not run by the tests". By default the
commands are run within this process, by the programs' `main`; with --full some by bash, as they stand.
"""

from __future__ import annotations

import argparse
import importlib
import io
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import datasets
import pytest

from app.runs import launch
from finetune_runs import ROOT, environment

README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = {page.name: page.read_text() for page in PAGES}
#: What makes the adapter that other pages use.
FIRST = "extend.md"
#: A page whose commands take more than a few seconds.
SLOW = ("plan.md",)

BLOCK = re.compile(
    r"^```bash\n(?:# needs (?P<reason>[^\n]+): not run by the tests\n)?(?P<commands>.*?)^```$", re.M | re.S
)
PROGRAM = re.compile(r"(?:^|/)examples/(\w+)\.py$")
OPTION = re.compile(r"(?<![\w-])--[A-Za-z]\w*(?:[-_]\w+)*")
LAUNCHERS = ("python", "deepspeed", "torchrun")
#: Options of other people's programs that the guides name outside of commands.
FOREIGN = {
    "--full",
    "--help",
    "--system-site-packages",
    "--evaluation_strategy",
    "--max-model-len",
    "--yarn-beta-fast",
    "--apply_chat_template",
}


def blocks(page: str, run: bool) -> list[str]:
    """The bash blocks of a page that are run, or those that are not."""
    return [found["commands"] for found in BLOCK.finditer(TEXTS[page]) if (found["reason"] is None) == run]


def commands(block: str) -> list[list[str]]:
    """The commands in a block as words."""
    lines = (shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines())
    return [words for words in lines if words]


def run_of(page: str) -> list[list[str]]:
    """All commands of a page that are run."""
    return [words for block in blocks(page, run=True) for words in commands(block)]


def run_here(words: list[str]) -> None:
    """Run `python examples/PROGRAM.py ...` within this process."""
    assert words[0] == "python" and (program := PROGRAM.search(words[1])), (
        f"{shlex.join(words)}: a command that is run starts with python examples/"
    )
    assert importlib.import_module(program[1]).main(words[2:]) in (None, 0), shlex.join(words)


def run_by_bash(block: str, folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


def workplace(folder: Path) -> Path:
    """A folder to type commands in: it has the repository's examples, and nothing is written to the repository."""
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workplace in which the commands of the first guide have run."""
    folder = workplace(tmp_path_factory.mktemp("guides"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "program", launch.program)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.chdir(folder)
        for words in run_of(FIRST):
            run_here(words)
        yield folder


def test_the_first_guide_makes_what_it_says(extended: Path) -> None:
    made = {path.name.partition("-")[0] for path in (extended / "finetuned" / "tiny_llama-1024").iterdir()}
    table = TEXTS[FIRST].split("| | |")[1].split("\n\n")[0]
    said = {name.partition("-")[0].strip("/") for name in re.findall(r"`([^`]+)`", table)}
    assert said == {name for name in made if not name.endswith(".lock")}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(name, marks=[pytest.mark.full] if name in SLOW else [])
        for name in TEXTS
        if name != FIRST and blocks(name, run=True)
    ],
)
def test_commands_run(page: str, extended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And print what the page says that they print."""
    for words in run_of(page):
        run_here(words)
    printed = capsys.readouterr().out
    for said in re.findall(r"^```text\n(.*?)^```$", TEXTS[page], re.M | re.S):
        assert said in printed, printed


@pytest.mark.full
def test_commands_run_as_typed(tmp_path: Path) -> None:
    """By bash, each in a process of its own: from a model and a text to a merged model that answers.

    The other commands of the first guide are the same program with other options, and run in this process.
    """
    workplace(tmp_path)
    for block in (blocks(FIRST, run=True)[0], *blocks("serve.md", run=True)):
        run_by_bash(block, tmp_path)


def test_every_guide_is_in_the_readme_and_its_reasons_are_given() -> None:
    for page, text in TEXTS.items():
        assert f"](docs/{page})" in README, page
        assert len(BLOCK.findall(text)) == text.count("```bash"), f"{page}: a block that does not end"
        assert text.count("not run by the tests") == len(blocks(page, run=False)), f"{page}: a marker in no first line"


@cache
def options_of(program: str) -> frozenset[str]:
    """Every option of a program in examples/, asked of its own parser."""
    found: set[str] = set()

    def collect(parser: argparse.ArgumentParser, *_: object) -> None:
        found.update(parser._option_string_actions)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for sub in action.choices.values():
                    collect(sub)

    name = launch.program
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit), redirect_stdout(io.StringIO()):
        patch.setattr(argparse.ArgumentParser, "print_help", collect)
        importlib.import_module(program).main(["--help"])
    launch.program = name
    assert found, program
    return frozenset(found)


def programs() -> list[str]:
    """The programs in examples/ that read a command line."""
    texts = {path.stem: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    return [name for name, text in texts.items() if "\ndef main(argv" in text]


def check_launcher(words: list[str]) -> None:
    """Let a launcher's own parser read what stands before the program."""
    if words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        assert PROGRAM.search(parse_args(words[1:]).user_script)
    elif words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        assert PROGRAM.search(get_args_parser().parse_args(words[1:]).training_script)


@pytest.mark.parametrize("name", ["README.md", *TEXTS])
def test_commands_are_commands(name: str) -> None:
    """In blocks that are not run, too: the programs are there and have these options, and so have the launchers."""
    text = README if name == "README.md" else TEXTS[name]
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S):
        for words in commands(block):
            place = next((n for n, word in enumerate(words) if PROGRAM.search(word)), None)
            if place is None or words[0] not in LAUNCHERS:
                continue
            assert (ROOT / words[place]).is_file(), words[place]
            check_launcher(words)
            given = {word.partition("=")[0] for word in words[place + 1 :] if OPTION.match(word)}
            unknown = given - options_of(PROGRAM.search(words[place])[1])  # type: ignore[index]
            assert not unknown, f"{shlex.join(words)}: {unknown}"


@pytest.mark.parametrize("name", ["README.md", *TEXTS])
def test_options_exist(name: str) -> None:
    """Outside of commands, an option is one of any program; for the original's users, of the original's too."""
    text = README if name == "README.md" else TEXTS[name]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    known = FOREIGN.union(*map(options_of, programs()))
    if name == "migration.md":
        known = known.union(*ORIGINAL.values())
    prose = re.sub(r"`(?:deepspeed|torchrun|vllm) [^`]*`", "", prose)
    assert not set(OPTION.findall(prose)) - known


@pytest.mark.parametrize("name", ["README.md", *TEXTS])
def test_links_lead_somewhere(name: str) -> None:
    folder, text = (ROOT, README) if name == "README.md" else (DOCS, TEXTS[name])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve() if path else folder / name
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target


#: The options that the scripts of the original LongLoRA have of their own (beside transformers' TrainingArguments).
_TRAIN = (
    "model_name_or_path model_type cache_dir optim model_max_length use_flash_attn use_full_attn low_rank_training "
    "trainable_params"
)
_EVALUATE = "batch_size base_model cache_dir seq_len context_size peft_model flash_attn data_path"
_ASK = "base_model cache_dir context_size flash_attn temperature top_p max_gen_len"
ORIGINAL = {
    script: frozenset(f"--{option}" for option in options.split())
    for script, options in {
        "fine-tune.py": _TRAIN,
        "supervised-fine-tune.py": "data_path",
        "supervised-fine-tune-qlora.py": "",
        "get_trainable_weights.py": "checkpoint_path trainable_params",
        "merge_lora_weights_and_save_hf_model.py": "base_model peft_model context_size save_path cache_dir",
        "eval.py": _EVALUATE,
        "eval_distributed.py": "progress_bar_fresh_rate",
        "passkey_retrivial.py": "base_model cache_dir context_size flash_attn max_tokens interval num_tests",
        "inference.py": f"material question {_ASK}",
        "inference-qlora.py": "",
        "demo.py": f"host port {_ASK}",
        "run_streaming_llama_longalpaca.py": "",
        "llama_attn_replace.py": "",
        "llama_attn_replace_sft.py": "",
        "gptneox_attn_replace.py": "",
    }.items()
}


@pytest.mark.parametrize("script", list(ORIGINAL))
def test_the_original_is_answered_option_by_option(script: str) -> None:
    """Each script has a section, each of its options a row in the section's table."""
    sections = re.split(r"^## ", TEXTS["migration.md"], flags=re.M)
    section = next((part for part in sections if f"`{script}`" in part.partition("\n")[0]), None)
    assert section is not None, script
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert ORIGINAL[script] <= set(OPTION.findall(" ".join(rows)))
