"""The face detectors of the package face-alignment, their weights through our store.

The package's own code decodes and merges boxes; left to itself it would fetch its weights when it
is built, unchecked and unasked. Both see upright faces only, unlike `DlibDetector`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.faces.dlib_detector import rank
from lmexp.faces.protocol import FaceBox, Photo
from lmexp.landmarks.face_alignment_network import RAISE
from lmexp.weights import store
from lmexp.weights.converters import first_line


class SfdDetector:
    """S3FD, a convolutional detector of faces of many sizes; face-alignment's default.

    Args:
        threshold: least probability of a face.
        side: px to which the photo's longer side is brought at most; time grows with its square
            (about 4 s at 640 px on one CPU core), and faces below about 2 % of it are not seen.
        weights: a state dict of that network, used instead of the published one.

    Raises:
        LmexpError: the weights can't be had, or are not such a network's.

    Source: Zhang et al., "S3FD: single shot scale-invariant face detector", ICCV 2017
    (arXiv 1708.05237).
    """

    def __init__(
        self,
        threshold: Annotated[float, Field(gt=0.05, lt=1)] = 0.5,
        side: Annotated[int, Field(ge=64, le=4096)] = 640,
        weights: str | None = None,
    ) -> None:
        # Here, since the package imports OpenCV and numba, seconds that others need not.
        from face_alignment.detection.sfd.sfd_detector import SFDDetector

        self.side = side
        path = _weights(weights, "face_alignment_sfd")
        self._find = _build(SFDDetector, path, filter_threshold=threshold)

    def detect(self, photo: Photo) -> list[FaceBox]:
        """Find faces; see `FaceDetector.detect`."""
        height, width = photo.shape[:2]
        scale = min(1.0, self.side / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        picture = np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS))
        found = self._find.detect_from_image(picture)
        factors = width / size[0], height / size[1]
        return rank([_square(box, factors) for box in found], (width, height))


class BlazeFaceDetector:
    """BlazeFace, a detector of a phone's camera: fast, for one or few large faces.

    The photo is padded to a square, so that faces at its sides are seen, too.

    Args:
        variant: `front` for faces near a selfie camera, or `back` for smaller ones.
        threshold: least score of a face.
        weights: a state dict of that network, used instead of the published one.

    Raises:
        LmexpError: the weights can't be had, or are not such a network's.

    Source: Bazarevsky et al., "BlazeFace: sub-millisecond neural face detection on mobile GPUs",
    2019 (arXiv 1907.05047).
    """

    def __init__(
        self,
        variant: Literal["front", "back"] = "back",
        threshold: Annotated[float, Field(gt=0, lt=1)] = 0.65,
        weights: str | None = None,
    ) -> None:
        from face_alignment.detection.blazeface.blazeface_detector import BlazeFaceDetector

        path = _weights(weights, f"blazeface_{variant}")
        # The package fetches the anchors as a file; they follow from the grids.
        file = io.BytesIO()
        np.save(file, anchors())
        file.seek(0)
        self._find = _build(
            BlazeFaceDetector,
            path,
            path_to_anchor=file,
            back_model=variant == "back",
            min_score_thresh=threshold,
        )
        self._find.face_detector.register_forward_hook(_bound)

    def detect(self, photo: Photo) -> list[FaceBox]:
        """Find faces; see `FaceDetector.detect`."""
        height, width = photo.shape[:2]
        side = max(height, width)
        left, top = (side - width) // 2, (side - height) // 2
        square = np.zeros((side, side, 3), np.uint8)
        square[top : top + height, left : left + width] = photo
        found = self._find.detect_from_image(square)
        boxes = [np.asarray(box) - (left, top, left, top, 0) for box in found]
        return rank([_square(box) for box in boxes], (width, height))


def anchors() -> NDArray[np.float32]:
    """BlazeFace's anchors, both variants': 2 a cell of 16×16, then 6 a cell of 8×8.

    Returns:
        [896, 4]: x and y of the centre, width and height, in sides of the picture. All are of
        size 1, since the network gives sizes themselves.
    """
    found: list[NDArray[np.float32]] = []
    for cells, each in ((16, 2), (8, 6)):
        at = (np.arange(cells, dtype=np.float32) + 0.5) / cells
        x, y = np.meshgrid(at, at)
        centres = np.stack((x, y, np.ones_like(x), np.ones_like(x)), axis=2).reshape(-1, 4)
        found.append(centres.repeat(each, axis=0).astype(np.float32))
    return np.concatenate(found)


def _bound(network: Any, inputs: Any, outputs: list[Tensor]) -> None:
    """Keep BlazeFace's boxes finite and at least 1 px wide and high, in place.

    The package merges boxes until each has overlapped itself, which one without an area never
    does: odd weights would hang it.
    """
    boxes = outputs[0]
    boxes.nan_to_num_(0.0).clamp_(-1e4, 1e4)
    boxes[..., 2:4].clamp_(min=1.0)


def _weights(chosen: str | None, name: str) -> Path:
    if chosen is None:
        return store.file_path(name)
    path = Path(chosen).expanduser()
    if not path.is_file():
        raise LmexpError(f"detector.weights: {path}: no such file; give a state dict")
    return path


def _build(detector: Any, path: Path, **keywords: Any) -> Any:
    """One of the package's detectors, which reads tensors of `path` and nothing else."""
    try:
        return detector("cpu", path_to_detector=str(path), **keywords)
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        OSError,
        ValueError,
        TypeError,
    ) as error:
        raise LmexpError(
            f"{path}: not the weights of face-alignment's {detector.__name__} "
            f"({first_line(error).rstrip(':')}); remove it, or give its state dict"
        ) from error


def _square(box: Iterable[float], factors: tuple[float, float] = (1.0, 1.0)) -> FaceBox:
    """The square whose crop for FAN is the one that face-alignment takes for this box.

    It is as wide as the box's mean side, and moved so that the crop's centre, which lies a share
    of the height above the box's, stays where it is.

    Args:
        box: left, top, right, bottom and score.
        factors: px of the photo per px of the box, x then y.
    """
    left, top, right, bottom, score = (float(value) for value in box)
    left, right = left * factors[0], right * factors[0]
    top, bottom = top * factors[1], bottom * factors[1]
    half = (right - left + bottom - top) / 4
    x = (left + right) / 2
    y = (top + bottom) / 2 + RAISE * (2 * half - (bottom - top))
    return FaceBox(left=x - half, top=y - half, right=x + half, bottom=y + half, score=score)
