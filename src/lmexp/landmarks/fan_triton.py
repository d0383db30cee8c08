"""What lies between the convolutions of a frozen FAN as Triton kernels, forward and backward.

What these kernels are for: a FAN is dozens of small convolutions with a normalisation, a ReLU, a
concatenation and a sum around each, and on a GPU these take several times the convolutions' time,
one pass through memory an operation. Here each gap between two convolutions is one pass in each
direction, a block's gradient is gathered where the convolutions' gradients end, and nothing is
kept for the backward pass but the rectified maps, which the convolutions' shapes need anyway. A
compiler comes close, but takes minutes for a network of this many parts.

Feature maps lie in memory channels-last; everything is computed in float32, whatever is stored.
The meaning of each function is that of its namesake in `frozen_fan`, in plain operations.
"""

# "no cover": they run on GPUs and, when tested, in a process of their own.
# Upper case marks what a kernel is compiled for, as in Triton's own code.
# ruff: noqa: N803

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

BLOCK, WARPS = 2048, 4
"""Elements of a program, and warps that work on them."""


@triton.jit  # type: ignore[untyped-decorator]
def _rectify_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    x,
    scale,
    shift,
    out,
    count,
    ceiling,
    C: tl.constexpr,
    SCALED: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    channel = at % C
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    if SCALED:
        value *= tl.load(scale + channel, mask=there, other=0.0)
    value += tl.load(shift + channel, mask=there, other=0.0)
    value = tl.maximum(value, 0.0)
    if BOUNDED:
        value = tl.minimum(value, ceiling)
    tl.store(out + at, value, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _collect_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    base,
    gradient,
    rectified,
    scale,
    out,
    count,
    ceiling,
    base_channels,
    first,
    C: tl.constexpr,
    BASE: tl.constexpr,
    GRADIENT: tl.constexpr,
    SCALED: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Channels first to first + C of `base`, plus what comes back through a rectified map.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    channel = at % C
    value = tl.zeros([BLOCK], dtype=tl.float32)
    if GRADIENT:
        value = tl.load(gradient + at, mask=there, other=0.0).to(tl.float32)
        if SCALED:
            value *= tl.load(scale + channel, mask=there, other=0.0)
        level = tl.load(rectified + at, mask=there, other=0.0).to(tl.float32)
        passes = level > 0.0
        if BOUNDED:
            passes = passes & (level < ceiling)
        value = tl.where(passes, value, 0.0)
    if BASE:
        place = (at // C) * base_channels + first + channel
        value += tl.load(base + place, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, value, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _join_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    half,
    quarter,
    last,
    skip,
    out,
    count,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    place = at // C
    channel = at % C
    value = tl.load(skip + at, mask=there, other=0.0).to(tl.float32)
    first = there & (channel < C // 2)
    second = there & (channel >= C // 2) & (channel < C // 2 + C // 4)
    third = there & (channel >= C // 2 + C // 4)
    within = channel - C // 2
    value += tl.load(half + place * (C // 2) + channel, mask=first, other=0.0).to(tl.float32)
    value += tl.load(quarter + place * (C // 4) + within, mask=second, other=0.0).to(tl.float32)
    within = channel - C // 2 - C // 4
    value += tl.load(last + place * (C // 4) + within, mask=third, other=0.0).to(tl.float32)
    tl.store(out + at, value, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _add_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    x,
    y,
    shift,
    out,
    count,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    value += tl.load(y + at, mask=there, other=0.0).to(tl.float32)
    value += tl.load(shift + at % C, mask=there, other=0.0)
    tl.store(out + at, value, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _halve_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    x,
    out,
    width,
    factor,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program has a part of one row of the result, `width` places long.
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < width * C
    row = tl.program_id(0).to(tl.int64)
    corner = (at // C) * (2 * C) + at % C
    x += row * (4 * width * C)
    value = tl.load(x + corner, mask=there, other=0.0).to(tl.float32)
    value += tl.load(x + corner + C, mask=there, other=0.0).to(tl.float32)
    x += 2 * width * C
    value += tl.load(x + corner, mask=there, other=0.0).to(tl.float32)
    value += tl.load(x + corner + C, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * (width * C) + at, value * factor, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _double_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    fine,
    coarse,
    out,
    width,
    factor,
    C: tl.constexpr,
    FINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # As above; of two rows of the result, both read the same of `coarse`.
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < width * C
    row = tl.program_id(0).to(tl.int64)
    source = (row // 2) * (width // 2 * C) + (at // (2 * C)) * C + at % C
    value = tl.load(coarse + source, mask=there, other=0.0).to(tl.float32) * factor
    if FINE:
        value += tl.load(fine + row * (width * C) + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * (width * C) + at, value, mask=there)


def _packed(x: Tensor) -> Tensor:  # pragma: no cover
    return x.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:  # pragma: no cover
    return torch.empty(
        (len(like), channels, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def _launch(
    kernel: Any, out: Tensor, *arguments: Any, inputs: Sequence[Any], **choices: Any
) -> Tensor:  # pragma: no cover
    """Run over all elements of `out`, which follows the kernel's inputs, its count after it."""
    grid = (triton.cdiv(out.numel(), BLOCK),)
    kernel[grid](*inputs, out, out.numel(), *arguments, **choices, BLOCK=BLOCK, num_warps=WARPS)
    return out


def _rectify(
    x: Tensor, scale: Tensor | None, shift: Tensor, ceiling: float
) -> Tensor:  # pragma: no cover
    x = _packed(x)
    return _launch(
        _rectify_kernel,
        torch.empty_like(x),
        min(ceiling, 1e30),
        inputs=(x, scale, shift),
        C=x.shape[1],
        SCALED=scale is not None,
        BOUNDED=ceiling < math.inf,
    )


def _collect(
    base: Tensor | None,
    first: int,
    channels: int,
    back: tuple[Tensor, Tensor, Tensor | None] | None,
    ceiling: float = math.inf,
) -> Tensor:  # pragma: no cover
    """Channels of a gradient plus what came back through a rectification.

    Args:
        base: [N, C', h, w], of which `channels` from `first` on are taken; None: none.
        back: (gradient at the rectified maps, those maps, the scale before); None: nothing.
    """
    gradient, rectified, scale = back or (None, None, None)
    like = base if gradient is None else gradient
    assert like is not None
    return _launch(
        _collect_kernel,
        _empty(like, channels, *like.shape[2:]),
        min(ceiling, 1e30),
        channels if base is None else base.shape[1],
        first,
        inputs=(base, None if gradient is None else _packed(gradient), rectified, scale),
        C=channels,
        BASE=base is not None,
        GRADIENT=gradient is not None,
        SCALED=scale is not None,
        BOUNDED=ceiling < math.inf,
    )


def _launch_rows(
    kernel: Any, out: Tensor, factor: float, *, inputs: Sequence[Any], **choices: Any
) -> Tensor:  # pragma: no cover
    """Run over all rows of places of `out`."""
    N, C, height, width = out.shape
    grid = (N * height, triton.cdiv(width * C, BLOCK))
    kernel[grid](*inputs, out, width, factor, C=C, **choices, BLOCK=BLOCK, num_warps=WARPS)
    return out


def _halve(x: Tensor, factor: float) -> Tensor:  # pragma: no cover
    out = _empty(x, x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
    return _launch_rows(_halve_kernel, out, factor, inputs=(_packed(x),))


def _double(fine: Tensor | None, coarse: Tensor, factor: float) -> Tensor:  # pragma: no cover
    out = _empty(coarse, coarse.shape[1], 2 * coarse.shape[2], 2 * coarse.shape[3])
    inputs = (None if fine is None else _packed(fine), _packed(coarse))
    return _launch_rows(_double_kernel, out, factor, inputs=inputs, FINE=fine is not None)


def _convolve_back(
    gradient: Tensor, x: Tensor, weight: Tensor, padding: Any
) -> Tensor:  # pragma: no cover
    """The gradient of a convolution of stride 1 with respect to what it reads."""
    pad = [padding, padding] if isinstance(padding, int) else list(padding)
    mask = [True, False, False]
    back: Callable[..., tuple[Tensor, Any, Any]] = torch.ops.aten.convolution_backward
    return back(gradient, x, weight, None, [1, 1], pad, [1, 1], False, [0, 0], 1, mask)[0]


class _Rectified(torch.autograd.Function):  # pragma: no cover
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, shift: Tensor, ceiling: float) -> Tensor:
        out = _rectify(x, scale, shift, ceiling)
        ctx.save_for_backward(out, scale)
        ctx.ceiling = ceiling
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        out, scale = ctx.saved_tensors
        back = (gradients[0], out, scale)
        return _collect(None, 0, out.shape[1], back, ctx.ceiling), None, None, None


class _Block(torch.autograd.Function):  # pragma: no cover
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Any, skip: Any, ceiling: float) -> Tensor:
        x = _packed(x)
        kept: list[Tensor] = []
        made: list[Tensor] = []
        for scale, shift, weight, padding in layers:
            kept.append(_rectify(made[-1] if made else x, scale, shift, ceiling))
            made.append(F.conv2d(kept[-1], weight, None, 1, padding))
        around = x
        if skip is not None:
            scale, shift, weight, padding = skip
            kept.append(_rectify(x, scale, shift, ceiling))
            around = F.conv2d(kept[-1], weight, None, 1, padding)
        out = torch.empty_like(around, memory_format=torch.channels_last)
        inputs = (*map(_packed, made), _packed(around))
        _launch(_join_kernel, out, inputs=inputs, C=out.shape[1])
        ctx.save_for_backward(*kept)
        ctx.layers, ctx.skip, ctx.ceiling = layers, skip, ceiling
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        whole, ceiling = _packed(gradients[0]), ctx.ceiling
        kept, last = ctx.saved_tensors, whole.shape[1]
        back: tuple[Tensor, Tensor, Tensor | None] | None = None
        for (scale, _, weight, padding), rectified in zip(
            reversed(ctx.layers), reversed(kept[:3]), strict=True
        ):
            channels = weight.shape[0]
            own = _collect(whole, last - channels, channels, back, ceiling)
            back = (_convolve_back(own, rectified, weight, padding), rectified, scale)
            last -= channels
        base = whole
        if ctx.skip is not None:
            scale, _, weight, padding = ctx.skip
            around = _convolve_back(whole, kept[3], weight, padding)
            base = _collect(None, 0, weight.shape[1], (around, kept[3], scale), ceiling)
        return _collect(base, 0, base.shape[1], back, ceiling), None, None, None


class _Sum(torch.autograd.Function):  # pragma: no cover
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.channels_last)
        inputs = (_packed(x), _packed(y), shift)
        return _launch(_add_kernel, out, inputs=inputs, C=out.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], gradients[0], None


class _Fork(torch.autograd.Function):  # pragma: no cover
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), _halve(x, 0.25)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _double(gradients[0], gradients[1], 0.25)


class _Halved(torch.autograd.Function):  # pragma: no cover
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _halve(x, 0.25)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _double(None, gradients[0], 0.25)


class _Merged(torch.autograd.Function):  # pragma: no cover
    @staticmethod
    def forward(ctx: Any, fine: Tensor, coarse: Tensor) -> Tensor:
        return _double(fine, coarse, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], _halve(gradients[0], 1.0)


def rectify(x: Tensor, scale: Tensor | None, shift: Tensor, ceiling: float) -> Tensor:
    """See `frozen_fan.rectify`."""
    out: Tensor = _Rectified.apply(x, scale, shift, ceiling)
    return out


def block(x: Tensor, layers: Any, skip: Any, ceiling: float) -> Tensor:
    """See `frozen_fan.FrozenBlock`.

    Args:
        layers: (scale, shift, weight, padding) of each.
        skip: the same of the way around them; None: it is the identity.
    """
    out: Tensor = _Block.apply(x, layers, skip, ceiling)
    return out


def add(x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    """See `frozen_fan.add`."""
    out: Tensor = _Sum.apply(x, y, shift)
    return out


def fork(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `frozen_fan.fork`."""
    same, halved = _Fork.apply(x)
    return same, halved


def halve(x: Tensor) -> Tensor:
    """See `frozen_fan.halve`."""
    out: Tensor = _Halved.apply(x)
    return out


def merge(fine: Tensor, coarse: Tensor) -> Tensor:
    """See `frozen_fan.merge`."""
    out: Tensor = _Merged.apply(fine, coarse)
    return out
