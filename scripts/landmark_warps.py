"""Opens mouths, closes eyes and moves brows of annotated faces, in the picture and the points.

Photos of wide-open mouths and closed eyes are few: 55 and 56 of the 1,207 that the landmark
networks are trained on. A thin-plate spline through the landmarks moves lips, lids and chin
where the points are moved; what opens between lips is another face's open mouth.

Source of the spline: Bookstein, "Principal warps: thin-plate splines and the decomposition of
deformations", PAMI 1989.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lmexp.metrics.aspect_ratios import mouth_aspect_ratio

STIFFNESS = 2e-5
"""Added to the spline's diagonal: points that nearly coincide must not tear the picture."""

DONOR_RATIO = 0.25
"""Mouths that are at least this far open (aspect ratio) show an inside worth borrowing."""

_LIDS = (((37, 38), (41, 40)), ((43, 44), (47, 46)))
"""Upper and lower points of the left and the right eye."""


@dataclass(frozen=True)
class Mouths:
    """Open mouths to borrow the inside of.

    Attributes:
        images: [D, 3, H, W] uint8.
        landmarks: [D, 68, 2], px.
    """

    images: Tensor
    landmarks: Tensor


@cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A tensor that stays on its device: making one anew would have a GPU wait for the CPU."""
    return torch.tensor(values, device=device)


def find_mouths(images: Tensor, landmarks: Tensor) -> Mouths:
    """The faces whose mouth is open by `DONOR_RATIO` at least."""
    chosen = mouth_aspect_ratio(landmarks) >= DONOR_RATIO
    return Mouths(images[chosen], landmarks[chosen])


def move_mouth(points: Tensor, ratio: Tensor, lower: Tensor, chin: Tensor, smile: Tensor) -> Tensor:
    """Open or close the inner lips to an aspect ratio, outer lips and chin with them.

    Args:
        points: [N, 68, 2].
        ratio: [N], wanted aspect ratio of the mouth, ≥ 0.
        lower: [N], share of the way that the lower lip goes, 0 to 1.
        chin: [N], share of the lower lip's way that the chin goes with it.
        smile: [N], how far the corners move outwards (below 0 inwards), mouth widths.

    Returns:
        [N, 68, 2].
    """
    moved, device = points.clone(), points.device
    across = points[:, 64] - points[:, 60]
    width = across.norm(dim=1, keepdim=True).clamp_min(1e-6)
    right = across / width
    down = torch.stack((-right[:, 1], right[:, 0]), dim=1)
    above_in, below_in = constant((61, 62, 63), device), constant((67, 66, 65), device)
    gap = ((points[:, below_in] - points[:, above_in]) * down[:, None]).sum(2).clamp_min(0)
    wanted = ratio[:, None] * width
    wider = gap + (wanted - gap[:, 1:2]) * constant((0.85, 1.0, 0.85), device)
    narrower = gap * (wanted / gap[:, 1:2].clamp_min(1e-6)).clamp_max(1)
    way = torch.where(wanted > gap[:, 1:2], wider, narrower) - gap
    middle = way[:, 1:2]
    arch = middle * constant((0.45, 0.85, 1.0, 0.85, 0.45), device)
    below, above = lower[:, None], 1 - lower[:, None]

    def go(index: tuple[int, ...], distance: Tensor, direction: Tensor) -> None:
        moved[:, constant(index, device)] += distance[:, :, None] * direction[:, None]

    go((67, 66, 65), way * below, down)
    go((61, 62, 63), -way * above, down)
    go((59, 58, 57, 56, 55), arch * below, down)
    go((49, 50, 51, 52, 53), -arch * above, down)
    go((48, 54, 60, 64), (0.25 * middle * below).expand(-1, 4), down)
    at = torch.arange(-5, 6, device=device, dtype=points.dtype)
    bow = torch.cos(torch.pi / 2 * at / 6) ** 2
    go(tuple(range(3, 14)), middle * below * chin[:, None] * bow, down)
    outwards = smile[:, None] * width
    go((54, 64), outwards.expand(-1, 2), right)
    go((48, 60), -outwards.expand(-1, 2), right)
    go((53, 55, 63, 65), 0.5 * outwards.expand(-1, 4), right)
    go((49, 59, 61, 67), -0.5 * outwards.expand(-1, 4), right)
    return moved


def move_lids(points: Tensor, factor: Tensor, upper: Tensor) -> Tensor:
    """Multiply the distances of upper and lower lids.

    Args:
        points: [N, 68, 2].
        factor: [N, 2], left and right eye; below 1 closes.
        upper: [N], share of the way that the upper lid goes, 0 to 1.
    """
    moved = points.clone()
    for eye, lids in enumerate(_LIDS):
        above, below = (constant(lid, points.device) for lid in lids)
        way = (points[:, below] - points[:, above]) * (1 - factor[:, eye, None, None])
        moved[:, above] += way * upper[:, None, None]
        moved[:, below] -= way * (1 - upper[:, None, None])
    return moved


def move_brows(points: Tensor, raised: Tensor) -> Tensor:
    """Raise both brows by `raised` ([N], distances of the outer eye corners)."""
    moved = points.clone()
    across = points[:, 45] - points[:, 36]
    up = torch.stack((across[:, 1], -across[:, 0]), dim=1)
    moved[:, 17:27] += raised[:, None, None] * up[:, None]
    return moved


def sources(points: Tensor, moved: Tensor, side: int, grid_side: int = 128) -> Tensor:
    """Where each pixel of the warped picture comes from.

    Args:
        points, moved: [N, 68, 2], px of a picture of `side`, before and after.
        grid_side: the spline is evaluated on so many places a side and interpolated.

    Returns:
        [N, side, side, 2], x then y, px of the picture before.
    """
    n = len(points)
    around = (0.0, 0.0, 0.5, 0.0, 1.0, 0.0, 0.0, 0.5, 1.0, 0.5, 0.0, 1.0, 0.5, 1.0, 1.0, 1.0)
    frame = side * constant(around, points.device).reshape(1, 8, 2).expand(n, 8, 2)
    # float64: the matrix is ill-conditioned where lips or lids meet.
    ends = (torch.cat((moved, frame), dim=1).double() / side) * 2 - 1
    ways = torch.cat((points - moved, torch.zeros_like(frame)), dim=1).double()
    k = ends.shape[1]
    system = ends.new_zeros(n, k + 3, k + 3)
    system[:, :k, :k] = _bend(ends, ends) + STIFFNESS * torch.eye(k, device=ends.device)
    system[:, :k, k] = 1
    system[:, :k, k + 1 :] = ends
    system[:, k:, :k] = system[:, :k, k:].transpose(1, 2)
    solved = torch.linalg.solve_ex(
        system, torch.cat((ways, ways.new_zeros(n, 3, 2)), dim=1)
    ).result.float()

    at = (torch.arange(grid_side, device=points.device) + 0.5) / grid_side * 2 - 1
    places = torch.stack(torch.meshgrid(at, at, indexing="xy"), dim=2).reshape(1, -1, 2)
    field = _bend(places.expand(n, -1, 2), ends.float()) @ solved[:, :k]
    field = field + solved[:, k : k + 1] + places @ solved[:, k + 1 :]
    field = field.reshape(n, grid_side, grid_side, 2).permute(0, 3, 1, 2)
    field = F.interpolate(field, size=(side, side), mode="bilinear", align_corners=False)
    return _pixels(side, points.device) + field.permute(0, 2, 3, 1)


def paint_mouths(
    pictures: Tensor, points: Tensor, donors: Tensor, landmarks: Tensor
) -> tuple[Tensor, Tensor]:
    """The insides of other mouths, brought into the shape of these ones.

    Args:
        pictures: [N, 3, R, R], in [0, 1].
        points: [N, 68, 2], px of the pictures.
        donors: [N, 3, H, W], in [0, 1].
        landmarks: [N, 68, 2], px of the donors.

    Returns:
        painted: [N, 3, R, R], `pictures` with the mouths filled.
        inside: [N, 1, R, R], 1 inside of the inner lips.
    """
    n, _, side, _ = pictures.shape
    origin, right, down, width, upper, lower = _mouth_frame(points)
    local = _pixels(side, points.device).expand(n, -1, -1, -1) - origin[:, None, None]
    u = (local * right[:, None, None]).sum(3) / width[:, None, None]
    v = (local * down[:, None, None]).sum(3) / width[:, None, None]
    top, bottom = _curve(upper, u), _curve(lower, u)
    soft = 1.0 / width[:, None, None].clamp_min(1)  # about a pixel
    inside = torch.sigmoid((v - top) / soft) * torch.sigmoid((bottom - v) / soft)
    inside = inside * ((u > 0) & (u < 1) & (bottom > top))
    share = ((v - top) / (bottom - top).clamp_min(1e-3)).clamp(0.02, 0.98)

    origin, right, down, width, upper, lower = _mouth_frame(landmarks)
    u = u.clamp(0, 1)
    top, bottom = _curve(upper, u), _curve(lower, u)
    v = top + share * (bottom - top)
    place = origin[:, None, None] + width[:, None, None, None] * (
        u[..., None] * right[:, None, None] + v[..., None] * down[:, None, None]
    )
    size = constant((float(donors.shape[3]), float(donors.shape[2])), points.device)
    teeth = F.grid_sample(donors, place / size * 2 - 1, padding_mode="border", align_corners=False)
    # A dark or tinted photo's mouth is dark or tinted, whoever lent it.
    light = pictures.mean(dim=(2, 3)) / donors.mean(dim=(2, 3)).clamp_min(1e-3)
    teeth = (teeth * light.clamp(0.3, 1.3)[:, :, None, None]).clamp(0, 1)
    inside = inside[:, None]
    return torch.lerp(pictures, teeth, inside), inside


def _bend(a: Tensor, b: Tensor) -> Tensor:
    """r² log r² of all distances: [N, A, 2], [N, B, 2] → [N, A, B]."""
    square = ((a[:, :, None] - b[:, None]) ** 2).sum(3)
    return square * square.clamp_min(1e-12).log()


def _pixels(side: int, device: torch.device) -> Tensor:
    """[1, side, side, 2], centres of the pixels, x then y."""
    at = torch.arange(side, device=device) + 0.5
    return torch.stack(torch.meshgrid(at, at, indexing="xy"), dim=2)[None]


def _mouth_frame(points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Left corner, axes, width and inner lips (upper, lower: [N, 5, 2]) in mouth widths."""
    origin = points[:, 60]
    across = points[:, 64] - origin
    width = across.norm(dim=1).clamp_min(1e-6)
    right = across / width[:, None]
    down = torch.stack((-right[:, 1], right[:, 0]), dim=1)
    axes = torch.stack((right, down), dim=2)
    local = ((points - origin[:, None]) @ axes) / width[:, None, None]
    return (
        origin,
        right,
        down,
        width,
        local[:, 60:65],
        local[:, constant((60, 67, 66, 65, 64), points.device)],
    )


def _curve(knots: Tensor, u: Tensor) -> Tensor:
    """Height of the polyline through `knots` ([N, 5, 2]) at u [N, R, R]; 0 beyond its ends."""
    height = torch.zeros_like(u)
    for k in range(4):
        start, end = knots[:, k, :, None, None], knots[:, k + 1, :, None, None]
        run = (end[:, 0] - start[:, 0]).clamp_min(1e-3)
        part = (u - start[:, 0]) / run
        here = (part >= 0) & (part < 1)
        height = torch.where(here, start[:, 1] + part * (end[:, 1] - start[:, 1]), height)
    return height
