"""Write docs/models.md: what becomes of every causal decoder that transformers has. `python docs/make_models.py`

It takes a minute of computing, and builds, trains, saves, loads and merges a small model of each type.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "examples")]

PAGE = Path(__file__).with_name("models.md")

_HEAD = """\
# Models

Made by `python docs/make_models.py` with transformers {version}: it builds a small model of every type of causal
decoder with rotary position embeddings, with random weights. {runs} of {all} run. For these it was tested that

- in training each attention layer computes S2-Attn of its own queries, keys and values, as the definition says, in a
  sliding window where the layer has one;
- in evaluation and `generate` the model computes what it does with transformers' own attention;
- documents packed into one row get the logits that they get alone. Where the table says *padded*, sharing a row is
  refused, and each document needs rows of its own (`--rows padded`);
- LoRA's factors, embedding and norms train, and the adapter, saved and loaded, and the merged model compute the same.

The others are refused before a training starts, with the reason in the table. *S2-Attn in* counts the attention layers
that compute S2-Attn, of all layers of the small model: the others are linear attention, convolutions and the like. The
last column says what `finetune_llama.py` refuses though the package can do it. RoPE was scaled linearly, or as the
model has it already. Phi-3 and Phi-3.5-MoE take neither linear nor yarn, but `ntk` and `longrope`. The latter is linear
with one factor for all frequencies, and was tested so (`rope_type="longrope"`, `short_factor` and `long_factor` of
equal numbers, `attention_factor` 1).

Models with a part for images or sound are not in the table, and refused. The text model in one (Gemma 3, LLaVA,
Mistral 3) becomes a folder of its own, of which it is known that its logits are the same:

```python
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

name, folder = "google/gemma-3-4b-it", "gemma-3-4b-text"
whole = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
text = AutoModelForCausalLM.from_config(whole.config.get_text_config(), dtype=whole.dtype)
text.model.load_state_dict(whole.model.language_model.state_dict())
text.lm_head.load_state_dict(whole.lm_head.state_dict())
text.generation_config = whole.generation_config
text.save_pretrained(folder)
AutoTokenizer.from_pretrained(name).save_pretrained(folder)
```

Where transformers has no causal decoder of the text model alone (Qwen2.5-VL), `from_config` says "Unrecognized
configuration class".

| model type | runs | S2-Attn in | rows | `finetune_llama.py` |
|---|---|---|---|---|
"""


def line(kind: str, verdict: Any) -> str:
    """A row of the table."""
    if verdict.refusal:
        return f"| {kind} | no: {_cell(verdict.refusal)} | | | |\n"
    layers = f"{verdict.layers[0]} of {verdict.layers[1]}" if verdict.layers[0] < verdict.layers[1] else "all"
    return f"| {kind} | yes | {layers} | {verdict.rows} | {_cell(verdict.programs) or 'yes'} |\n"


def _cell(text: str) -> str:
    text = " ".join(text.split()).removeprefix("attn_implementation='s2attn' ")
    return text.replace("|", "\\|").partition(": use attn_implementation")[0]


def page(verdicts: dict[str, Any]) -> str:
    """The whole page."""
    import transformers

    runs = sum(not verdict.refusal for verdict in verdicts.values())
    head = _HEAD.format(version=transformers.__version__, runs=runs, all=len(verdicts))
    return head + "".join(line(kind, verdicts[kind]) for kind in sorted(verdicts))


if __name__ == "__main__":
    from every_decoder import verdict
    from small_decoders import kinds

    PAGE.write_text(page({kind: verdict(kind) for kind in kinds()}), encoding="utf-8")
