"""How well a network finds the landmarks of a set of annotated faces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmexp.landmarks.groups import GROUPS, OUTER_EYE_CORNERS
from lmexp.metrics.aspect_ratios import eye_aspect_ratio, mouth_aspect_ratio
from lmexp.metrics.nme import nme

FAILURE = 10.0
"""A face whose NME exceeds this many per cent is a failure, as in the 300-W challenge."""


@dataclass(frozen=True)
class Score:
    """Errors over a set of faces, in per cent of the distance of the outer eye corners.

    Those of the openings are aspect ratios (see `lmexp.metrics.aspect_ratios`), not per cent:
    how far a mouth is open is what a projection takes over, wherever the mouth is.

    Attributes:
        faces: number of faces.
        nme: mean over faces and landmarks.
        median: median over faces.
        failures: faces whose own NME exceeds `FAILURE`.
        groups: mean over the landmarks of each group of `GROUPS`.
        bias: mean signed error, x then y.
        eye_error, mouth_error: mean absolute error of the aspect ratio.
        eye_bias, mouth_bias: mean signed error of it; below 0 the network sees it too shut.
    """

    faces: int
    nme: float
    median: float
    failures: int
    groups: dict[str, float]
    bias: tuple[float, float]
    eye_error: float
    mouth_error: float
    eye_bias: float
    mouth_bias: float

    def as_dict(self) -> dict[str, object]:
        """The fields for JSON, rounded to a thousandth of a per cent."""
        return {
            "faces": self.faces,
            "nme": round(self.nme, 3),
            "median": round(self.median, 3),
            "failures": self.failures,
            "groups": {group: round(value, 3) for group, value in self.groups.items()},
            "bias": [round(value, 3) for value in self.bias],
            "eye_error": round(self.eye_error, 4),
            "mouth_error": round(self.mouth_error, 4),
            "eye_bias": round(self.eye_bias, 4),
            "mouth_bias": round(self.mouth_bias, 4),
        }


def score(landmarks: Tensor, reference: Tensor) -> Score:
    """Summarise `nme` and the openings' errors over faces.

    Args:
        landmarks: [N, 68, 2], predicted.
        reference: [N, 68, 2], annotated, in the same px.
    """
    errors = nme(landmarks, reference)
    left, right = OUTER_EYE_CORNERS
    unit = torch.linalg.vector_norm(reference[:, left] - reference[:, right], dim=1)
    eyes = eye_aspect_ratio(landmarks) - eye_aspect_ratio(reference)
    mouths = mouth_aspect_ratio(landmarks) - mouth_aspect_ratio(reference)
    bias = 100 * ((landmarks - reference) / unit[:, None, None]).mean(dim=(0, 1))
    return Score(
        faces=len(landmarks),
        nme=errors["all"].mean().item(),
        median=torch.quantile(errors["all"], 0.5).item(),
        failures=int((errors["all"] > FAILURE).sum()),
        groups={group: errors[group].mean().item() for group in GROUPS},
        bias=(bias[0].item(), bias[1].item()),
        eye_error=eyes.abs().mean().item(),
        mouth_error=mouths.abs().mean().item(),
        eye_bias=eyes.mean().item(),
        mouth_bias=mouths.mean().item(),
    )
