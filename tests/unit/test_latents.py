from __future__ import annotations

import numpy as np
import pytest
import torch

from lmexp.errors import LmexpError
from lmexp.generators.tiny_random import TinyRandom
from lmexp.latents import (
    Latents,
    derive_seed,
    draw_normal,
    expand,
    mark_moving,
    measure,
    start_at_mean,
    truncate,
)

CPU = torch.device("cpu")
GENERATOR = TinyRandom(resolution=16, dim=8, channels=4)


def test_statistics_of_w() -> None:
    statistics = measure(GENERATOR, 3000, 7, CPU)  # more than one portion
    z = np.random.RandomState(7).randn(3000, 8).astype(np.float32)
    w = GENERATOR.mapping(torch.from_numpy(z))
    torch.testing.assert_close(statistics.samples, w)
    torch.testing.assert_close(statistics.w_avg, w.mean(0))
    # Σ over the components, then the mean over the samples: one number for the whole vector.
    expected = (w - w.mean(0)).pow(2).sum(1).mean().sqrt().item()
    assert statistics.w_std == pytest.approx(expected, rel=1e-5)
    again = measure(GENERATOR, 3000, 7, CPU)
    assert torch.equal(again.samples, statistics.samples)
    assert not torch.equal(measure(GENERATOR, 3000, 8, CPU).samples, statistics.samples)


def test_draws_depend_on_seed_and_purpose_alone() -> None:
    first = draw_normal((100,), 3, "w", 5)
    torch.randn(10)  # the global state has no part in it
    assert torch.equal(draw_normal((100,), 3, "w", 5), first)
    others = [(4, "w", 5), (3, "noise", 5), (3, "w", 6), (3, "w", "5")]
    for seed, *purpose in others:
        assert not torch.equal(draw_normal((100,), int(seed), *purpose), first)
    assert len({derive_seed(seed, "w") for seed in range(1000)}) == 1000
    assert 0 <= derive_seed(1, "w") < 2**63


def test_every_job_starts_at_the_mean_with_its_own_noise() -> None:
    statistics = measure(GENERATOR, 100, 0, CPU)
    start = start_at_mean(GENERATOR, statistics, space="w_plus", seeds=[3, 5], device=CPU)
    assert start.ws.shape == (2, GENERATOR.num_ws, 8)
    assert torch.equal(start.ws[1, 2], statistics.w_avg)
    assert [tuple(noise.shape) for noise in start.noise_bufs] == [
        (2, 1, *shape) for shape in GENERATOR.noise_shapes
    ]
    assert not torch.equal(start.noise_bufs[0][0], start.noise_bufs[0][1])
    alone = start_at_mean(GENERATOR, statistics, space="w", seeds=[5], device=CPU)
    assert alone.ws.shape == (1, 1, 8)
    assert torch.equal(alone.noise_bufs[1][0], start.noise_bufs[1][1])


def test_truncation_ends_at_both_and_keeps_noise_as_strong() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = (
        Latents(torch.randn(2, 3, 4, generator=draw), (torch.randn(2, 1, 64, 64, generator=draw),))
        for _ in range(2)
    )
    for psi, wanted in ((1.0, one), (0.0, other)):
        got = truncate(one, other, psi)
        assert torch.equal(got.ws, wanted.ws)
        assert torch.equal(got.noise_bufs[0], wanted.noise_bufs[0])
    between = truncate(one, other, 0.6)
    assert torch.allclose(between.ws, 0.6 * one.ws + 0.4 * other.ws, atol=1e-6)
    assert between.noise_bufs[0].std() == pytest.approx(1, abs=0.03)


def test_expand_repeats_w_and_leaves_w_plus() -> None:
    w, ws = torch.randn(2, 1, 4), torch.randn(2, 3, 4)
    assert torch.equal(expand(w, 3)[:, 2], w[:, 0])
    assert torch.equal(expand(ws, 3), ws)


def test_which_ws_move() -> None:
    ws = torch.zeros(2, 5, 4, dtype=torch.float64)
    assert mark_moving(None, ws) is None
    moves = mark_moving((1, 3), ws)
    assert moves is not None and moves.dtype == ws.dtype
    assert moves.tolist() == [[0], [1], [1], [0], [0]]
    beyond = mark_moving((3, 14), ws)  # as far as there are so many
    assert beyond is not None and beyond.flatten().tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(LmexpError, match=r"latent\.moving_ws: \[5, 9\] holds none .* 5 ws"):
        mark_moving((5, 9), ws)
