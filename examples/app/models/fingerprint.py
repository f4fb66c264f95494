"""Which model that is, by its files: the same wherever they lie, and told before any weight is loaded."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

CONFIGS = ("config.json", "adapter_config.json", "longlora.json")  # a model's, and those of an adapter
WEIGHTS = ("*.safetensors", "*.bin")
_ENDS = 1 << 16  # bytes read at each end of a file: its header or first weights, and its last weights


def files_fingerprint(model: str, gguf_file: str | None = None) -> str:
    """Tell a model, or an adapter, from others.

    Args:
        model: A folder, or a hub name.
        gguf_file: The GGUF file in it that is the model; other files there have no part in it.

    Returns:
        The SHA-256 of a folder's configs and of both ends of its files of weights, whose whole would take minutes to
        read; the name of what is on a hub.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    if gguf_file:
        weights = [folder / gguf_file]
    else:
        weights = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
        for config in (folder / name for name in CONFIGS):
            digest.update(config.read_bytes() if config.is_file() else b"")
    for path in weights:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size} ".encode())
            for start in (0, max(0, size - _ENDS)):
                file.seek(start)
                digest.update(file.read(_ENDS))
    return f"sha256:{digest.hexdigest()}"
