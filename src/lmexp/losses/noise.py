"""The noise regulariser: optimised noise maps must not carry a picture."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets


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
    total = noise.new_zeros(len(noise))
    while True:
        for axis in (2, 3):
            total = total + (noise * noise.roll(1, axis)).mean((1, 2, 3)).square()
        if min(noise.shape[2:]) <= 8:
            return total
        noise = F.avg_pool2d(noise, 2)


class NoiseRegularization:
    """Sum of `autocorrelation` over the noise maps; 0 for a generator without any."""

    needs_expression: ClassVar[bool] = False

    def __init__(self, weight: Annotated[float, Field(ge=0)] = 1e5) -> None:
        self.weight = weight

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        def evaluate(candidate: Candidate) -> Tensor:
            total = candidate.images.new_zeros(len(candidate.images))
            for noise in candidate.noise_bufs:
                total = total + autocorrelation(noise)
            return total

        return evaluate
