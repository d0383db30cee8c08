"""How far predicted landmarks are from annotated ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lmexp.landmarks.groups import GROUPS, OUTER_EYE_CORNERS

FAILURE = 0.10
"""A face whose NME exceeds this counts as a failure, as in the 300-W challenge."""


@dataclass(frozen=True)
class Score:
    """Errors of one set of faces, in per cent of the distance of the outer eye corners.

    Attributes:
        faces: number of faces.
        nme: mean over faces and landmarks.
        median: median over faces.
        failures: faces whose own mean exceeds 10 %.
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
        """The fields, rounded to a thousandth of a per cent, for JSON."""
        return {key: _rounded(value) for key, value in asdict(self).items()}


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


def point_errors(predicted: Tensor, annotated: Tensor) -> Tensor:
    """Distance of every landmark in units of the outer eye corners' distance.

    Args:
        predicted: [N, 68, 2].
        annotated: [N, 68, 2], in the same px.

    Returns:
        errors: [N, 68], not in per cent; their mean is the NME of 300-W.
    """
    return (predicted - annotated).norm(dim=2) / _unit(annotated)[:, None]


def _unit(annotated: Tensor) -> Tensor:
    left, right = OUTER_EYE_CORNERS
    return (annotated[:, left] - annotated[:, right]).norm(dim=1)


def score(predicted: Tensor, annotated: Tensor) -> Score:
    """Summarise `point_errors` over a set of faces ([N, 68, 2] each)."""
    errors = point_errors(predicted, annotated)
    faces = errors.mean(dim=1)
    bias = ((predicted - annotated) / _unit(annotated)[:, None, None]).mean(dim=(0, 1))
    return Score(
        faces=len(faces),
        nme=100 * faces.mean().item(),
        median=100 * torch.quantile(faces, 0.5).item(),
        failures=int((faces > FAILURE).sum()),
        groups={
            name: 100 * errors[:, members.start : members.stop].mean().item()
            for name, members in GROUPS.items()
        },
        bias=(100 * bias[0].item(), 100 * bias[1].item()),
    )
