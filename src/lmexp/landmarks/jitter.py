"""Random views of an image, so that a heat-map network is not asked the same question twice.

An optimiser that always meets the network through the same pixels finds paint that this one
view takes for a mouth. Seen turned, shifted and scaled, another way each step, only what looks
like a mouth from everywhere lasts: the average over views of Athalye et al., "Synthesizing
robust adversarial examples", ICML 2018 (arXiv 1707.07397), used here to keep such out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lmexp.landmarks.framing import affine_grid
from lmexp.latents import derive_seed

TURN = 0.2
"""Largest turn at jitter 1, radians."""

SCALE = 0.12
"""Largest natural logarithm of the scale at jitter 1."""

SHIFT = 0.05
"""Largest shift at jitter 1, fraction of the image's side."""


def draw_views(jitter: float, seeds: Sequence[int], step: int) -> Tensor:
    """One similarity a job, uniform within `jitter` times the bounds above.

    Args:
        jitter: ≥ 0.
        seeds: one per job; the view of step t derives from (seed, t) alone.
        step: 0-based.

    Returns:
        [N, 2, 3] on the CPU, from the view's coordinates to the image's, both from -1 to 1.
    """
    views = torch.empty(len(seeds), 2, 3)
    for k, seed in enumerate(seeds):
        draw = torch.Generator().manual_seed(derive_seed(seed, "view", step))
        turn, scale, x, y = ((torch.rand(4, generator=draw) * 2 - 1) * jitter).tolist()
        size, angle = math.exp(SCALE * scale), TURN * turn
        a, b = size * math.cos(angle), size * math.sin(angle)
        # Coordinates span 2 sides' halves, hence the 2.
        views[k] = torch.tensor([[a, -b, 2 * SHIFT * x], [b, a, 2 * SHIFT * y]])
    return views


def look_through(images: Tensor, views: Tensor) -> Tensor:
    """[N, C, R, R] as seen in `views` [N, 2, 3]; border pixels go on beyond the border."""
    grid = affine_grid(views.to(images), images.shape[2], images.shape[3])
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
