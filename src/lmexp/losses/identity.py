"""The identity term: a face recogniser must take the image for the person of the look photo."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lmexp.landmarks.framing import average, sample, square_views, view_grid
from lmexp.landmarks.groups import GROUPS
from lmexp.losses import identity_network
from lmexp.losses.identity_network import SIDE, IdentityNetwork
from lmexp.losses.protocol import BoundTerm, Context, Targets

_NOSE_TIP = 30

_TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366))
"""Where recognisers expect the left eye, the right eye and the tip of the nose in 112 × 112 px,
x then y; pixel (i, j) is the point (j, i). Source: Deng et al., "ArcFace", CVPR 2019 (arXiv
1801.07698), which aligns by the corners of the mouth, too."""

_REDUCED = 256
"""Images of twice this side or more are first reduced by averaging whole pixels, px."""

_EYES_APART = 0.25
"""At most, between their centres, as a fraction of an image of the FFHQ alignment."""


def fit_views(landmarks: Tensor) -> Tensor:
    """The squares in which eyes and nose lie as near as can be to where a recogniser expects them.

    A similarity, by least squares in the crop. The mouth, which the published alignment uses,
    too, is left out: its corners are what an expression moves.

    Args:
        landmarks: [N, 68, 2], px; pixel (i, j) is the square whose centre is (j + 0.5, i + 0.5).

    Returns:
        views: [N, 2, 3], unit square → px, for `lmexp.landmarks.framing.resample`.

    Source: Umeyama, TPAMI 13(4), 1991, which in the plane is one complex factor.
    """
    eyes = [landmarks[:, list(GROUPS[f"{side}_eye"])].mean(1) for side in ("left", "right")]
    points = torch.stack((*eyes, landmarks[:, _NOSE_TIP]), dim=1)
    template = points.new_tensor(_TEMPLATE) + 0.5
    centre, origin = points.mean(1), template.mean(0)
    (x, y), (u, v) = (points - centre[:, None]).unbind(2), (template - origin).unbind(1)
    # template ≈ (real + i·imaginary) · points, turned round to get from the template to px;
    # the floors keep it finite for points that are all in one place.
    size = (x * x + y * y).sum(1).clamp_min(1e-6)
    real, imaginary = (u * x + v * y).sum(1) / size, (v * x - u * y).sum(1) / size
    norm = (real * real + imaginary * imaginary).clamp_min(1e-12)
    a, b = real / norm, -imaginary / norm
    right, down = SIDE / 2 - origin
    middle = centre + torch.stack((a * right - b * down, b * right + a * down), dim=1)
    return square_views(middle, SIDE * torch.stack((a, b), dim=1))


class IdentityDistance:
    """1 - cos(f(image), f(look)), f a face recogniser that no score is taken from (SFace).

    Both are cropped alike, by the look's eyes and nose. The mouth is within the crop, and an
    expression costs a little of the recogniser's cosine in real photos as well: a large weight
    may hold it back. The scores' identity is judged by another network (`lmexp.metrics`).

    Args:
        weight: ≥ 0, λ of the term, whose values are between 0 and 2.

    Raises:
        LmexpError: when bound, if the network's weights cannot be had.
    """

    needs_expression: ClassVar[bool] = False

    def __init__(self, weight: Annotated[float, Field(ge=0)] = 1.0) -> None:
        self.weight = weight
        self._loaded: IdentityNetwork | None = None

    @property
    def weights_sha256(self) -> str:
        """Digest of the network's weights; loads them if they are not yet."""
        return self._load().weights_sha256

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        look = targets.look
        network = context.acceleration.network(self._load().to(look.device))
        views = fit_views(targets.look_landmarks.to(look))

        side = look.shape[-1]
        factor = max(1, side // _REDUCED)
        reduced = side // factor
        # The crop's pixels are averages of points that are at most a pixel of the image apart.
        # Their number depends on the image's side, not on the faces: jobs are strangers.
        width = _EYES_APART * side / factor / (_TEMPLATE[1][0] - _TEMPLATE[0][0])
        points = max(2, math.ceil(width))
        grid = view_grid(views / factor, (reduced, reduced), SIDE * points)

        @context.acceleration.fuse
        def crop(images: Tensor) -> Tensor:
            return F.avg_pool2d(sample(images, grid), points)

        def recognise(images: Tensor) -> Tensor:
            return F.normalize(network(crop(images)), dim=1)

        with torch.no_grad():
            target = recognise(average(look, reduced))

        return lambda candidate: 1 - (recognise(candidate.averaged(reduced)) * target).sum(1)

    def _load(self) -> IdentityNetwork:
        # Not when constructed: a term of weight 0 is built too, and must not fetch weights.
        if self._loaded is None:
            self._loaded = identity_network.load()
        return self._loaded
