"""What was read, in the cache of `datasets`: a second run finds it there, and memory holds a few megabytes of it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import datasets
import pyarrow as pa

from app.inputs import json_values, reading

TABLE_BYTES = 2**22
TABLE_ROWS = 10_000


@contextmanager
def cache_named() -> Iterator[None]:
    """Name the cache, and what to do, where it cannot be written to."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the cache, {datasets.config.HF_DATASETS_CACHE}, cannot be written to: {error.strerror or error}. Another "
            "folder, with room for the text and its tokens, is named by the environment variable HF_DATASETS_CACHE, or "
            "by HF_HOME"
        ) from error


def cached(files: list[str], column: str | None) -> datasets.Dataset:
    """Read files, or find what was read of them before.

    Args:
        files: Their names. A file that changed is read again.
        column: What holds the text of a row; None for whole rows.

    Returns:
        One column: `text`, the documents, or `row`, each row as JSON.

    Raises:
        ValueError: A file that cannot be read.
        OSError: The cache cannot be written to.
    """
    config = {"files": tuple(files), "states": tuple(map(reading.state_of, files)), "column": column}
    code = hashlib.sha256("".join(map(inspect.getsource, (reading, json_values))).encode()).hexdigest()[:16]
    with cache_named():
        try:
            builder = _Builder(dataset_name="longlora_text", hash=code, **config)
            builder.download_and_prepare()
            return builder.as_dataset(split="train")
        except datasets.exceptions.DatasetGenerationError as error:  # around what went wrong
            raise error.__cause__ or error from None


@dataclass
class _Files(datasets.BuilderConfig):
    """What the name of a cache depends on."""

    files: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    column: str | None = None


class _Builder(datasets.ArrowBasedBuilder):
    """Writes a cache, which appears when it is complete, behind a lock and with a progress bar.

    Files are not opened in this module: in that of a builder `datasets` makes `open` and `Path` take names for URLs.
    """

    BUILDER_CONFIG_CLASS = _Files

    def _info(self) -> datasets.DatasetInfo:
        name = "row" if self.config.column is None else "text"
        return datasets.DatasetInfo(features=datasets.Features({name: datasets.Value("large_string")}))

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train", gen_kwargs={"files": self.config.files})]

    def _generate_tables(self, files: tuple[str, ...]) -> Iterator[tuple[int, pa.Table]]:
        rows: list[bytes | None] = []
        size = number = 0
        for file in files:
            for text in self._texts(file):
                # A table of a single row `datasets` would hold back, up to a thousand of them.
                if len(rows) > 1 and (size >= TABLE_BYTES or len(rows) >= TABLE_ROWS):
                    yield number, self._table(rows)
                    rows, size, number = [], 0, number + 1
                rows.append(text)
                size += len(text or b"")
        if rows:
            yield number, self._table(rows)

    def _table(self, rows: list[bytes | None]) -> pa.Table:
        return pa.table({name: pa.array(rows, pa.large_string()) for name in self.info.features})

    def _texts(self, file: str) -> Iterator[bytes | None]:
        column, number = self.config.column, 0
        try:
            texts = reading.read_rows(file) if column is None else reading.read_texts(file, column)
            for number, text in enumerate(texts, 1):  # noqa: B007
                yield text
            if not number:
                raise ValueError("it has no rows")
        except Exception as error:  # of what packs, of Parquet, of the file: as many types as libraries
            reason = error.strerror if isinstance(error, OSError) else None
            short = " ".join(str(reason or error).split())[:300] or type(error).__name__
            raise ValueError(f"cannot read {file} as {reading.format_of(file)}: {short}") from error
