"""What a user types for a model: a folder, a name on a hub, or a GGUF file, by its path or by `--gguf_file`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig

from app.models.folders import is_adapter
from longlora_ext.adapter._checkpoint import listed, refuse_pointer

LENGTH = "max_position_embeddings"
GGUF_HELP = "The GGUF file to load, where the model is a folder (or hub repository) that holds one."


def find_model(name: str, gguf_file: str | None = None) -> tuple[str, str | None]:
    """
    The folder or hub name, and the name of the GGUF file in it if that is what is meant.

    Args:
        name: What was typed; `~` is the user's home.
        gguf_file: The file's name, where `name` is its folder.

    Returns:
        What `from_pretrained` takes, and what it takes as its `gguf_file`.

    Raises:
        ValueError, OSError: There is no such folder or file, it is not said which file, or it is no GGUF file.
    """
    name = os.path.expanduser(name)
    if not name.strip():
        raise ValueError("the name is empty")
    if name.lower().endswith(".gguf") and not os.path.isdir(name):
        if gguf_file is not None:
            raise ValueError("this is a file already: --gguf_file goes with the folder that it is in")
        folder, gguf_file = os.path.split(name)
        name = folder or "."
        if not (Path(name) / gguf_file).is_file():
            raise FileNotFoundError("there is no such file")
    elif os.path.isfile(name):
        raise ValueError("this is a file: give the folder that it is in")
    if os.path.isdir(name):
        _check_gguf(Path(name), gguf_file)
    elif _is_path(name):
        raise FileNotFoundError("there is no such folder")
    return name, gguf_file


def check_config(name: str, gguf_file: str | None = None) -> None:
    """
    Raise an error for a model without a config, and for a config without the length that the model was trained on.

    Transformers would take one of its own for that, silently.

    Args:
        name: As `find_model` gives it, or a config.json.
        gguf_file: Likewise.

    Raises:
        ValueError, OSError: What it says.
    """
    if os.path.isdir(name) and gguf_file is None and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError("there is no config.json in it")
    try:
        said, _ = PreTrainedConfig.get_config_dict(name, **({"gguf_file": gguf_file} if gguf_file else {}))
    except OSError as error:
        where = "" if os.path.exists(name) else "there is no such folder, and on the hub: "
        raise OSError(f"{where}{error}") from error
    except TypeError:  # of older transformers, which read fields of what is none
        said = None
    if not isinstance(said, dict):
        raise ValueError("its config.json is no JSON object")
    kind = CONFIG_MAPPING[said["model_type"]] if said.get("model_type") in CONFIG_MAPPING else None
    default = getattr(kind, LENGTH, None)
    spellings = (LENGTH, getattr(kind, "attribute_map", {}).get(LENGTH))
    if isinstance(default, int) and not any(spelling in said for spelling in spellings):
        raise ValueError(
            f"its config says no {LENGTH}, and transformers would take {default:,}: write into it what the model was "
            "trained on"
        )


def _is_path(name: str) -> bool:
    """Whether that cannot be a name on a hub, which is NAME or OWNER/NAME."""
    return name.startswith((".", "/")) or name.rstrip("/").count("/") > 1


def _check_gguf(folder: Path, gguf_file: str | None) -> None:
    held = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    if gguf_file is None:
        # Repositories of GGUF files have a config.json too, often of one line.
        has_weights = any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin"))
        if held and not has_weights and not is_adapter(str(folder)):
            raise ValueError(f"there are no weights in it but {listed(held)}: say which by --gguf_file")
        return
    file = folder / gguf_file
    if not file.is_file():
        raise FileNotFoundError(f"there is no {gguf_file} in it{f', but {listed(held)}' if held else ''}")
    refuse_pointer(file)
    with open(file, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{gguf_file} is no GGUF file")
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", gguf_file) and not gguf_file.endswith("-00001-of-00001.gguf"):
        raise ValueError(f"{gguf_file} is one of several parts: llama-gguf-split --merge makes one file of them")
