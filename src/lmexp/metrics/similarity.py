"""The similarity (turn, size, place; no mirror) that brings one set of points onto another."""

from __future__ import annotations

import torch
from torch import Tensor


def align_by_similarity(points: Tensor, reference: Tensor) -> Tensor:
    """Move points by the similarity x ↦ s·R·x + t with the least squared distance.

    All points count alike. What is left is shape: where the head is, how it is turned in the
    picture's plane and how large it is no longer play a part.

    Args:
        points: [N, K, 2], not all in one place.
        reference: [N, K, 2].

    Returns:
        [N, K, 2], `points` moved onto `reference`.

    Source: Umeyama, "Least-squares estimation of transformation parameters between two point
    patterns", TPAMI 13(4), 1991, equations 40–42.
    """
    # float64: differences of a face's width cancel.
    x, y = points.double(), reference.double()
    x_mean, y_mean = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    x, y = x - x_mean, y - y_mean
    u, strengths, vh = torch.linalg.svd(y.mT @ x)
    signs = torch.ones_like(strengths)
    signs[:, -1] = torch.sign(torch.linalg.det(u @ vh))
    rotation = (u * signs[:, None, :]) @ vh
    scale = (strengths * signs).sum(1) / x.square().sum((1, 2)).clamp_min(1e-12)
    moved: Tensor = scale[:, None, None] * (x @ rotation.mT) + y_mean
    return moved.to(points.dtype)
