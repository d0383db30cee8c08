"""The fidelity term: latents must stay near the mean of W."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets

SMOOTHING = 1e-6
"""Under the root of `latent_distance`; that of the published code."""


def latent_distance(ws: Tensor, target: Tensor) -> Tensor:
    """Charbonnier distance of latents: Σ_layers Σ_components √((w − t)² + 1e-6), per image.

    An l1 distance with a finite gradient everywhere. It is 1e-3 · L · D, not 0, where the
    two are equal.

    Args:
        ws: [N, L, D].
        target: anything that broadcasts to it.

    Returns:
        [N].

    Source: the video projector of L. Uzolas, "Facial landmark projection without training"
    (2021); Charbonnier et al., "Two deterministic half-quadratic regularization algorithms
    for computed imaging", ICIP 1994.
    """
    return ((ws - target).square() + SMOOTHING).sqrt().sum((1, 2))


class LatentFidelity:
    """`latent_distance` of the latents to w_avg: keeps faces plain and whole.

    The published code's guard against broken faces. `LatentPrior` knows the shape of W,
    which this does not.

    Args:
        weight: ≥ 0, λ of the term; the published command line's is 0.05.
    """

    needs_expression: ClassVar[bool] = False

    def __init__(self, weight: Annotated[float, Field(ge=0)] = 0.05) -> None:
        self.weight = weight

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        w_avg = context.latent_statistics.w_avg.to(targets.look.device)

        def evaluate(candidate: Candidate) -> Tensor:
            return latent_distance(candidate.ws, w_avg)

        return evaluate
