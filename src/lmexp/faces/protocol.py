"""What the way from a photo to an aligned face needs to know of a face detector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Photo = NDArray[np.uint8]
"""[H, W, 3], RGB, upright as the camera was held."""


@dataclass(frozen=True)
class FaceBox:
    """A square around the inner face, from the brows to the chin.

    Attributes:
        left, top, right, bottom: px of the photo, whose first pixel spans [0, 1]; they may
            lie outside the photo.
        score: how sure the detector is; comparable within one detector only.
        angle: degrees by which the face is turned clockwise in the photo, coarse. The
            square itself is not turned.
    """

    left: float
    top: float
    right: float
    bottom: float
    score: float
    angle: float = 0.0

    @property
    def side(self) -> float:
        """Side of the square, px."""
        return self.right - self.left

    @property
    def centre(self) -> tuple[float, float]:
        """x then y, px of the photo."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


@runtime_checkable
class FaceDetector(Protocol):
    """Finds the faces of a photo."""

    def detect(self, photo: Photo) -> list[FaceBox]:
        """Find faces.

        Args:
            photo: [H, W, 3], RGB.

        Returns:
            The faces, the one that the photo is of first: the largest, unless one of about
            its size is more central or clearer. Empty if there is none.
        """
        ...
