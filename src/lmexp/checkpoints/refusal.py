"""How the readers of this package say no."""

from __future__ import annotations


class RefusedError(Exception):
    """A file is not what it should be: the reason, and the way out where there is one.

    `checkpoint.load` puts the file's name in front of it and raises an `LmexpError`.
    """

    def __init__(self, reason: str, way_out: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.way_out = way_out


def show(text: object, length: int = 60) -> str:
    """Text out of an untrusted file as printable ASCII on one line, cut to `length` characters."""
    if not isinstance(text, str):
        return f"a value of type {type(text).__name__}"
    shown = ascii(text[: length + 1])[1:-1]
    return shown if len(shown) <= length else f"{shown[: length - 3]}..."
