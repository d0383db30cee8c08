"""What the landmark loss needs to know of a heat-map network."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class HeatmapNetwork(Protocol):
    """A frozen network that draws one heat map per facial landmark (FAN and its kin).

    Attributes:
        weights_sha256: digest of the weights, written into every run's summary.

    One that averages larger images down to some side first may say so by an attribute `side`, px:
    it is then given images that are averaged already, which others need as well.
    """

    weights_sha256: str

    def __call__(self, images: Tensor) -> Tensor:
        """Differentiable with respect to `images`; each image is treated alone.

        Args:
            images: [N, 3, R, R], RGB in [-1, 1], any R; a whole FFHQ-aligned face.

        Returns:
            heatmaps: [N, 68, 64, 64], about 1 at a landmark and 0 elsewhere. Cell
            (i, j) covers the square of side R/64 whose centre is ((j + 0.5) R/64,
            (i + 0.5) R/64).
        """
        ...
