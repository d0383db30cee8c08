"""The noise regulariser's kernels against the same computation in plain operations.

Run as a program, this file compares them on the device it is given; `TRITON_INTERPRET=1` runs the
kernels on a CPU.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from lmexp.losses.autocorrelation import autocorrelations

SETS = ((4, 8, 8, 16, 16, 32, 32, 64, 64), (64,), (4,), (32, 8), (16, 16))
"""Sides of the maps; the last sets lack sizes that a generator would have."""


def try_what_generators_do_not(device: str) -> None:
    """Without gradients, with some of the maps', and of one map that all jobs share."""
    from lmexp.losses import noise_triton

    draw = torch.Generator().manual_seed(0)
    varied, shared, fixed = (
        torch.randn(jobs, 1, side, side, generator=draw) for jobs, side in ((3, 16), (1, 8), (3, 8))
    )
    results = []
    for function, where in ((autocorrelations, "cpu"), (noise_triton.autocorrelations, device)):
        leaves = [noise.to(where).clone().requires_grad_() for noise in (varied, shared)]
        maps = [leaves[0], leaves[1].expand(3, -1, -1, -1), fixed.to(where)]
        with torch.no_grad():
            still = function(maps)
        assert not still.requires_grad
        results.append([still.cpu()])
        for chosen in (leaves[:1], leaves[1:], leaves):
            gradients = torch.autograd.grad(function(maps).sum(), chosen)
            results[-1] += [gradient.cpu() for gradient in gradients]
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    # There is no second derivative, which must not pass for 0.
    leaf = varied.to(device).requires_grad_()
    total = noise_triton.autocorrelations([leaf]).sum() + leaf.pow(3).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, leaf, create_graph=True)


def compare(device: str) -> list[float]:
    """Relative errors of values and of each map's gradient, the largest last."""
    from lmexp.losses import noise_triton

    errors = []
    for sides in SETS:
        for jobs in (1, 3):
            draw = torch.Generator().manual_seed(sum(sides) + jobs)
            maps = [torch.randn(jobs, 1, side, side, generator=draw) for side in sides]
            # Not white, so that there is something to find; and one that does not lie in a row.
            maps = [noise + noise.roll(1, 3) for noise in maps]
            outer = torch.rand(jobs, generator=draw) + 0.5
            results: list[list[Tensor]] = []
            for function, where in (
                (autocorrelations, "cpu"),
                (noise_triton.autocorrelations, device),
            ):
                leaves = [noise.to(where).clone().requires_grad_() for noise in maps]
                total = function([leaf.mT.contiguous().mT for leaf in leaves])
                gradients = torch.autograd.grad(total, leaves, outer.to(where))
                results.append([total.detach().cpu(), *(g.cpu() for g in gradients)])
            for wanted, found in zip(*results, strict=True):
                assert found.shape == wanted.shape and wanted.norm() > 0
                errors.append(float((found - wanted).norm() / wanted.norm()))
    return sorted(errors)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compute_the_same(run_kernels: Callable[[str, str], tuple[int, float]]) -> None:
    count, worst = run_kernels(Path(__file__).name, "cpu")
    assert count == 40
    assert 0 < worst < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("shapes", "fit"),
    [
        ([(4, 4), (8, 8), (8, 8)], True),
        ([(8, 8), (8, 8), (8, 8)], False),
        ([(8, 16)], False),
        ([(12, 12)], False),
        ([(1, 1)], False),
        ([(2, 2)], True),
    ],
)
def test_other_maps_than_a_generators_are_computed_plainly(
    shapes: list[tuple[int, int]], fit: bool
) -> None:
    from lmexp.losses import noise_triton

    maps = [torch.zeros(2, 1, *shape) for shape in shapes]
    assert not noise_triton.applies(maps)  # they are on a CPU
    with mock.patch.object(Tensor, "is_cuda", True):
        assert noise_triton.applies(maps) == fit
        assert not noise_triton.applies([noise.double() for noise in maps])
        # A kernel that believed the first map's number of jobs would read behind the second's end.
        assert not noise_triton.applies([*maps, torch.zeros(1, 1, 32, 32)])


if __name__ == "__main__":
    try_what_generators_do_not(sys.argv[1])
    found = compare(sys.argv[1])
    print(len(found), found[-1])
