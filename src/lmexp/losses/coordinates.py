"""The coordinates term: distance between landmarks themselves, beside their heat maps.

A heat map's distance has no slope once two peaks are farther apart than they are wide: a mouth
that should open by a third of its width pulls at nothing. Expected coordinates slope everywhere.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lmexp.landmarks.groups import OUTER_EYE_CORNERS
from lmexp.losses.protocol import BoundTerm, Context, Targets


def expect(heatmaps: Tensor) -> Tensor:
    """Each map's centre of mass, its values squared so that the background hardly counts.

    Args:
        heatmaps: [N, K, h, w]; values below 0 count as 0.

    Returns:
        [N, K, 2], x then y, fractions of the side; about 0 for a map without a positive value.

    Source: Sun et al., "Integral human pose regression", ECCV 2018 (arXiv 1711.08229), with
    squares in place of the softmax, whose temperature would have to suit the network.
    """
    mass = heatmaps.clamp_min(0).square()
    mass = mass / (mass.sum((2, 3), keepdim=True) + 1e-6)
    height, width = mass.shape[2:]
    x = (torch.arange(width, device=mass.device, dtype=mass.dtype) + 0.5) / width
    y = (torch.arange(height, device=mass.device, dtype=mass.dtype) + 0.5) / height
    return torch.stack(((mass.sum(2) * x).sum(2), (mass.sum(3) * y).sum(2)), dim=2)


class LandmarkCoordinates:
    """Mean distance of expected landmarks, in distances of the look's outer eye corners.

    Σ_k λ_k ‖p_k(x) - p_k(expression)‖ / Σ_k λ_k, with λ the landmarks' group weights
    times the step's `landmark_factors`.

    Args:
        weight: ≥ 0, λ of the term.
        jitter: ≥ 0, as the landmark term's, which shares the network's passes if it is equal.
    """

    needs_expression: ClassVar[bool] = True

    def __init__(
        self,
        weight: Annotated[float, Field(ge=0)] = 16.0,
        jitter: Annotated[float, Field(ge=0, le=3)] = 1.0,
    ) -> None:
        self.weight = weight
        self.jitter = jitter

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        assert targets.expression is not None and targets.landmark_weights is not None
        expression = targets.expression
        weights = targets.landmark_weights.to(expression)
        settled = _share(weights)
        left, right = OUTER_EYE_CORNERS
        corners = targets.look_landmarks[:, [left, right]].to(expression)
        unit = (corners[:, 0] - corners[:, 1]).norm(dim=1, keepdim=True) / expression.shape[-1]

        def measure(heatmaps: Tensor, wanted: Tensor, factors: Tensor | None) -> Tensor:
            share = settled if factors is None else _share(weights * factors)
            difference = expect(heatmaps) - expect(wanted)
            # The floor keeps the root's gradient finite at distance 0: 1e-4 sides is no distance.
            distance = (difference.square().sum(2) + 1e-8).sqrt() / unit
            mean: Tensor = (share * distance).sum(1)
            return mean

        fused = context.acceleration.fuse(measure)
        if self.jitter:
            return lambda candidate: fused(
                *candidate.see(expression, self.jitter), candidate.landmark_factors
            )
        with torch.no_grad():
            target = context.heatmap_network(expression)
        return lambda candidate: fused(candidate.heatmaps, target, candidate.landmark_factors)


def _share(weights: Tensor) -> Tensor:
    """[N, 68], each row divided by its sum; zeros stay zeros."""
    return weights / weights.sum(1, keepdim=True).clamp_min(1e-12)
