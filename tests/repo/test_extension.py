"""benchmarks/extension.py: what its measures measure, and that an arm which was killed goes on."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import extension
from app.evaluation.answer_nats import answer_losses
from app.evaluation.prompts import DEPTHS
from app.inputs.corpus import stdlib_documents
from extending import measures, training
from extending.arms import ARMS
from extending.draw import COLOURS
from extending.material import HELD_OUT, Text, read_text
from extending.results import add
from extending.training import Recipe
from finetune_runs import ROOT
from longlora_ext.data import pad_rows
from tiny_models import tiny_model, tokens

TINY = str(ROOT / "examples" / "tiny_llama")
CONTEXT = 1024


@pytest.fixture(scope="module")
def text() -> Text:
    """Documents of the standard library as the tiny Llama reads them, two of them held out."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    some = [str(document) for document in list(stdlib_documents()[1])[:60]]
    ids = [tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] for document in some]
    long = [document for document in ids if len(document) > CONTEXT]
    return Text("some", long[2:5], {"a": long[0], "b": long[1]})


def options(work: Path, *words: str) -> Any:
    given = ["--context", str(CONTEXT), "--steps", "4", "--save_steps", "2", "--device", "cpu", *words]
    return extension.parse([*given, "--work", str(work), "--results", str(work / "results.json")])


def run(arm: str, work: Path, text: Text, *words: str) -> dict[str, Any]:
    given = options(work, *words)
    (rate,), (seed,) = given.learning_rate, given.seeds
    recipe = Recipe(given.context, given.steps, rate, seed, given.save_steps, given.device)
    return extension.run(arm, recipe, work, TINY, AutoTokenizer.from_pretrained(TINY), text)


def test_arms_are_what_they_say() -> None:
    base = AutoConfig.from_pretrained(TINY)
    configs = {name: arm.config(base, CONTEXT) for name, arm in ARMS.items()}
    assert configs["base"] is base and configs["linear"].rope_parameters["rope_type"] == "linear"
    assert configs["ntk"].rope_parameters["rope_theta"] > base.rope_parameters["rope_theta"]
    assert (configs["s2"].s2attn_group_size, getattr(configs["s2"], "s2attn_sink", None)) == (CONTEXT // 4, None)
    window = configs["window8-sink"]
    assert (window.s2attn_window, window.s2attn_group_size, window.s2attn_sink) == (CONTEXT // 8, 2 * CONTEXT, True)
    assert configs["dense"].s2attn_mode == "dense" and configs["s2-sink-dense-layers"].s2attn_dense_layers


def test_short_rows_are_the_parts_of_the_rows_of_others(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that both are trained on the same text in the same order, whatever the order."""
    seen: dict[str, list[list[int]]] = {}
    for name in ("s2", "short", "short-drawn-alone"):
        seen[name] = batches = []

        def note(rows: list[dict[str, torch.Tensor]], pad_token_id: int, into: list[list[int]] = batches) -> Any:
            into.append([token for row in rows for token in row["input_ids"].tolist()])
            return pad_rows(rows, pad_token_id)

        monkeypatch.setattr(training, "pad_rows", note)
        arm, recipe = ARMS[name], Recipe(CONTEXT, 3, 1e-3, 0, 9, "cpu")
        config = arm.config(AutoConfig.from_pretrained(TINY), CONTEXT)
        training.train(arm, TINY, config, text.train, 0, recipe, tmp_path / name)
    whole, parts, others = seen.values()
    assert [row[: len(part)] for row, part in zip(whole, parts, strict=True)] == parts  # the last row is less filled up
    assert sum(map(len, parts)) > sum(map(len, whole)) - CONTEXT and parts != others and len(whole) >= 3


def test_copying_finds_who_copies_and_who_does_not(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who looks back for the last two tokens, no further than `reach`."""

    def nats(reach: int) -> dict[str, Any]:
        def losses_of(model: Any, states: Any, wanted: torch.Tensor) -> torch.Tensor:
            ids = [0, *wanted.tolist()]
            where: dict[tuple[int, ...], int] = {}
            losses = []
            for i in range(len(wanted)):
                before = tuple(ids[max(0, i - 1) : i + 1])
                known = where.get(before)
                hit = known is not None and i - known <= reach and ids[known + 1] == ids[i + 1]
                losses.append(0.0 if hit else 9.0)
                where[before] = i
            return torch.tensor(losses)

        monkeypatch.setattr(measures, "losses_of", losses_of)
        monkeypatch.setattr(measures, "hidden_states", lambda model, ids: ids[..., None])
        return measures.copying(SimpleNamespace(device="cpu"), text.held_out, CONTEXT)

    far = nats(CONTEXT)
    assert (
        far["distances"] == [256, 512, 896]
        and far["nats"] == pytest.approx([0, 0, 0], abs=0.5)
        and far["first_time"] > 8
    )
    near = nats(600)
    assert near["nats"] == pytest.approx([0, 0, 9], abs=0.5)
    assert [sum(each) / len(each) for each in near["of_each"]] == near["nats"]
    assert list(map(len, near["of_each"])) == near["pairs"]
    assert nats(10)["nats"] == pytest.approx([9, 9, 9], abs=0.5)


@pytest.mark.parametrize("context", [1024, 16384, 32768])
def test_copies_do_not_lie_on_each_other(context: int) -> None:
    span = measures.span_of(context)
    for seed in range(5):
        placed = measures.places(random.Random(seed), context)
        begins = sorted(begin for first, distance in placed for begin in (first, first + distance))
        assert begins[0] > 0 and begins[-1] + span <= context
        assert all(later - earlier >= span for earlier, later in pairwise(begins))
        assert {distance for _, distance in placed} == set(measures.distances(context))
        assert context < 16384 or len(placed) == measures.PAIRS * len(measures.distances(context))


def test_positions_and_short_windows_are_plain_cross_entropy(text: Text) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY)
    ids = {"a": text.held_out["a"]}
    row = torch.tensor([ids["a"][: CONTEXT + 1]])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="none")
        short = torch.tensor([ids["a"][64:129]])
        of_short = torch.nn.functional.cross_entropy(model(short).logits[0, :-1], short[0, 1:])
    found = measures.by_position(model, ids, CONTEXT)
    assert found["edges"] == [0, 128, 256, 512, 768, 1024]
    for (begin, end), nats in zip(pairwise(found["edges"]), found["nats"]["a"], strict=True):
        assert nats == pytest.approx(losses[begin:end].mean().item(), rel=1e-4)
    with torch.no_grad():
        both = measures.short_windows(model, {"a": ids["a"][:129]}, 64)
    assert len(ids["a"]) > 129 and both["window"] == 64
    assert both["nats"] > 0 and of_short > 0
    alone = measures.short_windows(model, {"a": ids["a"][64:129]}, 64)
    assert alone["nats"] == pytest.approx(of_short.item(), rel=1e-4)


def test_a_pass_key_is_asked_at_its_length_and_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    asked: list[tuple[list[int], list[int]]] = []

    def losses(model: Any, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, bool]:
        asked.append((prompt, answer))
        return torch.tensor([1.0, 2.0]), len(asked) % 2 == 0

    monkeypatch.setattr(measures, "answer_losses", losses)
    found = measures.pass_keys(None, tokenizer, 800)
    assert found["nats"] == [1.5] * 8 and sum(found["found"]) == 4
    for (prompt, answer), depth in zip(asked, DEPTHS, strict=True):
        assert 770 < len(prompt) + len(answer) <= 800
        words, key = tokenizer.decode(prompt), tokenizer.decode(answer).strip()
        assert words.count(key) == 2 and words.endswith("The pass key is")
        assert words.index(key) / len(words) == pytest.approx(depth, abs=0.12)


def test_measuring_is_dense_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model(s2attn_group_size=8).train()
    ids = tokens(1, 40)
    with measures.measuring(model), torch.autocast("cpu", enabled=False):
        dense = model(ids, use_cache=False).logits
    assert model.training and model.config.s2attn_mode == "auto"
    torch.testing.assert_close(dense, model.eval()(ids, use_cache=False).logits)
    losses, found = answer_losses(model, [1, 2, 3], [4])
    assert losses.shape == (1,) and isinstance(found, bool)


def test_an_arm_goes_on_where_it_was_killed(text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the training and among the measures; the result is that of an undisturbed run."""
    whole = run("s2-sink-dense-steps", tmp_path / "whole", text)
    stop = training.StepTimes.on_step_begin

    def killed(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt
        stop(self, args, state, control, **rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.StepTimes, "on_step_begin", killed)
        run("s2-sink-dense-steps", tmp_path / "cut", text)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(extension, "pass_keys", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run("s2-sink-dense-steps", tmp_path / "cut", text)
    with monkeypatch.context() as patch:
        patch.setattr(extension, "copying", lambda *_: pytest.fail("it is measured again"))
        cut = run("s2-sink-dense-steps", tmp_path / "cut", text)
    assert cut["training"]["loss"] == whole["training"]["loss"] and len(whole["training"]["loss"]) == 4
    for what in ("copying", "by_position", "short", "pass_key_own", "pass_key_new"):
        assert cut[what] == whole[what]
    assert whole["training"]["tokens"] == 4 * CONTEXT and whole["training"]["seconds_a_step"] > 0
    assert run("s2-sink-dense-steps", tmp_path / "cut", text) == cut  # nothing is computed again


def test_more_steps_go_on_from_fewer(text: Text, tmp_path: Path) -> None:
    """Four steps are the first four of six, and both are measured."""
    four = run("s2-sink", tmp_path / "on", text)
    six = run("s2-sink", tmp_path / "on", text, "--steps", "6")
    whole = run("s2-sink", tmp_path / "whole", text, "--steps", "6")
    assert six["training"]["loss"] == whole["training"]["loss"] and len(six["training"]["loss"]) == 6
    assert six["copying"] == whole["copying"] != four["copying"]
    for result in (four, six):
        add(tmp_path / "r.json", result, {})
    assert json.loads((tmp_path / "r.json").read_text())["arms"] == [four, six]
    with pytest.raises(ValueError, match="trained to step 6 and cannot be measured at 5"):
        run("s2-sink", tmp_path / "on", text, "--steps", "5")


def test_every_arm_has_a_colour_of_its_own() -> None:
    assert COLOURS.keys() == ARMS.keys() and len({*COLOURS.values()}) == len(ARMS)


def test_results_are_shown(text: Text, tmp_path: Path) -> None:
    for arm in ("yarn", "base", "short"):
        result = run(arm, tmp_path, text)
        if arm == "yarn":
            del result["copying"]["of_each"]  # as in results of before
        add(
            tmp_path / "r.json",
            result,
            {"model": "m", "context": CONTEXT, "text": "t"},
        )
    content = json.loads((tmp_path / "r.json").read_text())
    for result in content["arms"]:
        result["made"]["dtype"] = "bfloat16"  # whatever this machine computes in
    (tmp_path / "r.json").write_text(json.dumps(content))
    shown = extension.show(tmp_path / "r.json").splitlines()
    assert [line.split(" | ")[0] for line in shown[4:]] == [
        "| the model as it is", "| YaRN alone", "| dense attention in rows of N/8 tokens",
    ]  # fmt: skip
    assert "ppl 0-128" in shown[2] and "copy 896" in shown[2]
    assert [line.count("±") for line in shown[4:]] == [3, 0, 3]
    assert all(matplotlib.image.imread(tmp_path / name).ndim == 3 for name in ("r.png", "r_curves.png"))
    made = json.loads((tmp_path / "r.json").read_text())["arms"][0]["made"]
    assert made["torch"] == torch.__version__ and made["date"] and made["commit"] and made["device"]
    with pytest.raises(ValueError, match="holds another experiment"):
        add(tmp_path / "r.json", result, {"model": "other"})

    result["made"]["dtype"], keys = "float32", result["pass_key_new"]
    keys["nats"] = [math.nan] * len(keys["nats"])
    result["by_position"]["nats"]["a"][-1] = math.inf
    add(tmp_path / "r.json", result, content["setting"])  # an arm that diverged, for the one of before
    last = extension.show(tmp_path / "r.json").splitlines()[-1].split(" | ")
    assert last[0] == "| dense attention in rows of N/8 tokens (float32)" and "nan" in " ".join(last)


def test_arms_of_one_setting_are_not_taken_for_those_of_another(text: Text, tmp_path: Path, monkeypatch) -> None:
    """Nor begins a program that would find an arm trained too far at its turn, after hours."""
    monkeypatch.setattr(extension, "model_and_tokenizer", lambda _: (TINY, AutoTokenizer.from_pretrained(TINY)))
    monkeypatch.setattr(extension, "read_text", lambda *_: text)
    words = ["--context", str(CONTEXT), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "r.json")]
    trained = tmp_path / "work" / f"s2-{CONTEXT}-0.0005-0" / "checkpoint-4"
    trained.mkdir(parents=True)
    (trained / "trainer_state.json").write_text('{"global_step": 4}')
    with pytest.raises(ValueError, match=r"s2-1024-.* is trained to step 4 and cannot be measured at 2 any more"):
        extension.main([*words, "--device", "cpu", "--steps", "2", "--arms", "base", "s2"])
    assert not (tmp_path / "r.json").exists()
    monkeypatch.setattr(extension, "read_text", lambda *_: Text("other", text.train[:1], text.held_out))
    with pytest.raises(ValueError, match="work holds arms of another experiment"):
        extension.main([*words, "--device", "cpu", "--steps", "4", "--arms", "base"])


def test_held_out_documents_are_whole_long_and_not_trained_on(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "perl-doc" / "pod"
    folder.mkdir(parents=True)
    for number in range(120):
        (folder / f"perl{number}.pod").write_text(f"manual {number} " + "words of it " * (2000 if number < 12 else 20))
    (folder / "perltoc.pod").write_text("all of them " * 3000)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    monkeypatch.setattr("extending.material._manuals", lambda root, real=None: sorted(map(str, folder.glob("*.pod"))))
    found = read_text(tmp_path, tokenizer, CONTEXT)
    assert len(found.held_out) == HELD_OUT and "perltoc" not in found.held_out
    assert all(len(ids) > CONTEXT for ids in found.held_out.values()) and len(found.train) == 12 - HELD_OUT
    assert not any(ids == held for ids in found.train for held in found.held_out.values())
    assert all(ids[-1] == tokenizer.eos_token_id for ids in found.train)
    assert found.description() == read_text(tmp_path, tokenizer, CONTEXT).description()
    with pytest.raises(ValueError, match="documents of 100,000 tokens, and 8 are needed"):
        read_text(tmp_path, tokenizer, 100000)
