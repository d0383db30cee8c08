"""Adam over rows against torch.optim.Adam, a row at a time."""

from __future__ import annotations

import pytest
import torch

from lmexp import adam


@pytest.mark.parametrize("shape", [(4, 8), (1, 5, 5)])
def test_each_row_is_torchs_adam_with_a_rate_and_a_count_of_its_own(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    betas, joins = (0.9, 0.99), (0, 3, 5)  # a row joins the batch at that step
    start = torch.randn(3, *shape, generator=draw)
    value, mean, square = start, torch.zeros_like(start), torch.zeros_like(start)
    leaves = [row.clone().requires_grad_() for row in start]
    rates = [0.1, 0.02, 0.5]
    theirs = [torch.optim.Adam([leaf], betas=betas) for leaf in leaves]
    counts = [0, 0, 0]
    for step in range(9):
        gradient = torch.randn(3, *shape, generator=draw)
        numbers = []
        for k in range(3):
            moves = step >= joins[k]
            gradient[k] *= moves
            counts[k] += moves
            rate = rates[k] / (1 + step) if moves else 0.0
            numbers.append(adam.step_sizes(rate, max(counts[k], 1), *betas))
            if moves:
                theirs[k].param_groups[0]["lr"] = rate
                leaves[k].grad = gradient[k].clone()
                theirs[k].step()
        sizes, roots = torch.tensor(numbers).T
        value, mean, square = adam.advance(value, gradient, mean, square, sizes, roots, betas)
    for k in range(3):
        torch.testing.assert_close(value[k], leaves[k].detach(), rtol=1e-6, atol=1e-7)
        state = theirs[k].state[leaves[k]]
        torch.testing.assert_close(mean[k], state["exp_avg"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(square[k], state["exp_avg_sq"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_is_broken_by_any_of_its_numbers_and_by_no_other_rows(bad: float) -> None:
    totals, gradients = torch.zeros(3), torch.zeros(3, 4, 4)
    assert not adam.any_not_finite([totals, gradients]).any()
    gradients[1, 2, 3] = bad
    assert adam.any_not_finite([totals, gradients]).tolist() == [False, True, False]
    totals[2] = bad
    assert adam.any_not_finite([totals, gradients]).tolist() == [False, True, True]
