"""How numbers and lists are written in what the programs print."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, thing: str) -> str:
    """`1 document`, `2,000 documents`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def listed(words: Sequence[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`; a longer list of longer words has a comma before the last as well."""
    comma = "," if any(" " in word for word in words) and len(words) > 2 else ""
    return f"{', '.join(words[:-1])}{comma} {last} {words[-1]}" if len(words) > 1 else words[0]
