"""How much noise maps resemble their neighbours, in plain operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_SIDE = 8
"""Maps of this side are not halved further, px."""


def autocorrelation(noise: Tensor) -> Tensor:
    """How much a noise map resembles its neighbour, over a pyramid of scales.

    Σ_levels (mean of n(x, y) · n(x - 1, y))² + (mean of n(x, y) · n(x, y - 1))², the shift
    being cyclic. Each level halves the one before by averaging 2×2 cells, down to a side of
    8. White noise gives about 0.

    The paper doubles the amplitude at each level to keep its variance; the published
    projector, whose weight of 1e5 everybody uses, does not, and neither does this.

    Args:
        noise: [N, 1, h, w].

    Returns:
        [N].

    Source: Karras et al., arXiv 1912.04958, appendix D.
    """
    return autocorrelations([noise])


def autocorrelations(maps: Sequence[Tensor]) -> Tensor:
    """Sum of `autocorrelation` over several maps, [N, 1, h, w] each, at least one -> [N].

    Maps of one size, a pyramid's levels among them, are one tensor: a generator's 17 maps have
    74 levels of 9 sizes, and a device would spend most of its time on starting tiny kernels.
    """
    total = maps[0].new_zeros(len(maps[0]))
    waiting = [noise[:, 0] for noise in maps]
    while waiting:
        # The largest first; a loop, since compilers do not follow max over shapes.
        size = waiting[0].shape[-2:]
        for noise in waiting:
            if noise.shape[-2] * noise.shape[-1] > size[0] * size[1]:
                size = noise.shape[-2:]
        level = torch.stack([noise for noise in waiting if noise.shape[-2:] == size], dim=1)
        waiting = [noise for noise in waiting if noise.shape[-2:] != size]
        for axis in (2, 3):
            total = total + (level * level.roll(1, axis)).mean((2, 3)).square().sum(1)
        if min(size) > LEAST_SIDE:
            waiting += F.avg_pool2d(level, 2).unbind(1)
    return total
