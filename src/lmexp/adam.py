"""Adam for a batch of strangers: every job has its own rate, its own count of steps, its own end.

torch.optim.Adam keeps one count and one rate for a tensor; here row k of every tensor is job k's.
The arithmetic is torch's (Kingma & Ba, arXiv 1412.6980, algorithm 1): a batch of one is its Adam.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-8


def step_sizes(rate: float, count: int, beta1: float, beta2: float) -> tuple[float, float]:
    """What a job's step needs beside the moments.

    Args:
        rate: learning rate.
        count: of the job's steps, this one included, ≥ 1.

    Returns:
        The rate over the first moment's bias correction, and the root of the second's.
    """
    return rate / (1 - beta1**count), math.sqrt(1 - beta2**count)


def advance(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    sizes: Tensor,
    roots: Tensor,
    betas: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of all jobs.

    Args:
        parameter, gradient: [N, …].
        mean, square: [N, …], the moments so far; 0 at first.
        sizes, roots: [N], see `step_sizes`.
        betas: decay rates of the moments.

    Returns:
        (parameter, mean, square) after the step.
    """
    rows = (-1,) + (1,) * (parameter.ndim - 1)
    mean = torch.lerp(mean, gradient, 1 - betas[0])
    square = torch.addcmul(square * betas[1], gradient, gradient, value=1 - betas[1])
    scale = square.sqrt() / roots.view(rows) + EPSILON
    return parameter - sizes.view(rows) * mean / scale, mean, square


def any_not_finite(values: Sequence[Tensor]) -> Tensor:
    """[N], True for each job that one of the tensors [N, …] has an infinity or NaN of."""
    # A sum shows both, and costs one pass.
    sums = torch.stack([value.flatten(1).sum(1) if value.ndim > 1 else value for value in values])
    return ~sums.sum(0).isfinite()
