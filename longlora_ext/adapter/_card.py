"""README.md of an adapter folder: a model card, as the hub reads it and as a person does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from longlora_ext._pattern import in_words

CARD = "README.md"

_TEXT = """\
---
{metadata}
---

# {title}

An adapter of {base} for a context of {context:,} tokens, made with longlora_ext
([LongLoRA](https://arxiv.org/abs/2309.12307): shifted short attention, LoRA, and embedding and norms trained in full).

| | |
|---|---|
{rows}

## Use

An adapter changes RoPE as well as weights, so PEFT alone does not load it right:

```python
import longlora_ext
from transformers import AutoTokenizer

model = longlora_ext.load("PATH_OF_THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
```

`longlora_ext.merge("PATH_OF_THIS_FOLDER", "merged")` makes a plain model folder of it, for transformers, vLLM and
llama.cpp. `longlora.json` holds the context extension. If there is a `run.json` or `import.json`, it says how the
adapter was made.
"""


def write_card(folder: Path, record: dict[str, Any], peft_config: Any) -> None:
    """Write the card of an adapter.

    Args:
        folder: The adapter folder.
        record: What `longlora.json` holds.
        peft_config: The adapter's `PeftConfig`.
    """
    base = str(peft_config.base_model_name_or_path or "")
    is_on_hub = bool(base) and not os.path.isabs(base)
    name = base if is_on_hub else os.path.basename(base.rstrip("/"))  # where a folder is, is nobody's business
    metadata = ModelCardData(
        base_model=base if is_on_hub else None,
        base_model_relation="adapter" if is_on_hub else None,
        library_name="longlora_ext",  # of peft the hub would show how to load it without its RoPE
        pipeline_tag="text-generation",
        tags=["longlora", "s2-attn", "lora", "long-context"],
    )
    context, group = record["context_length"], record["config"].get("s2attn_group_size")
    rows = {
        "base model": f"`{name}`" if name else None,
        "context": f"{context:,} tokens",
        "RoPE": ", ".join(f"{field} {_short(value)}" for field, value in record["rope_parameters"].items()),
        "group size of S2-Attn": group and f"{group:,} tokens, in training; attention is dense in use",
        "layers dense in training": in_words(record["config"].get("s2attn_dense_layers") or ()),
        str(getattr(peft_config.peft_type, "value", peft_config.peft_type)).replace("LORA", "LoRA"): _lora(peft_config),
        "trained in full": _listed(getattr(peft_config, "modules_to_save", None)),
    }
    text = _TEXT.format(
        metadata=metadata.to_yaml(),
        title=f"{name or 'Adapter'}, {context:,} tokens",
        base=f"`{name}`" if name else "a model",
        context=context,
        rows="\n".join(f"| {title} | {value} |" for title, value in rows.items() if value),
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def _lora(peft_config: Any) -> str | None:
    rank = getattr(peft_config, "r", None)
    on = _listed(getattr(peft_config, "target_modules", None))
    alpha = getattr(peft_config, "lora_alpha", getattr(peft_config, "alpha", None))  # LoHa and LoKr; VeRA has none
    return ", ".join([f"rank {rank}", *([f"alpha {alpha}"] if alpha is not None else []), f"on {on}"]) if rank else None


def _short(value: Any) -> str:
    """A value of `rope_parameters`, of which LongRoPE has lists of a number for each frequency."""
    if isinstance(value, dict):
        return f"({', '.join(f'{name} {_short(inner)}' for name, inner in value.items())})"
    return f"of {len(value)} numbers" if isinstance(value, (list, tuple)) else str(value)


def _listed(names: Any) -> str:
    """A pattern, or some names."""
    return f"`{names}`" if isinstance(names, str) else ", ".join(f"`{name}`" for name in sorted(names or ()))
