"""Laying the expression's face over the look's, so that only the expression differs.

The FFHQ alignment is sized by eyes *and mouth*: a mouth wide open makes the whole face smaller
and higher than the same face with its mouth shut. Left so, the landmark term would shrink the
look's skull. The parts that no expression moves far, eyes and the bridge of the nose, are
therefore brought onto the look's first.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lmexp.faces.alignment import Affine, crop, transform
from lmexp.faces.targets import AlignedFace
from lmexp.landmarks.groups import GROUPS

STEADY = [*GROUPS["nose_bridge"], *GROUPS["left_eye"], *GROUPS["right_eye"]]
"""Landmarks that keep their place in the head whatever the face does, more or less."""


def fit_similarity(points: NDArray[np.floating], onto: NDArray[np.floating]) -> Affine:
    """The turn, scale and shift that bring points closest to others, in least squares.

    Args:
        points, onto: [K, 2], x then y.

    Returns:
        [2, 3]. As complex numbers z ↦ a z + b, so ordinary regression solves it.
    """
    z = points[:, 0] + 1j * points[:, 1]
    target = onto[:, 0] + 1j * onto[:, 1]
    centred = z - z.mean()
    a = (centred.conj() @ (target - target.mean())) / (centred.conj() @ centred)
    b = target.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def lay_over(expression: AlignedFace, look: AlignedFace) -> AlignedFace:
    """The expression's aligned face, moved so that its steady landmarks lie on the look's.

    Args:
        expression, look: aligned images of one side.
    """
    affine = fit_similarity(expression.landmarks[STEADY], look.landmarks[STEADY])
    moved = crop(expression.image, affine, len(expression.image))
    linear = affine[:, :2] @ expression.affine[:, :2]
    shift = transform(affine, expression.affine[:, 2])
    return replace(
        expression,
        image=moved.image,
        landmarks=transform(affine, expression.landmarks).astype(np.float32),
        affine=np.column_stack((linear, shift)),
    )
