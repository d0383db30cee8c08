"""How far eyes and mouth are open, whatever the size and the turn of the face."""

from __future__ import annotations

import torch
from torch import Tensor

_EYES = ((36, 37, 38, 39, 40, 41), (42, 43, 44, 45, 46, 47))
"""p1 … p6 of each eye: corner, two points above, corner, two points below."""


def eye_aspect_ratio(landmarks: Tensor) -> Tensor:
    """(‖p2 − p6‖ + ‖p3 − p5‖) / (2 ‖p1 − p4‖), the mean of both eyes: about 0.3 open, 0.1 shut.

    Args:
        landmarks: [N, 68, 2].

    Returns:
        [N].

    Source: Soukupová and Čech, "Real-time eye blink detection using facial landmarks",
    CVWW 2016, equation 1.
    """
    ratios = []
    for p1, p2, p3, p4, p5, p6 in _EYES:
        opening = _distance(landmarks, p2, p6) + _distance(landmarks, p3, p5)
        ratios.append(opening / (2 * _distance(landmarks, p1, p4)).clamp_min(1e-9))
    return torch.stack(ratios).mean(0)


def mouth_aspect_ratio(landmarks: Tensor) -> Tensor:
    """‖p62 − p66‖ / ‖p60 − p64‖ of the inner lips: 0 closed, about 1 wide open.

    The eye's ratio, by analogy, on the middle of the inner lips (60–67): the middle is what
    opens most, and outer lips would add their own thickness.

    Args:
        landmarks: [N, 68, 2].

    Returns:
        [N].
    """
    return _distance(landmarks, 62, 66) / _distance(landmarks, 60, 64).clamp_min(1e-9)


def _distance(landmarks: Tensor, first: int, second: int) -> Tensor:
    distance: Tensor = torch.linalg.vector_norm(landmarks[:, first] - landmarks[:, second], dim=-1)
    return distance
