"""The noise regulariser against a case by hand, numpy, and what it is for."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from lmexp.losses.autocorrelation import autocorrelation
from lmexp.losses.noise import NoiseRegularization
from lmexp.losses.protocol import Candidate, Context, Targets

UNUSED = cast(Any, None)


def evaluate(images: Tensor, noise_bufs: tuple[Tensor, ...]) -> Tensor:
    context = Context(UNUSED, UNUSED, UNUSED)
    targets = Targets(look=images, look_landmarks=images.new_zeros(len(images), 68, 2))
    ws = images.new_zeros(len(images), 1, 4)
    bound = NoiseRegularization().bind(context, targets)
    return bound(Candidate(images, ws, noise_bufs, 0, UNUSED))


def by_numpy(noise: np.ndarray) -> float:
    total = 0.0
    while True:
        h, w = noise.shape
        right = sum(noise[y, x] * noise[y, x - 1] for y in range(h) for x in range(w)) / (h * w)
        below = sum(noise[y, x] * noise[y - 1, x] for y in range(h) for x in range(w)) / (h * w)
        total += right**2 + below**2
        if h <= 8:
            return total
        noise = noise.reshape(h // 2, 2, w // 2, 2).mean((1, 3))


def test_by_hand() -> None:
    # Constant 2: n·n' is 4 everywhere, squared 16, in two directions. One level at 8 px
    # and below, two at 16 px, since averaging keeps the constant.
    assert autocorrelation(torch.full((1, 1, 8, 8), 2.0)).tolist() == [32]
    assert autocorrelation(torch.full((1, 1, 4, 4), 2.0)).tolist() == [32]
    assert autocorrelation(torch.full((1, 1, 16, 16), 2.0)).tolist() == [64]
    # A chequerboard: -1 in both directions, and nothing left after averaging.
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    assert autocorrelation(board[None, None]).tolist() == [2]


@pytest.mark.parametrize("side", [4, 8, 16, 32])
def test_by_numpy(side: int) -> None:
    noise = np.random.RandomState(side).standard_normal((3, 1, side, side)) + 0.3
    got = autocorrelation(torch.tensor(noise))
    np.testing.assert_allclose(got.numpy(), [by_numpy(row[0]) for row in noise], rtol=1e-10)


def test_gradient() -> None:
    torch.manual_seed(0)
    noise = torch.randn(2, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(autocorrelation, (noise,))


def test_sum_over_maps_and_jobs_are_strangers() -> None:
    torch.manual_seed(0)
    bufs = (torch.randn(3, 1, 8, 8), torch.randn(3, 1, 32, 32))
    images = torch.zeros(3, 3, 32, 32)
    got = evaluate(images, bufs)
    torch.testing.assert_close(got, autocorrelation(bufs[0]) + autocorrelation(bufs[1]))
    for k in range(3):
        alone = evaluate(images[k : k + 1], tuple(noise[k : k + 1] for noise in bufs))
        torch.testing.assert_close(got[k : k + 1], alone, rtol=1e-5, atol=1e-9)


def test_no_noise_is_zero() -> None:
    assert evaluate(torch.zeros(2, 3, 8, 8), ()).tolist() == [0, 0]


def test_a_picture_costs_far_more_than_white_noise() -> None:
    white = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    smooth = torch.sin(torch.arange(64) / 10)[:, None].expand(64, 64)[None, None] * 2**0.5
    assert autocorrelation(white) < 0.02 < 1 < autocorrelation(smooth)
