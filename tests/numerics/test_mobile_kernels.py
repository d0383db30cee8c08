"""MobileStyleGAN's kernels against the same layers in plain operations.

Run as a program, this file compares them on the device it is given; `TRITON_INTERPRET=1` runs them
on a CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_mobile_stylegan import random_tensors

from lmexp.generators import mobile_lowered
from lmexp.generators.mobile_head import ImageHead
from lmexp.generators.mobile_stylegan import MobileNetwork
from lmexp.generators.mobile_styles import split_styles

CHANNELS = (64, 128, 64)


def build(with_head: bool) -> mobile_lowered.LoweredTail:
    """One or two blocks of which all have kernels, and either head, in float32."""
    head = None
    if with_head:
        torch.manual_seed(1)
        head = ImageHead(channels=128, width=16, side=8, w_dim=6)
        for value in head.parameters():
            torch.nn.init.normal_(value, std=0.3)
        head.freeze()
    network = MobileNetwork(random_tensors(CHANNELS), "", head, 1 if with_head else None)
    network.lower_precision(torch.float32)
    assert network._lowered is not None
    return network._lowered.tail


def compare_kernels(device: str) -> list[float]:
    """Relative errors of images and gradients, the worst last."""
    from lmexp.generators import mobile_triton

    errors = []
    names = ("PRODUCT", "NARROW_PRODUCT", "PAINTING_PRODUCT")
    usual = [getattr(mobile_triton, name) for name in names]
    for with_head in (False, True):
        tail = build(with_head)
        assert tail.has_kernels and len(tail.blocks) == (1 if with_head else 2)
        for count in (1, 3):
            torch.manual_seed(2)
            # Each style vector has more columns than any of its layers reads, and there are more
            # styles on either side, as there may be in memory.
            columns = 32 + max(map(sum, tail.widths))
            inputs = [torch.randn(count, 4, 4, CHANNELS[0])]
            inputs.append(torch.randn(count, columns * len(tail.widths)))
            side = 16 if with_head else 32
            outer = torch.randn(count, 3, side, side)
            # A program of fewer outputs than the last layer has cannot make the image.
            sizes = [(64, 32, 32, 4, 2)] * 3 if count == 1 else usual
            # Once by programs that keep their weights, where they fit, and once by the others.
            streams = mobile_triton.STREAM if count == 3 else {}
            processors = mock.Mock(wraps=mobile_triton._count_processors)
            apart = mock.Mock(wraps=mobile_triton._image)
            found = []
            for fast in (False, True):
                there = device if fast else "cpu"
                x, styles = (value.to(there).requires_grad_() for value in inputs)
                tail.to(there)
                paint = functools.partial(mobile_triton.paint, tail) if fast else tail
                with mock.patch.multiple(
                    mobile_triton,
                    **dict(zip(names, sizes, strict=True)),
                    STREAM=streams,
                    _count_processors=processors,
                    _image=apart,
                ):
                    images = paint(x, F.pad(styles, (16, 48))[:, 16:-48] if fast else styles)
                gradient, slopes = torch.autograd.grad(images, (x, styles), outer.to(there))
                parts = tail.split(slopes)
                # Columns of no layer have no gradient.
                assert slopes.count_nonzero() == sum(part.count_nonzero() for part in parts)
                found.append([value.detach().cpu() for value in (images, gradient, *parts)])
            assert apart.call_count == (with_head or count == 1)
            assert processors.called == (count == 3)
            for wanted, got in zip(*found, strict=True):
                assert got.shape == wanted.shape and wanted.norm() > 0
                errors.append(float((got - wanted).norm() / wanted.norm()))
    return sorted(errors + compare_sums(device))


def compare_sums(device: str) -> list[float]:
    """Relative errors of the gradients of styles from partial sums alone."""
    from lmexp.generators import mobile_triton

    # More rows than a step takes, fewer, no multiple of four; columns left over before the last
    # vector and behind it, as many as a program writes and not.
    kinds = ((70, 64, True), (3, 32, False), (1, 128, True), (513, 16, False), (130, 64, False))
    partials = tuple(mobile_triton.Partial(*kind) for kind in kinds)
    widths, columns = ((64, 16, 32), (128, 32), (16,), (64,)), 163
    torch.manual_seed(3)
    errors = []
    for count in (1, 3):
        styles = torch.randn(count, 20 + columns * len(widths))[:, 20:]
        sums, parts = mobile_triton._make_room(partials, count, torch.device(device))
        sums.normal_()
        wanted = torch.zeros_like(styles)
        into, given = (iter(split_styles(tensor, widths)) for tensor in (wanted, styles))
        for part, (_, channels, bands) in zip(parts, partials, strict=True):
            found = part.cpu().view(count, -1, channels).double().sum(1)
            if bands:
                up, style = next(given), next(given)
                found = found.view(count, 4, -1)
                next(into).copy_((found * style[:, None]).flatten(1))
                found = (found * up.view(count, 4, -1)).sum(1)
            else:
                next(given)
            next(into).copy_(found)
        made = [mobile_triton._add_up(sums, partials, styles.to(device), widths) for _ in range(2)]
        assert torch.equal(*made)
        got = made[0].cpu()
        assert not got[wanted == 0].any()
        for one, other in zip(*(split_styles(v, widths) for v in (wanted, got)), strict=True):
            errors.append(float((one - other).norm() / one.norm()))
    return errors


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compute_the_same(run_kernels: Callable[[str, str], tuple[int, float]]) -> None:
    count, worst = run_kernels(Path(__file__).name, "cpu")
    # Twice the image, the features' gradient and those of the styles: 7 of two blocks, 6 of one and
    # the larger head; and of partial sums alone seven.
    assert count == 2 * (2 + 7) + 2 * (2 + 6) + 2 * 7
    assert 0 < worst < 1e-5


WALK = {"ROWS": 16, "PLACES": 16, "CHANNELS": 64, "STAGES": 4}
PRODUCT = {"C_IN": 64, "C_OUT": 64, "CONSTANTS": 1, "BIAS": True, "M": 64, "N": 64, "STAGES": 3}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("spread_kernel", {"C": 64, **WALK}),
        ("spread_bands_kernel", {"C": 64, **WALK, "STAGES": 3}),
        ("gather_kernel", {"C": 64, "MORE": True, **WALK}),
        ("gather_bands_kernel", {"C": 64, "ACTIVATED": True, **WALK}),
        ("product_kernel", {**PRODUCT, "K": 64, "EVEN": False, "PAINTS": False}),
        ("product_kernel", {**PRODUCT, "K": 64, "EVEN": True, "PAINTS": True}),
        ("stream_kernel", PRODUCT),
        (
            "image_kernel",
            {"C": 64, "SKIPPED": 0, "CONSTANTS": 1, "ROWS": 8, "COLUMNS": 16, "CHANNELS": 64},
        ),
        (
            "back_image_kernel",
            {"K": 64, "C_OUT": 64, "ROWS": 32, "PLACES": 64, "OUTPUTS": 64},
        ),
        ("add_up_kernel", {"ADDED": 16, "TILES": 64}),
    ],
)
def test_kernels_compile_for_a_gpu(
    name: str, sizes: dict[str, object], compile_kernel: Callable[..., Any]
) -> None:
    from lmexp.generators import mobile_kernels

    halves = ("x", "y", "weight", "more", "gradient", "colours", "skipped", "skip_weight")
    whole = ("rows", "tiles", "places", "count", "height", "width", "columns")
    strides = ("stride", "up_stride", "skip_stride")
    types = dict.fromkeys(halves, "*bf16") | dict.fromkeys(whole + strides, "i32")
    types |= {"leak": "fp32", "table": "*i32"}
    if name not in ("image_kernel", "add_up_kernel"):
        types["out"] = "*bf16"
    assert compile_kernel(getattr(mobile_kernels, name), types, sizes).asm["cubin"]


if __name__ == "__main__":
    mobile_lowered.DENSE_SIDE = 4
    if sys.argv[1] == "cpu":
        from lmexp.generators import mobile_triton

        # Few programs, since each takes a while to be interpreted, and tiles beyond the border.
        mobile_triton.SPREAD_ROWS, mobile_triton.GATHER_ROWS = 6, 12
        mobile_triton.SPREAD_BANDS = 3
        mobile_triton.ROWS, mobile_triton.PAINTED_ROWS = 16, 6
    found = compare_kernels(sys.argv[1])
    print(len(found), found[-1])
