"""The 68 landmarks of 300-W (iBUG) in nine groups, and what a mirror does to them.

Source: Sagonas et al., "300 Faces in-the-wild challenge", ICCVW 2013, for the numbering;
the group names are those of the published projector, whose nose groups overlap at 30:
here the tip of the nose belongs to the bridge alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lmexp.errors import LmexpError

NUM_LANDMARKS = 68

GROUPS: dict[str, range] = {
    "jaw": range(0, 17),
    "left_eyebrow": range(17, 22),
    "right_eyebrow": range(22, 27),
    "nose_bridge": range(27, 31),
    "lower_nose": range(31, 36),
    "left_eye": range(36, 42),
    "right_eye": range(42, 48),
    "outer_lip": range(48, 60),
    "inner_lip": range(60, 68),
}
"""Zero-based landmarks of each group; left is the viewer's left. They cover 0–67 once."""

OUTER_EYE_CORNERS = (36, 45)
"""Their distance is the unit of the NME that 300-W reports."""

FLIP: tuple[int, ...] = (
    *range(16, -1, -1),
    *range(26, 16, -1),
    *range(27, 31),
    *range(35, 30, -1),
    *(45, 44, 43, 42, 47, 46),
    *(39, 38, 37, 36, 41, 40),
    *range(54, 47, -1),
    *range(59, 54, -1),
    *range(64, 59, -1),
    *range(67, 64, -1),
)
"""Landmark k of a mirrored face is landmark FLIP[k] of the face."""


def expand(group_weights: Mapping[str, float]) -> Tensor:
    """Spread one weight per group over the landmarks of that group.

    Args:
        group_weights: weight of every group of `GROUPS`, finite and ≥ 0.

    Returns:
        weights: [68], float32.

    Raises:
        LmexpError: a group is unknown or missing, or a weight is negative or not finite.
    """
    unknown = sorted(set(group_weights) - set(GROUPS))
    if unknown:
        raise LmexpError(
            f"landmark_weights.{unknown[0]}: unknown group; choose from {', '.join(GROUPS)}"
        )
    weights = torch.zeros(NUM_LANDMARKS)
    for name, members in GROUPS.items():
        if name not in group_weights:
            raise LmexpError(f"landmark_weights.{name}: missing; give a weight, 0 to ignore it")
        weight = float(group_weights[name])
        if not math.isfinite(weight) or weight < 0:
            raise LmexpError(f"landmark_weights.{name}: {weight} is no weight; give a number ≥ 0")
        weights[members.start : members.stop] = weight
    return weights
