"""The landmark term: distance between heat maps of the image and of the expression photo."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.landmarks.groups import GROUPS
from lmexp.losses.lpips import shrink
from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets

_NOSE_TIP = 30
_STRETCHED_SIDE = 256
_LEAST_WIDENING = 0.5


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


def stretch(images: Tensor) -> Tensor:
    """Bring each image's least value, over places and colours, to -1 and its largest to 1.

    Args:
        images: [N, 3, R, R]; larger ones are averaged down to 256 px first, the side that the
            published code gives its network, since extremes depend on the side.

    Returns:
        [N, 3, min(R, 256), min(R, 256)]; an image of one value becomes -1 everywhere.
    """
    images = shrink(images, _STRETCHED_SIDE)
    least, largest = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (images - least) * (2 / (largest - least).clamp_min(1e-12)) - 1


def widen_heatmaps(heatmaps: Tensor, sigma: float) -> Tensor:
    """Blur heat maps by a Gaussian of unit sum; what leaves a map at its border is lost.

    A peak of width s becomes one of √(s² + σ²), lower by s² / (s² + σ²).

    Args:
        heatmaps: [N, K, h, w].
        sigma: > 0, standard deviation, px of the maps.

    Returns:
        [N, K, h, w].
    """
    down, right = (_gaussian(heatmaps, side, sigma) for side in heatmaps.shape[2:])
    return down @ heatmaps @ right


def _gaussian(like: Tensor, side: int, sigma: float) -> Tensor:
    """[side, side], symmetric: row k is the kernel around k."""
    places = torch.arange(side, device=like.device, dtype=like.dtype)
    kernel = torch.exp(-((places[:, None] - places) ** 2) / (2 * sigma**2))
    return kernel / (sigma * math.sqrt(2 * math.pi))


class LandmarkHeatmaps:
    """HL(x, expression), with one weight λ_landmark per landmark group, times the step's factor.

    Args:
        weight: ≥ 0, λ of the term.
        norm: see `heatmap_distance`.
        squared_group_weights: see `heatmap_distance`.
        tip_in_lower_nose: landmark 30, the tip of the nose, weighs what `lower_nose` does, as
            in the published code, whose nose groups overlap there; else what `nose_bridge` does.
        stretch_contrast: the network sees each image `stretch`ed, as the published code shows
            it (it takes the range of the whole batch, which is one image). Brightness and
            contrast then cost nothing, but one outlying pixel dims the whole face.
        jitter: ≥ 0, how far the network's view of both images is turned, shifted and scaled at
            random each step; 0 shows both as they are, as in the published code. See
            `lmexp.landmarks.jitter`.
        widen: σ of the Gaussian that both faces' heat maps are blurred with first, px of the
            maps; 0: as the network gives them. Wide peaks pull from farther, and less exactly.

    Source: L. Uzolas, "Facial landmark projection without training" (2021); FAN: Bulat &
    Tzimiropoulos, arXiv 1703.07332.
    """

    needs_expression: ClassVar[bool] = True

    def __init__(
        self,
        weight: Annotated[float, Field(ge=0)] = 0.4,
        norm: Literal["l1", "l2"] = "l2",
        squared_group_weights: bool = False,
        tip_in_lower_nose: bool = False,
        stretch_contrast: bool = False,
        jitter: Annotated[float, Field(ge=0, le=3)] = 1.0,
        widen: Annotated[float, Field(ge=0, le=16)] = 0.0,
    ) -> None:
        if 0 < widen < _LEAST_WIDENING:
            raise LmexpError(
                f"loss.landmarks.widen: {widen}, a Gaussian narrower than a pixel's half; give 0 "
                f"or at least {_LEAST_WIDENING}"
            )
        if jitter and stretch_contrast:
            raise LmexpError(
                "loss.landmarks: jitter and stretch_contrast exclude each other; set one to 0 "
                "or false"
            )
        self.weight = weight
        self.norm = norm
        self.squared_group_weights = squared_group_weights
        self.tip_in_lower_nose = tip_in_lower_nose
        self.stretch_contrast = stretch_contrast
        self.jitter = jitter
        self.widen = widen

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        assert targets.expression is not None and targets.landmark_weights is not None
        network, expression = context.heatmap_network, targets.expression
        weights = targets.landmark_weights.to(expression.device)
        lowered = self.tip_in_lower_nose
        if lowered:
            weights = _lower_tip(weights)
        norm, squared, sigma = self.norm, self.squared_group_weights, self.widen

        def measure(maps: Tensor, target: Tensor, factors: Tensor | None) -> Tensor:
            scaled = weights
            if factors is not None:
                scaled = weights * (_lower_tip(factors) if lowered else factors)
            if sigma:
                maps, target = widen_heatmaps(maps, sigma), widen_heatmaps(target, sigma)
            return heatmap_distance(maps, target, scaled, norm, squared)

        fuse = context.acceleration.fuse
        distance = fuse(measure)
        prepare = fuse(stretch) if self.stretch_contrast else None

        if self.jitter:
            return lambda candidate: distance(
                *candidate.see(expression, self.jitter), candidate.landmark_factors
            )

        with torch.no_grad():
            target = network(prepare(expression) if prepare else expression)

        def evaluate(candidate: Candidate) -> Tensor:
            if prepare is None:
                return distance(candidate.heatmaps, target, candidate.landmark_factors)
            stretched = prepare(candidate.averaged(_STRETCHED_SIDE))
            return distance(network(stretched), target, candidate.landmark_factors)

        return evaluate


def _lower_tip(values: Tensor) -> Tensor:
    """[..., 68] -> the same, but the tip of the nose has what `lower_nose` has."""
    values = values.clone()
    values[..., _NOSE_TIP] = values[..., GROUPS["lower_nose"][0]]
    return values
