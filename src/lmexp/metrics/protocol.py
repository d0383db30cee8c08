"""What is measured of finished jobs, and what it may look at."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Exhibits:
    """What N finished jobs came to; row k belongs to job k.

    Attributes:
        result: [N, 3, R, R], RGB in [-1, 1] (clamped by whoever looks at it).
        look: as `result`, the aligned photo whose person is wanted.
        expression: as `result`, the aligned photo whose expression is wanted.
        look_landmarks: [N, 68, 2], x then y, px, of the network that the jobs were run with;
            they tell where the two photos differ, and measure nothing.
        expression_landmarks: as `look_landmarks`.
        inversion: as `result`, the look inverted by itself; None if the jobs began elsewhere.
        ws: [N, num_ws, w_dim], the result's latents; None if they are not known.
        inversion_ws: as `ws`, of the inversion.
        samples: [S, w_dim], mapped standard-normal z: what the generator's W looks like;
            None with `ws`.
    """

    result: Tensor
    look: Tensor
    expression: Tensor
    look_landmarks: Tensor
    expression_landmarks: Tensor
    inversion: Tensor | None = None
    ws: Tensor | None = None
    inversion_ws: Tensor | None = None
    samples: Tensor | None = None


@runtime_checkable
class Scores(Protocol):
    """Numbers that are reported and never optimised."""

    def score(self, exhibits: Exhibits, optimised: Collection[str] = ()) -> list[dict[str, Any]]:
        """Measure finished jobs.

        Args:
            exhibits: the jobs' pictures and latents.
            optimised: digests of the weights that took part in the optimisation; a network
                among them is no judge.

        Returns:
            One dictionary of plain numbers, texts and dictionaries a job, value k from row k
            alone; empty where nothing is measured. See docs/scores.md.
        """
        ...


class NoScores:
    """Measures nothing."""

    def score(self, exhibits: Exhibits, optimised: Collection[str] = ()) -> list[dict[str, Any]]:
        """An empty dictionary a job."""
        return [{} for _ in exhibits.result]
