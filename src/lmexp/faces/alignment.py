"""The FFHQ alignment: from a photo and its landmarks to the square that generators draw.

Source: Karras et al., "A style-based generator architecture for generative adversarial
networks", CVPR 2019 (arXiv 1812.04948), appendix A, which refers to Karras et al.,
"Progressive growing of GANs", ICLR 2018 (arXiv 1710.10196), appendix C: the square is
oriented and sized by the eyes and the mouth, and what lies outside the photo is mirrored and
blurred.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch.nn import functional as F

from lmexp.faces.protocol import Photo
from lmexp.landmarks.framing import ffhq_views

Affine = NDArray[np.float64]
"""[2, 3]: p ↦ A[:, :2] p + A[:, 2], x then y; both pictures' first pixel spans [0, 1]."""

BLUR = 0.02
"""Standard deviation of the blur outside the photo, as a share of the crop's side."""

FADE = 0.08
"""Distance from the photo's edge at which the blur is complete, as a share of the crop's side."""


@dataclass(frozen=True)
class Crop:
    """A square view of a photo.

    Attributes:
        image: [R, R, 3], RGB, 0–255.
        affine: photo px → image px.
        outside: share of the image that lies outside the photo, 0–1.
    """

    image: Photo
    affine: Affine
    outside: float


def ffhq_affine(landmarks: NDArray[np.floating], side: int) -> Affine:
    """The map from photo px to px of the FFHQ-aligned image of that side.

    Args:
        landmarks: [68, 2], x then y, px of the photo.
        side: px.
    """
    view = ffhq_views(torch.from_numpy(np.asarray(landmarks, dtype=np.float64))[None])[0]
    return invert(view.numpy() * np.array([1 / side, 1 / side, 1.0]))


def square_affine(centre: tuple[float, float], width: float, angle: float, side: int) -> Affine:
    """The map from photo px to px of a turned square's image.

    Args:
        centre: x then y, px of the photo.
        width: side of the square, px of the photo.
        angle: degrees by which the square is turned clockwise in the photo.
        side: side of the image, px.
    """
    scale = side / width
    cos, sin = scale * math.cos(math.radians(angle)), scale * math.sin(math.radians(angle))
    linear = np.array([[cos, sin], [-sin, cos]])
    return np.column_stack((linear, side / 2 - linear @ centre))


def invert(affine: Affine) -> Affine:
    """The map back."""
    linear = np.linalg.inv(affine[:, :2])
    return np.column_stack((linear, -linear @ affine[:, 2]))


def transform(affine: Affine, points: NDArray[np.floating]) -> NDArray[np.float64]:
    """points: [..., 2], x then y → the same shape."""
    moved: NDArray[np.float64] = points @ affine[:, :2].T + affine[:, 2]
    return moved


def crop(photo: Photo, affine: Affine, side: int) -> Crop:
    """Resample the photo into a square image without aliasing.

    The photo is reduced to two to four px per image px by averaging whole pixels, then read
    once, by cubic interpolation, on a grid as dense, whose average is the image. Outside the
    photo it is mirrored, and blurred with growing distance, so that neither an edge nor a
    second face comes into being there.

    Args:
        photo: [H, W, 3], RGB.
        affine: photo px → image px, a similarity.
        side: side of the image, px.
    """
    density = 1 / math.sqrt(abs(np.linalg.det(affine[:, :2])))
    shrink = max(1, math.floor(density / 2))
    # An enlarged photo has no detail to lose; read once per image px, it stays the sharpest.
    points = 1 if density <= 1 else max(2, math.ceil(density / shrink))
    # From here on in px of the reduced photo.
    back = invert(affine) / shrink
    corners = transform(back, side * np.array([[0, 0], [1, 0], [1, 1], [0, 1]]))
    # Two px more, for the reach of the cubic; and at least one px of the photo.
    last = (np.array(photo.shape[1::-1]) - 1) // shrink
    low = np.minimum(np.floor(corners.min(axis=0)).astype(int) - 2, last)
    high = np.maximum(np.ceil(corners.max(axis=0)).astype(int) + 2, 1)
    region, bounds = _cut(photo, low, high, shrink, side * density / shrink)
    levels = torch.tensor(region).permute(2, 0, 1)[None].float()

    at = (np.arange(side * points) + 0.5) / points
    rows, beyond = [], 0
    # In strips: the grid of a whole image of 1024 px would take a gigabyte.
    for start in range(0, len(at), 64 * points):
        place = transform(back, np.stack(np.meshgrid(at, at[start : start + 64 * points]), axis=2))
        beyond += int(((place < 0) | (place > bounds)).any(axis=2).sum())
        # Frame of `grid_sample`: the region spans [-1, 1].
        frame = 2 * (place - low) / (high - low) - 1
        sampled = F.grid_sample(
            levels,
            torch.from_numpy(frame.astype(np.float32))[None],
            mode="bicubic",
            padding_mode="border",
            align_corners=False,
        )
        rows.append(F.avg_pool2d(sampled, points))
    image = torch.cat(rows, dim=2)[0].clamp(0, 255).round().byte().permute(1, 2, 0)
    return Crop(image.contiguous().numpy(), affine, beyond / len(at) ** 2)


def _cut(
    photo: Photo, low: NDArray[np.int_], high: NDArray[np.int_], shrink: int, side: float
) -> tuple[Photo, NDArray[np.float64]]:
    """A region of the reduced photo, continued where it leaves the photo.

    Args:
        photo: [H, W, 3].
        low, high: corners of the region, x then y, px of the reduced photo.
        shrink: px of the photo per px of the reduced photo.
        side: side of the crop, px of the reduced photo; the measure of blur and fading.

    Returns:
        region: [high y - low y, high x - low x, 3].
        bounds: width and height of the photo, px of the reduced photo.
    """
    size = np.array(photo.shape[1::-1])
    start = np.clip(low * shrink, 0, (size - 1) // shrink * shrink)
    stop = np.clip(high * shrink, start + 1, size)
    inside = Image.fromarray(photo[start[1] : stop[1], start[0] : stop[0]])
    region = np.asarray(inside.reduce(shrink))
    bounds = size / shrink
    first = start // shrink
    before, after = first - low, high - first - region.shape[1::-1]
    if not before.any() and not after.any():
        return region, bounds
    around = ((before[1], after[1]), (before[0], after[0]))
    mirrored = np.pad(region, (*around, (0, 0)), mode="symmetric")
    blurred = np.asarray(Image.fromarray(mirrored).filter(ImageFilter.GaussianBlur(BLUR * side)))
    x, y = (
        np.maximum(-np.arange(low[k], high[k]), np.arange(low[k], high[k]) - bounds[k]).clip(0)
        for k in range(2)
    )
    weight = (np.hypot(x, y[:, None]) / (FADE * side)).clip(0, 1).astype(np.float32)[..., None]
    # Smoothstep: the blur sets in without a visible line.
    weight = weight * weight * (3 - 2 * weight)
    mixed = mirrored + (blurred.astype(np.float32) - mirrored) * weight
    return np.round(mixed).astype(np.uint8), bounds
