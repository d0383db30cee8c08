"""Normalised mean error between two sets of landmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from lmexp.landmarks.groups import GROUPS

OUTER_EYE_CORNERS = (36, 45)


def nme(landmarks: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """Mean distance of corresponding points over the reference's outer-eye distance, percent.

    Args:
        landmarks, reference: [N, 68, 2] in one coordinate system.

    Returns:
        [N] per landmark group, and under "all" over the 68 points (300-W's definition,
        Sagonas et al., ICCV-W 2013).
    """
    left, right = OUTER_EYE_CORNERS
    scale = torch.linalg.vector_norm(reference[:, left] - reference[:, right], dim=-1)
    error = torch.linalg.vector_norm(landmarks - reference, dim=-1) / scale[:, None] * 100
    per_group = {group: error[:, list(points)].mean(1) for group, points in GROUPS.items()}
    return {"all": error.mean(1), **per_group}
