"""From a photo to the aligned face and landmarks that a projection aims at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.faces.alignment import Affine, crop, ffhq_affine, invert, square_affine, transform
from lmexp.faces.photo import read_photo
from lmexp.faces.protocol import FaceBox, FaceDetector, Photo
from lmexp.landmarks.decoding import decode
from lmexp.landmarks.protocol import HeatmapNetwork

NETWORK_SIDE = 256
"""Side of the views in which landmarks are looked for, px."""

BOX_VIEWS = ((1.2, 0), (1.5, 0), (1.5, 20), (1.5, -20), (1.9, 0))
"""First views: side in sides of the detector's box, turn in degrees."""

FACE_VIEWS = (1.35, 1.7)
"""Second views, beside the FFHQ alignment's: side in extents of the landmarks."""

LEAST_FACE = 24.0
"""Side of the smallest box that is aligned, px: below, landmarks are guesses."""

SMALL_FACE = 64.0
"""Side of a box below which a warning says so, px."""

LEAST_PEAK = 0.25
"""Mean height of the heat maps' peaks below which there is no face."""

MUCH_AMISS = 0.1
"""Mean error on the aligned image, in distances of the outer eye corners, that is warned of."""

MUCH_OUTSIDE = 0.1
"""Share of the aligned image that may be made up before a warning says so."""


@dataclass(frozen=True)
class AlignedFace:
    """A face as the generator draws faces.

    Attributes:
        image: [R, R, 3], RGB, 0–255.
        landmarks: [68, 2], x then y, px of `image`.
        affine: photo px → image px; the identity if the image is no part of a photo.
        box: where the detector saw the face, px of the photo; None without a photo.
        photo_size: width and height of the photo, px; None without a photo.
        warnings: what the user should know, a line each.
    """

    image: Photo
    landmarks: NDArray[np.float32]
    affine: Affine
    box: FaceBox | None = None
    photo_size: tuple[int, int] | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def of_aligned(cls, image: Photo, landmarks: NDArray[np.floating]) -> AlignedFace:
        """A face that is aligned by construction, such as a generated one."""
        return cls(image, landmarks.astype(np.float32), np.eye(2, 3))

    @property
    def inverse(self) -> Affine:
        """Image px → photo px, for pasting back."""
        return invert(self.affine)

    @property
    def photo_landmarks(self) -> NDArray[np.float32]:
        """[68, 2], x then y, px of the photo."""
        return transform(self.inverse, self.landmarks).astype(np.float32)

    def landmarks_tensor(self) -> Tensor:
        """[68, 2], float32, x then y, px of the image."""
        return torch.tensor(self.landmarks)


def align_photo(
    path: Path,
    detector: FaceDetector,
    network: HeatmapNetwork,
    side: int,
    face: int | None = None,
    device: torch.device | str = "cpu",
) -> AlignedFace:
    """Read a photo, find its face, and align it as FFHQ's are.

    Landmarks are looked for twice: in views around the detector's box, then in upright views
    around those landmarks, of which one is the FFHQ alignment. Each time the views' median
    counts.

    Args:
        path: the photo.
        detector: finds faces.
        network: draws the heat maps of landmarks; on `device`.
        side: side R of the aligned image, px.
        face: which face, 0 the photo's main one; None takes that one and warns if there are
            others.
        device: where the network computes.

    Raises:
        LmexpError: the photo can't be read, holds no face, or not the one that was asked
            for, or that one is too small or no face after all.
    """
    photo = read_photo(path)
    box, warnings = choose_face(path, detector.detect(photo), face)
    warnings += check_size(path, box)
    landmarks = _search(path, photo, box, network, device)
    affine = ffhq_affine(landmarks, side)
    aligned = crop(photo, affine, side)
    landmarks = transform(affine, landmarks)
    seen = find_landmarks([aligned.image], network, device)[0][0]
    outer_eyes = np.linalg.norm(landmarks[36] - landmarks[45])
    error = np.linalg.norm(seen - landmarks, axis=1).mean() / outer_eyes
    if error > MUCH_AMISS:
        warnings += (
            f"{path}: on the aligned image the landmark network is {error:.0%} of the eyes' "
            "distance off, and so will the projection be; try landmarks=fan_full or another photo",
        )
    if aligned.outside > MUCH_OUTSIDE:
        warnings += (
            f"{path}: {aligned.outside:.0%} of the aligned image lies outside the photo and is "
            "made up by mirroring; a photo with more room around the head is better",
        )
    return AlignedFace(
        image=aligned.image,
        landmarks=landmarks.astype(np.float32),
        affine=affine,
        box=box,
        photo_size=(photo.shape[1], photo.shape[0]),
        warnings=warnings,
    )


def _search(
    path: Path,
    photo: Photo,
    box: FaceBox,
    network: HeatmapNetwork,
    device: torch.device | str,
) -> NDArray[np.float64]:
    """Landmarks of the face in the box, [68, 2], px of the photo."""
    views = [
        square_affine(box.centre, width * box.side, box.angle + turn, NETWORK_SIDE)
        for width, turn in BOX_VIEWS
    ]
    landmarks = _agree(path, photo, views, network, device)
    views = [ffhq_affine(landmarks, NETWORK_SIDE)]
    views += [_face_affine(landmarks, width) for width in FACE_VIEWS]
    return _agree(path, photo, views, network, device)


def _agree(
    path: Path,
    photo: Photo,
    views: Sequence[Affine],
    network: HeatmapNetwork,
    device: torch.device | str,
) -> NDArray[np.float64]:
    """What several views of one face agree on: the median of each coordinate, px of the photo.

    A single view is now and then misread by a whole face's width, where a collar or a hand
    looks like a chin.
    """
    images = [crop(photo, view, NETWORK_SIDE).image for view in views]
    landmarks, peaks = find_landmarks(images, network, device)
    if np.median(peaks) < LEAST_PEAK:
        raise LmexpError(
            f"{path}: what looks like a face has no eyes, nose and mouth that can be made out; "
            "give a photo that shows the face from the front, larger or in better light"
        )
    found = [transform(invert(view), seen) for view, seen in zip(views, landmarks, strict=True)]
    middle: NDArray[np.float64] = np.median(found, axis=0)
    return middle


def _face_affine(landmarks: NDArray[np.float64], width: float) -> Affine:
    """An upright view of `width` times the landmarks' longer extent."""
    x, y = landmarks[42:48].mean(axis=0) - landmarks[36:42].mean(axis=0)
    low, high = landmarks.min(axis=0), landmarks.max(axis=0)
    centre_x, centre_y = (low + high) / 2
    angle = math.degrees(math.atan2(y, x))
    return square_affine((centre_x, centre_y), width * (high - low).max(), angle, NETWORK_SIDE)


def choose_face(
    path: Path, boxes: Sequence[FaceBox], face: int | None
) -> tuple[FaceBox, tuple[str, ...]]:
    """Pick one of the detector's faces, and say so if that was a choice."""
    if not boxes:
        raise LmexpError(
            f"{path}: no face found; give a photo that shows a face from the front, larger or "
            "in better light, or try detector.threshold=0.4"
        )
    if face is None:
        if len(boxes) == 1:
            return boxes[0], ()
        x, y = boxes[0].centre
        return boxes[0], (
            f"{path}: {len(boxes)} faces; took the main one, at ({x:.0f}, {y:.0f}); choose with "
            f"inputs.face=0 … {len(boxes) - 1}",
        )
    if not 0 <= face < len(boxes):
        have = "one face: 0" if len(boxes) == 1 else f"{len(boxes)} faces: 0 … {len(boxes) - 1}"
        raise LmexpError(f"{path}: face {face} was asked for; there is {have}")
    return boxes[face], ()


def check_size(path: Path, box: FaceBox) -> tuple[str, ...]:
    """Refuse a tiny face, and warn of a small one."""
    if box.side < LEAST_FACE:
        raise LmexpError(
            f"{path}: the face is only {box.side:.0f} px wide, {LEAST_FACE:.0f} px are needed; "
            "give a larger photo of it"
        )
    if box.side < SMALL_FACE:
        return (
            f"{path}: the face is only {box.side:.0f} px wide; the result will be as blurred "
            "as it is",
        )
    return ()


@torch.no_grad()
def find_landmarks(
    images: Sequence[Photo], network: HeatmapNetwork, device: torch.device | str = "cpu"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Landmarks of upright faces, one an image.

    Args:
        images: N of [R, R, 3], RGB, the face in the middle.
        network: on `device`.
        device: where it computes.

    Returns:
        landmarks: [N, 68, 2], x then y, px of the image.
        peaks: [N], mean height of the heat maps' maxima, about 1 if all are seen.
    """
    stacked = torch.tensor(np.stack(images)).permute(0, 3, 1, 2).to(device)
    heatmaps = network(stacked.float() / 127.5 - 1)
    landmarks: NDArray[np.float64] = decode(heatmaps, images[0].shape[0]).double().cpu().numpy()
    peaks: NDArray[np.float64] = heatmaps.amax(dim=(2, 3)).mean(dim=1).double().cpu().numpy()
    return landmarks, peaks
