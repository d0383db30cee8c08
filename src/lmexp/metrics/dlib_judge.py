"""dlib's networks as a judge: is there a face, where are its landmarks, who is it?

None of the three shares weights with anything that lmexp optimises, and none of them is
differentiable here.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import dlib
import numpy as np
from numpy.typing import NDArray

from lmexp.recording.run_folder import Picture
from lmexp.weights import store

EXPECTED_BOX = (0.18, 0.30, 0.76, 0.89)
"""Where dlib's detector sees the face of an FFHQ-aligned picture: left, top, right, bottom,
shares of its side (medians of 60 generated faces, each side ± 0.04)."""

IDENTITY_MEAN = Path(__file__).parent / "data" / "dlib_identity_mean.json"
"""Mean identity over many people; scripts/measure_identity_mean.py writes it."""

_REMEMBERED = 256
"""Pictures whose verdicts are kept: photos come again in every job of a sweep."""


@dataclass(frozen=True)
class Verdict:
    """What dlib sees in one picture.

    Attributes:
        found: whether its detector sees a face; if not, the rest is read where an aligned
            face ought to be, and is to be trusted accordingly.
        landmarks: [68, 2], x then y, px, of its shape predictor.
        identity: [128], of its face recognition network, not normalised.
    """

    found: bool
    landmarks: NDArray[np.float64]
    identity: NDArray[np.float64]


class DlibJudge:
    """dlib's frontal face detector, 68-point shape predictor and face recognition network.

    Two pictures count as one person's if their identities are less than 0.6 apart (Euclid):
    right for 99.38 % of the pairs of "Labeled Faces in the Wild", says its author.

    Raises:
        LmexpError: the weights cannot be had.

    Source: King, "Dlib-ml: a machine learning toolkit", JMLR 10, 2009; Kazemi and Sullivan,
    CVPR 2014, for the predictor (trained on 300-W); He et al., arXiv 1512.03385, for the
    network (a ResNet of 29 layers, trained with a metric loss on about 3 million faces).
    """

    def __init__(self, say: store.Say = store.say_on_stderr) -> None:
        predictor = store.file_path("dlib_landmarks_68", say)
        network = store.file_path("dlib_identity", say)
        self.weights_sha256 = {  # `file_path` has verified them
            "landmarks": store.find_file("dlib_landmarks_68").sha256,
            "identity": store.find_file("dlib_identity").sha256,
        }
        self._detect = dlib.get_frontal_face_detector()
        self._predict = dlib.shape_predictor(str(predictor))
        self._recognise = dlib.face_recognition_model_v1(str(network))
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()

    def look_at(self, picture: Picture) -> Verdict:
        """Judge an FFHQ-aligned picture.

        Args:
            picture: [H, W, 3], RGB, 0–255.
        """
        key = hashlib.sha256(picture.tobytes() + str(picture.shape).encode()).digest()
        if key not in self._verdicts:
            self._verdicts[key] = self._judge(np.ascontiguousarray(picture))
            if len(self._verdicts) > _REMEMBERED:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(key)
        return self._verdicts[key]

    def _judge(self, picture: Picture) -> Verdict:
        height, width = picture.shape[:2]
        left, top, right, bottom = EXPECTED_BOX
        expected = dlib.rectangle(
            round(left * width), round(top * height), round(right * width), round(bottom * height)
        )
        # Enlarged only if need be: the detector's smallest face is 80 px, and slow when larger.
        boxes = self._detect(picture, 0) or self._detect(picture, 1)
        # Of several (a face on a shirt), the one that lies where the alignment put the face.
        box = max(boxes, key=lambda box: _overlap(box, expected)) if boxes else expected
        found = bool(boxes) and _overlap(box, expected) > 0.2
        shape = self._predict(picture, box if found else expected)
        return Verdict(
            found=found,
            landmarks=np.array([[point.x, point.y] for point in shape.parts()], dtype=float),
            identity=np.array(self._recognise.compute_face_descriptor(picture, shape, 1)),
        )


@cache
def identity_mean() -> NDArray[np.float64]:
    """[128], the mean of dlib's identities over many people.

    All identities share its direction, so that strangers' cosine is 0.85; less the mean, it
    is 0 ± 0.2.
    """
    return np.array(json.loads(IDENTITY_MEAN.read_text(encoding="utf-8"))["mean"])


def _overlap(one: dlib.rectangle, other: dlib.rectangle) -> float:
    """Area of the intersection over that of the union."""
    both = one.intersect(other).area()
    return float(both / (one.area() + other.area() - both))
