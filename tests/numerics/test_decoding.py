"""Decoding finds peaks finer than a cell, in the pixels that the docstring promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmexp.landmarks.decoding import decode


def gaussians(cells: Tensor, sigma: float, side: int = 64) -> Tensor:
    """Bells of height 1 at `cells` [N, K, 2] (x, y; cell centres are whole numbers)."""
    at = torch.arange(side, dtype=cells.dtype)
    bells = torch.exp(-((at - cells[..., None]) ** 2) / (2 * sigma**2))
    return bells[:, :, 1, :, None] * bells[:, :, 0, None, :]


def test_one_hot_map_gives_the_centre_of_its_cell() -> None:
    heatmaps = torch.zeros(1, 3, 64, 64)
    heatmaps[0, 0, 0, 0] = 1
    heatmaps[0, 1, 10, 63] = 0.3
    heatmaps[0, 2, 20, 30] = 5
    # A cell of a 256 px image is 4 px wide: cell j spans 4 j … 4 j + 4.
    expected = torch.tensor([[[2.0, 2.0], [254.0, 42.0], [122.0, 82.0]]])
    torch.testing.assert_close(decode(heatmaps, 256), expected, atol=1e-3, rtol=0)


def test_two_equal_neighbours_give_the_border_between_them() -> None:
    heatmaps = torch.zeros(1, 1, 16, 16)
    heatmaps[0, 0, 8, 5:7] = 1.0
    # Cells 5 and 6 meet at x = 6; row 8 has its middle at 8.5; cells of 2 px. Two bells one cell
    # apart make a log no longer a parabola, so that the step is exact to a fiftieth of a cell.
    torch.testing.assert_close(
        decode(heatmaps, 32), torch.tensor([[[12.0, 17.0]]]), atol=0.04, rtol=0
    )


def test_newton_step_worked_by_hand() -> None:
    """The log of a smoothed one-cell map and of a second cell, differentiated on paper."""
    heatmaps = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    heatmaps[0, 0, 7, 7], heatmaps[0, 0, 7, 8] = 1.0, 0.5
    # Smoothing by σ = 1 in x gives f(j) ∝ b(j) + b(j − 1)/2 with b(j) = exp(−j²/2), j from cell 7.
    bell = [math.exp(-(j**2) / 2) for j in range(-2, 3)]
    left, middle, right = (math.log(bell[j + 2] + bell[j + 1] / 2) for j in (-1, 0, 1))
    step = -((right - left) / 2) / (right - 2 * middle + left)
    found = decode(heatmaps, 16)[0, 0].tolist()
    assert found == pytest.approx([7.5 + step, 7.5], abs=1e-4)


def test_what_is_below_zero_is_no_evidence() -> None:
    heatmaps = gaussians(torch.tensor([[[20.3, 30.7]]]), 1.2)
    dented = torch.where(heatmaps > 1e-3, heatmaps, -heatmaps.new_tensor(9.0))
    kept = torch.where(heatmaps > 1e-3, heatmaps, heatmaps.new_tensor(0.0))
    assert torch.equal(decode(dented, 64), decode(kept, 64))


@pytest.mark.parametrize("sigma", [1.0, 1.2, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_random_gaussians_are_found_to_a_tenth_of_a_cell(sigma: float, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    cells = 4 + 55 * torch.rand(20, 68, 2, generator=random, dtype=torch.float64)
    found = decode(gaussians(cells, sigma).to(dtype), 64).double() - 0.5
    assert (found - cells).norm(dim=2).max() < 0.1


def test_result_scales_with_the_side_and_not_with_the_height_of_the_map() -> None:
    random = torch.Generator().manual_seed(1)
    heatmaps = gaussians(10 + 40 * torch.rand(2, 68, 2, generator=random), 1.2)
    torch.testing.assert_close(decode(heatmaps, 1024), 4 * decode(heatmaps, 256))
    torch.testing.assert_close(
        decode(0.01 * heatmaps, 256), decode(heatmaps, 256), atol=1e-2, rtol=0
    )


def test_each_map_is_decoded_alone() -> None:
    random = torch.Generator().manual_seed(2)
    heatmaps = torch.rand(3, 68, 64, 64, generator=random)
    together = decode(heatmaps, 256)
    for k in range(3):
        assert torch.equal(decode(heatmaps[k : k + 1], 256)[0], together[k])
    changed = heatmaps.clone()
    changed[:, 0] = 0
    assert torch.equal(decode(changed, 256)[:, 1:], together[:, 1:])


def test_map_that_is_no_hill_gives_the_centre_of_its_highest_cell() -> None:
    heatmaps = torch.full((1, 1, 4, 4), -1.0)
    heatmaps[0, 0, 1, 2] = -0.5
    assert decode(heatmaps, 4).tolist() == [[[2.5, 1.5]]]
    assert decode(torch.zeros(1, 2, 64, 64), 64).tolist() == [[[0.5, 0.5]] * 2]


def test_step_is_at_most_one_cell() -> None:
    random = torch.Generator().manual_seed(3)
    heatmaps = torch.rand(4, 68, 64, 64, generator=random)
    peak = heatmaps.flatten(2).argmax(dim=2)
    cells = torch.stack((peak % 64, peak // 64), dim=2) + 0.5
    assert (decode(heatmaps, 64) - cells).abs().max() <= 2  # the start may be one cell inside
