"""The landmark term against a hand-computed case, NumPy, and finite differences."""

import numpy as np
import pytest
import torch

from lmexp.losses.landmarks import heatmap_distance


def test_hand_computed_case() -> None:
    heatmaps = torch.zeros(1, 2, 1, 2)
    target = torch.tensor([[[[3.0, 4.0]], [[0.0, 2.0]]]])
    weights = torch.tensor([[1.0, 4.0]])
    # Σ λ Δ² = 1·(9 + 16) + 4·4 = 41; Σ λ² Δ² = 25 + 16·4 = 89; Σ λ |Δ| = 7 + 4·2 = 15
    assert heatmap_distance(heatmaps, target, weights, "l2").item() == pytest.approx(41**0.5)
    squared = heatmap_distance(heatmaps, target, weights, "l2", squared_weights=True)
    assert squared.item() == pytest.approx(89**0.5)
    assert heatmap_distance(heatmaps, target, weights, "l1").item() == pytest.approx(15)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_agrees_with_numpy_job_by_job(norm: str) -> None:
    draw = np.random.default_rng(0)
    a, b = draw.random((2, 3, 68, 8, 8))
    weights = draw.random((3, 68))
    for k in range(3):
        delta = a[k] - b[k]
        lam = weights[k][:, None, None]
        expected = (
            np.sqrt((lam * delta**2).sum()) if norm == "l2" else (lam * np.sqrt(delta**2)).sum()
        )
        got = heatmap_distance(*map(torch.from_numpy, (a, b, weights)), norm)[k]
        assert got.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradient(norm: str) -> None:
    torch.manual_seed(0)
    heatmaps = torch.rand(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    target = torch.rand(2, 3, 2, 2, dtype=torch.float64)
    weights = torch.rand(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h: heatmap_distance(h, target, weights, norm), heatmaps)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_identical_maps_give_zero_and_a_zero_gradient(norm: str) -> None:
    heatmaps = torch.rand(1, 3, 2, 2, requires_grad=True)
    distance = heatmap_distance(heatmaps, heatmaps.detach(), torch.ones(1, 3), norm)
    distance.sum().backward()
    assert distance.item() == 0.0
    assert heatmaps.grad is not None
    assert torch.equal(heatmaps.grad, torch.zeros_like(heatmaps))
