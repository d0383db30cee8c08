"""From heat maps to coordinates, finer than a cell."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW = 7
"""Side of the neighbourhood that is averaged, in cells."""


def decode(heatmaps: Tensor, side: float) -> Tensor:
    """Find each heat map's peak by the centroid of the cells around its maximum.

    The maximum gives the cell; the mean position of the WINDOW × WINDOW cells around it,
    weighted by their positive part, gives the fraction. A landmark whose map is nowhere
    positive is put at its maximum.

    Args:
        heatmaps: [N, K, h, w].
        side: side of the square image that the maps cover, in px.

    Returns:
        landmarks: [N, K, 2], x then y, px of the image: the image spans [0, side], so the
            centre of cell (0, 0) is at (side / (2 w), side / (2 h)).
    """
    n, k, height, width = heatmaps.shape
    flat = heatmaps.reshape(n, k, height * width).float()
    peak = flat.argmax(dim=2)
    row, column = peak // width, peak % width
    reach = WINDOW // 2
    offset = torch.arange(-reach, reach + 1, device=heatmaps.device)
    padded = F.pad(
        flat.reshape(n, k, height, width).clamp_min(0), (reach, reach, reach, reach)
    ).reshape(n, k, -1)
    rows = row[..., None, None] + reach + offset[:, None]
    columns = column[..., None, None] + reach + offset
    cells = (rows * (width + 2 * reach) + columns).reshape(n, k, -1)
    mass = padded.gather(2, cells).reshape(n, k, WINDOW, WINDOW)
    total = mass.sum(dim=(2, 3)).clamp_min(torch.finfo(mass.dtype).tiny)
    shift = offset.to(mass.dtype)
    x = column + (mass.sum(dim=2) * shift).sum(dim=2) / total
    y = row + (mass.sum(dim=3) * shift).sum(dim=2) / total
    return torch.stack(((x + 0.5) * (side / width), (y + 0.5) * (side / height)), dim=2)
