"""Where the two targets contradict each other, and the perceptual term should not look.

The look photo says "closed mouth here", the expression's landmarks say "open mouth here".
A perceptual term that insists on the first draws the ghost of a closed mouth; so it is
made to ignore the regions that an expression moves, in both faces.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lmexp.landmarks.groups import GROUPS, OUTER_EYE_CORNERS

Region = Literal["mouth", "eyes", "brows", "nose", "jaw"]

HULLS: dict[Region, tuple[tuple[int, ...], ...]] = {
    "mouth": ((*GROUPS["outer_lip"], *GROUPS["inner_lip"]),),
    "eyes": (tuple(GROUPS["left_eye"]), tuple(GROUPS["right_eye"])),
    "brows": (tuple(GROUPS["left_eyebrow"]), tuple(GROUPS["right_eyebrow"])),
    "nose": ((*GROUPS["nose_bridge"], *GROUPS["lower_nose"]),),
}
"""Regions that are convex hulls of landmarks, in each face by itself."""

BANDS: dict[Region, tuple[int, ...]] = {"jaw": tuple(range(3, 14))}
"""Regions that are what an open outline sweeps on its way from one face to the other."""


_FOREHEAD = 0.35


def keep_mask(
    faces: Sequence[Tensor],
    regions: Sequence[Region],
    *,
    resolution: int,
    side: int,
    dilation: float,
    softness: float,
    strength: float = 1.0,
) -> Tensor:
    """How much each place counts: 0 in the regions of any of the faces, 1 far from them.

    With s the signed distance to the nearest region (negative inside) and lengths in
    units of the distance between the outer eye corners, averaged over the faces,

        keep = 1 - strength · exp(-max(s - dilation, 0)² / (2 softness²)),

    so that the dilated regions are ignored wholly (at strength 1) and the Gaussian
    feather lies outside of them.

    Args:
        faces: landmarks [N, 68, 2] of each photo, x then y, px of an image of side
            `resolution`; pixel (i, j) is the square whose centre is (j + 0.5, i + 0.5).
        regions: which regions; none gives 1 everywhere.
        resolution: side of the image that the landmarks are measured in, px.
        side: height and width of the mask.
        dilation, softness: ≥ 0, fractions of the distance between the outer eye corners.
        strength: in [0, 1]; 0 gives 1 everywhere.

    Returns:
        keep: [N, 1, side, side] in [0, 1].
    """
    first = faces[0]
    if not regions:
        return first.new_ones(len(first), 1, side, side)
    # float64: a hull's edges are told from its chords by the sign of small areas.
    landmarks = [face.double() for face in faces]
    left, right = OUTER_EYE_CORNERS
    unit = torch.stack([(face[:, left] - face[:, right]).norm(dim=1) for face in landmarks]).mean(0)
    unit = unit.clamp_min(1e-6)[:, None, None]
    hulls: list[Tensor] = []
    for region in regions:
        for members in HULLS.get(region, ()):
            hulls += [face[:, list(members)] for face in landmarks]
        for start, stop in pairwise(BANDS.get(region, ())):
            ends = [face[:, [start, stop]] for face in landmarks]
            hulls.append(torch.cat(ends, dim=1))
    distance = hull_distance(hulls[0], resolution, side)
    for hull in hulls[1:]:
        distance = torch.minimum(distance, hull_distance(hull, resolution, side))
    excess = (distance / unit - dilation).clamp_min(0)
    # A feather of width 0 is a step; the floor only avoids 0 / 0 on its edge.
    cover = torch.exp(-0.5 * (excess / max(softness, 1e-9)).square())
    return (1 - strength * cover)[:, None].to(first.dtype)


def face_weight(
    landmarks: Tensor, *, resolution: int, side: int, emphasis: float, softness: float = 0.08
) -> Tensor:
    """How much each place counts: 1 in the face, 1 - `emphasis` far from it.

    The face is the hull of jaw and brows, these raised by a third of their height over the
    base of the nose, for a forehead. Its feather is as in `keep_mask`.

    Args:
        landmarks: [N, 68, 2], x then y, px of an image of side `resolution`.
        resolution: side of that image, px.
        side: height and width of the result.
        emphasis: in [0, 1]; 0 gives 1 everywhere.
        softness: of the feather, fraction of the distance between the outer eye corners.

    Returns:
        [N, 1, side, side] in [0, 1].
    """
    points = landmarks.double()
    left, right = OUTER_EYE_CORNERS
    unit = (points[:, left] - points[:, right]).norm(dim=1).clamp_min(1e-6)[:, None, None]
    brows = points[:, [*GROUPS["left_eyebrow"], *GROUPS["right_eyebrow"]]]
    forehead = brows + _FOREHEAD * (brows - points[:, [GROUPS["lower_nose"][2]]])
    hull = torch.cat((points[:, list(GROUPS["jaw"])], forehead), dim=1)
    excess = (hull_distance(hull, resolution, side) / unit).clamp_min(0)
    cover = torch.exp(-0.5 * (excess / softness).square())
    return (1 - emphasis + emphasis * cover)[:, None].to(landmarks.dtype)


def hull_distance(points: Tensor, resolution: int, side: int) -> Tensor:
    """Signed distance to the convex hull of some points, on a grid of pixel centres.

    Args:
        points: [N, K, 2], float64, x then y, px of an image of side `resolution`; they may
            coincide or lie on a line.
        resolution: side of that image, px.
        side: height and width of the grid that covers it.

    Returns:
        [N, side, side], px of that image, negative inside the hull.
    """
    edges, real = _hull_edges(points)
    centres = (torch.arange(side, device=points.device, dtype=points.dtype) + 0.5) * (
        resolution / side
    )
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1)
    start = edges[:, :, 0, None, None]  # [N, K, 1, 1, 2]
    along = edges[:, :, 1, None, None] - start
    present = real[:, :, None, None]
    to_pixel = grid - start
    length = along.square().sum(-1)
    fraction = (to_pixel * along).sum(-1) / length.clamp_min(1e-12)
    gap = (to_pixel - fraction.clamp(0, 1)[..., None] * along).square().sum(-1)
    nearest = gap.masked_fill(~present, torch.inf).amin(1)
    # Without an edge all points are one, and nothing is inside.
    any_edge = present.any(1)
    nearest = torch.where(any_edge, nearest, gap[:, 0]).sqrt()
    inside = ((_cross(along, to_pixel) > 0) | ~present).all(1) & any_edge
    return torch.where(inside, -nearest, nearest)


def _hull_edges(points: Tensor) -> tuple[Tensor, Tensor]:
    """For each point its edge of the hull, in the one sense of rotation.

    i → j is an edge if no point lies on its right; of several such j, which are then in
    line, the farthest is taken. The number of edges differs between the hulls of a batch,
    so that points without one are marked.

    Returns:
        edges [N, K, 2 (from, to), 2 (x, y)], real [N, K].
    """
    span = points[:, None, :] - points[:, :, None]  # [N, i, j, 2], from i to j
    length = span.square().sum(-1)
    scale = length.amax((1, 2), keepdim=True)
    side = _cross(span[:, :, :, None], span[:, :, None, :])  # [N, i, j, k]
    is_edge = (side >= -1e-12 * scale[..., None]).all(-1) & (length > 1e-12 * scale)
    is_edge &= length > 0
    reach, successor = torch.where(is_edge, length, -1).max(2)
    ends = points.gather(1, successor[..., None].expand_as(points))
    return torch.stack([points, ends], 2), reach > 0


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
