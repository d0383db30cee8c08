"""Ramps of the projection: pure functions of how far it is.

The shapes and default lengths are those of the projector published with StyleGAN2
(arXiv 1912.04958, appendix D).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """How a projection's learning rate and exploration noise run over its steps.

    Attributes:
        steps: number of optimisation steps.
        learning_rate: its maximum.
        rampup: fraction of the steps in which the learning rate rises linearly from 0.
        rampdown: fraction at the end in which it falls to 0 along a cosine.
        noise_factor: exploration noise at the first step, in units of w_std.
        noise_ramp: fraction after which the exploration noise is 0.
        beta1, beta2: Adam's decay rates of the gradient's first and second moment.
    """

    steps: int
    learning_rate: float = 0.1
    rampup: float = 0.05
    rampdown: float = 0.25
    noise_factor: float = 0.05
    noise_ramp: float = 0.75
    beta1: float = 0.9
    beta2: float = 0.999

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of `step` in [0, steps)."""
        t = step / self.steps
        down = min(1.0, (1.0 - t) / self.rampdown) if self.rampdown > 0 else 1.0
        up = min(1.0, t / self.rampup) if self.rampup > 0 else 1.0
        return self.learning_rate * (0.5 - 0.5 * math.cos(down * math.pi)) * up

    def noise_at(self, step: int) -> float:
        """Standard deviation of the exploration noise of `step`, in units of w_std."""
        t = step / self.steps
        ramp = max(0.0, 1.0 - t / self.noise_ramp) if self.noise_ramp > 0 else 0.0
        return self.noise_factor * ramp * ramp
