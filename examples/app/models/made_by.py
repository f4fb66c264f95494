"""merge.json, import.json: what made the folder they lie in out of an adapter, so that one command makes it again.

The command is in the file, with OUTPUT_FOLDER for the place. Versions, the commit and the fingerprints of adapter and
base model tell whether it would be the same.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from app.models.fingerprint import files_fingerprint
from app.runs import launch
from app.runs.command_line import EXAMPLES
from app.runs.json_files import write_json
from app.runs.provenance import commit, versions
from longlora_ext.adapter._load import base_of


def write_made_by(path: Path, adapter: Path, options: Mapping[str, Any]) -> None:
    """Write what this program made of an adapter folder.

    Args:
        path: The file to write.
        adapter: The folder, ours or the original's, which was read and is whole.
        options: All of the program's options by name, `base_model` among them.
    """
    base = base_of(adapter, options["base_model"])
    base = os.path.abspath(base) if os.path.isdir(base) else base
    given = [f"--{name}={value}" for name, value in {**options, "base_model": base}.items()]
    arguments = [str(adapter.resolve()), "OUTPUT_FOLDER", *given]
    record = {
        "command": shlex.join(["python", str(EXAMPLES / launch.program), *arguments]),
        "arguments": arguments,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "adapter": {"name": str(adapter.resolve()), "fingerprint": files_fingerprint(str(adapter))},
        "base_model": {
            "name": base,
            "fingerprint": files_fingerprint(base),
            "revision": getattr(AutoConfig.from_pretrained(base), "_commit_hash", None),  # on the hub
        },
    }
    write_json(path, record)
