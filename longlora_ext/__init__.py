"""Shifted short attention (S2-Attn) for extending the context of Llama-type models by LoRA fine-tuning.

Importing the package loads `torch.ops.longlora.s2attn` and nothing else; `longlora_ext.attention` puts it under
transformers, `longlora_ext.config` and `longlora_ext.adapter` extend and fine-tune a model with it. What the package
offers of these is imported when it is asked for.

Where the library cannot be loaded, the package can still be imported, with a warning, so that `python -m
longlora_ext.env` can report on the machine. Whatever needs the library raises `ImportError`.
"""

import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from longlora_ext.documents import doc_start_from_cu_seqlens, doc_start_from_mask, doc_start_from_position_ids

if TYPE_CHECKING:
    from longlora_ext.adapter import import_longlora, load, lora_config, merge, prepare_model, save_adapter, stop_at
    from longlora_ext.config import extend_config
    from longlora_ext.independence import check_documents_apart
    from longlora_ext.loss import tile_loss
    from longlora_ext.sinks import add_key, add_learned_sink

try:
    __version__ = version("longlora_ext")
except PackageNotFoundError:  # a source tree on the path, which is not installed
    __version__ = "0+unknown"

try:
    from longlora_ext.ops import s2attn, why_unsupported
except ImportError as error:
    warnings.warn(f"the operator of longlora_ext is not there: {error}", RuntimeWarning, stacklevel=2)

#: Where names are that are imported when they are asked for; those of the operator, once more, for their error.
_HOMES = {
    "s2attn": "ops",
    "why_unsupported": "ops",
    "import_longlora": "adapter",
    "load": "adapter",
    "lora_config": "adapter",
    "merge": "adapter",
    "prepare_model": "adapter",
    "save_adapter": "adapter",
    "extend_config": "config",
    "check_documents_apart": "independence",
    "stop_at": "adapter",
    "tile_loss": "loss",
    "add_key": "sinks",
    "add_learned_sink": "sinks",
}

__all__ = [
    "add_key",
    "add_learned_sink",
    "check_documents_apart",
    "doc_start_from_cu_seqlens",
    "doc_start_from_mask",
    "doc_start_from_position_ids",
    "extend_config",
    "import_longlora",
    "load",
    "lora_config",
    "merge",
    "prepare_model",
    "s2attn",
    "save_adapter",
    "stop_at",
    "tile_loss",
    "why_unsupported",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] in ("adapter", "config"):  # whoever extends a model asks for attn_implementation="s2attn" next
        import_module(f"{__name__}.attention")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
