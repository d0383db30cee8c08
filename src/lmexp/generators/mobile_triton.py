"""The large layers of MobileStyleGAN as Triton kernels, forward and backward.

What these kernels are for: a layer here is two cheap convolutions around much memory. A depthwise
and a 1×1 convolution by themselves read and write every map several times, and in the backward pass
again, with a sum over pixels for each style. Here a layer is one pass forward (the nine shifts are
added up while the product with the 1×1 weights is under way) and one pass backward, which begins
behind the layer's 1×1 convolution and ends behind that of the layer before. In between, only
activated maps are kept.

What is computed, in plain operations: `mobile_lowered.LoweredTail`. Maps lie in memory
channels-last; sums are float32, whatever is stored. Sums over pixels are made of one partial sum a
program, added up afterwards, so that they are the same at every run.
"""

# "no cover": they run on GPUs and, when tested, in a process of their own.
# Upper case marks what a kernel is compiled for, as in Triton's own code.
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from lmexp.generators.mobile_lowered import LoweredHead, LoweredTail

LEAK = 0.2
ROWS, COLUMNS, WARPS = 8, 16, 4
"""Places of a program, and warps that work on them. These sizes were the fastest of nine in all of
the network at 1024 px on an H200."""
GROUP_ROWS, GROUP_COLUMNS, GROUP_WARPS = 2, 8, 4
"""The same where each place stands for 2×2 pixels."""
CHANNELS = 64
"""Channels of a step of a product's sum."""
OUTPUTS = 128
"""Most channels of a result that a program computes."""
STAGES = 1
"""Loads are not staged through shared memory: they are shifts of each other."""
BLOCK = 1024
"""Elements of a program where elements are strangers to each other."""
COLOURS = 16
"""Columns of the product that gives four pixels of three colours, padded."""


@triton.jit  # type: ignore[untyped-decorator]
def _place(tile, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    # A tile's places: (image, rows, columns), and which of them are on the map.
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(height, ROWS)
    image = tile // (across * down)
    within = tile % (across * down)
    place = tl.arange(0, ROWS * COLUMNS)
    row = (within // across) * ROWS + place // COLUMNS
    column = (within % across) * COLUMNS + place % COLUMNS
    return image.to(tl.int64), row, column, (row < height) & (column < width)


@triton.jit  # type: ignore[untyped-decorator]
def _read(maps, row, column, channel, height, width, C: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    # [places, channels] of one image in float32, 0 beyond the border.
    there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    at = (row * width + column) * C
    value = tl.load(maps + at[:, None] + channel[None, :], mask=there[:, None], other=0.0)
    return value.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _convolve(  # type: ignore[no-untyped-def] # pragma: no cover
    maps,
    taps,
    row,
    column,
    channel,
    height,
    width,
    C: tl.constexpr,
    TURNED: tl.constexpr,
):
    # A depthwise 3×3 convolution at the four pixels (2 row, 2 column) … (2 row + 1, 2 column + 1)
    # of a map of height × width; its gradient, if TURNED. Pixels that share what they read need
    # less than half of the loads and casts of four times one pixel.
    upper_left = tl.zeros([row.shape[0], channel.shape[0]], dtype=tl.float32)
    upper_right = tl.zeros([row.shape[0], channel.shape[0]], dtype=tl.float32)
    lower_left = tl.zeros([row.shape[0], channel.shape[0]], dtype=tl.float32)
    lower_right = tl.zeros([row.shape[0], channel.shape[0]], dtype=tl.float32)
    for down in tl.static_range(4):
        for right in tl.static_range(4):
            part = _read(
                maps, 2 * row + (down - 1), 2 * column + (right - 1), channel, height, width, C
            )
            if down < 3:
                if right < 3:
                    upper_left += part * _tap(taps, down * 3 + right, channel, C, TURNED)
                if right > 0:
                    upper_right += part * _tap(taps, down * 3 + right - 1, channel, C, TURNED)
            if down > 0:
                if right < 3:
                    lower_left += part * _tap(taps, (down - 1) * 3 + right, channel, C, TURNED)
                if right > 0:
                    lower_right += part * _tap(taps, (down - 1) * 3 + right - 1, channel, C, TURNED)
    return upper_left, upper_right, lower_left, lower_right


@triton.jit  # type: ignore[untyped-decorator]
def _tap(taps, index: tl.constexpr, channel, C: tl.constexpr, TURNED: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    at: tl.constexpr = 8 - index if TURNED else index
    return tl.load(taps + at * C + channel)[None, :]


@triton.jit
def _stack(a, b, c, d):  # type: ignore[no-untyped-def] # pragma: no cover
    # Four [places, channels] -> [4 places, channels], one after the other: one product, not four.
    joined = tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (3, 2, 0, 1))
    return tl.reshape(joined, (4 * a.shape[0], a.shape[1]))


@triton.jit  # type: ignore[untyped-decorator]
def _place_pixels(tile, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    # The pixels of a tile of groups in the order of _stack: as _place, of the whole map.
    across = tl.cdiv(width // 2, COLUMNS)
    down = tl.cdiv(height // 2, ROWS)
    within = tile % (across * down)
    pixel = tl.arange(0, 4 * ROWS * COLUMNS)
    place = pixel % (ROWS * COLUMNS)
    phase = pixel // (ROWS * COLUMNS)
    row = 2 * ((within // across) * ROWS + place // COLUMNS) + phase // 2
    column = 2 * ((within % across) * COLUMNS + place % COLUMNS) + phase % 2
    return row * width + column, (row < height) & (column < width)


@triton.jit
def _multiply(value, weight, total):  # type: ignore[no-untyped-def] # pragma: no cover
    # total [outputs, places] + weight [outputs, channels] · value [places, channels] turned. The
    # tensor cores read the second factor from shared memory. As the first it would be brought to
    # their registers' layout, and with it, through shared memory, each of the loads it is made of.
    return tl.dot(weight, tl.trans(value.to(weight.dtype)), total, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def _merge_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    x,
    up,
    out,
    count,
    height,
    width,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Inverse Haar transform of modulated bands; an element is a place and channel of a band.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    channel = at % C
    place = at // C
    image = place // (height * width)
    source = x + place * (4 * C) + channel
    scale = up + image * (4 * C) + channel
    low = tl.load(source, mask=there, other=0.0).to(tl.float32)
    low *= tl.load(scale, mask=there, other=0.0)
    rows = tl.load(source + C, mask=there, other=0.0).to(tl.float32)
    rows *= tl.load(scale + C, mask=there, other=0.0)
    columns = tl.load(source + 2 * C, mask=there, other=0.0).to(tl.float32)
    columns *= tl.load(scale + 2 * C, mask=there, other=0.0)
    both = tl.load(source + 3 * C, mask=there, other=0.0).to(tl.float32)
    both *= tl.load(scale + 3 * C, mask=there, other=0.0)
    # Of the result, twice as wide: place (2 i, 2 j).
    row = place // width
    first = out + (row * (4 * width) + 2 * (place % width)) * C + channel
    tl.store(first, low + rows + columns + both, mask=there)
    tl.store(first + C, low + rows - columns - both, mask=there)
    tl.store(first + 2 * width * C, low - rows + columns - both, mask=there)
    tl.store(first + (2 * width + 1) * C, low - rows - columns + both, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _layer_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    x,
    style,
    taps,
    weight,
    constant,
    bias,
    out,
    height,
    width,
    leak,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    CONSTANTS: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    # Modulation, depthwise 3×3, 1×1 by `weight` [C_OUT, C_IN], constant, bias, leaky ReLU.
    tile = tl.program_id(0)
    image, row, column, _ = _place(tile, height // 2, width // 2, ROWS, COLUMNS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros([OUTPUTS, 4 * ROWS * COLUMNS], dtype=tl.float32)
    x += image * height * width * C_IN
    out += image * height * width * C_OUT
    for start in range(0, C_IN, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        a, b, c, d = _convolve(x, taps, row, column, channel, height, width, C_IN, False)
        own = tl.load(style + image * C_IN + channel)[None, :]
        entry = output[:, None] * C_IN + channel[None, :]
        factor = tl.load(weight + entry, mask=output[:, None] < C_OUT, other=0.0)
        total = _multiply(_stack(a * own, b * own, c * own, d * own), factor, total)
    total = tl.trans(total)
    pixel, inside = _place_pixels(tile, height, width, ROWS, COLUMNS)
    at = (pixel * C_OUT)[:, None] + output[None, :]
    there = inside[:, None] & (output < C_OUT)[None, :]
    if CONSTANTS == 1:
        total += tl.load(constant + pixel, mask=inside, other=0.0)[:, None]
    else:
        total += tl.load(constant + at, mask=there, other=0.0)
    if BIAS:
        total += tl.load(bias + output, mask=output < C_OUT, other=0.0)[None, :]
    total = tl.where(total > 0, total, leak * total)
    tl.store(out + at, total, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _image_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    y,
    style,
    weight,
    skipped,
    skip_style,
    skip_weight,
    constant,
    out,
    height,
    width,
    C: tl.constexpr,
    SKIPPED: tl.constexpr,
    CONSTANTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # Four pixels of three colours at each place; `weight` is [C, 16], `out` [N, 3, 2 h, 2 w].
    image, row, column, inside = _place(tl.program_id(0), height, width, ROWS, COLUMNS)
    colour = tl.arange(0, 16)
    y += image * height * width * C
    total = tl.zeros([ROWS * COLUMNS, 16], dtype=tl.float32)
    for start in range(0, C, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        value = _read(y, row, column, channel, height, width, C)
        value *= tl.load(style + image * C + channel)[None, :]
        factor = tl.load(weight + channel[:, None] * 16 + colour[None, :])
        total = tl.dot(value.to(factor.dtype), factor, total, input_precision="ieee")
    if SKIPPED:
        skipped += image * height * width * SKIPPED
        for start in range(0, SKIPPED, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            value = _read(skipped, row, column, channel, height, width, SKIPPED)
            value *= tl.load(skip_style + image * SKIPPED + channel)[None, :]
            factor = tl.load(skip_weight + channel[:, None] * 16 + colour[None, :])
            total = tl.dot(value.to(factor.dtype), factor, total, input_precision="ieee")
    if CONSTANTS == 1:
        total += tl.load(constant + colour)[None, :]
    else:
        at = (row * width + column)[:, None] * 16 + colour[None, :]
        total += tl.load(constant + at, mask=inside[:, None], other=0.0)
    at = _pixel(image, row, column, colour, height, width)
    tl.store(out + at, total, mask=inside[:, None] & (colour < 12)[None, :])


@triton.jit
def _pixel(image, row, column, colour, height, width):  # type: ignore[no-untyped-def] # pragma: no cover
    # Where column k of a place's product is in an image: k = (2 down + right) · 3 + channel.
    plane = (image * 3 + colour % 3)[None, :] * (4 * height * width)
    down = 2 * row[:, None] + (colour // 6)[None, :]
    return plane + down * (2 * width) + 2 * column[:, None] + (colour // 3 % 2)[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _back_image_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    pixels,
    colours,
    y,
    style,
    weight,
    sums,
    out,
    height,
    width,
    leak,
    K: tl.constexpr,
    C_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    # From the image to behind the 1×1 convolution, `weight` [C_OUT, K], whose activated result `y`
    # [.., K] it is made of by `colours` [16, K].
    tile = tl.program_id(0)
    image, row, column, inside = _place(tile, height, width, ROWS, COLUMNS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros([OUTPUTS, ROWS * COLUMNS], dtype=tl.float32)
    colour = tl.arange(0, 16)
    shown = inside[:, None] & (colour < 12)[None, :]
    pixels += _pixel(image, row, column, colour, height, width)
    painted = tl.load(pixels, mask=shown, other=0.0).to(colours.dtype.element_ty)
    y += image * height * width * K
    out += image * height * width * C_OUT
    for start in range(0, K, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        factor = tl.load(colours + colour[:, None] * K + channel[None, :])
        value = tl.dot(painted, factor, input_precision="ieee")
        level = _read(y, row, column, channel, height, width, K)
        if tl.program_id(1) == 0:
            # Beyond the border y is 0.
            tl.store(sums + tile.to(tl.int64) * K + channel, tl.sum(value * level, 0))
        value *= tl.load(style + image * K + channel)[None, :]
        value = tl.where(level > 0, value, leak * value)
        entry = output[:, None] * K + channel[None, :]
        factor = tl.load(weight + entry, mask=output[:, None] < C_OUT, other=0.0)
        total = _multiply(value, factor, total)
    at = ((row * width + column) * C_OUT)[:, None] + output[None, :]
    there = inside[:, None] & (output < C_OUT)[None, :]
    tl.store(out + at, tl.trans(total), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _back_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    gradient,
    taps,
    more,
    y,
    style,
    weight,
    sums,
    out,
    height,
    width,
    leak,
    K: tl.constexpr,
    C_OUT: tl.constexpr,
    MORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    # From behind one layer's 1×1 convolution to behind that of the layer before, `weight`
    # [C_OUT, K], whose activated result is `y` [.., K]; `more` reads y beside the layer.
    tile = tl.program_id(0)
    image, row, column, _ = _place(tile, height // 2, width // 2, ROWS, COLUMNS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros([OUTPUTS, 4 * ROWS * COLUMNS], dtype=tl.float32)
    gradient += image * height * width * K
    y += image * height * width * K
    out += image * height * width * C_OUT
    if MORE:
        more += image * height * width * K
    for start in range(0, K, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        a, b, c, d = _convolve(gradient, taps, row, column, channel, height, width, K, True)
        if MORE:
            a += _read(more, 2 * row, 2 * column, channel, height, width, K)
            b += _read(more, 2 * row, 2 * column + 1, channel, height, width, K)
            c += _read(more, 2 * row + 1, 2 * column, channel, height, width, K)
            d += _read(more, 2 * row + 1, 2 * column + 1, channel, height, width, K)
        # Beyond the border y is 0.
        level_a = _read(y, 2 * row, 2 * column, channel, height, width, K)
        level_b = _read(y, 2 * row, 2 * column + 1, channel, height, width, K)
        level_c = _read(y, 2 * row + 1, 2 * column, channel, height, width, K)
        level_d = _read(y, 2 * row + 1, 2 * column + 1, channel, height, width, K)
        if tl.program_id(1) == 0:
            found = a * level_a + b * level_b + c * level_c + d * level_d
            tl.store(sums + tile.to(tl.int64) * K + channel, tl.sum(found, 0))
        own = tl.load(style + image * K + channel)[None, :]
        a *= tl.where(level_a > 0, own, leak * own)
        b *= tl.where(level_b > 0, own, leak * own)
        c *= tl.where(level_c > 0, own, leak * own)
        d *= tl.where(level_d > 0, own, leak * own)
        entry = output[:, None] * K + channel[None, :]
        factor = tl.load(weight + entry, mask=output[:, None] < C_OUT, other=0.0)
        total = _multiply(_stack(a, b, c, d), factor, total)
    pixel, inside = _place_pixels(tile, height, width, ROWS, COLUMNS)
    at = (pixel * C_OUT)[:, None] + output[None, :]
    there = inside[:, None] & (output < C_OUT)[None, :]
    tl.store(out + at, tl.trans(total), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _back_band(  # type: ignore[no-untyped-def] # pragma: no cover
    value,
    own,
    x,
    up,
    sums,
    row,
    column,
    stored,
    height,
    width,
    leak,
    BANDS: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    # One band's gradient: its sum with the band, then through its style and activation.
    level = _read(x, row, column, stored, height, width, BANDS)
    if tl.program_id(1) == 0:
        tl.store(sums + stored, tl.sum(value * level, 0))
    scale = tl.load(up + stored)[None, :] * own
    if PRODUCT:
        scale = tl.where(level > 0, scale, leak * scale)
    return value * scale


@triton.jit  # type: ignore[untyped-decorator]
def _back_merge_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    gradient,
    taps,
    x,
    up,
    style,
    weight,
    sums,
    out,
    height,
    width,
    leak,
    C: tl.constexpr,
    C_OUT: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    # As _back_kernel, through the inverse Haar transform that the layer reads: `x` [N, h, w, 4 C]
    # are the bands, `gradient` [N, 2 h, 2 w, C], `weight` [C_OUT, 4 C]. Without PRODUCT `out` is
    # the bands' gradient itself. Sums are of the bands and their gradients before any style.
    tile = tl.program_id(0)
    image, row, column, inside = _place(tile, height, width, ROWS, COLUMNS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros([OUTPUTS, ROWS * COLUMNS], dtype=tl.float32)
    place = row * width + column
    gradient += image * (4 * height * width * C)
    x += image * (height * width * 4 * C)
    out += image * (height * width * C_OUT)
    up += image * (4 * C)
    sums += tile.to(tl.int64) * (4 * C)
    band = tl.arange(0, 4 * CHANNELS) // CHANNELS
    for start in range(0, C, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        a, b, c, d = _convolve(gradient, taps, row, column, channel, 2 * height, 2 * width, C, True)
        own = tl.load(style + image * C + channel)[None, :]
        # With respect to the bands: low, between rows, between columns, between both.
        low = _back_band(
            (a + b) + (c + d),
            own, x, up, sums, row, column, channel, height, width, leak, 4 * C, PRODUCT,
        )  # fmt: skip
        rows = _back_band(
            (a + b) - (c + d),
            own, x, up, sums, row, column, C + channel, height, width, leak, 4 * C, PRODUCT,
        )  # fmt: skip
        columns = _back_band(
            (a - b) + (c - d),
            own, x, up, sums, row, column, 2 * C + channel, height, width, leak, 4 * C, PRODUCT,
        )  # fmt: skip
        both = _back_band(
            (a - b) - (c - d),
            own, x, up, sums, row, column, 3 * C + channel, height, width, leak, 4 * C, PRODUCT,
        )  # fmt: skip
        bands = tl.permute(tl.join(tl.join(low, rows), tl.join(columns, both)), (0, 3, 2, 1))
        value = tl.reshape(bands, (ROWS * COLUMNS, 4 * CHANNELS))
        stored = band * C + start + tl.arange(0, 4 * CHANNELS) % CHANNELS
        if PRODUCT:
            entry = output[:, None] * (4 * C) + stored[None, :]
            factor = tl.load(weight + entry, mask=output[:, None] < C_OUT, other=0.0)
            total = _multiply(value, factor, total)
        else:
            at = (place * (4 * C))[:, None] + stored[None, :]
            tl.store(out + at, value, mask=inside[:, None])
    if PRODUCT:
        at = (place * C_OUT)[:, None] + output[None, :]
        there = inside[:, None] & (output < C_OUT)[None, :]
        tl.store(out + at, tl.trans(total), mask=there)


def _single(channels: int) -> dict[str, int]:  # pragma: no cover
    """How a kernel is launched whose places are pixels."""
    return _tiling(ROWS, COLUMNS, WARPS, channels)


def _group(channels: int) -> dict[str, int]:  # pragma: no cover
    """How a kernel is launched whose places stand for 2×2 pixels each."""
    return _tiling(GROUP_ROWS, GROUP_COLUMNS, GROUP_WARPS, channels)


def _tiling(
    rows: int, columns: int, warps: int, channels: int
) -> dict[str, int]:  # pragma: no cover
    return {
        "ROWS": rows,
        "COLUMNS": columns,
        "CHANNELS": min(channels, CHANNELS),
        "num_warps": warps,
        "num_stages": STAGES,
    }


def _tiles(rows: int, columns: int, n: int, height: int, width: int) -> int:  # pragma: no cover
    tiles: int = n * triton.cdiv(height, rows) * triton.cdiv(width, columns)
    return tiles


def _add_up(sums: Tensor, n: int) -> Tensor:  # pragma: no cover
    """Partial sums [tiles, C] of n images -> [n, C]."""
    return sums.view(n, -1, sums.shape[-1]).sum(1)


def _merge(x: Tensor, up: Tensor) -> Tensor:  # pragma: no cover
    n, height, width, bands = x.shape
    out = x.new_empty(n, 2 * height, 2 * width, bands // 4)
    count = x.numel() // 4
    grid = (triton.cdiv(count, BLOCK),)
    _merge_kernel[grid](x, up, out, count, height, width, C=bands // 4, BLOCK=BLOCK)
    return out


def _wide(outputs: int) -> int:  # pragma: no cover
    """Outputs of a program; tensor cores take 64 at least, of which some may be surplus."""
    return max(64, min(outputs, OUTPUTS))


def _layer(x: Tensor, style: Tensor, layer: Any) -> Tensor:  # pragma: no cover
    n, height, width, inputs = x.shape
    outputs = layer.weight.shape[0]
    out = x.new_empty(n, height, width, outputs)
    wide = _wide(outputs)
    tiles = _tiles(GROUP_ROWS, GROUP_COLUMNS, n, height // 2, width // 2)
    grid = (tiles, triton.cdiv(outputs, wide))
    _layer_kernel[grid](
        x,
        style,
        layer.taps,
        layer.weight,
        layer.constant,
        layer.bias,
        out,
        height,
        width,
        LEAK,
        C_IN=inputs,
        C_OUT=outputs,
        CONSTANTS=layer.constant.shape[-1],
        BIAS=layer.bias is not None,
        OUTPUTS=wide,
        **_group(inputs),
    )
    return out


def _image(
    y: Tensor, style: Tensor, head: LoweredHead, skipped: Tensor | None, skip_style: Tensor | None
) -> Tensor:  # pragma: no cover
    n, height, width, channels = y.shape
    out = torch.empty(n, 3, 2 * height, 2 * width, device=y.device)
    _image_kernel[(_tiles(ROWS, COLUMNS, n, height, width),)](
        y,
        style,
        head.columns,
        skipped,
        skip_style,
        head.skip_columns,
        head.constant,
        out,
        height,
        width,
        C=channels,
        SKIPPED=0 if skipped is None else skipped.shape[-1],
        CONSTANTS=1 if head.constant.ndim == 1 else COLOURS,
        **_single(channels),
    )
    return out


def _back_image(
    pixels: Tensor, colours: Tensor, y: Tensor, style: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:  # pragma: no cover
    """From an image to behind the 1×1 convolution before it.

    Args:
        pixels: [N, 3, 2 h, 2 w], the image's gradient.
        colours: [16, K], what made it of the map.
        y: [N, h, w, K], the map.
        style: [N, K], what it was modulated with.
        weight: [O, K], of the 1×1 convolution that made it, transposed.

    Returns:
        Gradients [N, h, w, O], and of the style [N, K].
    """
    n, height, width, channels = y.shape
    outputs, wide = len(weight), _wide(len(weight))
    tiles = _tiles(ROWS, COLUMNS, n, height, width)
    sums = torch.empty(tiles, channels, device=y.device)
    out = y.new_empty(n, height, width, outputs)
    _back_image_kernel[(tiles, triton.cdiv(outputs, wide))](
        pixels,
        colours,
        y,
        style,
        weight,
        sums,
        out,
        height,
        width,
        LEAK,
        K=channels,
        C_OUT=outputs,
        OUTPUTS=wide,
        **_single(channels),
    )
    return out, _add_up(sums, n)


def _back(
    gradient: Tensor,
    taps: Tensor,
    y: Tensor,
    style: Tensor,
    weight: Tensor,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # pragma: no cover
    """From behind a layer's 1×1 convolution to behind that of the layer before.

    Args:
        gradient: [N, h, w, K], behind the layer's depthwise convolution with `taps`.
        y, style, weight: as `_back_image` takes them.
        more: [N, h, w, K], gradient of another reader of the modulated map.
    """
    n, height, width, channels = y.shape
    outputs, wide = len(weight), _wide(len(weight))
    tiles = _tiles(GROUP_ROWS, GROUP_COLUMNS, n, height // 2, width // 2)
    sums = torch.empty(tiles, channels, device=y.device)
    out = y.new_empty(n, height, width, outputs)
    _back_kernel[(tiles, triton.cdiv(outputs, wide))](
        gradient,
        taps,
        more,
        y,
        style,
        weight,
        sums,
        out,
        height,
        width,
        LEAK,
        K=channels,
        C_OUT=outputs,
        MORE=more is not None,
        OUTPUTS=wide,
        **_group(channels),
    )
    return out, _add_up(sums, n)


def _back_merge(
    gradient: Tensor,
    taps: Tensor,
    x: Tensor,
    up: Tensor,
    style: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # pragma: no cover
    """The same through the bands x [N, h, w, 4 C]: gradients, of the styles of bands and layer."""
    n, height, width, bands = x.shape
    channels = bands // 4
    outputs = bands if weight is None else len(weight)
    wide = 64 if weight is None else _wide(outputs)
    tiles = _tiles(GROUP_ROWS, GROUP_COLUMNS, n, height, width)
    sums = torch.empty(tiles, bands, device=x.device)
    out = x.new_empty(n, height, width, outputs)
    _back_merge_kernel[(tiles, 1 if weight is None else triton.cdiv(outputs, wide))](
        gradient,
        taps,
        x,
        up,
        style,
        weight,
        sums,
        out,
        height,
        width,
        LEAK,
        C=channels,
        C_OUT=outputs,
        PRODUCT=weight is not None,
        OUTPUTS=wide,
        **_group(channels),
    )
    found = _add_up(sums, n).view(n, 4, channels)
    of_up = (found * style[:, None]).flatten(1)
    return out, of_up, (found * up.view(n, 4, channels)).sum(1)


def _unpaint(pixels: Tensor) -> Tensor:  # pragma: no cover
    """Images [N, 3, 2 h, 2 w] -> [N, h, w, 12], columns in the order of `LoweredHead`."""
    n, _, height, width = pixels.shape
    parts = pixels.reshape(n, 3, height // 2, 2, width // 2, 2)
    return parts.permute(0, 2, 4, 3, 5, 1).flatten(3)


class _Tail(torch.autograd.Function):  # pragma: no cover
    """`LoweredTail` of bands [N, h, w, 4 C] and styles [N, channels]."""

    @staticmethod
    def forward(ctx: Any, tail: LoweredTail, x: Tensor, *styles: Tensor) -> Tensor:
        x = x.contiguous()
        styles = tuple(style.float().contiguous() for style in styles)
        maps, given = [x], list(styles)
        for block in tail.blocks:
            up, first, second = given[:3]
            del given[:3]
            hidden = _layer(_merge(maps[-1], up), first, block.conv1)
            maps += [hidden, _layer(hidden, second, block.conv2)]
        head = tail.head
        if head.layers:
            features = maps[-1]
            maps.append(_layer(features, given[0], head.layers[0]))
            maps.append(_layer(maps[-1], given[1], head.layers[1]))
            images = _image(maps[-1], given[2], head, features, given[0])
        else:
            images = _image(maps[-1], given[0], head, None, None)
        ctx.tail, ctx.count = tail, len(styles)
        ctx.save_for_backward(*styles, *maps)
        return images

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tail, pixels = ctx.tail, gradients[0].contiguous()
        styles, maps = list(ctx.saved_tensors[: ctx.count]), list(ctx.saved_tensors[ctx.count :])
        found: list[Tensor] = []  # from the last style to the first
        head, blocks = tail.head, list(tail.blocks)
        below = blocks[-1].conv2.columns
        if head.layers:
            conv1, conv2 = head.layers
            gradient, own = _back_image(pixels, head.rows, maps.pop(), styles.pop(), conv2.columns)
            found.append(own)
            gradient, own = _back(gradient, conv2.taps, maps.pop(), styles.pop(), conv1.columns)
            found.append(own)
            # The product that skips both layers.
            more = _unpaint(pixels).to(gradient.dtype) @ head.skip_rows[:12]
            gradient, own = _back(gradient, conv1.taps, maps.pop(), styles.pop(), below, more)
        else:
            gradient, own = _back_image(pixels, head.rows, maps.pop(), styles.pop(), below)
        found.append(own)
        while blocks:
            block = blocks.pop()
            gradient, own = _back(
                gradient, block.conv2.taps, maps.pop(), styles.pop(), block.conv1.columns
            )
            found.append(own)
            first, up = styles.pop(), styles.pop()
            below = blocks[-1].conv2.columns if blocks else None
            gradient, of_up, own = _back_merge(
                gradient, block.conv1.taps, maps.pop(), up, first, below
            )
            found += [own, of_up]
        return None, gradient, *reversed(found)


def paint(tail: LoweredTail, x: Tensor, styles: Sequence[Tensor]) -> Tensor:  # pragma: no cover
    """`tail(x, styles)` by these kernels; `tail.has_kernels` says whether they fit it."""
    images: Tensor = _Tail.apply(tail, x, *styles)
    return images
