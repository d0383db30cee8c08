"""Similarity alignment and aspect ratios against hand-made cases and independent solutions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.transform import SimilarityTransform

from lmexp.metrics.aspect_ratios import eye_aspect_ratio, mouth_aspect_ratio
from lmexp.metrics.similarity import align_by_similarity


def face(seed: int = 0, jobs: int = 3) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 256 * torch.rand(jobs, 68, 2, generator=draw, dtype=torch.float64)


def turned(points: torch.Tensor, angle: float, scale: float, shift: float) -> torch.Tensor:
    cos, sin = math.cos(angle), math.sin(angle)
    return scale * points @ torch.tensor([[cos, sin], [-sin, cos]], dtype=points.dtype) + shift


@pytest.mark.parametrize("angle", [0.0, 0.3, -2.5, math.pi])
def test_a_similarity_is_undone_exactly(angle: float) -> None:
    points = face()
    aligned = align_by_similarity(turned(points, angle, 1.7, -40.0), points)
    torch.testing.assert_close(aligned, points)


@pytest.mark.parametrize("seed", range(4))
def test_equals_scikit_image(seed: int) -> None:
    points, reference = face(seed), face(seed + 10)
    ours = align_by_similarity(points, reference)
    for k in range(len(points)):
        theirs = SimilarityTransform.from_estimate(points[k].numpy(), reference[k].numpy())
        np.testing.assert_allclose(ours[k].numpy(), theirs(points[k].numpy()), atol=1e-8)


def test_a_mirrored_face_is_not_mirrored_back() -> None:
    points = face()
    mirrored = points * torch.tensor([-1.0, 1.0], dtype=points.dtype)
    left = (align_by_similarity(mirrored, points) - points).norm(dim=-1)
    assert (left.mean(1) > 10).all()


def test_each_row_is_aligned_alone_and_in_its_own_type() -> None:
    points, reference = face(1).float(), face(2).float()
    together = align_by_similarity(points, reference)
    assert together.dtype == torch.float32
    for k in range(3):
        alone = align_by_similarity(points[k : k + 1], reference[k : k + 1])
        torch.testing.assert_close(alone[0], together[k])


def eye_and_mouth(eye: float, mouth: float) -> torch.Tensor:
    """Eyes 10 wide and `eye` high at both pairs of points; inner lips 20 wide, `mouth` high."""
    points = torch.zeros(1, 68, 2)
    for first, x in ((36, 0.0), (42, 50.0)):
        ring = [(0, 0), (3, eye / 2), (7, eye / 2), (10, 0), (7, -eye / 2), (3, -eye / 2)]
        for k, (dx, dy) in enumerate(ring):
            points[0, first + k] = torch.tensor([x + dx, dy])
    points[0, 60], points[0, 64] = torch.tensor([0.0, 80.0]), torch.tensor([20.0, 80.0])
    points[0, 62] = torch.tensor([10.0, 80.0 - mouth / 2])
    points[0, 66] = torch.tensor([10.0, 80.0 + mouth / 2])
    return points


@pytest.mark.parametrize(("height", "ratio"), [(3.0, 0.3), (0.0, 0.0), (1.0, 0.1)])
def test_openings_by_hand(height: float, ratio: float) -> None:
    points = eye_and_mouth(height, 2 * height)
    assert eye_aspect_ratio(points).item() == pytest.approx(ratio, abs=1e-6)
    assert mouth_aspect_ratio(points).item() == pytest.approx(ratio, abs=1e-6)


def test_openings_do_not_depend_on_size_and_turn() -> None:
    points = eye_and_mouth(2.5, 8.0).double()
    moved = turned(points, 0.7, 3.3, 12.0)
    torch.testing.assert_close(eye_aspect_ratio(moved), eye_aspect_ratio(points))
    torch.testing.assert_close(mouth_aspect_ratio(moved), mouth_aspect_ratio(points))


def test_a_mouth_of_no_width_gives_a_finite_number() -> None:
    assert torch.isfinite(mouth_aspect_ratio(torch.zeros(1, 68, 2))).all()
    assert torch.isfinite(eye_aspect_ratio(torch.zeros(1, 68, 2))).all()
