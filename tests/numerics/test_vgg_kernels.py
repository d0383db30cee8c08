"""The kernels of a VGG's distance against the same distance in plain operations.

Run as a program, this file compares them on the device it is given; `TRITON_INTERPRET=1` runs them
on a CPU.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmexp.convolutions import LoweredConv
from lmexp.losses.lpips import feature_distance, normalise
from lmexp.losses.perceptual.frozen_vgg import FrozenVgg

WIDTHS = ((16, 16), (32, 16, 32), (16, 64))


class SmallVgg:
    """Blocks of random convolutions, read as both kinds of VGG read their images."""

    def __init__(self, *, reverses: bool, rounds_up: bool, widths: Any = WIDTHS) -> None:
        torch.manual_seed(0)
        before, self.blocks = 3, []
        for block in widths:
            self.blocks.append([])
            for width in block:
                conv = nn.Conv2d(before, width, 3)
                lowered = LoweredConv(conv.weight * 2, conv.bias, torch.float32, padding=1)
                self.blocks[-1].append(lowered)
                before = width
        self.shift, self.gain = torch.tensor([0.3, -0.2, 0.5]), torch.tensor([0.7, 1.5, 1.1])
        self.weights = [torch.rand(block[-1]) for block in widths]
        self.reverses, self.rounds_up = reverses, rounds_up
        self.frozen = FrozenVgg(
            self.blocks,
            self.shift,
            self.gain,
            self.weights,
            reverses=reverses,
            rounds_up=rounds_up,
        )

    def features(self, images: Tensor) -> list[Tensor]:
        x = (images + self.shift[:, None, None]) * self.gain[:, None, None]
        x, found = (x.flip(1) if self.reverses else x), []
        for block in self.blocks:
            if found:
                x = nn.functional.max_pool2d(x, 2, ceil_mode=self.rounds_up)
            for conv in block:
                x = conv(x).relu()
            found.append(x)
        return found

    def distance(self, images: Tensor, targets: list[Tensor], places: list[Tensor]) -> Tensor:
        return feature_distance(self.features(images), targets, self.weights, places or None)


def compare_kernels(device: str) -> list[float]:
    """Relative errors of distances and gradients, the worst last."""
    from lmexp.losses.perceptual.vgg_triton import distance

    errors = []
    for count, height, width, kind, placed in (
        (1, 16, 16, True, False),
        (3, 13, 10, True, True),
        (2, 13, 10, False, True),
        (2, 16, 12, False, False),
    ):
        vgg = SmallVgg(reverses=kind, rounds_up=kind)
        draw = torch.Generator().manual_seed(1)
        images = torch.randn(count, 3, height, width, generator=draw)
        look = torch.randn(count, 3, height, width, generator=draw)
        targets = [normalise(layer).detach() for layer in vgg.features(look)]
        places = [torch.rand(count, 1, *t.shape[2:], generator=draw) for t in targets]
        places = places if placed else []
        outer = torch.randn(count, generator=draw)
        leaf = images.clone().requires_grad_()
        wanted = vgg.distance(leaf, targets, places)
        (slope,) = torch.autograd.grad(wanted, leaf, outer)
        there = vgg.frozen.to(device)
        leaf = images.clone().to(device).requires_grad_()
        rows = [row.to(device) for row in (*targets, *places)]
        got = distance(there, leaf, *rows)
        found = [got, *torch.autograd.grad(got, leaf, outer.to(device))]
        for right, value in zip((wanted, slope), found, strict=True):
            assert value.shape == right.shape and right.norm() > 0
            errors.append(
                float((value.detach().cpu() - right.detach()).norm() / right.detach().norm())
            )
    return sorted(errors)


triton_alone = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@triton_alone
def test_kernels_compute_the_same(run_kernels: Callable[[str, str], tuple[int, float]]) -> None:
    count, worst = run_kernels(Path(__file__).name, "cpu")
    assert count == 4 * 2
    assert 0 < worst < 1e-5


def test_kernels_are_for_cuda_and_powers_of_two() -> None:
    assert not SmallVgg(reverses=True, rounds_up=True).frozen.has_kernels  # on a CPU
    if torch.cuda.is_available():
        assert SmallVgg(reverses=True, rounds_up=True).frozen.cuda().has_kernels
        odd = SmallVgg(reverses=True, rounds_up=True, widths=((16, 16), (24, 24)))
        assert not odd.frozen.cuda().has_kernels


SIZES = {"C": 64, "CELLS": 16, "PLACED": True, "POOLED": True}


@triton_alone
@pytest.mark.parametrize(
    ("name", "sizes", "halves"),
    [
        ("_first_kernel", {"C": 64, "PLACES": 128, "TERMS": 32}, "weight out"),
        ("_first_back_kernel", {"C": 64, "PLACES": 128, "TERMS": 32}, "gradient made weight out"),
        ("_add_up_kernel", {"BLOCK": 1024}, "shares"),
        ("_rectify_kernel", {"C": 64, "BLOCK": 1024}, "x out"),
        ("_pass_kernel", {"BLOCK": 1024}, "gradient made out"),
        ("_tap_kernel", SIZES, "y target pooled"),
        ("_tap_back_kernel", SIZES, "y target pooled out"),
        ("_tap_back_kernel", {**SIZES, "C": 512, "CELLS": 2}, "y target pooled out"),
    ],
)
def test_kernels_compile_for_a_gpu(
    name: str,
    sizes: dict[str, object],
    halves: str,
    compile_kernel: Callable[..., Any],
) -> None:
    from lmexp.losses.perceptual import vgg_triton

    whole = ("count", "height", "width", "pooled_height", "pooled_width", "sums_width")
    types = dict.fromkeys(halves.split(), "*bf16") | dict.fromkeys(whole, "i32") | {"share": "fp32"}
    assert compile_kernel(getattr(vgg_triton, name), types, sizes).asm["cubin"]


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = False
    if sys.argv[1] == "cpu":
        from lmexp.losses.perceptual import vgg_triton

        # Few programs, since each takes a while to be interpreted.
        vgg_triton.PLACES = 16
    found = compare_kernels(sys.argv[1])
    print(len(found), found[-1])
