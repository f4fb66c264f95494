"""`--dense_layers`: which layers attend densely in training, as it is written on the command line."""

from __future__ import annotations


def asked_layers(text: str | None) -> int | list[int] | None:
    """What `--dense_layers` asks for: how many of the last layers, or a list of indices.

    Args:
        text: "3" are the last three; "0,5,29" are these; "5," is that one.

    Raises:
        ValueError: It is neither.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",") if part.strip()] if "," in text else int(text)
    except ValueError:
        raise ValueError(
            f"--dense_layers must be a number of last layers (3) or indices with commas (0,5,29 or 5,), got {text!r}"
        ) from None
