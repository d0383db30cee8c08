"""The prior on W: latents must stay where the mapping network puts its samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lmexp.losses.protocol import BoundTerm, Context, Targets


@dataclass(frozen=True)
class GaussianSpace:
    """W made Gaussian ("P-norm+" space): undo the last LeakyReLU, then whiten by PCA.

    The mapping network ends in a LeakyReLU of slope 0.2, whose inverse is one of slope 5.
    The gain √2 that follows it needs no undoing: whitening absorbs every scale.

    Attributes:
        mean: [D], of the unrolled samples.
        whitening: [D, D]; (unroll(w) - mean) @ whitening has unit covariance.

    Source: Zhu et al., "Improved StyleGAN embedding: where are the good latents?", arXiv
    2012.09036, section 3.2.
    """

    mean: Tensor
    whitening: Tensor

    @staticmethod
    def measure(samples: Tensor, variance_floor: float) -> GaussianSpace:
        """From mapped samples [S, D], S > D to see every direction.

        Args:
            variance_floor: variances below this fraction of the largest count as that
                fraction, so that directions in which samples hardly differ are stiff but
                not infinitely so.
        """
        # float64: the variances span many orders of magnitude.
        unrolled = unroll(samples.double())
        mean = unrolled.mean(0)
        variances, directions = torch.linalg.eigh(torch.cov(unrolled.T))
        variances = variances.clamp_min(variance_floor * float(variances[-1]))
        whitening = directions * variances.rsqrt()
        return GaussianSpace(mean.to(samples.dtype), whitening.to(samples.dtype))

    def standardise(self, w: Tensor) -> Tensor:
        """w: [..., D] -> [..., D], standard normal for samples of the mapping network."""
        return (unroll(w) - self.mean) @ self.whitening

    def restore(self, z: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        back = torch.linalg.inv(self.whitening.double()).to(z.dtype)
        return F.leaky_relu(z @ back + self.mean, 0.2)


def unroll(w: Tensor) -> Tensor:
    """The inverse of LeakyReLU(0.2), up to scale; any shape."""
    return F.leaky_relu(w, 5.0)


class LatentPrior:
    """Mean square of the latents in Gaussian space, over their dimensions and `ws`.

    About 1 for samples of the mapping network, whatever generator; thousands where an
    optimiser has left the manifold of faces. w_avg is no sample: it lies outside of the
    bent manifold, the farther the lower the floor (FFHQ: about 120 at 1e-6, 8 at 1e-4).

    Args:
        weight: ≥ 0, λ of the term.
        variance_floor: see `GaussianSpace.measure`; a variance far below the square of the
            learning rate makes Adam oscillate.
    """

    needs_expression: ClassVar[bool] = False

    def __init__(
        self,
        weight: Annotated[float, Field(ge=0)] = 0.3,
        variance_floor: Annotated[float, Field(gt=0, lt=1)] = 1e-4,
    ) -> None:
        self.weight = weight
        self.variance_floor = variance_floor

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        with torch.no_grad():
            samples = context.latent_statistics.samples
            space = GaussianSpace.measure(samples, self.variance_floor)

        fused = context.acceleration.fuse(lambda ws: space.standardise(ws).square().mean((1, 2)))
        return lambda candidate: fused(candidate.ws)
