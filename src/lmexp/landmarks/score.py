"""How well a network finds the landmarks of a set of annotated faces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmexp.landmarks.groups import GROUPS, OUTER_EYE_CORNERS
from lmexp.metrics.nme import nme

FAILURE = 10.0
"""A face whose NME exceeds this many per cent is a failure, as in the 300-W challenge."""


@dataclass(frozen=True)
class Score:
    """Errors over a set of faces, in per cent of the distance of the outer eye corners.

    Attributes:
        faces: number of faces.
        nme: mean over faces and landmarks.
        median: median over faces.
        failures: faces whose own NME exceeds `FAILURE`.
        groups: mean over the landmarks of each group of `GROUPS`.
        bias: mean signed error, x then y.
    """

    faces: int
    nme: float
    median: float
    failures: int
    groups: dict[str, float]
    bias: tuple[float, float]

    def as_dict(self) -> dict[str, object]:
        """The fields for JSON, rounded to a thousandth of a per cent."""
        return {
            "faces": self.faces,
            "nme": round(self.nme, 3),
            "median": round(self.median, 3),
            "failures": self.failures,
            "groups": {group: round(value, 3) for group, value in self.groups.items()},
            "bias": [round(value, 3) for value in self.bias],
        }


def score(landmarks: Tensor, reference: Tensor) -> Score:
    """Summarise `nme` over faces.

    Args:
        landmarks: [N, 68, 2], predicted.
        reference: [N, 68, 2], annotated, in the same px.
    """
    errors = nme(landmarks, reference)
    left, right = OUTER_EYE_CORNERS
    unit = torch.linalg.vector_norm(reference[:, left] - reference[:, right], dim=1)
    bias = 100 * ((landmarks - reference) / unit[:, None, None]).mean(dim=(0, 1))
    return Score(
        faces=len(landmarks),
        nme=errors["all"].mean().item(),
        median=torch.quantile(errors["all"], 0.5).item(),
        failures=int((errors["all"] > FAILURE).sum()),
        groups={group: errors[group].mean().item() for group in GROUPS},
        bias=(bias[0].item(), bias[1].item()),
    )
