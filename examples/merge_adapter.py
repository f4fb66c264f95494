#!/usr/bin/env python
"""Merge an adapter folder into its base model.

    python examples/merge_adapter.py ADAPTER_FOLDER OUTPUT_FOLDER

The output is a standard model folder. LoRA is added to the base weights, and the trained embedding and norms replace
those of the base model. The config has the RoPE parameters and the length of the extended context (for RoPE type
"dynamic" as s2attn_context_length: max_position_embeddings is the old length, beyond which transformers scales). The
tokenizer is included; merge.json says how the folder was made. transformers, and programs that read its folders, load
it without longlora_ext:

    AutoModelForCausalLM.from_pretrained("OUTPUT_FOLDER")

The weights are merged one file at a time: the program needs the memory of one file, not of the model. (DoRA and similar
adapters, and base models with quantised weights, are loaded whole; the program says so.)
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from app.runs.launch import stay_alone  # isort: skip  (first: sets what torch and DeepSpeed read at import)
from app.models.folders import check_run_folder
from app.models.made_by import write_made_by
from app.models.use_model import DTYPES
from app.runs.command_line import Parser, as_program
from app.runs.errors import one_clear_error
from longlora_ext.adapter import merge


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python examples/merge_adapter.py ADAPTER_FOLDER OUTPUT_FOLDER [OPTIONS]",
    )
    parser.add_argument(
        "adapter_folder",
        type=Path,
        metavar="ADAPTER_FOLDER",
        help="the folder 'adapter' that finetune_llama.py wrote (adapter_model.safetensors, longlora.json)",
    )
    parser.add_argument(
        "output_folder",
        type=Path,
        metavar="OUTPUT_FOLDER",
        help="the folder to write; it must not exist, or be empty, and appears when it is complete",
    )
    parser.add_argument(
        "--base_model",
        type=os.path.expanduser,
        metavar="MODEL",
        help="where the base model is now, if it was moved since training",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the merged weights; auto (the default) is the base model's. The adapter is in float32: "
        "merging into bfloat16 rounds it, as computing in bfloat16 does",
    )
    parser.add_argument(
        "--max_shard_size",
        default="5GB",
        metavar="SIZE",
        help="size of a weight file, in bytes or with KB, MB, GB or TB; merging needs about as much memory "
        "(default: 5GB)",
    )
    return parser.parse_args(argv)


@as_program("merge_adapter.py")
def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    stay_alone("merges")
    adapter = options.adapter_folder
    given = {name: getattr(options, name) for name in ("base_model", "dtype", "max_shard_size")}
    with one_clear_error():
        check_run_folder(str(adapter))
        merge(
            adapter,
            options.output_folder,
            **given,
            finish=lambda folder: write_made_by(folder / "merge.json", adapter, given),
        )
    print(f"merged: {options.output_folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
