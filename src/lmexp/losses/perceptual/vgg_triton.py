"""LPIPS of a VGG trunk on CUDA: its convolutions are cuDNN's, what lies between them is here.

What these kernels are for: half of the term's time went into passes through memory around the
convolutions. The last map of a block is read three times (for its distance to the look's, by the
pool, and with the pool's indices by the way back); here that is one kernel each way, which keeps
the convolution's own result and nothing else. The first convolution, of three channels, is one with
its bias and ReLU: libraries fill it up to eight channels, and take longer than its memory does.

Maps lie in memory channels-last; everything is computed in float32, whatever is stored. Sums over
places are made of one partial sum a program, added up afterwards, so that they are the same at
every run. What is computed, in plain operations: `lmexp.losses.lpips.feature_distance`.
"""

# "no cover": they run on GPUs and, when tested, in a process of their own.
# Upper case marks what a kernel is compiled for, as in Triton's own code.
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lmexp.kernel_launch import await_turn, launch
from lmexp.losses.perceptual.frozen_vgg import FrozenVgg

BLOCK, WARPS = 2048, 4
"""Elements of a program where elements are strangers to each other, and warps on them."""
TAPPED = 1024
"""Elements of a program at a tap: of each of the four places that a pool makes one."""
PLACES = 128
"""Of a row, in a program of the first convolution."""


@triton.jit  # type: ignore[untyped-decorator]
def _first_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    images,
    shift,
    gain,
    weight,
    bias,
    out,
    height,
    width,
    C: tl.constexpr,
    PLACES: tl.constexpr,
    TERMS: tl.constexpr,
):
    await_turn()
    # 3×3 over gain · (images [N, 3, h, w] + shift), bias, ReLU; `weight` is [TERMS, C].
    row = tl.program_id(0)
    image = (row // height).to(tl.int64)
    column = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    channel = tl.arange(0, C)
    term = tl.arange(0, TERMS)
    line = row % height + term // 9 - 1
    place = column[:, None] + (term // 3 % 3 - 1)[None, :]
    there = (term < 27) & (line >= 0) & (line < height)
    there = there[None, :] & (place >= 0) & (place < width)
    at = ((image * 3 + term % 3) * height + line) * width
    value = tl.load(images + at[None, :] + place, mask=there, other=0.0).to(tl.float32)
    value = (value + tl.load(shift + term)[None, :]) * tl.load(gain + term)[None, :]
    value = tl.where(there, value, 0.0)
    factor = tl.load(weight + term[:, None] * C + channel[None, :])
    total = tl.dot(value.to(factor.dtype), factor, input_precision="ieee")
    total = tl.maximum(total + tl.load(bias + channel)[None, :], 0.0)
    out += row.to(tl.int64) * width * C
    at = column[:, None] * C + channel[None, :]
    tl.store(out + at, total, mask=(column < width)[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _first_back_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    gradient,
    made,
    weight,
    out,
    height,
    width,
    C: tl.constexpr,
    PLACES: tl.constexpr,
    TERMS: tl.constexpr,
):
    await_turn()
    # What each place gives to those of the image that it was made of: `out` [N, 27, h, w], in the
    # order of `weight` [C, TERMS]. `made` is the ReLU's result.
    row = tl.program_id(0)
    column = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    channel, term = tl.arange(0, C), tl.arange(0, TERMS)
    there = (column < width)[:, None]
    at = row.to(tl.int64) * width * C + (column[:, None] * C + channel[None, :])
    value = tl.load(gradient + at, mask=there, other=0.0)
    value = tl.where(tl.load(made + at, mask=there, other=0.0) > 0.0, value, 0.0)
    factor = tl.load(weight + channel[:, None] * TERMS + term[None, :])
    total = tl.dot(value.to(factor.dtype), factor, input_precision="ieee")
    image = (row // height).to(tl.int64)
    at = ((image * 27 + term) * height + row % height) * width
    tl.store(out + at[None, :] + column[:, None], total, mask=there & (term < 27)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _add_up_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    shares,
    gain,
    out,
    count,
    height,
    width,
    BLOCK: tl.constexpr,
):
    await_turn()
    # What nine places gave to each of an image: [N, 3, 3, 3, h, w] -> [N, 3, h, w].
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    plane = height * width
    image = at // (3 * plane)
    row, column = at // width % height, at % width
    shares += image * (27 * plane) + at % (3 * plane)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for down in tl.static_range(3):
        for right in tl.static_range(3):
            # The place below gave by the upper row of its kernel.
            line, place = row + 1 - down, column + 1 - right
            shown = there & (line >= 0) & (line < height) & (place >= 0) & (place < width)
            source = shares + (9 * down + 3 * right) * plane + (1 - down) * width + 1 - right
            total += tl.load(source, mask=shown, other=0.0).to(tl.float32)
    total *= tl.load(gain + at // plane % 3, mask=there, other=0.0)
    tl.store(out + at, total, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _rectify_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    x,
    bias,
    out,
    count,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    await_turn()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    value = tl.maximum(value + tl.load(bias + at % C), 0.0)
    tl.store(out + at, value, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _pass_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    gradient,
    made,
    out,
    count,
    BLOCK: tl.constexpr,
):
    await_turn()
    # Back through the ReLU that made `made`.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    value = tl.load(gradient + at, mask=there, other=0.0)
    level = tl.load(made + at, mask=there, other=0.0)
    tl.store(out + at, tl.where(level > 0.0, value, 0.0), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _read(maps, at, there, channel, C: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    # [places, C] in float32, 0 beyond the border.
    value = tl.load(maps + at[:, None] * C + channel[None, :], mask=there[:, None], other=0.0)
    return value.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _level(y, bias, at, there, channel, C: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    # The same, rectified.
    value = _read(y, at, there, channel, C)
    return tl.where(there[:, None], tl.maximum(value + bias, 0.0), 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _tap_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    y,
    bias,
    target,
    channels,
    places,
    pooled,
    sums,
    height,
    width,
    pooled_height,
    pooled_width,
    sums_width,
    share,
    C: tl.constexpr,
    CELLS: tl.constexpr,
    PLACED: tl.constexpr,
    POOLED: tl.constexpr,
):
    await_turn()
    # Bias and ReLU of the map y [N, h, w, C], its distance to `target`, and its 2×2 maximum.
    image = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    across = tl.cdiv(width, 2)
    row, column = cell // across, cell % across
    channel = tl.arange(0, C)
    own = tl.load(bias + channel)[None, :]
    weight = tl.load(channels + channel)[None, :]
    best = tl.zeros([CELLS, C], dtype=tl.float32)
    total = tl.zeros([CELLS], dtype=tl.float32)
    for k in tl.static_range(4):
        down, right = 2 * row + k // 2, 2 * column + k % 2
        there = (down < height) & (right < width)
        at = (image * height + down) * width + right
        level = _level(y, own, at, there, channel, C)
        best = tl.maximum(best, level)
        wanted = _read(target, at, there, channel, C)
        unit = level * tl.rsqrt(tl.sum(level * level, 1) + 1e-20)[:, None]
        error = unit - wanted
        distance = tl.sum(weight * error * error, 1)
        if PLACED:
            distance *= tl.load(places + at, mask=there, other=0.0)
        total += distance
    tl.store(sums + image * sums_width + tl.program_id(1), tl.sum(total, 0) * share)
    if POOLED:
        there = (row < pooled_height) & (column < pooled_width)
        at = ((image * pooled_height + row) * pooled_width + column) * C
        tl.store(pooled + at[:, None] + channel[None, :], best, mask=there[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _place_back(  # type: ignore[no-untyped-def] # pragma: no cover
    level,
    target,
    places,
    out,
    at,
    there,
    channel,
    weight,
    coming,
    C: tl.constexpr,
    PLACED: tl.constexpr,
):
    # The gradient of one place of each cell, `coming` that of the maximum if it was chosen.
    wanted = _read(target, at, there, channel, C)
    scale = tl.rsqrt(tl.sum(level * level, 1) + 1e-20)[:, None]
    unit = level * scale
    slope = weight * (unit - wanted)
    if PLACED:
        slope *= tl.load(places + at, mask=there, other=0.0)[:, None]
    value = coming + scale * (slope - unit * tl.sum(slope * unit, 1)[:, None])
    value = tl.where(level > 0.0, value, 0.0)
    tl.store(out + at[:, None] * C + channel[None, :], value, mask=there[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _tap_back_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    y,
    bias,
    target,
    channels,
    places,
    slopes,
    pooled,
    out,
    height,
    width,
    pooled_height,
    pooled_width,
    share,
    C: tl.constexpr,
    CELLS: tl.constexpr,
    PLACED: tl.constexpr,
    POOLED: tl.constexpr,
):
    await_turn()
    # `slopes` [N] are the distance's, `pooled` the gradient of the maximum.
    image = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    across = tl.cdiv(width, 2)
    row, column = cell // across, cell % across
    channel = tl.arange(0, C)
    own = tl.load(bias + channel)[None, :]
    weight = 2.0 * share * tl.load(slopes + image) * tl.load(channels + channel)[None, :]
    # The four places of a cell, row by row.
    at0 = (image * height + 2 * row) * width + 2 * column
    at1, at2, at3 = at0 + 1, at0 + width, at0 + width + 1
    there0 = 2 * row < height
    there1 = there0 & (2 * column + 1 < width)
    there2 = 2 * row + 1 < height
    there3 = there1 & there2
    level0 = _level(y, own, at0, there0, channel, C)
    level1 = _level(y, own, at1, there1, channel, C)
    level2 = _level(y, own, at2, there2, channel, C)
    level3 = _level(y, own, at3, there3, channel, C)
    coming = tl.zeros([CELLS, C], dtype=tl.float32)
    best = tl.maximum(tl.maximum(level0, level1), tl.maximum(level2, level3))
    if POOLED:
        there = (row < pooled_height) & (column < pooled_width)
        at = (image * pooled_height + row) * pooled_width + column
        coming = _read(pooled, at, there, channel, C)
    # The first that is largest has the maximum's gradient, as in libraries' pools.
    own0 = tl.where(level0 == best, coming, 0.0)
    coming = tl.where(level0 == best, 0.0, coming)
    own1 = tl.where(level1 == best, coming, 0.0)
    coming = tl.where(level1 == best, 0.0, coming)
    own2 = tl.where(level2 == best, coming, 0.0)
    coming = tl.where(level2 == best, 0.0, coming)
    _place_back(level0, target, places, out, at0, there0, channel, weight, own0, C, PLACED)
    _place_back(level1, target, places, out, at1, there1, channel, weight, own1, C, PLACED)
    _place_back(level2, target, places, out, at2, there2, channel, weight, own2, C, PLACED)
    _place_back(level3, target, places, out, at3, there3, channel, weight, coming, C, PLACED)


def _empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:  # pragma: no cover
    return torch.empty(
        (len(like), channels, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def _packed(x: Tensor) -> Tensor:  # pragma: no cover
    return x.contiguous(memory_format=torch.channels_last)


def _first(images: Tensor, vgg: FrozenVgg) -> Tensor:  # pragma: no cover
    n, _, height, width = images.shape
    channels = vgg.first.shape[1]
    out = torch.empty(
        (n, channels, height, width),
        dtype=vgg.first.dtype,
        device=images.device,
        memory_format=torch.channels_last,
    )
    launch(
        _first_kernel,
        (n * height, triton.cdiv(width, PLACES)),
        images,
        vgg.shift,
        vgg.gain,
        vgg.first,
        vgg.first_bias,
        out,
        height,
        width,
        C=channels,
        PLACES=PLACES,
        TERMS=len(vgg.first),
        num_warps=WARPS,
    )
    return out


def _first_back(gradient: Tensor, made: Tensor, vgg: FrozenVgg) -> Tensor:  # pragma: no cover
    n, channels, height, width = made.shape
    shares = torch.empty((n, 27, height, width), dtype=made.dtype, device=made.device)
    launch(
        _first_back_kernel,
        (n * height, triton.cdiv(width, PLACES)),
        gradient,
        made,
        vgg.first_back,
        shares,
        height,
        width,
        C=channels,
        PLACES=PLACES,
        TERMS=len(vgg.first),
        num_warps=WARPS,
    )
    out = torch.empty(n, 3, height, width, device=made.device)
    count = out.numel()
    grid = (triton.cdiv(count, BLOCK),)
    launch(_add_up_kernel, grid, shares, vgg.gain, out, count, height, width, BLOCK=BLOCK)
    return out


def _rectify(x: Tensor, bias: Tensor) -> Tensor:  # pragma: no cover
    x = _packed(x)
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), BLOCK),)
    launch(
        _rectify_kernel, grid, x, bias, out, x.numel(), C=x.shape[1], BLOCK=BLOCK, num_warps=WARPS
    )
    return out


def _pass(gradient: Tensor, made: Tensor) -> Tensor:  # pragma: no cover
    gradient = _packed(gradient)
    out = torch.empty_like(gradient)
    grid = (triton.cdiv(out.numel(), BLOCK),)
    launch(_pass_kernel, grid, gradient, made, out, out.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return out


def _cells(channels: int, height: int, width: int) -> tuple[int, int]:  # pragma: no cover
    """How many cells of 2×2 places a program takes at a tap, and how many programs an image."""
    cells = max(1, TAPPED // channels)
    return cells, triton.cdiv(triton.cdiv(height, 2) * triton.cdiv(width, 2), cells)


def _share(y: Tensor, places: Tensor | None) -> float:  # pragma: no cover
    """A place's weight where places have none of their own."""
    return 1.0 if places is not None else 1.0 / (y.shape[2] * y.shape[3])


def _tap(
    y: Tensor,
    bias: Tensor,
    target: Tensor,
    channels: Tensor,
    places: Tensor | None,
    sums: Tensor,
    pooled: Tensor | None,
) -> None:  # pragma: no cover
    """Write the distance's partial sums, [N, programs] with a stride, and the pooled map."""
    cells, programs = _cells(*y.shape[1:])
    launch(
        _tap_kernel,
        (len(y), programs),
        y,
        bias,
        target,
        channels,
        places,
        pooled,
        sums,
        *y.shape[2:],
        *((0, 0) if pooled is None else pooled.shape[2:]),
        sums.stride(0),
        _share(y, places),
        C=y.shape[1],
        CELLS=cells,
        PLACED=places is not None,
        POOLED=pooled is not None,
        num_warps=WARPS,
    )


def _tap_back(
    y: Tensor,
    bias: Tensor,
    target: Tensor,
    channels: Tensor,
    places: Tensor | None,
    slopes: Tensor,
    pooled: Tensor | None,
) -> Tensor:  # pragma: no cover
    """The gradient behind the convolution that made y."""
    out = torch.empty_like(y)
    cells, programs = _cells(*y.shape[1:])
    launch(
        _tap_back_kernel,
        (len(y), programs),
        y,
        bias,
        target,
        channels,
        places,
        slopes,
        None if pooled is None else _packed(pooled),
        out,
        *y.shape[2:],
        *((0, 0) if pooled is None else pooled.shape[2:]),
        _share(y, places),
        C=y.shape[1],
        CELLS=cells,
        PLACED=places is not None,
        POOLED=pooled is not None,
        num_warps=WARPS,
    )
    return out


def _convolve(x: Tensor, conv: Any) -> Tensor:  # pragma: no cover
    return _packed(F.conv2d(x, conv.weight, None, 1, 1))


def _convolve_back(gradient: Tensor, conv: Any) -> Tensor:  # pragma: no cover
    """The gradient of a convolution with respect to what it read, of which the shape counts."""
    read = _empty(gradient, conv.weight.shape[1], *gradient.shape[2:])
    back: Callable[..., tuple[Tensor, Any, Any]] = torch.ops.aten.convolution_backward
    mask = [True, False, False]
    return back(gradient, read, conv.weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)[
        0
    ]


class _Distance(torch.autograd.Function):  # pragma: no cover
    @staticmethod
    def forward(ctx: Any, vgg: FrozenVgg, images: Tensor, *rows: Tensor) -> Tensor:
        targets, places = vgg.split([_packed(row) for row in rows])
        programs = [_cells(*target.shape[1:])[1] for target in targets]
        sums = torch.empty(len(images), sum(programs), device=images.device)
        parts = torch.split(sums, programs, 1)
        x = _first(images.contiguous(), vgg)
        kept = [x]
        for index, block in enumerate(vgg.convs):
            for conv in block[:-1]:
                x = _rectify(_convolve(x, conv), conv.bias)
                kept.append(x)
            y = _convolve(x, block[-1])
            kept.append(y)
            if index + 1 < len(vgg.convs):
                x = _empty(y, y.shape[1], *vgg.pooled(y.shape[2], y.shape[3]))
            pooled = x if index + 1 < len(vgg.convs) else None
            read = (y, block[-1].bias, targets[index], vgg.weights[index], places[index])
            _tap(*read, parts[index], pooled)
        ctx.vgg, ctx.dtype = vgg, images.dtype
        ctx.save_for_backward(*kept, *rows)
        return sums.sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        vgg, slopes = ctx.vgg, gradients[0].contiguous()
        count = 1 + sum(len(block) for block in vgg.convs)
        kept, rows = list(ctx.saved_tensors[:count]), ctx.saved_tensors[count:]
        targets, places = vgg.split(rows)
        gradient: Tensor | None = None
        for index, block in reversed(list(enumerate(vgg.convs))):
            read = (kept.pop(), block[-1].bias, targets[index], vgg.weights[index], places[index])
            gradient = _convolve_back(_tap_back(*read, slopes, gradient), block[-1])
            for conv in reversed(block[:-1]):
                gradient = _convolve_back(_pass(gradient, kept.pop()), conv)
        assert gradient is not None
        images = _first_back(_packed(gradient), kept.pop(), vgg)
        return None, images.to(ctx.dtype), *(None for _ in rows)


def distance(vgg: FrozenVgg, images: Tensor, *rows: Tensor) -> Tensor:  # pragma: no cover
    """`lmexp.losses.lpips.feature_distance` of the images' features, by these kernels.

    Args:
        vgg: one for which `has_kernels` holds.
        images: [N, 3, h, w], RGB in [-1, 1].
        rows: a target for each block, [N, C, h', w'], normalised and of this network's type;
            then nothing, or for each block its places' weights, [N, 1, h', w'].

    Returns:
        [N], float32; its gradient is that with respect to the images alone.
    """
    found: Tensor = _Distance.apply(vgg, images, *rows)
    return found
