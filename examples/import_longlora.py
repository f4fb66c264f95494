#!/usr/bin/env python
"""Convert an adapter of the original LongLoRA, your own or a released one, to an adapter folder of this project.

    python examples/import_longlora.py RELEASE OUTPUT_FOLDER --context_length 8192

RELEASE is a folder with adapter_config.json, adapter_model.bin and trainable_params.bin, such as
Llama-2-7b-longlora-8k. For a checkpoint of your own, the original's get_trainable_weights.py makes these files. The
result is used like any adapter of this project; import.json in it says how it was made:

    python examples/merge_adapter.py OUTPUT_FOLDER merged/
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from app.runs.launch import stay_alone  # isort: skip  (first: sets what torch and DeepSpeed read at import)
from app.models.made_by import write_made_by
from app.runs.command_line import Parser, as_program
from app.runs.errors import one_clear_error
from longlora_ext.adapter import import_longlora


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python examples/import_longlora.py RELEASE OUTPUT_FOLDER --context_length TOKENS [OPTIONS]",
    )
    parser.add_argument("release", type=Path, metavar="RELEASE", help="the original's folder")
    parser.add_argument(
        "output_folder",
        type=Path,
        metavar="OUTPUT_FOLDER",
        help="the adapter folder to write; it must not exist, or be empty, and appears when it is complete",
    )
    parser.add_argument(
        "--context_length",
        type=int,
        required=True,
        metavar="TOKENS",
        help="the trained context: none of the files records it, but the name does (8k is 8192, 100k is 100000)",
    )
    parser.add_argument(
        "--base_model",
        type=os.path.expanduser,
        metavar="MODEL",
        help="a folder or hub name of the base model, in place of the one that adapter_config.json names",
    )
    return parser.parse_args(argv)


@as_program("import_longlora.py")
def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    stay_alone("imports")
    release = options.release
    given = {name: getattr(options, name) for name in ("base_model", "context_length")}
    with one_clear_error():
        import_longlora(
            release,
            options.output_folder,
            **given,
            finish=lambda folder: write_made_by(folder / "import.json", release, given),
        )
    print(f"imported: {options.output_folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
