"""How half precision splits StyleGAN2's layers: against the layers as they are written.

Run as a program, this file compares the Triton kernels with the same computation in plain tensor
operations, on the device it is given; `TRITON_INTERPRET=1` runs them on a CPU.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmexp.generators import stylegan2
from lmexp.generators.stylegan2 import StyleGAN2Network
from lmexp.generators.stylegan2_config import StyleGAN2Config, channel_table
from lmexp.generators.stylegan2_epilogue import (
    Split,
    compose,
    compute,
    convolve,
    double_side,
    fuse,
    grow,
    resample,
)
from lmexp.generators.stylegan2_layers import LowPass, make_random_state

SPLITS: tuple[Split, ...] = ("transposed", "quads", "phases")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_a_transposed_convolution_and_the_filter(split: Split) -> None:
    """Values and gradients, the borders included."""
    weight, low_pass = draw(5, 3, 3, 3), LowPass((1, 3, 3, 1)).double()
    x = draw(2, 3, 6, 4, seed=1).requires_grad_()
    wanted = low_pass.upsample_convolved(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2))
    found = resample(convolve(x, compose(weight, split), split), split)
    assert found.shape == (2, 5, 12, 8)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    outer = draw(*wanted.shape, seed=2)
    (gradient,) = torch.autograd.grad(found, x, outer)
    (slope,) = torch.autograd.grad(wanted, x, outer)
    torch.testing.assert_close(gradient, slope, rtol=0, atol=1e-10)


def test_doubling_a_side_is_upsampling() -> None:
    image, low_pass = draw(2, 3, 5, 4), LowPass((1, 3, 3, 1)).double()
    torch.testing.assert_close(double_side(image), low_pass.upsample(image), rtol=0, atol=1e-12)


def make_network(architecture: Any, taps: tuple[float, ...], **choices: Any) -> StyleGAN2Network:
    config = StyleGAN2Config(
        z_dim=6,
        w_dim=8,
        resolution=32,
        channels=channel_table(32, 128, 12),
        mapping_layers=1,
        architecture=architecture,
        resample_filter=taps,
        conv_clamp=2.0,
    )
    return StyleGAN2Network(config, make_random_state(config, 3), **choices).double()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("architecture", "taps"),
    [("skip", (1, 3, 3, 1)), ("resnet", (1, 3, 3, 1)), ("orig", (1, 3, 3, 1)), ("skip", (1, 2, 1))],
)
@pytest.mark.parametrize("smallest", [8, 32])
def test_both_structures_compute_the_same(
    architecture: Any,
    taps: tuple[float, ...],
    split: Split,
    smallest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float64, the epsilon of demodulation, which normalised weights meet, is what differs."""
    monkeypatch.setattr(stylegan2, "choose_split", lambda side: split)
    plain, fast = (make_network(architecture, taps) for _ in range(2))
    fast._lower(torch.float64, smallest)
    ws = draw(2, plain.num_ws, 8).requires_grad_()
    noise = [draw(2, 1, *shape, seed=4).requires_grad_() for shape in plain.noise_shapes]
    outer = draw(2, 3, 32, 32, seed=5)
    images = []
    for maps in ([], noise):
        found, wanted = fast.synthesis(ws, maps), plain.synthesis(ws, maps)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        images.append(wanted.detach())
        variables = [ws, *maps]
        pairs = zip(
            torch.autograd.grad(found, variables, outer),
            torch.autograd.grad(wanted, variables, outer),
            strict=True,
        )
        for gradient, slope in pairs:
            assert slope.norm() > 0
            assert (gradient - slope).norm() <= 1e-6 * slope.norm()
    assert not torch.allclose(*images)


@pytest.mark.parametrize("mode", ["none", "random"])
def test_noise_modes_of_both_structures(mode: Any) -> None:
    plain, fast = (make_network("skip", (1, 3, 3, 1), noise_mode=mode) for _ in range(2))
    fast._lower(torch.float64, 8)
    ws = draw(2, plain.num_ws, 8)
    torch.testing.assert_close(fast.synthesis(ws), plain.synthesis(ws), rtol=0, atol=1e-6)


def compare_kernels(device: str) -> list[float]:
    """Relative errors of the kernels' results and gradients, largest last."""
    from lmexp.generators.stylegan2_triton import Grown

    errors = []
    # (channels, features, modulated, image, noise maps or 0, noise scaled, clamp)
    choices = [
        (16, True, True, True, 2, True, None),
        (12, True, True, False, 2, True, 0.8),
        (16, False, False, True, 1, False, 0.7),
        (16, True, False, False, 0, False, None),
    ]
    cases = itertools.product(("same", *SPLITS), choices)
    for split, (C, features, modulated, with_image, maps, scaled, clamp) in cases:
        x, weight = draw(2, 6, 2, 4).float(), compose(draw(C, 6, 3, 3).float() / 7, split)
        source = convolve(x, weight, split).to(device, memory_format=torch.channels_last)
        side = (2, 4) if split == "same" else (4, 8)
        tables = draw(2, 5, C + 4, seed=1).float().to(device)[..., :C].unbind(1)
        demodulation, styles = tables[0].abs(), tables[1] if modulated else None
        rgb = draw(2, 3, C, seed=2).float().to(device) if with_image else None
        noise = draw(maps, 1, *side, seed=3).float().to(device) if maps else None
        strength = torch.tensor(0.3, device=device) if scaled else None
        variables = [source, demodulation, styles, rgb, noise if maps == 2 else None]
        variables = [v.requires_grad_() for v in variables if v is not None]
        results: list[list[Tensor]] = []
        for function in (compute, fuse):
            made = function(
                source,
                demodulation,
                tables[4][0],
                noise,
                strength,
                styles,
                rgb,
                features,
                split,
                clamp,
            )
            outputs = [output for output in made if output is not None]
            assert len(outputs) == features + with_image
            outer = [draw(*output.shape, seed=6).float().to(device) for output in outputs]
            gradients = torch.autograd.grad(outputs, variables, outer)
            results.append([*(output.detach() for output in outputs), *gradients])
        for wanted, found in zip(*results, strict=True):
            assert found.shape == wanted.shape and wanted.norm() > 0
            errors.append(float((found - wanted).norm() / wanted.norm()))
    image, layer = draw(2, 3, 5, 4).float().to(device), draw(2, 3, 10, 8, seed=1).float().to(device)
    for variables in ([image, layer], [image]):
        results = []
        for function, where in ((grow, "cpu"), (Grown.apply, device)):
            leaves = [v.to(where).clone().requires_grad_() for v in variables]
            made = function(*leaves, *[None] * (2 - len(leaves)))
            outer = draw(*made.shape, seed=2).float().to(where)
            made_and_slopes = [made.detach(), *torch.autograd.grad(made, leaves, outer)]
            results.append([x.cpu() for x in made_and_slopes])
        for wanted, found in zip(*results, strict=True):
            assert found.shape == wanted.shape and wanted.norm() > 0
            errors.append(float((found - wanted).norm() / wanted.norm()))
    return sorted(errors)


@pytest.mark.parametrize("split", ["same", *SPLITS])
@pytest.mark.parametrize(("features", "modulated", "with_image"), [(1, 1, 1), (1, 0, 0), (0, 0, 1)])
def test_what_the_compiler_is_told_of_the_kernels(
    split: Split, features: int, modulated: int, with_image: int
) -> None:
    """Shapes and types of results and gradients, on PyTorch's device without memory."""
    x = torch.empty(2, 6, 4, 4, device="meta", dtype=torch.bfloat16)
    weight = compose(torch.empty(12, 6, 3, 3), split).to(x)
    source = convolve(x, weight, split).requires_grad_()
    side = 4 if split == "same" else 8
    rows = torch.empty(2, 12, device="meta").requires_grad_()
    rgb = torch.empty(2, 3, 12, device="meta").requires_grad_() if with_image else None
    noise = torch.empty(2, 1, side, side, device="meta").requires_grad_()
    styles = rows if modulated else None
    bias, strength = torch.empty(12, device="meta"), torch.empty((), device="meta")
    arguments: Any = (source, rows, bias, noise, strength, styles, rgb, bool(features), split, 1.0)
    found, wanted = fuse(*arguments), compute(*arguments)
    for made, reference in zip(found, wanted, strict=True):
        assert (made is None) == (reference is None)
        if made is not None and reference is not None:
            assert (made.shape, made.dtype) == (reference.shape, reference.dtype)
    if found[0] is not None:
        assert found[0].is_contiguous(memory_format=torch.channels_last)
    variables = [v for v in (source, rows, noise, rgb) if v is not None]
    outputs = [made for made in found if made is not None]
    gradients = torch.autograd.grad(outputs, variables, [torch.empty_like(o) for o in outputs])
    for gradient, variable in zip(gradients, variables, strict=True):
        assert (gradient.shape, gradient.dtype) == (variable.shape, variable.dtype)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compute_the_same(run_kernels: Callable[[str, str], tuple[int, float]]) -> None:
    count, worst = run_kernels(Path(__file__).name, "cpu")
    assert count == 81
    assert 0 < worst < 1e-5


if __name__ == "__main__":
    found = compare_kernels(sys.argv[1])
    print(len(found), found[-1])
