from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from lmexp.faces.dlib_detector import DlibDetector, equalise, merge, overlap, rank
from lmexp.faces.photo import read_photo
from lmexp.faces.protocol import FaceBox, FaceDetector, Photo
from lmexp.landmarks.pts import read_pts

PORTRAIT = (slice(0, 300), slice(80, 380))
"""Head and shoulders of the astronaut."""

CENTRE = np.array([145.0, 130.0])
"""Between eyes and mouth, px of the portrait."""


@pytest.fixture(scope="module")
def detector() -> DlibDetector:
    return DlibDetector()


@pytest.fixture(scope="module")
def portrait() -> Photo:
    photo: Photo = np.ascontiguousarray(skimage.data.astronaut()[PORTRAIT])
    return photo


def square(left: float, top: float, side: float, score: float = 3.0) -> FaceBox:
    return FaceBox(left, top, left + side, top + side, score)


def test_the_astronaut_has_one_face(detector: DlibDetector) -> None:
    assert isinstance(detector, FaceDetector)
    (box,) = detector.detect(np.asarray(skimage.data.astronaut()))
    assert np.linalg.norm(np.subtract(box.centre, CENTRE) - (80, 0)) < 10
    assert 80 < box.side < 120
    assert box.bottom - box.top == pytest.approx(box.side)
    assert abs(box.angle) <= 30


@pytest.mark.parametrize("degrees", [-45, 25, 60, 90, 180])
def test_turned_photos_keep_their_face(
    detector: DlibDetector, portrait: Photo, degrees: float
) -> None:
    turned = np.asarray(
        Image.fromarray(portrait).rotate(-degrees, Image.Resampling.BICUBIC, expand=True)
    )
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    centre = np.array([[cos, -sin], [sin, cos]]) @ (CENTRE - 150)
    box = detector.detect(turned)[0]
    assert np.linalg.norm(box.centre - centre - np.array(turned.shape[1::-1]) / 2) < 15
    assert abs((box.angle - degrees + 180) % 360 - 180) <= 45


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda p: (p * 0.1).astype(np.uint8), id="dark"),
        pytest.param(lambda p: (120 + p * 0.1).astype(np.uint8), id="faded"),
        pytest.param(lambda p: np.asarray(Image.fromarray(p).resize((90, 90))), id="small"),
        pytest.param(lambda p: p[70:185, 85:200], id="tight"),
        pytest.param(lambda p: np.pad(p, ((900, 200), (1300, 0), (0, 0))), id="far"),
    ],
)
def test_faces_in_bad_photos_are_found(
    detector: DlibDetector, portrait: Photo, spoil: object
) -> None:
    assert callable(spoil)
    photo = np.ascontiguousarray(spoil(portrait))
    box = detector.detect(photo)[0]
    height, width = photo.shape[:2]
    x, y = box.centre
    if width > 1000:
        x, y, width, height = x - 1300, y - 900, 300, 300
    if width < 120 < box.side * 1.5:
        x, y, width, height = x + 85, y + 70, 300, 300
    assert np.linalg.norm(np.array([x * 300 / width, y * 300 / height]) - CENTRE) < 15


def test_what_is_no_face_is_not_found(detector: DlibDetector) -> None:
    assert detector.detect(np.asarray(skimage.data.coffee())) == []
    assert detector.detect(np.full((64, 200, 3), 80, np.uint8)) == []
    noise = np.random.default_rng(0).integers(0, 256, (200, 120, 3), dtype=np.uint8)
    assert detector.detect(noise) == []


def test_the_threshold_decides(portrait: Photo) -> None:
    assert DlibDetector(threshold=10).detect(portrait[:150, :160]) == []


def test_boxes_of_one_face_become_one() -> None:
    first, same, other = square(0, 0, 100, 1.0), square(10, 5, 110, 2.0), square(300, 0, 90, 0.5)
    faces = merge([first, other, same])
    assert [face.left for face in faces] == [10, 300]
    assert [face.score for face in faces] == [3.0, 0.5]
    assert overlap(first, other) == 0
    assert overlap(first, square(25, 25, 50)) == 1
    assert overlap(square(0, 0, 100), square(50, 50, 100)) == pytest.approx(0.25)


def test_the_face_that_the_photo_is_of_comes_first() -> None:
    size = (1000, 800)
    large, small = square(350, 250, 300), square(100, 300, 120)
    assert rank([small, large], size) == [large, small]
    # Of nearly the same size: the central one.
    centre, corner = square(370, 270, 300), square(0, 0, 310)
    assert rank([corner, centre], size) == [centre, corner]
    # Much larger, at the side: still the larger one.
    side = square(0, 200, 500)
    assert rank([centre, side], size) == [side, centre]
    # About as large: the surer one.
    unsure = square(360, 260, 310, 0.2)
    assert rank([unsure, centre], size) == [centre, unsure]


def test_contrast_is_brought_out() -> None:
    rng = np.random.default_rng(0)
    dark = rng.integers(3, 9, (64, 64), dtype=np.uint8)
    assert np.ptp(equalise(dark, local=False)) == 255
    assert np.ptp(equalise(dark, local=True)) > 200
    flat = np.full((64, 64), 9, np.uint8)
    assert np.array_equal(equalise(flat, local=True), flat)
    assert np.ptp(equalise(flat, local=False)) == 0


@pytest.mark.skipif(
    "LMEXP_TEST_DATA" not in os.environ, reason="LMEXP_TEST_DATA names no folder of test photos"
)
def test_the_main_face_of_every_test_photo_is_the_first(detector: DlibDetector) -> None:
    paths = sorted((Path(os.environ["LMEXP_TEST_DATA"]) / "photos").glob("*.jpg"))
    assert len(paths) == 24
    missed = []
    for path in paths:
        points = read_pts(path.with_suffix(".pts")).numpy()
        boxes = detector.detect(read_photo(path))
        middle, extent = (points.max(0) + points.min(0)) / 2, np.ptp(points, axis=0).max()
        if not boxes or np.linalg.norm(boxes[0].centre - middle) > 0.35 * extent:
            missed.append(path.stem)
    assert missed == []
