"""The prior on W against numpy, its value for real samples, and its gradient at the kink."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmexp.latents import LatentStatistics
from lmexp.losses.prior import GaussianSpace, LatentPrior, unroll
from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets

UNUSED = cast(Any, None)
DIM = 16


def draw_samples(count: int, seed: int = 0, gain: float = 2**0.5) -> Tensor:
    """What a mapping network's last layer gives: a LeakyReLU of correlated Gaussians."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(99))
    mixing = torch.eye(DIM) + 0.15 * mixing
    hidden = torch.randn(count, DIM, generator=generator) @ mixing.T + 0.3
    return F.leaky_relu(hidden, 0.2) * gain


def bind(samples: Tensor) -> BoundTerm:
    statistics = LatentStatistics(samples, samples.mean(0), 1.0)
    context = Context(UNUSED, UNUSED, statistics)
    images = torch.zeros(1, 3, 8, 8)
    return LatentPrior().bind(context, Targets(images, images.new_zeros(1, 68, 2)))


def candidate(ws: Tensor) -> Candidate:
    return Candidate(ws.new_zeros(len(ws), 3, 8, 8), ws, (), 0, UNUSED)


def test_against_numpy() -> None:
    samples, ws = draw_samples(500), draw_samples(12, seed=1).reshape(3, 4, DIM) * 1.7
    x = samples.numpy().astype(np.float64) / np.sqrt(2)
    x = np.where(x < 0, 5 * x, x)
    inverse = np.linalg.inv(np.cov(x, rowvar=False))
    v = ws.numpy().astype(np.float64) / np.sqrt(2)
    v = np.where(v < 0, 5 * v, v) - x.mean(0)
    # Mahalanobis: whitening by PCA is a square root of the inverse covariance.
    expected = np.einsum("nlc,cd,nld->nl", v, inverse, v).mean(1) / DIM
    got = bind(samples)(candidate(ws))
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-4)


def test_by_hand() -> None:
    # ±1 and ±3 on two axes, positive after unrolling by construction: x = w + 10.
    samples = torch.tensor([[11.0, 10.0], [9.0, 10.0], [10.0, 13.0], [10.0, 7.0]])
    # Variances 2/3 and 18/3 about (10, 10).
    ws = torch.tensor([[[12.0, 10.0]], [[10.0, 16.0]], [[10.0, 10.0]]])
    got = bind(samples)(candidate(ws))
    assert got.tolist() == pytest.approx([4 / (2 / 3) / 2, 36 / 6 / 2, 0], abs=1e-5)
    # Below zero the unrolled distance is five times as long.
    got = bind(samples)(candidate(torch.tensor([[[-1.0, 10.0]]])))
    assert got.tolist() == pytest.approx([15**2 / (2 / 3) / 2], rel=1e-5)


def test_about_one_for_unseen_samples_of_the_mapping_and_far_more_elsewhere() -> None:
    term = bind(draw_samples(20_000))
    unseen = draw_samples(4_000, seed=5)[:, None]
    values = term(candidate(unseen))
    assert float(values.mean()) == pytest.approx(1, abs=0.05)
    assert float(term(candidate(-unseen)).mean()) > 10


def test_scale_of_w_does_not_matter() -> None:
    ws = draw_samples(6, seed=2, gain=1.0).reshape(2, 3, DIM)
    plain = bind(draw_samples(400, gain=1.0))(candidate(ws))
    scaled = bind(draw_samples(400, gain=7.0))(candidate(7 * ws))
    torch.testing.assert_close(plain, scaled, rtol=1e-4, atol=1e-6)


def test_unroll_inverts_the_last_activation() -> None:
    hidden = torch.randn(100)
    torch.testing.assert_close(unroll(F.leaky_relu(hidden, 0.2)), hidden)


def test_direction_without_samples_is_stiff_but_finite() -> None:
    samples = draw_samples(400)
    samples[:, 3] = 0.5
    space = GaussianSpace.measure(samples, variance_floor=1e-6)
    assert torch.isfinite(space.whitening).all()
    on, off = samples[:1], samples[:1].clone()
    off[:, 3] += 1.0
    assert space.standardise(on).square().mean() < 10
    assert 100 < space.standardise(off).square().mean() < 1e7


def test_gradient_also_at_the_kink() -> None:
    term = bind(draw_samples(400))
    ws = torch.zeros(2, 3, DIM, requires_grad=True)
    (gradient,) = torch.autograd.grad(term(candidate(ws)).sum(), ws)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    away = draw_samples(6, seed=3).reshape(2, 3, DIM).double().requires_grad_(True)
    exact = bind(draw_samples(400).double())
    assert torch.autograd.gradcheck(lambda w: exact(candidate(w)), (away,))


def test_jobs_are_strangers_and_ws_are_averaged() -> None:
    term = bind(draw_samples(400))
    ws = draw_samples(12, seed=4).reshape(3, 4, DIM)
    together = term(candidate(ws))
    for k in range(3):
        torch.testing.assert_close(together[k : k + 1], term(candidate(ws[k : k + 1])))
        rows = torch.cat([term(candidate(ws[k : k + 1, row : row + 1])) for row in range(4)])
        torch.testing.assert_close(together[k], rows.mean())
