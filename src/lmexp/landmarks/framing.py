"""Annotated faces as tensors, and the square views of them that networks are shown.

A view is an affine map from the view's unit square to px of the source image, so that
cropping, turning, scaling and mirroring are one resampling.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from lmexp.errors import LmexpError
from lmexp.landmarks.pts import read_pts


def read_faces(folder: Path) -> tuple[Tensor, Tensor]:
    """Read every `NAME.pts` of a folder with its `NAME.jpg` or `NAME.png`.

    Args:
        folder: pictures of one size.

    Returns:
        images: [N, 3, H, W], uint8, RGB, in the order of the names.
        landmarks: [N, 68, 2], x then y, px.

    Raises:
        LmexpError: the folder has no annotation, a picture is missing or unreadable, or
            sizes differ.
    """
    images: list[NDArray[np.uint8]] = []
    landmarks: list[Tensor] = []
    for path in sorted(folder.glob("*.pts")):
        found = [p for p in (path.with_suffix(".jpg"), path.with_suffix(".png")) if p.exists()]
        if not found:
            raise LmexpError(f"{path}: no picture beside it; put {path.stem}.jpg there")
        try:
            with Image.open(found[0]) as picture:
                pixels = np.array(picture.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise LmexpError(f"{found[0]}: not a readable picture; save it again") from error
        if images and pixels.shape != images[0].shape:
            raise LmexpError(f"{found[0]}: its size differs from the others'; crop all to one size")
        images.append(pixels)
        landmarks.append(read_pts(path))
    if not images:
        raise LmexpError(f"{folder}: no .pts file there; give a folder of NAME.jpg and NAME.pts")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.stack(landmarks)


def tight_views(landmarks: Tensor, fill: float = 0.8) -> Tensor:
    """Upright squares centred on the landmarks' box, whose longer side fills `fill` of them.

    Args:
        landmarks: [N, K, 2], px.
        fill: fraction of the view's side.

    Returns:
        views: [N, 2, 3], unit square → px.
    """
    low, high = landmarks.amin(dim=1), landmarks.amax(dim=1)
    side = (high - low).amax(dim=1) / fill
    axis = torch.stack((side, torch.zeros_like(side)), dim=1)
    return square_views((low + high) / 2, axis)


def ffhq_views(landmarks: Tensor) -> Tensor:
    """The squares that the FFHQ alignment crops.

    Source: Karras et al., "A style-based generator architecture for generative adversarial
    networks", CVPR 2019, appendix C, whose x' = (eyes' vector) − 90° turn of the vector
    from eyes to mouth, side 2·max(2·|eye to eye|, 1.8·|eye to mouth|), and centre
    0.1·(eye to mouth) below the eyes' midpoint.

    Args:
        landmarks: [N, 68, 2], px.

    Returns:
        views: [N, 2, 3], unit square → px.
    """
    left, right = landmarks[:, 36:42].mean(dim=1), landmarks[:, 42:48].mean(dim=1)
    mouth = (landmarks[:, 48] + landmarks[:, 54]) / 2
    middle, between = (left + right) / 2, right - left
    down = mouth - middle
    direction = between + torch.stack((down[:, 1], -down[:, 0]), dim=1)
    direction = direction / direction.norm(dim=1, keepdim=True)
    half = torch.maximum(2.0 * between.norm(dim=1), 1.8 * down.norm(dim=1))
    return square_views(middle + 0.1 * down, 2 * half[:, None] * direction)


def square_views(centre: Tensor, axis: Tensor) -> Tensor:
    """Squares given by centre and upper edge (left to right), [N, 2] each → [N, 2, 3]."""
    lower = torch.stack((-axis[:, 1], axis[:, 0]), dim=1)
    origin = centre - (axis + lower) / 2
    return torch.stack((axis, lower, origin), dim=2)


def resample(images: Tensor, views: Tensor, side: int) -> Tensor:
    """Show each image through its view; beyond the image's border it is mirrored.

    Args:
        images: [N, 3, H, W], float.
        views: [N, 2, 3], unit square → px.
        side: side of the result, px.

    Returns:
        images: [N, 3, side, side], in the range of the input.
    """
    height, width = images.shape[2:]
    return sample(images, view_grid(views, (height, width), side))


def view_grid(views: Tensor, size: tuple[int, int], side: int) -> Tensor:
    """Where each pixel of a view lies in the image, for `sample`.

    Args:
        views: [N, 2, 3], unit square → px.
        size: height and width of the image, px.
        side: side of the view, px.

    Returns:
        [N, side, side, 2], x then y, both from -1 to 1.
    """
    height, width = size
    # The frame is [-1, 1] on both sides: unit = (frame + 1) / 2, frame = 2 px / size - 1.
    linear = torch.stack((views[:, 0, :2] / width, views[:, 1, :2] / height), dim=1)
    shift = torch.stack((2 * views[:, 0, 2] / width, 2 * views[:, 1, 2] / height), dim=1)
    shift = shift - 1 + linear.sum(dim=2)
    return affine_grid(torch.cat((linear, shift[:, :, None]), dim=2), side, side)


def sample(images: Tensor, grid: Tensor) -> Tensor:
    """[N, 3, H, W] at the places of a `view_grid`, mirrored beyond the border."""
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def affine_grid(maps: Tensor, height: int, width: int) -> Tensor:
    """`torch.nn.functional.affine_grid` of pixel centres without its matrix product.

    On GPUs that product may be computed in TensorFloat-32, whose 10 bits are half a pixel of
    1024.

    Args:
        maps: [N, 2, 3].

    Returns:
        [N, height, width, 2], x then y.
    """
    x, y = (
        (torch.arange(n, device=maps.device, dtype=maps.dtype) * 2 + 1) / n - 1
        for n in (width, height)
    )
    rows = maps[:, None, :, 1] * y[:, None] + maps[:, None, :, 2]
    columns = maps[:, None, :, 0] * x[:, None]
    return rows[:, :, None] + columns[:, None]


def average(images: Tensor, side: int) -> Tensor:
    """Larger square images [N, C, R, R] averaged over areas: [N, C, side, side]."""
    factor, rest = divmod(images.shape[-1], side)
    if rest == 0:
        # What avg_pool2d computes, but a GPU takes a tenth of the time for this one's gradient.
        cells = images.reshape(*images.shape[:2], side, factor, side, factor)
        return cells.mean((3, 5))
    return F.interpolate(images, size=(side, side), mode="area")


def place(landmarks: Tensor, views: Tensor, side: float) -> Tensor:
    """Where landmarks of the image ([N, K, 2], px) lie in the view of that side, px."""
    (a, b, left), (c, d, top) = (row.unbind(dim=1) for row in views.unbind(dim=1))
    # Written out: linalg.solve would make a GPU report its status to the CPU every call.
    scale = side / (a * d - b * c)
    x, y = landmarks[..., 0] - left[:, None], landmarks[..., 1] - top[:, None]
    return torch.stack(
        (
            scale[:, None] * (d[:, None] * x - b[:, None] * y),
            scale[:, None] * (a[:, None] * y - c[:, None] * x),
        ),
        dim=2,
    )
