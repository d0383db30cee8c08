"""The noise regulariser: optimised noise maps must not carry a picture."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from lmexp.losses.autocorrelation import autocorrelations
from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets


class NoiseRegularization:
    """Sum of `autocorrelation` over the noise maps; 0 for a generator without any."""

    needs_expression: ClassVar[bool] = False

    def __init__(self, weight: Annotated[float, Field(ge=0)] = 1e5) -> None:
        self.weight = weight

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        fused = context.acceleration.fuse(autocorrelations)

        def evaluate(candidate: Candidate) -> Tensor:
            maps = candidate.noise_bufs
            if not maps:
                return candidate.images.new_zeros(len(candidate.images))
            if maps[0].is_cuda:
                # Triton comes with PyTorch's CUDA builds alone.
                from lmexp.losses import noise_triton

                fits = noise_triton.applies(maps)  # else a compiler would take minutes
                return noise_triton.autocorrelations(maps) if fits else autocorrelations(maps)
            return fused(maps)

        return evaluate
