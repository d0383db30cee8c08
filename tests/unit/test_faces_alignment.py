from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmexp.faces.alignment import crop, ffhq_affine, invert, square_affine, transform


def face(eyes: float = 60.0, mouth: float = 70.0) -> np.ndarray:
    """68 landmarks: eyes `eyes` apart around (200, 150), the mouth `mouth` below."""
    points = np.full((68, 2), (200.0, 150.0))
    points[36:42] = (200 - eyes / 2, 150)
    points[42:48] = (200 + eyes / 2, 150)
    points[48:68] = (200, 150 + mouth)
    return points


@pytest.mark.parametrize(("eyes", "mouth", "width"), [(60, 50, 240), (40, 80, 288)])
def test_the_ffhq_square_is_what_the_paper_says(eyes: float, mouth: float, width: float) -> None:
    """Side 4 × the eyes' distance or 3.6 × eyes to mouth, centre a tenth below the eyes."""
    affine = ffhq_affine(face(eyes, mouth), 256)
    centre = np.array([200, 150 + 0.1 * mouth])
    corners = centre + width / 2 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    assert transform(affine, corners) == pytest.approx(
        256 * np.array([[0, 0], [1, 0], [1, 1], [0, 1]]), abs=1e-6
    )


@settings(max_examples=40)
@given(
    angle=st.floats(-180, 180),
    scale=st.floats(0.1, 9),
    shift=st.tuples(st.floats(-500, 500), st.floats(-500, 500)),
)
def test_alignment_undoes_any_turn_scale_and_shift(
    angle: float, scale: float, shift: tuple[float, float]
) -> None:
    rng = np.random.default_rng(0)
    landmarks = face() + rng.normal(0, 2, (68, 2))
    cos, sin = scale * np.cos(np.radians(angle)), scale * np.sin(np.radians(angle))
    moved = landmarks @ np.array([[cos, -sin], [sin, cos]]).T + shift
    first = transform(ffhq_affine(landmarks, 256), landmarks)
    again = transform(ffhq_affine(moved, 256), moved)
    assert again == pytest.approx(first, abs=1e-6)


def test_affines_agree_with_their_words() -> None:
    affine = square_affine((50, 40), 20, 90, 10)
    # Turned a quarter clockwise: the square's top is at the photo's right.
    assert transform(affine, np.array([[60, 30], [60, 50], [50, 40]])) == pytest.approx(
        np.array([[0, 0], [10, 0], [5, 5]])
    )
    points = np.random.default_rng(0).normal(size=(5, 7, 2))
    assert transform(invert(affine), transform(affine, points)) == pytest.approx(points)


def waves(height: int, width: int, period: float = 40.0) -> np.ndarray:
    y, x = np.mgrid[:height, :width] + 0.5
    return np.stack([127 + 100 * np.sin(2 * np.pi * v / period) for v in (x, y, x + y)], axis=2)


def test_an_aligned_picture_passes_unchanged() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    result = crop(photo, np.eye(2, 3), 64)
    assert np.array_equal(result.image, photo)
    assert result.outside == 0


@pytest.mark.parametrize(("width", "side"), [(60, 240), (150, 100), (300, 100), (350, 50)])
def test_resampling_keeps_what_can_be_kept(width: float, side: int) -> None:
    period = 20 * max(1.0, width / side)
    photo = np.rint(waves(600, 500, period)).astype(np.uint8)
    affine = square_affine((240, 310), width, 25, side)
    image = crop(photo, affine, side).image
    y, x = np.mgrid[:side, :side] + 0.5
    px, py = np.moveaxis(transform(invert(affine), np.stack((x, y), axis=2)), 2, 0)
    for channel, v in enumerate((px, py, px + py)):
        expected = 127 + 100 * np.sin(2 * np.pi * v / period)
        # Averaging over a pixel takes a little off the highest of the three waves.
        assert np.abs(image[..., channel] - expected).max() < 8


@pytest.mark.parametrize("angle", [0, 30])
def test_what_is_too_fine_becomes_its_mean(angle: float) -> None:
    photo = np.zeros((800, 800, 3), np.uint8)
    photo[:, ::2] = 255
    image = crop(photo, square_affine((400, 400), 500, angle, 50), 50).image
    assert np.abs(image.astype(int) - 127.5).max() < 4


def test_outside_the_photo_it_is_mirrored_and_blurred() -> None:
    photo = np.rint(waves(200, 200)).astype(np.uint8)
    photo[100:, :, :] = np.random.default_rng(0).integers(0, 256, (100, 200, 3))
    affine = square_affine((0, 100), 200, 0, 200)
    result = crop(photo, affine, 200)
    assert result.outside == pytest.approx(0.5)
    assert np.array_equal(result.image[:, 102:], photo[:, 2:100])
    # Mirrored right beside the edge, and soft farther out.
    beside = np.abs(result.image[:, 98:100].astype(int) - photo[:, 1::-1]).mean()
    assert beside < 25
    assert result.image[120:180, :60].std() < 0.4 * photo[120:180, :60].std()


def test_an_edge_is_no_step() -> None:
    photo = np.full((100, 100, 3), 200, np.uint8)
    assert np.all(crop(photo, square_affine((0, 0), 150, 20, 64), 64).image == 200)


@pytest.mark.parametrize("centre", [(-400.0, 50.0), (50.0, 900.0)])
def test_a_square_beside_the_photo_shows_its_nearest_edge(centre: tuple[float, float]) -> None:
    photo = np.full((100, 100, 3), 90, np.uint8)
    result = crop(photo, square_affine(centre, 80, 10, 32), 32)
    assert np.all(result.image == 90)
    assert result.outside == 1
