"""Ramps of the projection: pure functions of how far it is.

The shapes and default lengths are those of the projector published with StyleGAN2
(arXiv 1912.04958, appendix D).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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
        patience: steps over which the total has to fall; None takes all steps. A job on a
            plateau (`is_plateau`) goes on with the learning rate's ramp-down at once, rather
            than stop where a high learning rate has shaken it to.
        least_gain: fraction by which it has to.
        landmark_factor: factor of the expression terms' weights at the first step.
        landmark_ramp: fraction of the steps in which it goes linearly to 1, as `group_factors` do.
        group_factors: landmark groups and the factors ≥ 0 of their weights at the first step; a
            group that is not named has factor 1.
    """

    steps: int
    learning_rate: float = 0.1
    rampup: float = 0.05
    rampdown: float = 0.25
    noise_factor: float = 0.05
    noise_ramp: float = 0.75
    beta1: float = 0.9
    beta2: float = 0.999
    patience: int | None = None
    least_gain: float = 0.01
    landmark_factor: float = 1.0
    landmark_ramp: float = 0.0
    group_factors: tuple[tuple[str, float], ...] = ()

    @classmethod
    def read(cls, keys: Mapping[str, Any]) -> Schedule:
        """From a config's keys, which have `group_factors` as a mapping, as None or not at all."""
        factors = keys.get("group_factors") or {}
        return cls(**{**keys, "group_factors": tuple(sorted(factors.items()))})

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

    def landmark_factor_at(self, step: int) -> float:
        """Factor of the weights of the terms that need the expression, at `step`."""
        return self.landmark_factor + (1 - self.landmark_factor) * self._landmark_ramp_at(step)

    def group_factors_at(self, step: int) -> dict[str, float]:
        """Factors of the landmark groups' weights, at `step`; 1 for groups that are not named."""
        done = self._landmark_ramp_at(step)
        return {name: first * (1 - done) + done for name, first in self.group_factors}

    def _landmark_ramp_at(self, step: int) -> float:
        """How far `landmark_ramp` is, from 0 to 1."""
        t = step / self.steps
        return min(1.0, t / self.landmark_ramp) if self.landmark_ramp > 0 else 1.0

    @property
    def settled_at(self) -> int:
        """First step whose total can be compared with later ones: nothing rises any more."""
        return math.ceil(max(self.rampup, self.landmark_ramp) * self.steps)

    @property
    def rampdown_at(self) -> int:
        """First step of the learning rate's ramp-down; `steps` if there is none."""
        return math.ceil((1 - self.rampdown) * self.steps)

    def is_plateau(self, totals: Sequence[float]) -> bool:
        """Whether a job has stopped gaining: its mean total over the last `patience` steps is not
        lower, by the fraction `least_gain`, than over the `patience` steps before them.

        Means, because random views and exploration noise shake every single total.

        Args:
            totals: of the steps from `settled_at` on, the latest last.
        """
        if self.patience is None or len(totals) < 2 * self.patience:
            return False
        before = sum(totals[-2 * self.patience : -self.patience])
        return before - sum(totals[-self.patience :]) < self.least_gain * abs(before)
