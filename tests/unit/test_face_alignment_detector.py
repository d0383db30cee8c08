"""face-alignment's detectors behind our protocol, on networks of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lmexp.errors import LmexpError
from lmexp.faces.face_alignment_detector import BlazeFaceDetector, SfdDetector, anchors
from lmexp.faces.protocol import FaceDetector, Photo
from lmexp.landmarks.face_alignment_network import frame


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """State dicts of random networks, in the format of the published files."""
    from face_alignment.detection.blazeface.net_blazeface import BlazeFace
    from face_alignment.detection.sfd.net_s3fd import s3fd

    folder = tmp_path_factory.mktemp("detectors")
    paths: dict[str, str] = {}
    networks = {
        "sfd": s3fd,
        "front": lambda: BlazeFace(back_model=False),
        "back": lambda: BlazeFace(back_model=True),
    }
    for name, build in networks.items():
        torch.manual_seed(0)
        paths[name] = str(folder / f"{name}.pth")
        state = build().state_dict()
        for key in ("regressor_8.bias", "regressor_16.bias"):
            if key in state:
                # Widths and heights that are not negative: their merging would not end.
                for size in (2, 3):
                    state[key][size::16] = 40.0
        torch.save(state, paths[name], _use_new_zipfile_serialization=False)
    return paths


def draw_photo(height: int, width: int) -> Photo:
    return np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)


class Outputs(torch.nn.Module):
    """In place of S3FD: one confident cell of one layer, and the size of what it was shown.

    Args:
        layer: 0–5, of stride 2 ** (layer + 2).
        row, column: the cell.
        loc: its four regressed numbers.
    """

    def __init__(self, layer: int, row: int, column: int, loc: tuple[float, ...]) -> None:
        super().__init__()
        self.place, self.loc = (layer, row, column), loc
        self.shown: tuple[int, ...] = ()

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.shown = tuple(images.shape)
        outputs: list[torch.Tensor] = []
        for layer in range(6):
            cells = tuple(max(1, length // 2 ** (layer + 2)) for length in images.shape[2:])
            scores = torch.tensor([9.0, 0.0])[None, :, None, None].repeat(1, 1, *cells)
            boxes = torch.zeros(1, 4, *cells)
            if layer == self.place[0]:
                scores[0, :, self.place[1], self.place[2]] = torch.tensor([0.0, 3.0])
                boxes[0, :, self.place[1], self.place[2]] = torch.tensor(self.loc)
            outputs += [scores, boxes]
        return outputs


def test_sfd_box_by_hand(weights: dict[str, str]) -> None:
    detector = SfdDetector(weights=weights["sfd"], side=640)
    assert isinstance(detector, FaceDetector)
    network = Outputs(3, 2, 4, (0.5, -1.0, 0.0, 1.0))
    detector._find.face_detector = network
    (face,) = detector.detect(draw_photo(400, 1280))
    assert network.shown == (1, 3, 200, 640)
    # Stride 32: the prior's centre is (4.5 · 32, 2.5 · 32) = (144, 80), its side 4 · 32 = 128. With
    # variances 0.1 and 0.2: centre (144 + 6.4, 80 - 12.8), width 128, height 128 · e^0.2; and the
    # photo is twice as large.
    width, height = 256.0, 256 * np.exp(0.2)
    x, y = 300.8, 134.4
    side = (width + height) / 2
    assert face.side == pytest.approx(side) and face.bottom - face.top == pytest.approx(side)
    assert face.centre == pytest.approx((x, y - 0.12 * (height - side)))
    assert face.score == pytest.approx(1 / (1 + np.exp(-3.0)))
    # FAN's crop is the same for the square as for the box.
    box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    assert frame((face.left, face.top, face.right, face.bottom)) == pytest.approx(frame(box))


def test_sfd_threshold_and_no_face(weights: dict[str, str]) -> None:
    detector = SfdDetector(weights=weights["sfd"], threshold=0.96)
    detector._find.face_detector = Outputs(3, 0, 0, (0.0,) * 4)
    assert detector.detect(draw_photo(64, 64)) == []
    detector = SfdDetector(weights=weights["sfd"])
    detector._find.face_detector = Outputs(9, 0, 0, ())
    assert detector.detect(draw_photo(64, 64)) == []


def corners(boxes: Any) -> list[tuple[float, ...]]:
    """FaceBoxes of the package's boxes, by the rule above, in an order of their own."""
    found = []
    for left, top, right, bottom, score in boxes:
        x, y, side = frame((left, top, right, bottom))
        found.append((x, y, side, float(score)))
    return sorted(found)


def test_sfd_finds_what_face_alignment_finds(weights: dict[str, str]) -> None:
    from face_alignment.detection.sfd import FaceDetector as Theirs

    # Small: a random network sees a face nearly everywhere, and boxes are merged in pairs.
    photo = draw_photo(40, 48)
    theirs = Theirs("cpu", path_to_detector=weights["sfd"], filter_threshold=0.4)
    expected = corners(theirs.detect_from_image(photo))
    found = SfdDetector(weights=weights["sfd"], threshold=0.4).detect(photo)
    assert len(found) > 3
    got = corners((face.left, face.top, face.right, face.bottom, face.score) for face in found)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("variant", ["front", "back"])
@pytest.mark.parametrize(("height", "width"), [(200, 200), (120, 200), (200, 90)])
def test_blazeface_finds_what_face_alignment_finds(
    weights: dict[str, str], tmp_path: Path, variant: Any, height: int, width: int
) -> None:
    from face_alignment.detection.blazeface import FaceDetector as Theirs

    path = tmp_path / "anchors.npy"
    np.save(path, anchors())
    theirs = Theirs(
        "cpu",
        back_model=variant == "back",
        path_to_detector=weights[variant],
        path_to_anchor=path,
        min_score_thresh=0.45,
    )
    photo = draw_photo(height, width)
    # Theirs sees the middle square of a photo only; give it the whole one in a square.
    side = max(height, width)
    square = Image.new("RGB", (side, side))
    left, top = (side - width) // 2, (side - height) // 2
    square.paste(Image.fromarray(photo), (left, top))
    boxes = np.asarray(theirs.detect_from_image(np.asarray(square)))
    assert len(boxes)
    expected = corners(boxes - (left, top, left, top, 0))
    detector = BlazeFaceDetector(variant, threshold=0.45, weights=weights[variant])
    assert isinstance(detector, FaceDetector)
    got = corners(
        (face.left, face.top, face.right, face.bottom, face.score)
        for face in detector.detect(photo)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [-40.0, float("nan"), float("inf")])
def test_odd_weights_do_not_hang_blazeface(
    weights: dict[str, str], tmp_path: Path, value: float
) -> None:
    state = torch.load(weights["back"], weights_only=True)
    for key in ("regressor_8.bias", "regressor_16.bias"):
        state[key][2::16] = value
    path = tmp_path / "odd.pth"
    torch.save(state, path)
    detector = BlazeFaceDetector("back", threshold=0.45, weights=str(path))
    assert all(np.isfinite(face.side) for face in detector.detect(draw_photo(64, 64)))


def test_blazeface_without_a_face(weights: dict[str, str]) -> None:
    detector = BlazeFaceDetector("back", threshold=0.99, weights=weights["back"])
    assert detector.detect(draw_photo(64, 80)) == []


def test_anchors_by_hand() -> None:
    found = anchors()
    assert found.shape == (16 * 16 * 2 + 8 * 8 * 6, 4) and found.dtype == np.float32
    assert (found[:, 2:] == 1).all()
    # Two a cell, the cells row by row; then six a cell.
    np.testing.assert_allclose(found[[0, 1], :2], 1 / 32)
    np.testing.assert_allclose(found[2, :2], (3 / 32, 1 / 32))
    np.testing.assert_allclose(found[511, :2], 31 / 32)
    np.testing.assert_allclose(found[[512, 517], :2], 1 / 16)
    np.testing.assert_allclose(found[518, :2], (3 / 16, 1 / 16))


@pytest.mark.parametrize("build", [SfdDetector, BlazeFaceDetector])
def test_other_weights_are_refused_in_one_line(
    build: Any, weights: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "a.pth"
    for state in ({"a": torch.zeros(1)}, [1, 2], None):
        if state is None:
            path.write_bytes(b"<html>no</html>")
        else:
            torch.save(state, path)
        with pytest.raises(LmexpError, match="not the weights of face-alignment's") as caught:
            build(weights=str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(LmexpError, match="no such file"):
        build(weights=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("build", "name", "filename"),
    [
        (SfdDetector, "face_alignment_sfd", "s3fd-619a316812.pth"),
        (BlazeFaceDetector, "blazeface_back", "blazefaceback.pth"),
    ],
)
def test_absent_weights_are_named(
    build: Any, name: str, filename: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LmexpError("no route to host")

    monkeypatch.setenv("LMEXP_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("lmexp.weights.transfer.bring", fail)
    with pytest.raises(LmexpError, match=f"weights {name}: .*put {filename} into"):
        build()
