"""A lowered FAN against the network as it was trained, and its kernels against plain operations.

Run as a program, this file compares the Triton kernels with the same computation in plain tensor
operations, on the device it is given; `TRITON_INTERPRET=1` runs them on a CPU.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmexp.landmarks import frozen_fan
from lmexp.landmarks.fan import CEILING, Fan, HierarchicalBlock
from lmexp.landmarks.frozen_fan import FrozenBlock, FrozenFan, add, halve, merge, rectify

Function = Callable[..., Any]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stir(module: nn.Module) -> None:
    """Give frozen normalisations something to do."""
    for index, norm in enumerate(m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(draw(norm.num_features, seed=index) * 0.3)
        norm.running_var.copy_(draw(norm.num_features, seed=index).abs() + 0.5)
        norm.weight.data.copy_(draw(norm.num_features, seed=index + 1) * 0.3 + 1)
        norm.bias.data.copy_(draw(norm.num_features, seed=index + 2) * 0.3)


@pytest.mark.parametrize("width", [16, 48])
def test_a_lowered_fan_is_the_fan(width: int) -> None:
    """In float32, where nothing is rounded that was not before; the gradient, too."""
    torch.manual_seed(0)
    fan = Fan(width, depth=2, landmarks=5).eval().requires_grad_(False)
    stir(fan)
    lowered = FrozenFan.of_embedded(fan, torch.float32)
    images = draw(2, 3, 32, 32).requires_grad_()
    wanted, found = fan(images), lowered(images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    outer = draw(*wanted.shape, seed=1)
    slopes = [torch.autograd.grad(maps, images, outer)[0] for maps in (wanted, found)]
    assert slopes[0].norm() > 0
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-3, atol=1e-4)


def compare(
    plain: Function, fast: Function, inputs: Sequence[Tensor], *constants: Any
) -> list[float]:
    """Relative errors of results and gradients."""
    found: list[list[Tensor]] = []
    for function in (plain, fast):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        made = function(*leaves, *constants)
        outputs = list(made) if isinstance(made, tuple) else [made]
        outer = [draw(*output.shape, seed=7).to(output) for output in outputs]
        gradients = torch.autograd.grad(outputs, leaves, outer)
        found.append([*(output.detach() for output in outputs), *gradients])
    errors = []
    for wanted, got in zip(*found, strict=True):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype and wanted.norm() > 0
        errors.append(float((got - wanted).norm() / wanted.norm()))
    return errors


def compare_kernels(device: str) -> list[float]:
    """Relative errors of results and gradients of every function, the worst last."""
    from lmexp.landmarks import fan_triton

    def plainly(function: Function) -> Function:
        # On a GPU the plain operations are those of a CPU's tensors.
        def call(*arguments: Any) -> Any:
            here = [x.cpu() if isinstance(x, Tensor) else x for x in arguments]
            made = function(*here)
            if isinstance(made, tuple):
                return tuple(output.to(device) for output in made)
            return made.to(device)

        return call

    def to(x: Tensor) -> Tensor:
        return x.to(device).contiguous(memory_format=torch.channels_last)

    errors: list[float] = []
    for n, channels, side in ((2, 16, 8), (1, 24, 4), (3, 64, 12)):
        fine = to(draw(n, channels, 2 * side, 2 * side))
        coarse = to(draw(n, channels, side, side, seed=1))
        scale, shift = (draw(channels, seed=k).to(device) for k in (2, 3))
        for ceiling in (math.inf, 0.7):
            for factor in (scale, None):
                constants = (factor, shift, ceiling)
                errors += compare(plainly(rectify), fan_triton.rectify, [coarse], *constants)
        errors += compare(plainly(halve), fan_triton.halve, [fine])
        errors += compare(plainly(fork), fan_triton.fork, [fine])
        errors += compare(plainly(merge), fan_triton.merge, [fine, coarse])
        errors += compare(plainly(add), fan_triton.add, [coarse, coarse.flip(0)], shift)
        for inputs in (channels, channels // 2):
            for ceiling in (math.inf, CEILING):
                torch.manual_seed(inputs)
                module = HierarchicalBlock(inputs, channels).eval().requires_grad_(False)
                stir(module)
                layers = [
                    (getattr(module, f"norm{i}"), getattr(module, f"conv{i}")) for i in (1, 2, 3)
                ]
                way: Any = module.skip
                skip = None if isinstance(way, nn.Identity) else (way[0], way[2])
                lowered = FrozenBlock(layers, skip, ceiling, torch.float32)
                there = FrozenBlock(layers, skip, ceiling, torch.float32).to(device)

                def fast(x: Tensor, there: FrozenBlock = there) -> Tensor:
                    around = there.skip
                    own = None if isinstance(around, nn.Identity) else frozen_fan.read_layer(around)
                    parts = tuple(map(frozen_fan.read_layer, there.layers))
                    return fan_triton.block(x, parts, own, there.ceiling)

                x = to(draw(n, inputs, side, side, seed=4))
                errors += compare(plainly(lowered), fast, [x])
    return sorted(errors)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compute_the_same(run_kernels: Callable[[str, str], tuple[int, float]]) -> None:
    count, worst = run_kernels(Path(__file__).name, "cpu")
    assert count == 81
    assert 0 < worst < 1e-5


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = False
    found = compare_kernels(sys.argv[1])
    print(len(found), found[-1])
