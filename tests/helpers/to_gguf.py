"""llama.cpp's converter, from its source: python to_gguf.py SOURCE MODEL_FOLDER FILE.

The converter knows tokenizers by a list of fingerprints, and refuses all others. The tiny Llama's, which was trained
for it, splits text as GPT-2's does, and that is said here. Nothing else is changed.
"""

import sys

source, model, file = sys.argv[1:]
sys.path[:0] = [source, f"{source}/gguf-py"]
import convert_hf_to_gguf  # noqa: E402
from conversion.base import TextModel  # noqa: E402

known = TextModel.get_vocab_base_pre


def split(self, tokenizer) -> str:  # type: ignore[no-untyped-def]
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return "gpt-2"


TextModel.get_vocab_base_pre = split
sys.argv[1:] = [model, "--outfile", file, "--outtype", "f32"]
convert_hf_to_gguf.main()
