"""SFace's depthwise convolutions and activations as Triton kernels, forward and backward.

What these kernels are for: the network is small and has 27 layers, so that on a GPU it is its
kernels' number that counts, and a compiler took 42 s for them. Here a depthwise convolution
with the activations before and behind it is one kernel in each direction. Maps are kept as they
are before their bias and PReLU: a PReLU's slopes may be negative, and then its result does not
tell on which side it was.

Maps are [N, h, w, C] with channels last in memory; everything is computed in float32, whatever is
stored. The same in plain operations: `identity_layers.separable`.
"""

# "no cover": they run on GPUs and, when tested, in a process of their own.
# Upper case marks what a kernel is compiled for, as in Triton's own code.
# ruff: noqa: N803

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmexp.kernel_launch import await_turn, launch
from lmexp.losses.identity_layers import LoweredLayer

BLOCK, WARPS = 1024, 4
"""Elements of a program, and warps that work on them. Widths are no constants of the kernels: there
are six, and each would have to be compiled for."""


@triton.jit  # type: ignore[untyped-decorator]
def _convolve_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    x,
    bias_before,
    slope_before,
    taps,
    bias,
    slope,
    raw,
    out,
    count,
    height,
    width,
    C,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    await_turn()
    # Bias and PReLU, depthwise 3×3 -> `raw`, bias and PReLU -> `out`; height and width are theirs.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    channel = (at % C).to(tl.int32)
    place = at // C
    row = ((place // width) % height).to(tl.int32) * STRIDE
    column = (place % width).to(tl.int32) * STRIDE
    image = x + place // (height * width) * (height * STRIDE * width * STRIDE * C)
    shift, factor = tl.load(bias_before + channel), tl.load(slope_before + channel)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for down in tl.static_range(3):
        for right in tl.static_range(3):
            y, z = row + down - 1, column + right - 1
            inside = there & (y >= 0) & (y < height * STRIDE) & (z >= 0) & (z < width * STRIDE)
            source = (y * (width * STRIDE) + z) * C + channel
            value = tl.load(image + source, mask=inside, other=0.0).to(tl.float32) + shift
            value = tl.where(value >= 0, value, factor * value)
            tap = tl.load(taps + (down * 3 + right) * C + channel)
            total += tl.where(inside, value, 0.0) * tap
    tl.store(raw + at, total, mask=there)
    # As the backward pass will read it.
    total = total.to(raw.dtype.element_ty).to(tl.float32) + tl.load(bias + channel)
    total = tl.where(total >= 0, total, tl.load(slope + channel) * total)
    tl.store(out + at, total, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _convolve_back_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    gradient,
    raw,
    bias,
    slope,
    taps,
    x,
    bias_before,
    slope_before,
    out,
    count,
    height,
    width,
    C,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    await_turn()
    # The gradient of the above with respect to x; height and width are those of x.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    channel = (at % C).to(tl.int32)
    place = at // C
    row = ((place // width) % height).to(tl.int32)
    column = (place % width).to(tl.int32)
    image = place // (height * width) * ((height // STRIDE) * (width // STRIDE) * C)
    shift, factor = tl.load(bias + channel), tl.load(slope + channel)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for down in tl.static_range(3):
        for right in tl.static_range(3):
            y, z = row - (down - 1), column - (right - 1)
            inside = there & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            if STRIDE == 2:
                inside = inside & (y % 2 == 0) & (z % 2 == 0)
            source = image + ((y // STRIDE) * (width // STRIDE) + z // STRIDE) * C + channel
            value = tl.load(gradient + source, mask=inside, other=0.0).to(tl.float32)
            level = tl.load(raw + source, mask=inside, other=0.0).to(tl.float32) + shift
            value = tl.where(level >= 0, value, factor * value)
            total += value * tl.load(taps + (down * 3 + right) * C + channel)
    level = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    level += tl.load(bias_before + channel)
    total = tl.where(level >= 0, total, tl.load(slope_before + channel) * total)
    tl.store(out + at, total, mask=there)


class _Separable(torch.autograd.Function):  # pragma: no cover
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, before: LoweredLayer, grouped: LoweredLayer, dense: LoweredLayer
    ) -> Tensor:
        x = x.contiguous()
        n, height, width, channels = x.shape
        shape = (n, height // grouped.stride, width // grouped.stride, channels)
        raw, activated = x.new_empty(shape), x.new_empty(shape)
        grid = (triton.cdiv(raw.numel(), BLOCK),)
        launch(
            _convolve_kernel,
            grid,
            x,
            before.bias,
            before.slope,
            grouped.weight,
            grouped.bias,
            grouped.slope,
            raw,
            activated,
            raw.numel(),
            *shape[1:3],
            channels,
            STRIDE=grouped.stride,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        ctx.layers = (before, grouped, dense)
        ctx.save_for_backward(x, raw)
        return activated @ dense.weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, raw = ctx.saved_tensors
        before, grouped, dense = ctx.layers
        gradient = (gradients[0] @ dense.weight).contiguous()
        out = torch.empty_like(x)
        grid = (triton.cdiv(out.numel(), BLOCK),)
        launch(
            _convolve_back_kernel,
            grid,
            gradient,
            raw,
            grouped.bias,
            grouped.slope,
            grouped.weight,
            x,
            before.bias,
            before.slope,
            out,
            out.numel(),
            *x.shape[1:3],
            x.shape[3],
            STRIDE=grouped.stride,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        return out, None, None, None


def separable(
    x: Tensor, before: LoweredLayer, grouped: LoweredLayer, dense: LoweredLayer
) -> Tensor:  # pragma: no cover
    """`identity_layers.separable` by these kernels; sides are even where the stride is 2."""
    y: Tensor = _Separable.apply(x, before, grouped, dense)
    return y
