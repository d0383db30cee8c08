"""Adam's kernel against the same step in plain operations.

Run as a program, this file compares them on the device it is given; `TRITON_INTERPRET=1` runs the
kernel on a CPU.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmexp import adam, batch

ROWS = 5
SHAPES = ((1, 3, 7), (1, 64, 64), (18, 96))
"""Of noise maps, and of latents: a part of a block, several of them, and no map at all."""


def compare(device: str) -> list[float]:
    """Largest differences after three steps, of all tensors and shapes; the largest last."""
    from lmexp import adam_triton

    draw = torch.Generator().manual_seed(0)
    found = []
    for shape in SHAPES:
        is_noise = len(shape) == 3
        values = torch.randn(ROWS, *shape, generator=draw)
        start = [values, torch.zeros_like(values), torch.zeros_like(values), values.clone()]
        kept: list[list[Tensor]] = []
        for advance in (batch.advance, adam_triton.advance):
            slopes = torch.Generator().manual_seed(1)
            tensors = [tensor.clone().to(device) for tensor in start]
            for step in range(3):
                gradient = torch.randn(ROWS, *shape, generator=slopes)
                gradient[3] = torch.nan
                sizes = [adam.step_sizes(0.1 / (k + 1), step + 1, 0.9, 0.999) for k in range(ROWS)]
                size, root = torch.tensor(sizes).T.contiguous().to(device)
                # The second does not move; the fourth breaks; the fifth breaks at the last step.
                moving = torch.tensor([1.0, 0, 1, 1, 1], device=device)
                broken = torch.tensor([False, False, False, True, step == 2], device=device)
                advance(
                    *tensors,
                    gradient.to(device),
                    size,
                    root,
                    moving,
                    broken,
                    (0.9, 0.999),
                    is_noise,
                )
            kept.append(tensors)
        plain, fast = kept
        assert torch.equal(fast[0][1].cpu(), values[1]) and torch.equal(fast[0][3].cpu(), values[3])
        assert torch.equal(fast[0][4], fast[3][4]) and not torch.equal(fast[0][4].cpu(), values[4])
        for wanted, got in zip(plain, fast, strict=True):
            found.append(float((got - wanted).abs().max()))
    return sorted(found)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_takes_the_same_step(
    run_kernels: Callable[[str, str], tuple[int, float]],
) -> None:
    count, worst = run_kernels(Path(__file__).name, "cpu")
    assert count == 12
    assert 0 < worst < 1e-5


if __name__ == "__main__":
    differences = compare(sys.argv[1])
    print(len(differences), differences[-1])
