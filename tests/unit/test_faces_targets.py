"""The way from photo to aligned face.

Most tests use a photo whose colours say where each pixel is, and a network that reads them:
it knows where the landmarks are in any view of that photo, however it was cut and turned.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.faces.alignment import ffhq_affine, transform
from lmexp.faces.dlib_detector import DlibDetector
from lmexp.faces.protocol import FaceBox, Photo
from lmexp.faces.targets import AlignedFace, align_photo
from lmexp.landmarks.embedded import EmbeddedFan
from lmexp.landmarks.pts import read_pts
from lmexp.recording.images import to_image, to_images

SIZE = 640
CELLS = 64


class Boxes:
    """A detector that finds what it is told."""

    def __init__(self, *boxes: FaceBox) -> None:
        self.boxes = list(boxes)

    def detect(self, photo: Photo) -> list[FaceBox]:
        assert photo.ndim == 3
        return self.boxes


class ColourReader:
    """Draws heat maps of `landmarks` of the photo of `coordinates()`, in whatever view of it."""

    weights_sha256 = "none"

    def __init__(self, landmarks: np.ndarray, peak: float = 1.0) -> None:
        self.landmarks = landmarks
        self.peak = peak
        self.misread = False

    def __call__(self, images: Tensor) -> Tensor:
        return torch.stack([self.draw(image) for image in images.double()])

    def draw(self, image: Tensor) -> Tensor:
        side = image.shape[1]
        x, y = ((image[:2] + 1) / 2 * SIZE).flatten(1)
        where = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double() + 0.5
        # What lies outside the photo repeats the colours of its edge, hence the inner part alone.
        inner = ((x - SIZE / 2).abs() < SIZE / 2 - 100) & ((y - SIZE / 2).abs() < SIZE / 2 - 100)
        photo = torch.stack((x, y, torch.ones_like(x)), dim=1)[inner]
        solution = torch.linalg.lstsq(photo, where.flip(1)[inner]).solution
        points = torch.from_numpy(self.landmarks) @ solution[:2] + solution[2]
        if self.misread and side != 256:
            points = points + side / 4
        at = torch.arange(CELLS) + 0.5
        cells = points * CELLS / side
        bells = torch.exp(-((at - cells[..., None]) ** 2) / 3)
        return (self.peak * bells[:, 1, :, None] * bells[:, 0, None, :]).float()


def coordinates() -> Photo:
    """[640, 640, 3]: red grows to the right, green downwards."""
    ramp = np.rint((np.arange(SIZE) + 0.5) / SIZE * 255).astype(np.uint8)
    photo = np.zeros((SIZE, SIZE, 3), np.uint8)
    photo[..., 0], photo[..., 1] = ramp, ramp[:, None]
    return photo


def face(
    centre: tuple[float, float] = (320, 320), width: float = 150, turn: float = 0
) -> np.ndarray:
    """68 points such as a face has: an ellipse with eyes and a mouth."""
    turns = np.linspace(0, 2 * np.pi, 68, endpoint=False)
    points = np.stack((0.5 * np.cos(turns), 0.55 * np.sin(turns)), axis=1)
    points[36:42] = (-0.2, -0.2)
    points[42:48] = (0.2, -0.2)
    points[48], points[54] = (-0.15, 0.25), (0.15, 0.25)
    angle = np.radians(turn)
    turning = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return points @ turning.T * width + centre


def box(points: np.ndarray, angle: float = 0, score: float = 3) -> FaceBox:
    x, y = (points.max(0) + points.min(0)) / 2
    half = np.ptp(points, axis=0).max() / 2
    return FaceBox(x - half, y - half, x + half, y + half, score, angle)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(coordinates()).save(path)
    return path


@pytest.mark.parametrize(("turn", "width"), [(0, 150), (35, 110), (90, 150), (-170, 180)])
def test_a_face_of_any_turn_and_size_is_aligned(photo: Path, turn: float, width: float) -> None:
    points = face(width=width, turn=turn)
    aligned = align_photo(photo, Boxes(box(points, turn)), ColourReader(points), 128)
    assert aligned.image.shape == (128, 128, 3)
    assert aligned.image.dtype == np.uint8
    assert aligned.warnings == ()
    assert aligned.photo_size == (SIZE, SIZE)
    # A cell of the heat maps is about two px of the photo.
    assert np.abs(aligned.photo_landmarks - points).max() < 1
    assert aligned.affine == pytest.approx(ffhq_affine(aligned.photo_landmarks, 128), abs=0.01)
    assert aligned.landmarks == pytest.approx(transform(ffhq_affine(points, 128), points), abs=0.5)
    # The picture shows the photo where the affine says.
    corner = transform(aligned.inverse, np.array([20.5, 90.5]))
    assert aligned.image[90, 20, :2] == pytest.approx(corner / SIZE * 255, abs=1.5)


def test_tensors_are_what_the_projection_takes(photo: Path) -> None:
    points = face()
    aligned = align_photo(photo, Boxes(box(points)), ColourReader(points), 64)
    (image,) = to_images([aligned.image], torch.device("cpu"))
    assert image.shape == (3, 64, 64)
    assert image.dtype == torch.float32
    assert torch.equal(image, to_image(aligned.image))
    levels = (image.permute(1, 2, 0) + 1) * 127.5
    assert torch.allclose(levels, torch.from_numpy(aligned.image).float(), atol=1e-3)
    landmarks = aligned.landmarks_tensor()
    assert landmarks.dtype == torch.float32
    assert np.array_equal(landmarks.numpy(), aligned.landmarks)


def test_of_several_faces_the_first_is_taken_with_a_word(photo: Path) -> None:
    main, other = face((250, 330)), face((480, 300), 90)
    boxes = Boxes(box(main), box(other))
    aligned = align_photo(photo, boxes, ColourReader(main), 64)
    assert aligned.warnings == (
        f"{photo}: 2 faces; took the main one, at (250, 330); choose with inputs.face=0 … 1",
    )
    chosen = align_photo(photo, boxes, ColourReader(other), 64, face=1)
    assert chosen.warnings == ()
    assert chosen.box == boxes.boxes[1]
    assert align_photo(photo, boxes, ColourReader(main), 64, face=0).warnings == ()


@pytest.mark.parametrize(("count", "have"), [(1, "one face: 0"), (3, "3 faces: 0 … 2")])
def test_a_face_that_is_not_there_is_refused(photo: Path, count: int, have: str) -> None:
    with pytest.raises(LmexpError, match=f"face 3 was asked for; there is {have}"):
        align_photo(photo, Boxes(*[box(face())] * count), ColourReader(face()), 64, face=3)


def test_no_face_is_an_error(photo: Path) -> None:
    with pytest.raises(LmexpError, match=r"photo\.png: no face found; give a photo that shows"):
        align_photo(photo, Boxes(), ColourReader(face()), 64)


def test_what_only_looks_like_a_face_is_an_error(photo: Path) -> None:
    with pytest.raises(LmexpError, match="no eyes, nose and mouth that can be made out; give"):
        align_photo(photo, Boxes(box(face())), ColourReader(face(), peak=0.1), 64)


def test_tiny_faces_are_refused_and_small_ones_announced(photo: Path) -> None:
    tiny, small = face(width=20), face(width=50)
    with pytest.raises(LmexpError, match="the face is only 22 px wide, 24 px are needed; give"):
        align_photo(photo, Boxes(box(tiny)), ColourReader(tiny), 64)
    (warning,) = align_photo(photo, Boxes(box(small)), ColourReader(small), 64).warnings
    assert "the face is only 55 px wide; the result will be as blurred" in warning


def test_a_crop_that_leaves_the_photo_is_announced(photo: Path) -> None:
    points = face((548, 320))
    (warning,) = align_photo(photo, Boxes(box(points)), ColourReader(points), 64).warnings
    assert "% of the aligned image lies outside the photo and is made up" in warning


def test_a_network_that_misreads_the_aligned_image_is_announced(photo: Path) -> None:
    network = ColourReader(face())
    network.misread = True
    (warning,) = align_photo(photo, Boxes(box(face())), network, 64).warnings
    assert "on the aligned image the landmark network is" in warning
    assert "try landmarks=fan_full or another photo" in warning


def test_a_generated_face_is_aligned_by_construction() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    landmarks = np.random.default_rng(1).uniform(0, 32, (68, 2))
    made = AlignedFace.of_aligned(image, landmarks)
    assert np.array_equal(made.inverse, np.eye(2, 3))
    assert made.photo_landmarks == pytest.approx(landmarks, abs=1e-5)
    assert (made.box, made.photo_size, made.warnings) == (None, None, ())


# dlib's 68-point predictor on scikit-image's portrait, px counted from the first one's centre: an
# independent judge. Jaw, brows, nose, eyes, lips.
# fmt: off
ASTRONAUT = np.array([
    179, 104, 180, 116, 181, 127, 182, 139, 185, 150, 191, 160, 200, 168, 209, 176, 220, 178,
    232, 177, 243, 171, 253, 163, 260, 154, 265, 143, 268, 131, 270, 120, 272, 108,
    186, 94, 192, 88, 200, 87, 208, 89, 216, 92, 236, 93, 244, 91, 252, 91, 260, 92, 265, 99,
    226, 102, 225, 111, 225, 119, 225, 127, 214, 131, 219, 133, 224, 134, 229, 133, 234, 132,
    195, 101, 200, 98, 207, 98, 212, 104, 206, 104, 199, 104,
    237, 106, 243, 100, 250, 100, 255, 105, 250, 107, 244, 107,
    201, 139, 209, 139, 218, 139, 224, 141, 230, 140, 238, 140, 246, 141, 238, 151, 229, 155,
    222, 156, 216, 155, 208, 150, 204, 141, 218, 143, 223, 144, 230, 143, 243, 142, 229, 150,
    223, 151, 217, 150,
]).reshape(68, 2) + 0.5
# fmt: on


@pytest.fixture(scope="module")
def fan() -> EmbeddedFan:
    return EmbeddedFan("slim").eval().requires_grad_(False)


def nme(landmarks: np.ndarray, reference: np.ndarray) -> float:
    unit = np.linalg.norm(reference[36] - reference[45])
    return float(100 * np.linalg.norm(landmarks - reference, axis=1).mean() / unit)


def test_the_portrait_is_aligned_as_another_program_sees_it(
    fan: EmbeddedFan, tmp_path: Path
) -> None:
    path = Path(skimage.data.__file__).parent / "astronaut.png"
    aligned = align_photo(path, DlibDetector(), fan, 256)
    assert aligned.warnings == ()
    assert nme(aligned.photo_landmarks, ASTRONAUT) < 4
    eyes = aligned.landmarks[[36, 45]]
    assert abs(eyes[0, 1] - eyes[1, 1]) < 8, "the eyes are level"

    # An aligned picture can be an input too.
    Image.fromarray(aligned.image).save(tmp_path / "aligned.png")
    again = align_photo(tmp_path / "aligned.png", DlibDetector(), fan, 256)
    assert again.affine == pytest.approx(np.eye(2, 3), abs=8)
    assert nme(again.photo_landmarks, aligned.landmarks) < 2


@pytest.mark.skipif(
    "LMEXP_TEST_DATA" not in os.environ, reason="LMEXP_TEST_DATA names no folder of test photos"
)
def test_landmarks_of_every_test_photo_are_those_annotated(fan: EmbeddedFan) -> None:
    paths = sorted((Path(os.environ["LMEXP_TEST_DATA"]) / "photos").glob("*.jpg"))
    assert len(paths) == 24
    detector = DlibDetector()
    errors = {
        path.stem: nme(
            align_photo(path, detector, fan, 256).photo_landmarks,
            read_pts(path.with_suffix(".pts")).numpy(),
        )
        for path in paths
    }
    assert max(errors.values()) < 7, errors
    assert np.mean(list(errors.values())) < 3
