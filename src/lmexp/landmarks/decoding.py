"""From heat maps to coordinates, finer than a cell."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SMOOTHING = 1.0
"""Standard deviation of the Gaussian that maps are smoothed with, in cells."""

FLOOR = 1e-6
"""Least height that a logarithm is taken of, as a share of the map's peak."""


def decode(heatmaps: Tensor, side: float) -> Tensor:
    """Find each heat map's peak by one Newton step on its logarithm.

    A Gaussian's logarithm is a parabola, so that from the highest cell one step of Newton's
    method, on the map smoothed against noise, arrives at the peak. The step is at most one
    cell; where the map is no hill (flat, or not positive) the answer is the cell's centre.

    Source: Zhang et al., "Distribution-aware coordinate representation for human pose
    estimation", CVPR 2020 (arXiv 1910.06278), section 3.2.

    Args:
        heatmaps: [N, K, h, w], h and w at least 3.
        side: side of the square image that the maps cover, in px.

    Returns:
        landmarks: [N, K, 2], x then y, px of the image: the image spans [0, side], so the
            centre of cell (0, 0) is at (side / (2 w), side / (2 h)).
    """
    n, k, height, width = heatmaps.shape
    maps = heatmaps.reshape(n * k, 1, height, width).float()
    peak = maps.flatten(1).argmax(dim=1)
    # From a border cell the step starts one cell inside, where all nine neighbours exist.
    row = (peak // width).clamp(1, height - 2)
    column = (peak % width).clamp(1, width - 2)

    smooth = smoothed(maps.clamp_min(0)).flatten(1)
    top = smooth.amax(dim=1, keepdim=True)
    logarithm = (smooth / top.clamp_min(torch.finfo(smooth.dtype).tiny)).clamp_min(FLOOR).log()
    around = torch.arange(-1, 2, device=heatmaps.device)
    cells = (row[:, None, None] + around[:, None]) * width + column[:, None, None] + around
    patch = logarithm.gather(1, cells.flatten(1)).reshape(n * k, 3, 3)
    middle = patch[:, 1, 1]
    dx = (patch[:, 1, 2] - patch[:, 1, 0]) / 2
    dy = (patch[:, 2, 1] - patch[:, 0, 1]) / 2
    dxx = patch[:, 1, 2] - 2 * middle + patch[:, 1, 0]
    dyy = patch[:, 2, 1] - 2 * middle + patch[:, 0, 1]
    dxy = (patch[:, 2, 2] - patch[:, 2, 0] - patch[:, 0, 2] + patch[:, 0, 0]) / 4
    determinant = dxx * dyy - dxy**2
    hill = (determinant > 1e-6) & (dxx < 0)
    determinant = torch.where(hill, determinant, 1)
    x = column + ((dxy * dy - dyy * dx) / determinant).clamp(-1, 1)
    y = row + ((dxy * dx - dxx * dy) / determinant).clamp(-1, 1)
    x = torch.where(hill, x, (peak % width).to(x.dtype))
    y = torch.where(hill, y, (peak // width).to(y.dtype))
    points = torch.stack(((x + 0.5) * (side / width), (y + 0.5) * (side / height)), dim=1)
    return points.reshape(n, k, 2)


def smoothed(maps: Tensor) -> Tensor:
    """Gaussian blur of `SMOOTHING` cells, zero beyond the border; [M, 1, h, w] → the same."""
    reach = round(5 * SMOOTHING)
    at = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    bell = torch.exp(-(at**2) / (2 * SMOOTHING**2))
    bell = bell / bell.sum()
    maps = F.conv2d(maps, bell.view(1, 1, 1, -1), padding=(0, reach))
    return F.conv2d(maps, bell.view(1, 1, -1, 1), padding=(reach, 0))
