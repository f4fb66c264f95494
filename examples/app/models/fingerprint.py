"""Which model that is, by its files: the same wherever they lie, and told before any weight is loaded."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

CONFIGS = ("config.json", "adapter_config.json", "longlora.json")  # a model's, and those of an adapter
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_ENDS = 1 << 16  # bytes read at each end of a file: its header or first weights, and its last weights


def files_fingerprint(model: str) -> str:
    """Tell a model, or an adapter, from others.

    Args:
        model: A folder, or a hub name.

    Returns:
        The SHA-256 of a folder's configs and of both ends of its files of weights, whose whole would take minutes to
        read; the name of what is on a hub.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for config in (folder / name for name in CONFIGS):
        digest.update(config.read_bytes() if config.is_file() else b"")
    for path in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size} ".encode())
            for start in (0, max(0, size - _ENDS)):
                file.seek(start)
                digest.update(file.read(_ENDS))
    return f"sha256:{digest.hexdigest()}"
