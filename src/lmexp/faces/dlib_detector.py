"""dlib's frontal face detector, which carries its weights, made to see more than frontal faces."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import dlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import Field
from skimage.exposure import equalize_adapthist

from lmexp.faces.protocol import FaceBox, Photo

MIN_FACE = 80
"""The side of the smallest face that the detector sees, in px of the picture it is given."""

LEAST_SCORE = -0.3
"""dlib's own threshold is 0: a face that several passes half see counts too."""

SURE = 2.0
"""Score of a face beside which the unsure ones are taken for chance."""

MAX_MAGNIFICATION = 4.0
"""Small pictures are enlarged this much at most: fewer px than MIN_FACE / 4 are no face."""


@dataclass(frozen=True)
class Pass:
    """One look at the photo.

    Attributes:
        side: px to which the photo's longer side is brought. Faces of at least
            MIN_FACE / side of it are seen.
        angle: degrees by which faces that this pass is for are turned clockwise; the
            detector itself tolerates about 30 either way, less where it is in doubt.
        border: width of a border that repeats the edge, as a share of the side, for faces
            that the photo's edge cuts.
        local: equalise the contrast locally, which blurred faces need, instead of
            stretching that of the whole photo.
    """

    side: int
    angle: float = 0.0
    border: float = 0.0
    local: bool = False


STAGES: tuple[tuple[Pass, ...], ...] = (
    # Tilted heads are sought at once, so that an upright face in the background does not win
    # over a tilted one in front of it. This stage finds 99 % of the faces of portrait photos.
    (Pass(1024), Pass(640, 15), Pass(640, -15), Pass(640, 30), Pass(640, -30)),
    # Unclear faces, faces down to 4 % of the photo, and faces larger than the photo.
    (
        Pass(512, 15),
        Pass(512, -15),
        Pass(760),
        Pass(400),
        Pass(1024, local=True),
        Pass(512, local=True),
        Pass(2048),
        Pass(640, border=0.3),
    ),
    # Photos that lost the note of how the camera was held.
    (Pass(1024, 90), Pass(1024, -90), Pass(1024, 180), Pass(640, 60), Pass(640, -60)),
    # Faces down to 2 % of a large photo.
    (Pass(4096),),
)


class DlibDetector:
    """A histogram-of-gradients face detector over several scales and turns of the photo.

    A face shows in several passes, what is none by chance in one: a box's score is the sum
    over the passes of the score that dlib gave it above LEAST_SCORE. The stages of `STAGES`
    add passes until a box has enough.

    Args:
        threshold: least score of a face; lower finds more faces and more that are none.

    Source: Dalal & Triggs, "Histograms of oriented gradients for human detection", CVPR 2005;
    King, "Max-margin object detection", 2015 (arXiv 1502.00046).
    """

    def __init__(self, threshold: Annotated[float, Field(ge=0, le=10)] = 0.8) -> None:
        self.threshold = threshold
        self._find = dlib.get_frontal_face_detector()

    def detect(self, photo: Photo) -> list[FaceBox]:
        """Find faces; see `FaceDetector.detect`."""
        grey = Image.fromarray(photo).convert("L")
        size = photo.shape[1], photo.shape[0]
        boxes: list[FaceBox] = []
        done: set[tuple[float, Pass]] = set()
        for stage in STAGES:
            for look in stage:
                scale = magnification(size, look)
                # Of a small picture, passes that only differ in side are the same.
                key = (scale, replace(look, side=0))
                if key not in done:
                    done.add(key)
                    boxes += self._look(grey, look, scale)
            faces = [face for face in merge(boxes) if face.score >= self.threshold]
            if any(face.score >= SURE for face in faces):
                faces = [face for face in faces if face.score >= SURE]
            if faces:
                return rank(faces, size)
        return []

    def _look(self, grey: Image.Image, look: Pass, scale: float) -> Iterator[FaceBox]:
        """The faces of one pass, in px of the photo."""
        width, height = (max(1, round(length * scale)) for length in grey.size)
        picture = np.asarray(
            grey.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        )
        border = round(look.border * max(width, height))
        picture = equalise(np.pad(picture, border, mode="edge"), look.local)
        turned = np.asarray(
            Image.fromarray(picture).rotate(look.angle, Image.Resampling.BILINEAR, expand=True)
        )
        rectangles, scores, _ = self._find.run(turned, 0, LEAST_SCORE)
        # About the picture's middle, `rotate` turns counter-clockwise: go back clockwise.
        cos, sin = math.cos(math.radians(look.angle)), math.sin(math.radians(look.angle))
        for rectangle, score in zip(rectangles, scores, strict=True):
            x = (rectangle.left() + rectangle.right() + 1 - turned.shape[1]) / 2
            y = (rectangle.top() + rectangle.bottom() + 1 - turned.shape[0]) / 2
            half = (rectangle.right() + 1 - rectangle.left()) / 2 / scale
            middle_x = (cos * x - sin * y + width / 2) / scale
            middle_y = (sin * x + cos * y + height / 2) / scale
            yield FaceBox(
                left=middle_x - half,
                top=middle_y - half,
                right=middle_x + half,
                bottom=middle_y + half,
                score=float(score) - LEAST_SCORE,
                angle=look.angle,
            )


def magnification(size: tuple[int, int], look: Pass) -> float:
    """How much the photo (width, height in px) is enlarged for a pass; below 1, made smaller."""
    return min(look.side / max(size), MAX_MAGNIFICATION)


def equalise(picture: NDArray[np.uint8], local: bool) -> NDArray[np.uint8]:
    """Bring out what a grey picture [H, W] shows: gradients of dark and faded photos are weak.

    Args:
        picture: 0–255.
        local: contrast-limited adaptive histogram equalisation; else the darkest and the
            brightest per cent become black and white.
    """
    if not local:
        return np.asarray(ImageOps.autocontrast(Image.fromarray(picture), cutoff=1))
    if picture.min() == picture.max():
        return picture
    levels: NDArray[np.uint8] = np.rint(equalize_adapthist(picture, clip_limit=0.03) * 255).astype(
        np.uint8
    )
    return levels


def merge(boxes: Iterable[FaceBox]) -> list[FaceBox]:
    """One box a face: where boxes overlap by much, the surest, with the sum of the scores."""
    groups: list[list[FaceBox]] = []
    for box in sorted(boxes, key=lambda box: -box.score):
        for group in groups:
            if overlap(box, group[0]) > 0.3:
                group.append(box)
                break
        else:
            groups.append([box])
    return [replace(group[0], score=sum(box.score for box in group)) for group in groups]


def overlap(first: FaceBox, second: FaceBox) -> float:
    """Area that two boxes share, as a fraction of the smaller one's."""
    width = min(first.right, second.right) - max(first.left, second.left)
    height = min(first.bottom, second.bottom) - max(first.top, second.top)
    return max(0.0, width) * max(0.0, height) / min(first.side, second.side) ** 2


def rank(boxes: Sequence[FaceBox], size: tuple[int, int]) -> list[FaceBox]:
    """Put the face that the photo is of first.

    Boxes are compared by their side, which counts less towards the photo's corners and where
    the detector is less sure (cut, turned or blurred faces): its sizes come in steps of a
    fifth, so size alone would choose at random between two people who stand side by side.

    Args:
        boxes: faces.
        size: width and height of the photo, px.
    """

    def prominence(box: FaceBox) -> float:
        x, y = box.centre
        distance = math.hypot(x - size[0] / 2, y - size[1] / 2) / math.hypot(*size) * 2
        sure = min(0.5 + box.score / 12, 1.0)
        return box.side * (1 - 0.6 * min(distance, 1.0)) * sure

    return sorted(boxes, key=prominence, reverse=True)
