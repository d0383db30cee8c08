"""SFace's kernels against the same layers in plain operations.

Run as a program, this file compares them on the device it is given; `TRITON_INTERPRET=1` runs them
on a CPU.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lmexp.losses.identity_layers import LoweredLayer, separable


def build(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> LoweredLayer:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
    activation = nn.PReLU(outputs)
    nn.init.normal_(activation.weight, std=0.4)  # of either sign, as the real ones are
    return LoweredLayer(conv, activation, torch.float32)


def compare_kernels(device: str) -> list[float]:
    """Relative errors of results and gradients, the worst last."""
    from lmexp.losses import identity_triton

    errors = []
    for count, channels, outputs, side, stride in (
        (1, 16, 24, 6, 1),
        (3, 24, 16, 8, 2),
        (2, 8, 8, 5, 1),
        (1, 40, 16, 14, 2),
    ):
        torch.manual_seed(side)
        layers = [
            build(4, channels, 1, 1, 1),
            build(channels, channels, 3, stride, channels),
            build(channels, outputs, 1, 1, 1),
        ]
        x = torch.randn(count, side, side, channels)
        outer = torch.randn(count, side // stride, side // stride, outputs)
        found = []
        for fast in (False, True):
            there = device if fast else "cpu"
            leaf = x.clone().to(there).requires_grad_()
            own = [layer.to(there).requires_grad_(False) for layer in layers]
            pair = identity_triton.separable if fast else separable
            y = pair(leaf, *own)
            (gradient,) = torch.autograd.grad(y, leaf, outer.to(there))
            found.append([y.detach().cpu(), gradient.cpu()])
        for wanted, got in zip(*found, strict=True):
            assert got.shape == wanted.shape and wanted.norm() > 0
            errors.append(float((got - wanted).norm() / wanted.norm()))
    return sorted(errors)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compute_the_same(run_kernels: Callable[[str, str], tuple[int, float]]) -> None:
    count, worst = run_kernels(Path(__file__).name, "cpu")
    assert count == 8
    assert 0 < worst < 1e-5


if __name__ == "__main__":
    found = compare_kernels(sys.argv[1])
    print(len(found), found[-1])
