"""The values in a file of JSON, one by one, so that the file may be of any length."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

PIECE = 2**20  # bytes that are read at once
SPACE = re.compile("[ \t\n\r\ufeff]*")  # of JSON, and byte order marks, which stay where files were put together
LONGEST_WORD = 16  # characters that make no sense without those behind them, outside of strings: -Infinity has 9


class JsonValues:
    """The values in a file of JSON: those of one array, or one after another, which JSON Lines is a case of.

    Iterating gives the line that a value begins in, from 1 on, and the value. A key that an object has twice stands for
    a `Repeated`. Bytes that are no UTF-8 are let pass within strings, as lone surrogates.

    Args:
        stream: The file.

    Raises:
        ValueError: What is no JSON, with its line.
    """

    def __init__(self, stream: BinaryIO) -> None:
        data = stream.read(PIECE)
        self.stream = stream
        self.bytes = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text = self.bytes.decode(without_mark(data))  # what was read, less what was told of
        self.place = 0  # in that text
        self.line = 1
        self.ended = False
        self.scan = json.JSONDecoder(object_pairs_hook=_object).raw_decode
        self.in_array = self._next() == "["

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        if not self.in_array:
            while self._next():
                yield self._value()
            return
        self.place += 1
        if self._next() == "]":
            self.place += 1
        else:
            yield self._value()
            while self._separator() == ",":
                yield self._value()
        if self._next():
            raise ValueError(f"line {self.line:,}: nothing may follow the array")

    def _separator(self) -> str:
        """What stands behind a value of an array, which is passed."""
        separator = self._next()
        if separator not in (",", "]"):
            raise ValueError(f"line {self.line:,}: the array neither goes on with ',' nor ends with ']'")
        self.place += 1
        return separator

    def _more(self) -> None:
        data = self.stream.read(max(PIECE, len(self.text) - self.place))  # twice as much for a value that is not whole
        self.ended = not data
        self.text = self.text[self.place :] + self.bytes.decode(data, final=self.ended)
        self.place = 0

    def _advance(self, place: int) -> None:
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def _next(self) -> str:
        """Go to the next character that is no white space, and return it; "" at the end."""
        while True:
            self._advance(SPACE.match(self.text, self.place).end())  # type: ignore[union-attr]
            if self.place < len(self.text) or self.ended:
                return self.text[self.place : self.place + 1]
            self._more()

    def _value(self) -> tuple[int, Any]:
        self._next()
        while True:
            try:
                value, end = self.scan(self.text, self.place)
                break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - LONGEST_WORD
                if not cut or self.ended:
                    line = self.line + self.text.count("\n", self.place, error.pos)
                    at = repr(self.text[error.pos : error.pos + 20]) if error.pos < len(self.text) else "the end"
                    raise ValueError(f"line {line:,}: {error.msg.removesuffix(' at')} at {at}") from error
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits, lists in lists in lists
                raise ValueError(f"line {self.line:,}: {error}") from error
            self._more()
        line = self.line
        self._advance(end)
        return line, value


class Repeated:
    """The value of a key that an object has twice: which one is meant nobody knows."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __repr__(self) -> str:
        return "given twice"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        found |= {key: Repeated(key) for key in found if times[key] > 1}
    return found


def without_mark(data: bytes) -> bytes:
    """The beginning of a text in UTF-8, less a byte order mark.

    Raises:
        ValueError: That mark is one of UTF-16, in words that follow the text's name.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        said = "its first two are the byte order mark of UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)"
        raise ValueError(f"is no text in UTF-8: invalid start byte at byte 0; {said}")
    return data.removeprefix(codecs.BOM_UTF8)
