"""The mask's geometry against independent rasterisers, and its promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull
from skimage.draw import polygon2mask
from torch import Tensor

from lmexp.losses.mask import BANDS, HULLS, Region, face_weight, hull_distance, keep_mask


def draw_face(side: float, mouth_opening: float = 0.02) -> Tensor:
    """[68, 2]: a schematic frontal face in an image of that side, px."""

    def arc(
        count: int,
        centre: tuple[float, float],
        radii: tuple[float, float],
        start: float,
        stop: float,
    ) -> np.ndarray:
        angle = np.radians(np.linspace(start, stop, count))
        return np.stack(
            [centre[0] + radii[0] * np.cos(angle), centre[1] + radii[1] * np.sin(angle)], 1
        )

    parts = [
        arc(17, (0.5, 0.45), (0.33, 0.42 + mouth_opening / 2), 180, 0),
        arc(5, (0.36, 0.38), (0.09, 0.04), 190, 350),
        arc(5, (0.64, 0.38), (0.09, 0.04), 190, 350),
        np.stack([np.full(4, 0.5), np.linspace(0.44, 0.58, 4)], 1),
        np.stack([np.linspace(0.45, 0.55, 5), np.full(5, 0.62)], 1),
        arc(6, (0.37, 0.46), (0.05, 0.02), 180, 480),
        arc(6, (0.63, 0.46), (0.05, 0.02), 180, 480),
        arc(12, (0.5, 0.74), (0.1, 0.03 + mouth_opening), 180, 510),
        arc(8, (0.5, 0.74), (0.07, 0.01 + mouth_opening), 180, 495),
    ]
    return torch.tensor(np.concatenate(parts) * side, dtype=torch.float32)


@pytest.mark.parametrize("seed", range(4))
def test_hull_distance_against_scipy_and_skimage(seed: int) -> None:
    draw = np.random.RandomState(seed)
    points = draw.uniform(10, 54, (3, 9, 2))
    got = hull_distance(torch.tensor(points), resolution=64, side=64).numpy()
    centres = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5), -1)
    for row, cloud in zip(got, points, strict=True):
        corners = cloud[ConvexHull(cloud).vertices]
        # skimage's polygons are in (row, column), pixel centres at whole numbers.
        inside = polygon2mask((64, 64), corners[:, ::-1] - 0.5)
        assert ((row < 0) != inside).sum() <= 2  # centres exactly on an edge
        gaps = []
        for start, stop in zip(corners, np.roll(corners, -1, 0), strict=True):
            along = stop - start
            share = np.clip((centres - start) @ along / (along @ along), 0, 1)
            gaps.append(np.linalg.norm(centres - start - share[..., None] * along, axis=-1))
        np.testing.assert_allclose(np.abs(row), np.min(gaps, 0), atol=1e-6)


def test_hull_distance_of_degenerate_hulls() -> None:
    line = [[10.0, 20.5], [20.0, 20.5], [30.0, 20.5], [30.0, 20.5]]
    spot = [[20.5, 20.5]] * 4
    square = [[10.0, 10.0], [30.0, 10.0], [30.0, 30.0], [10.0, 30.0]]
    twice = [[10.0, 10.0], [30.0, 10.0], [20.0, 30.0], [20.0, 30.0]]
    got = hull_distance(torch.tensor([line, spot, square, twice]).double(), 64, 64)
    assert torch.isfinite(got).all()
    assert got[0, 20, 15] == pytest.approx(0, abs=1e-6)
    assert got[0, 25, 15] == pytest.approx(5)
    assert got[0, 20, 40] == pytest.approx(10.5)
    assert got[1, 20, 20] == pytest.approx(0, abs=1e-6)
    assert got[1, 23, 24] == pytest.approx(5)
    assert got[2, 20, 20] == pytest.approx(-9.5)
    assert got[2, 33, 34] == pytest.approx(np.hypot(3.5, 4.5))
    assert got[3, 12, 20] == pytest.approx(-2.5)


def test_coarser_grid_measures_in_image_pixels() -> None:
    points = torch.tensor([[[10.0, 10.0], [30.0, 10.0], [30.0, 30.0], [10.0, 30.0]]]).double()
    got = hull_distance(points, resolution=64, side=16)
    assert got[0, 4, 10] == pytest.approx(42 - 30)  # cell 10 has its centre at 10.5 · 4 px


@pytest.mark.parametrize("regions", [("mouth",), ("eyes", "brows"), ("nose",), ("jaw",)])
def test_regions_are_ignored_and_the_rest_counts(regions: tuple[Region, ...]) -> None:
    look, expression = draw_face(128)[None], draw_face(128, mouth_opening=0.1)[None]
    keep = keep_mask(
        (look, expression), regions, resolution=128, side=128, dilation=0.05, softness=0.03
    )
    assert keep.shape == (1, 1, 128, 128)
    assert keep.min() == 0 and keep.max() == 1
    for face in (look, expression):
        for region in regions:
            members = [*BANDS.get(region, ())] + [m for hull in HULLS.get(region, ()) for m in hull]
            for x, y in face[0, members].int().tolist():
                assert keep[0, 0, y, x] == 0
    assert keep[0, 0, 2:10].min() > 0.99  # the hair
    assert 0 < (keep == 0).float().mean() < 0.35


def test_jaw_is_the_area_that_the_outline_sweeps() -> None:
    look, expression = draw_face(128)[None], draw_face(128, mouth_opening=0.12)[None]
    keep = keep_mask(
        (look, expression), ("jaw",), resolution=128, side=128, dilation=0.02, softness=0.0
    )
    between = (look[0, 8] + expression[0, 8]) / 2
    assert abs(float(look[0, 8, 1] - expression[0, 8, 1])) > 5
    assert keep[0, 0, int(between[1]), int(between[0])] == 0
    assert keep[0, 0, int(look[0, 57, 1]), 64] == 1  # the mouth within it counts


def test_feather_is_gaussian_outside_of_the_dilated_hull() -> None:
    face = draw_face(256)[None]
    unit = float((face[0, 36] - face[0, 45]).norm())
    keep = keep_mask((face,), ("mouth",), resolution=256, side=256, dilation=0.1, softness=0.2)
    outer_lip = face[:, 48:68].double()
    distance = hull_distance(outer_lip, 256, 256)[0].numpy() / unit
    expected = 1 - np.exp(-(np.maximum(distance - 0.1, 0) ** 2) / (2 * 0.2**2))
    np.testing.assert_allclose(keep[0, 0].numpy(), expected, atol=1e-6)


def test_strength_and_empty() -> None:
    face = draw_face(64)[None]
    options = {"resolution": 64, "side": 32, "dilation": 0.05, "softness": 0.05}
    half = keep_mask((face,), ("mouth",), strength=0.5, **options)
    whole = keep_mask((face,), ("mouth",), **options)
    torch.testing.assert_close(half, 1 - 0.5 * (1 - whole))
    assert (keep_mask((face,), (), **options) == 1).all()
    assert (keep_mask((face,), ("mouth",), strength=0.0, **options) == 1).all()


def test_softness_of_zero_is_a_step() -> None:
    face = draw_face(64)[None]
    keep = keep_mask((face,), ("eyes",), resolution=64, side=64, dilation=0.1, softness=0.0)
    assert set(keep.unique().tolist()) == {0.0, 1.0}


def test_faces_of_a_batch_are_strangers() -> None:
    torch.manual_seed(0)
    look = torch.stack([draw_face(96) + 4 * torch.randn(68, 2) for _ in range(3)])
    expression = torch.stack([draw_face(96, 0.1) + 4 * torch.randn(68, 2) for _ in range(3)])
    regions: tuple[Region, ...] = ("mouth", "eyes", "brows", "nose", "jaw")
    options = {"resolution": 96, "side": 48, "dilation": 0.05, "softness": 0.05}
    together = keep_mask((look, expression), regions, **options)
    for k in range(3):
        alone = keep_mask((look[k : k + 1], expression[k : k + 1]), regions, **options)
        torch.testing.assert_close(together[k : k + 1], alone, rtol=0, atol=1e-7)


def test_face_weight_is_one_in_the_face_and_falls_to_what_is_left_around() -> None:
    landmarks = draw_face(128)[None]
    weight = face_weight(landmarks, resolution=128, side=64, emphasis=0.7)[0, 0]
    points = landmarks[0, [0, 8, 16, 30, 48]] / 2
    for x, y in (points - 0.5).round().long().clamp(0, 63).tolist():
        assert float(weight[y, x]) > 0.95
    forehead_x, forehead_y = 31, int(64 * 0.33)
    assert float(weight[forehead_y, forehead_x]) == pytest.approx(1.0)
    for corner in (weight[0, 0], weight[0, -1], weight[-1, 0], weight[-1, -1]):
        assert float(corner) == pytest.approx(0.3, abs=1e-3)
    assert face_weight(landmarks, resolution=128, side=8, emphasis=0.0).eq(1).all()
