"""Reads and writes 300-W `.pts` annotations."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from lmexp.errors import LmexpError


def read_pts(path: Path, count: int = 68) -> Tensor:
    """Read one annotation file.

    The format is text: `version: 1`, `n_points: 68`, then the points between braces, one
    "x y" a line, counted from 1.

    Args:
        path: the file.
        count: points that it must hold.

    Returns:
        landmarks: [count, 2], float32, x then y, px of the image, counted from 0.

    Raises:
        LmexpError: the file can't be read, isn't in this format, or holds another number
            of points.
    """
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise LmexpError(f"{path}: {reason}; give a 300-W .pts file") from error
    _, opening, rest = text.partition("{")
    body, closing, _ = rest.partition("}")
    if not opening or not closing:
        raise LmexpError(f"{path}: no points between braces; give a 300-W .pts file")
    points = []
    for line in body.split("\n"):
        if not line.strip():
            continue
        try:
            x, y = map(float, line.split())
        except ValueError as error:
            raise LmexpError(f"{path}: '{line.strip()}' is not a point; write 'x y'") from error
        if not (math.isfinite(x) and math.isfinite(y)):
            raise LmexpError(f"{path}: '{line.strip()}' is not finite; write 'x y' in px")
        points.append((x - 1, y - 1))
    if len(points) != count:
        raise LmexpError(f"{path}: {len(points)} points; {count} are needed")
    return torch.tensor(points, dtype=torch.float32)


def write_pts(path: Path, landmarks: Tensor) -> None:
    """Write `landmarks` ([K, 2], px counted from 0) in the format of `read_pts`."""
    lines = [f"{x + 1:.2f} {y + 1:.2f}" for x, y in landmarks.tolist()]
    path.write_text(
        "\n".join(("version: 1", f"n_points: {len(lines)}", "{", *lines, "}", "")),
        encoding="ascii",
    )
