"""The landmark term: distance between heat maps of the image and of the expression photo."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets


def heatmap_distance(
    heatmaps: Tensor, target: Tensor, weights: Tensor, norm: str, squared_weights: bool = False
) -> Tensor:
    """Weighted distance of heat maps, per image.

    Args:
        heatmaps, target: [N, K, h, w].
        weights: [N, K], λ_landmark of each of the K maps, ≥ 0.
        norm: "l2" is √(Σ_k λ_k Σ_px Δ²), one root over everything, as the published code
            computes it; "l1" is Σ_k λ_k Σ_px √(Δ²), the formula as the blog post prints it.
        squared_weights: the published code multiplies Δ by λ before squaring, so that its
            l2 weighs each map by λ²; True repeats that.

    Returns:
        [N]. The gradient at distance 0 is 0, not NaN.
    """
    difference = heatmaps - target
    scale = weights[:, :, None, None].to(difference.dtype)
    if norm == "l1":
        return (scale * difference.abs()).sum((1, 2, 3))
    scale = scale if squared_weights else scale.sqrt()
    # vector_norm's subgradient at zero is zero, where sqrt(sum) would give NaN.
    distance: Tensor = torch.linalg.vector_norm((scale * difference).flatten(1), dim=1)
    return distance


class LandmarkHeatmaps:
    """HL(x, expression), with one weight λ_landmark per landmark group.

    Source: L. Uzolas, "Facial landmark projection without training" (2021); FAN: Bulat &
    Tzimiropoulos, arXiv 1703.07332.
    """

    needs_expression: ClassVar[bool] = True

    def __init__(
        self,
        weight: Annotated[float, Field(ge=0)] = 0.05,
        norm: Literal["l1", "l2"] = "l2",
        squared_group_weights: bool = False,
    ) -> None:
        self.weight = weight
        self.norm = norm
        self.squared_group_weights = squared_group_weights

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        assert targets.expression is not None and targets.landmark_weights is not None
        with torch.no_grad():
            target = context.heatmap_network(targets.expression)
        weights = targets.landmark_weights.to(target.device)

        def evaluate(candidate: Candidate) -> Tensor:
            return heatmap_distance(
                candidate.heatmaps, target, weights, self.norm, self.squared_group_weights
            )

        return evaluate
