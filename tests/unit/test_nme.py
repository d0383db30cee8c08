from __future__ import annotations

import numpy as np
import pytest
import torch

from lmexp.landmarks.groups import GROUPS
from lmexp.metrics.nme import nme


def faces(count: int, seed: int = 0) -> torch.Tensor:
    points = torch.rand(count, 68, 2, generator=torch.Generator().manual_seed(seed)) * 100
    points[:, 36] = torch.tensor([30.0, 40.0])
    points[:, 45] = torch.tensor([70.0, 40.0])
    return points


def test_hand_computed_case() -> None:
    """Eyes 40 px apart; the 20 points of the mouth 3-4-5 px off: 5 / 40 = 12.5 %."""
    reference = faces(1)
    landmarks = reference.clone()
    landmarks[:, 48:] += torch.tensor([3.0, 4.0])
    errors = nme(landmarks, reference)
    assert errors["outer_lip"].item() == pytest.approx(12.5, rel=1e-5)
    assert errors["inner_lip"].item() == pytest.approx(12.5, rel=1e-5)
    assert errors["jaw"].item() == 0
    assert errors["all"].item() == pytest.approx(12.5 * 20 / 68, rel=1e-5)


def test_agrees_with_numpy_face_by_face() -> None:
    landmarks, reference = faces(3, seed=1), faces(3, seed=2)
    errors = nme(landmarks, reference)
    assert set(errors) == {"all", *GROUPS}
    for k in range(3):
        a, b = landmarks[k].numpy(), reference[k].numpy()
        scale = np.hypot(*(b[36] - b[45]))
        expected = np.hypot(*(a - b).T) / scale * 100
        assert errors["all"][k].item() == pytest.approx(expected.mean(), rel=1e-5)
        assert errors["left_eye"][k].item() == pytest.approx(expected[36:42].mean(), rel=1e-5)


def test_does_not_depend_on_the_images_size() -> None:
    landmarks, reference = faces(1, seed=1), faces(1, seed=2)
    assert nme(landmarks, reference)["all"].item() == pytest.approx(
        nme(4 * landmarks, 4 * reference)["all"].item(), rel=1e-5
    )
