"""Decoding finds peaks finer than a cell, in the pixels that the docstring promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmexp.landmarks.decoding import WINDOW, decode


def gaussians(cells: Tensor, sigma: float, side: int = 64) -> Tensor:
    """Bells of height 1 at `cells` [N, K, 2] (x, y; cell centres are whole numbers)."""
    at = torch.arange(side, dtype=cells.dtype)
    bells = torch.exp(-((at - cells[..., None]) ** 2) / (2 * sigma**2))
    return bells[:, :, 1, :, None] * bells[:, :, 0, None, :]


def test_one_hot_map_gives_the_centre_of_its_cell() -> None:
    heatmaps = torch.zeros(1, 2, 64, 64)
    heatmaps[0, 0, 0, 0] = 1
    heatmaps[0, 1, 10, 63] = 0.3
    # A cell of a 256 px image is 4 px wide: cell j spans 4 j … 4 j + 4.
    assert decode(heatmaps, 256).tolist() == [[[2.0, 2.0], [254.0, 42.0]]]


def test_centroid_worked_by_hand() -> None:
    heatmaps = torch.zeros(1, 1, 8, 8)
    heatmaps[0, 0, 4, 3] = 1.0
    heatmaps[0, 0, 4, 4] = 0.5
    heatmaps[0, 0, 2, 3] = 0.5
    heatmaps[0, 0, 4, 2] = -9.0  # what is below zero is no evidence
    # x = 3 + (0.5 · 1) / 2 = 3.25; y = 4 − (0.5 · 2) / 2 = 3.5; centres at + 0.5; cells of 2 px.
    assert decode(heatmaps, 16).tolist() == [[[7.5, 8.0]]]


def test_what_lies_outside_the_window_does_not_count() -> None:
    heatmaps = torch.zeros(1, 1, 32, 32)
    heatmaps[0, 0, 16, 16] = 1.0
    heatmaps[0, 0, 16, 16 + WINDOW // 2 + 1] = 0.9
    assert decode(heatmaps, 32).tolist() == [[[16.5, 16.5]]]


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
    torch.testing.assert_close(decode(0.01 * heatmaps, 256), decode(heatmaps, 256))


def test_each_map_is_decoded_alone() -> None:
    random = torch.Generator().manual_seed(2)
    heatmaps = torch.rand(3, 68, 64, 64, generator=random)
    together = decode(heatmaps, 256)
    for k in range(3):
        assert torch.equal(decode(heatmaps[k : k + 1], 256)[0], together[k])
    changed = heatmaps.clone()
    changed[:, 0] = 0
    assert torch.equal(decode(changed, 256)[:, 1:], together[:, 1:])


def test_map_without_positive_cell_gives_its_maximum() -> None:
    heatmaps = torch.full((1, 1, 4, 4), -1.0)
    heatmaps[0, 0, 1, 2] = -0.5
    found = decode(heatmaps, 4)
    assert found.tolist() == [[[2.5, 1.5]]]
    assert torch.isfinite(decode(torch.zeros(1, 68, 64, 64), 256)).all()
