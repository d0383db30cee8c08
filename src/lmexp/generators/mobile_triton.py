"""The large layers of MobileStyleGAN as Triton kernels, forward and backward.

What these kernels are for: a layer here is two cheap convolutions around much memory, and in the
backward pass a sum over pixels for each style. Here a layer is two passes each way. One adds up the
nine shifts of the depthwise convolution with all that is done to each value by itself (modulation,
Haar transform; backwards also activation and the sums), and walks down the rows of the map, so that
each row is loaded once, ahead of its turn, and the taps stay in registers. The other is the product
with the 1×1 weights, by programs that keep these where they fit, with noise, bias and activation;
of the last layer, with the image as well. One pass for both would spare half of the traffic, and
was slower: a program that waits for its products has no loads under way.

What is computed, in plain operations: `mobile_lowered.LoweredTail`. Maps lie in memory
channels-last; sums are float32, whatever is stored. Sums over pixels are made of one partial sum a
program, so that they are the same at every run; one kernel adds them up for all layers at the end.
"""

# "no cover": they run on GPUs and, when tested, in a process of their own.
# Upper case marks what a kernel is compiled for, as in Triton's own code.
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmexp.generators.mobile_styles import split_styles

if TYPE_CHECKING:
    from lmexp.generators.mobile_lowered import LoweredHead, LoweredTail

LEAK = 0.2
ROWS, COLUMNS, WARPS = 8, 16, 4
"""Places of a program of the image, and warps that work on them."""
STRIP_PLACES, STRIP_CHANNELS, STRIP_WARPS = 16, 64, 4
"""Of a program that walks down the rows of a strip: pairs of pixels of a row, channels, warps. This
and what follows was the fastest of ten on an H200, or within some percent of it, at every size;
`scripts/time_mobile_layers.py` times others."""
SPREAD_ROWS, GATHER_ROWS = 16, 32
"""Rows of a strip, forward and backward."""
SPREAD_BANDS, SPREAD_STAGES, SPREAD_VALUES = 32, 3, 1024
"""Of the strips that are read as bands: rows of bands, rows under way, values of a row."""
STRIP_STAGES, BANDS_STAGES = 4, 3
"""Rows under way at once, and of the way back through bands, which has more loads to a row."""
PRODUCT, NARROW_PRODUCT = (128, 128, 64, 4, 3), (128, 64, 64, 4, 4)
PAINTING_PRODUCT = (64, 64, 64, 4, 4)
"""Of a product's program: rows, outputs, terms of a step, warps and steps under way; the second
with up to 64 inputs or outputs, the third with the image."""
STREAM = {256: (64, 128, 4, 3, 2), 512: (64, 128, 8, 4, 1)}
"""Of a product's program that keeps its weights, by bytes of a place's inputs: rows and outputs,
warps, tiles under way, programs of a multiprocessor."""
PAINTED_ROWS, PAINTED_PLACES = 32, 64
"""Of a strip of the way back through the image."""
CHANNELS = 64
"""Channels of a step of the image's sum."""
OUTPUTS = 128
"""Most channels of a result that a program of the way back through the image computes."""
COLOURS = 16
"""Columns of the product that gives four pixels of three colours, padded."""
ADDED, ADDED_TILES, ADDED_WARPS = 16, 64, 4
"""Of a program that adds up partial sums: channels, which every layer's are a multiple of; a
quarter of the rows of a step; warps."""


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
    # [places, channels] of one image in float32, 0 beyond the border below and on the right.
    there = (row < height) & (column < width)
    at = (row * width + column) * C
    value = tl.load(maps + at[:, None] + channel[None, :], mask=there[:, None], other=0.0)
    return value.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _strip(program, height, width, ROWS: tl.constexpr, PLACES: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    # A program's strip: its image, first row, and columns; a place is two pixels of a row.
    across = tl.cdiv(width, 2 * PLACES)
    down = tl.cdiv(height, ROWS)
    within = program % (across * down)
    column = 2 * ((within % across) * PLACES + tl.arange(0, PLACES))
    return (program // (across * down)).to(tl.int64), (within // across) * ROWS, column


@triton.jit  # type: ignore[untyped-decorator]
def _row(maps, row, column, channel, height, width, C: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    # Of a row, [places, channels] each: both pixels between their neighbours, 0 beyond the border.
    there = (row >= 0) & (row < height) & (column < width)
    at = maps + ((row * width + column) * C)[:, None] + channel[None, :]
    before = tl.load(at - C, mask=(there & (column > 0))[:, None], other=0.0)
    left = tl.load(at, mask=there[:, None], other=0.0)
    right = tl.load(at + C, mask=there[:, None], other=0.0)
    after = tl.load(at + 2 * C, mask=(there & (column + 2 < width))[:, None], other=0.0)
    return before.to(tl.float32), left.to(tl.float32), right.to(tl.float32), after.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _taps(taps, channel, C: tl.constexpr, TURNED: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    # The nine taps of a depthwise 3×3 convolution [9, C], row by row; of its gradient, if TURNED.
    first: tl.constexpr = 8 if TURNED else 0
    step: tl.constexpr = -C if TURNED else C
    at = taps + first * C + channel
    return (
        tl.load(at)[None, :],
        tl.load(at + step)[None, :],
        tl.load(at + 2 * step)[None, :],
        tl.load(at + 3 * step)[None, :],
        tl.load(at + 4 * step)[None, :],
        tl.load(at + 5 * step)[None, :],
        tl.load(at + 6 * step)[None, :],
        tl.load(at + 7 * step)[None, :],
        tl.load(at + 8 * step)[None, :],
    )


@triton.jit
def _weigh(before, left, right, after, a, b, c):  # type: ignore[no-untyped-def] # pragma: no cover
    # What a row adds to both pixels of a row by that row's three taps.
    return before * a + left * b + right * c, left * a + right * b + after * c


@triton.jit
def _add(this, that, before, left, right, after, a, b, c):  # type: ignore[no-untyped-def] # pragma: no cover
    # The same, added to what there is of both.
    this = this + before * a + left * b + right * c
    return this, that + left * a + right * b + after * c


@triton.jit  # type: ignore[untyped-decorator]
def _spread_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    x,
    style,
    stride,
    taps,
    out,
    height,
    width,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Modulation and depthwise 3×3: what a layer's product is of.
    image, first, column = _strip(tl.program_id(0), height, width, ROWS, PLACES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x += image * height * width * C
    out += image * height * width * C
    own = tl.load(style + image * stride + channel)[None, :]
    t0, t1, t2, t3, t4, t5, t6, t7, t8 = _taps(taps, channel, C, False)
    t0, t1, t2 = t0 * own, t1 * own, t2 * own
    t3, t4, t5 = t3 * own, t4 * own, t5 * own
    t6, t7, t8 = t6 * own, t7 * own, t8 * own
    # Of the two rows that are not whole yet: left and right pixels, the upper row's first.
    a, b, c, d = _row(x, first - 1, column, channel, height, width, C)
    left, right = _weigh(a, b, c, d, t0, t1, t2)
    a, b, c, d = _row(x, first, column, channel, height, width, C)
    left, right = _add(left, right, a, b, c, d, t3, t4, t5)
    next_left, next_right = _weigh(a, b, c, d, t0, t1, t2)
    for row in tl.range(first, first + ROWS, num_stages=STAGES):
        a, b, c, d = _row(x, row + 1, column, channel, height, width, C)
        left, right = _add(left, right, a, b, c, d, t6, t7, t8)
        at = out + ((row * width + column) * C)[:, None] + channel[None, :]
        there = ((row < height) & (column < width))[:, None]
        tl.store(at, left, mask=there)
        tl.store(at + C, right, mask=there)
        left, right = _add(next_left, next_right, a, b, c, d, t3, t4, t5)
        next_left, next_right = _weigh(a, b, c, d, t0, t1, t2)


@triton.jit  # type: ignore[untyped-decorator]
def _four(bands, up, at, there, C: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    # The four bands of some places, each [places, channels], modulated.
    low = tl.load(bands + at, mask=there, other=0.0).to(tl.float32) * up[0]
    rows = tl.load(bands + at + C, mask=there, other=0.0).to(tl.float32) * up[1]
    columns = tl.load(bands + at + 2 * C, mask=there, other=0.0).to(tl.float32) * up[2]
    both = tl.load(bands + at + 3 * C, mask=there, other=0.0).to(tl.float32) * up[3]
    return low + rows, low - rows, columns + both, columns - both


@triton.jit  # type: ignore[untyped-decorator]
def _two_rows(bands, up, row, place, channel, height, width, C: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    # The inverse Haar transform of a row of bands [height, width, 4 C]: of the upper and of the
    # lower row that it makes, both pixels of each place between their neighbours.
    there = (row >= 0) & (row < height) & (place < width)
    at = ((row * width + place) * (4 * C))[:, None] + channel[None, :]
    above, below, across, apart = _four(bands, up, at, there[:, None], C)
    left, right = above + across, above - across
    low_left, low_right = below + apart, below - apart
    known = (there & (place > 0))[:, None]
    above, below, across, apart = _four(bands, up, at - 4 * C, known, C)
    before, low_before = above - across, below - apart
    known = (there & (place + 1 < width))[:, None]
    above, below, across, apart = _four(bands, up, at + 4 * C, known, C)
    after, low_after = above + across, below + apart
    return before, left, right, after, low_before, low_left, low_right, low_after


@triton.jit  # type: ignore[untyped-decorator]
def _spread_bands_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    x,
    up,
    up_stride,
    style,
    stride,
    taps,
    out,
    height,
    width,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The same of modulated bands x [height, width, 4 C], by their inverse Haar transform, which is
    # stored nowhere. ROWS is of the bands; the style `up` of the next image is `up_stride` further.
    image, first, column = _strip(tl.program_id(0), height, 2 * width, ROWS, PLACES)
    place = column // 2
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x += image * height * width * (4 * C)
    out += image * height * width * (4 * C)
    own = tl.load(style + image * stride + channel)[None, :]
    t0, t1, t2, t3, t4, t5, t6, t7, t8 = _taps(taps, channel, C, False)
    up += image * up_stride + channel
    bands = (
        tl.load(up)[None, :] * own,
        tl.load(up + C)[None, :] * own,
        tl.load(up + 2 * C)[None, :] * own,
        tl.load(up + 3 * C)[None, :] * own,
    )
    # Of the upper row of `first`, what the row above it adds; nothing yet of that one itself.
    _, _, _, _, a, b, c, d = _two_rows(x, bands, first - 1, place, channel, height, width, C)
    left, right = _weigh(a, b, c, d, t0, t1, t2)
    last_left, last_right = tl.zeros_like(left), tl.zeros_like(right)
    for row in tl.range(first, first + ROWS + 1, num_stages=STAGES):
        e, f, g, h, a, b, c, d = _two_rows(x, bands, row, place, channel, height, width, C)
        last_left, last_right = _add(last_left, last_right, e, f, g, h, t6, t7, t8)
        left, right = _add(left, right, e, f, g, h, t3, t4, t5)
        left, right = _add(left, right, a, b, c, d, t6, t7, t8)
        at = out + ((2 * row * (2 * width) + column) * C)[:, None] + channel[None, :]
        # The lower row of the bands before, and this one's upper row.
        there = (row > first) & (row <= height) & (place < width)
        tl.store(at - 2 * width * C, last_left, mask=there[:, None])
        tl.store(at - 2 * width * C + C, last_right, mask=there[:, None])
        there = (row < first + ROWS) & (row < height) & (place < width)
        tl.store(at, left, mask=there[:, None])
        tl.store(at + C, right, mask=there[:, None])
        last_left, last_right = _weigh(e, f, g, h, t0, t1, t2)
        last_left, last_right = _add(last_left, last_right, a, b, c, d, t3, t4, t5)
        left, right = _weigh(a, b, c, d, t0, t1, t2)


@triton.jit  # type: ignore[untyped-decorator]
def _shift(bias, output, C_OUT: tl.constexpr, N: tl.constexpr, BIAS: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    # What is added to some outputs of all places.
    shift = tl.zeros([1, N], dtype=tl.float32)
    if BIAS:
        shift += tl.load(bias + output, mask=output < C_OUT, other=0.0)[None, :]
    return shift


@triton.jit  # type: ignore[untyped-decorator]
def _finish(  # type: ignore[no-untyped-def] # pragma: no cover
    total,
    constant,
    shift,
    place,
    output,
    there,
    leak,
    C_OUT: tl.constexpr,
    CONSTANTS: tl.constexpr,
    EVEN: tl.constexpr,
):
    # What follows a layer's product of some places and outputs: noise, bias, leaky ReLU. If EVEN,
    # all of them are there, here and below.
    if CONSTANTS == 1:
        at, known = constant + place[:, None], there[:, None]
    else:
        at = constant + (place[:, None] * C_OUT + output[None, :])
        known = there[:, None] & (output < C_OUT)[None, :]
    if EVEN:
        total += tl.load(at) + shift
    else:
        total += tl.load(at, mask=known, other=0.0) + shift
    return tl.where(total > 0, total, leak * total)


@triton.jit  # type: ignore[untyped-decorator]
def _product_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    x,
    weight,
    constant,
    bias,
    out,
    rows,
    places,
    leak,
    style,
    stride,
    colours,
    shade,
    image,
    width,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    CONSTANTS: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    PAINTS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,
):
    # [rows, C_IN] · weight [C_OUT, C_IN] turned, constant, bias, leaky ReLU. If PAINTS, also the
    # image of the result, as in `_image_kernel`: `style` [images, C_OUT], `colours` [C_OUT, 16],
    # `shade` [16]. Then N is C_OUT, and M divides the places of an image. Programs of the same rows
    # follow each other, so that these are read from memory once.
    ACROSS: tl.constexpr = (C_OUT + N - 1) // N
    output = tl.program_id(0) % ACROSS * N + tl.arange(0, N)
    tile = tl.program_id(0) // ACROSS
    within = tl.arange(0, M)
    row = tile * M + within
    there = row < rows
    x += tl.cast(tile, tl.int64) * (M * C_IN)
    out += tl.cast(tile, tl.int64) * (M * C_OUT)
    if PAINTS:
        colour = tl.arange(0, 16)
        factor = tl.load(colours + output[:, None] * 16 + colour[None, :])
    total = tl.zeros([M, N], dtype=tl.float32)
    for start in tl.range(0, C_IN, K, num_stages=STAGES):
        term = start + tl.arange(0, K)
        source = x + (within[:, None] * C_IN + term[None, :])
        entry = weight + (output[None, :] * C_IN + term[:, None])
        if EVEN:
            left = tl.load(source)
            right = tl.load(entry)
        else:
            left = tl.load(source, mask=there[:, None], other=0.0)
            right = tl.load(entry, mask=(output < C_OUT)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    place = row % places
    shift = _shift(bias, output, C_OUT, N, BIAS)
    total = _finish(total, constant, shift, place, output, there, leak, C_OUT, CONSTANTS, EVEN)
    to = out + (within[:, None] * C_OUT + output[None, :])
    if EVEN:
        tl.store(to, total)
    else:
        tl.store(to, total, mask=there[:, None] & (output < C_OUT)[None, :])
    if PAINTS:
        which = tl.cast(tile // (places // M), tl.int64)
        own = tl.load(style + which * stride + output)[None, :]
        # Rounded first, as the map is that the way back reads.
        value = (total.to(out.dtype.element_ty).to(tl.float32) * own).to(factor.dtype)
        painted = tl.dot(value, factor, input_precision="ieee")
        painted += tl.load(shade + colour)[None, :]
        height = places // width
        at = _pixel(which, place // width, place % width, colour, height, width)
        tl.store(image + at, painted, mask=there[:, None] & (colour < 12)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _stream_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    x,
    weight,
    constant,
    bias,
    out,
    tiles,
    places,
    leak,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    CONSTANTS: tl.constexpr,
    BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The same by programs that keep the weights of their N outputs and have the rows of the next
    # tiles under way. M divides the rows, and N the outputs.
    output = tl.program_id(1) * N + tl.arange(0, N)
    within = tl.arange(0, M)
    term = tl.arange(0, C_IN)
    source = within[:, None] * C_IN + term[None, :]
    right = tl.load(weight + (output[None, :] * C_IN + term[:, None]))
    shift = _shift(bias, output, C_OUT, N, BIAS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        left = tl.load(x + tl.cast(tile, tl.int64) * (M * C_IN) + source)
        total = tl.dot(left, right, input_precision="ieee")
        place = (tile * M + within) % places
        there = within < M
        total = _finish(total, constant, shift, place, output, there, leak, C_OUT, CONSTANTS, True)
        to = out + tl.cast(tile, tl.int64) * (M * C_OUT)
        tl.store(to + (within[:, None] * C_OUT + output[None, :]), total)


@triton.jit  # type: ignore[untyped-decorator]
def _image_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    y,
    style,
    stride,
    weight,
    skipped,
    skip_style,
    skip_stride,
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
        value *= tl.load(style + image * stride + channel)[None, :]
        factor = tl.load(weight + channel[:, None] * 16 + colour[None, :])
        total = tl.dot(value.to(factor.dtype), factor, total, input_precision="ieee")
    if SKIPPED:
        skipped += image * height * width * SKIPPED
        for start in range(0, SKIPPED, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            value = _read(skipped, row, column, channel, height, width, SKIPPED)
            value *= tl.load(skip_style + image * skip_stride + channel)[None, :]
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
    # Where column k of a place's product is in an image: k = 4 channel + 2 down + right, so that
    # neighbours of a row are loaded and stored at once.
    plane = (image * 3 + colour // 4)[None, :] * (4 * height * width)
    down = 2 * row[:, None] + (colour // 2 % 2)[None, :]
    return plane + down * (2 * width) + 2 * column[:, None] + (colour % 2)[None, :]


@triton.jit
def _multiply(value, weight):  # type: ignore[no-untyped-def] # pragma: no cover
    # weight [outputs, channels] · value [places, channels] turned: the tensor cores read the second
    # factor from shared memory. As the first it would be brought to their registers' layout.
    return tl.dot(weight, tl.trans(value.to(weight.dtype)), input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def _back_image_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    pixels,
    colours,
    y,
    style,
    stride,
    weight,
    sums,
    out,
    height,
    width,
    leak,
    K: tl.constexpr,
    C_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    # From the image to behind the 1×1 convolution, `weight` [C_OUT, K], whose activated result `y`
    # [.., K] it is made of by `colours` [16, K].
    program = tl.program_id(0)
    across = tl.cdiv(width, PLACES)
    down = tl.cdiv(height, ROWS)
    image = (program // (across * down)).to(tl.int64)
    within = program % (across * down)
    first = (within // across) * ROWS
    column = (within % across) * PLACES + tl.arange(0, PLACES)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    channel = tl.arange(0, K)
    colour = tl.arange(0, 16)
    paint = tl.load(colours + colour[:, None] * K + channel[None, :])
    entry = output[:, None] * K + channel[None, :]
    factor = tl.load(weight + entry, mask=(output < C_OUT)[:, None], other=0.0)
    own = tl.load(style + image * stride + channel)[None, :]
    slope = leak * own
    inside = (column < width)[:, None]
    shown = inside & (colour < 12)[None, :]
    pixels += _pixel(image, first + 0 * column, column, colour, height, width)
    y += (image * height * width + first * width) * K + column[:, None] * K + channel[None, :]
    out += (image * height * width + first * width) * C_OUT
    out += (column * C_OUT)[:, None] + output[None, :]
    painted = tl.load(pixels, mask=shown & (first < height), other=0.0)
    level = tl.load(y, mask=inside & (first < height), other=0.0)
    found = tl.zeros([PLACES, K], dtype=tl.float32)
    for row in range(ROWS):
        value = tl.dot(painted.to(paint.dtype), paint, input_precision="ieee")
        now = level.to(tl.float32)
        # The next row's are on their way while this one is computed.
        there = (row + 1 < ROWS) & (first + row + 1 < height)
        painted = tl.load(pixels + (row + 1) * (4 * width), mask=shown & there, other=0.0)
        level = tl.load(y + (row + 1) * (width * K), mask=inside & there, other=0.0)
        # Beyond the border y is 0.
        found += value * now
        value *= tl.where(now > 0, own, slope)
        total = tl.trans(_multiply(value, factor))
        there = inside & (first + row < height) & (output < C_OUT)[None, :]
        tl.store(out + row * (width * C_OUT), total, mask=there)
    if tl.program_id(1) == 0:
        tl.store(sums + program.to(tl.int64) * K + channel, tl.sum(found, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _gather_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    gradient,
    taps,
    more,
    y,
    style,
    stride,
    sums,
    out,
    height,
    width,
    leak,
    C: tl.constexpr,
    MORE: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Back through a depthwise convolution, a style and an activation, whose result is `y`; `more`
    # reads y beside the layer.
    program = tl.program_id(0)
    image, first, column = _strip(program, height, width, ROWS, PLACES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    size = image * height * width * C
    gradient += size
    y += size
    out += size
    if MORE:
        more += size
    own = tl.load(style + image * stride + channel)[None, :]
    slope = leak * own
    t0, t1, t2, t3, t4, t5, t6, t7, t8 = _taps(taps, channel, C, True)
    a, b, c, d = _row(gradient, first - 1, column, channel, height, width, C)
    left, right = _weigh(a, b, c, d, t0, t1, t2)
    a, b, c, d = _row(gradient, first, column, channel, height, width, C)
    left, right = _add(left, right, a, b, c, d, t3, t4, t5)
    next_left, next_right = _weigh(a, b, c, d, t0, t1, t2)
    found = tl.zeros([PLACES, CHANNELS], dtype=tl.float32)
    for row in tl.range(first, first + ROWS, num_stages=STAGES):
        a, b, c, d = _row(gradient, row + 1, column, channel, height, width, C)
        there = ((row < height) & (column < width))[:, None]
        at = ((row * width + column) * C)[:, None] + channel[None, :]
        level_left = tl.load(y + at, mask=there, other=0.0).to(tl.float32)
        level_right = tl.load(y + at + C, mask=there, other=0.0).to(tl.float32)
        left, right = _add(left, right, a, b, c, d, t6, t7, t8)
        if MORE:
            left += tl.load(more + at, mask=there, other=0.0).to(tl.float32)
            right += tl.load(more + at + C, mask=there, other=0.0).to(tl.float32)
        # Beyond the border y is 0.
        found += left * level_left + right * level_right
        tl.store(out + at, left * tl.where(level_left > 0, own, slope), mask=there)
        tl.store(out + at + C, right * tl.where(level_right > 0, own, slope), mask=there)
        left, right = _add(next_left, next_right, a, b, c, d, t3, t4, t5)
        next_left, next_right = _weigh(a, b, c, d, t0, t1, t2)
    tl.store(sums + program.to(tl.int64) * C + channel, tl.sum(found, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _gather_bands_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    gradient,
    taps,
    x,
    up,
    up_stride,
    style,
    stride,
    sums,
    out,
    height,
    width,
    leak,
    C: tl.constexpr,
    ACTIVATED: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # As _gather_kernel, through the inverse Haar transform that the layer reads: `x` and `out`
    # [N, h, w, 4 C] are the bands, `gradient` is [N, 2 h, 2 w, C]. `leak` counts if ACTIVATED. Sums
    # are of the bands and their gradients before any style.
    program = tl.program_id(0)
    image, first, column = _strip(program, 2 * height, 2 * width, 2 * ROWS, PLACES)
    place = column // 2
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    size = image * (4 * height * width * C)
    gradient += size
    x += size
    out += size
    own = tl.load(style + image * stride + channel)
    up += image * up_stride + channel
    scale_low = (own * tl.load(up))[None, :]
    scale_rows = (own * tl.load(up + C))[None, :]
    scale_columns = (own * tl.load(up + 2 * C))[None, :]
    scale_both = (own * tl.load(up + 3 * C))[None, :]
    t0, t1, t2, t3, t4, t5, t6, t7, t8 = _taps(taps, channel, C, True)
    a, b, c, d = _row(gradient, first - 1, column, channel, 2 * height, 2 * width, C)
    left, right = _weigh(a, b, c, d, t0, t1, t2)
    a, b, c, d = _row(gradient, first, column, channel, 2 * height, 2 * width, C)
    left, right = _add(left, right, a, b, c, d, t3, t4, t5)
    next_left, next_right = _weigh(a, b, c, d, t0, t1, t2)
    found_low = tl.zeros([PLACES, CHANNELS], dtype=tl.float32)
    found_rows = tl.zeros([PLACES, CHANNELS], dtype=tl.float32)
    found_columns = tl.zeros([PLACES, CHANNELS], dtype=tl.float32)
    found_both = tl.zeros([PLACES, CHANNELS], dtype=tl.float32)
    for row in tl.range(first // 2, first // 2 + ROWS, num_stages=STAGES):
        a, b, c, d = _row(gradient, 2 * row + 1, column, channel, 2 * height, 2 * width, C)
        e, f, g, h = _row(gradient, 2 * row + 2, column, channel, 2 * height, 2 * width, C)
        there = ((row < height) & (place < width))[:, None]
        at = ((row * width + place) * (4 * C))[:, None] + channel[None, :]
        level_low = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        level_rows = tl.load(x + at + C, mask=there, other=0.0).to(tl.float32)
        level_columns = tl.load(x + at + 2 * C, mask=there, other=0.0).to(tl.float32)
        level_both = tl.load(x + at + 3 * C, mask=there, other=0.0).to(tl.float32)
        # The upper row becomes whole, then the lower one.
        upper_left, upper_right = _add(left, right, a, b, c, d, t6, t7, t8)
        left, right = _add(next_left, next_right, a, b, c, d, t3, t4, t5)
        next_left, next_right = _weigh(a, b, c, d, t0, t1, t2)
        lower_left, lower_right = _add(left, right, e, f, g, h, t6, t7, t8)
        left, right = _add(next_left, next_right, e, f, g, h, t3, t4, t5)
        next_left, next_right = _weigh(e, f, g, h, t0, t1, t2)
        upper, upper_slope = upper_left + upper_right, upper_left - upper_right
        lower, lower_slope = lower_left + lower_right, lower_left - lower_right
        low, rows = upper + lower, upper - lower
        columns, both = upper_slope + lower_slope, upper_slope - lower_slope
        found_low += low * level_low
        found_rows += rows * level_rows
        found_columns += columns * level_columns
        found_both += both * level_both
        low *= scale_low
        rows *= scale_rows
        columns *= scale_columns
        both *= scale_both
        if ACTIVATED:
            low = tl.where(level_low > 0, low, leak * low)
            rows = tl.where(level_rows > 0, rows, leak * rows)
            columns = tl.where(level_columns > 0, columns, leak * columns)
            both = tl.where(level_both > 0, both, leak * both)
        tl.store(out + at, low, mask=there)
        tl.store(out + at + C, rows, mask=there)
        tl.store(out + at + 2 * C, columns, mask=there)
        tl.store(out + at + 3 * C, both, mask=there)
    sums += program.to(tl.int64) * (4 * C) + channel
    tl.store(sums, tl.sum(found_low, 0))
    tl.store(sums + C, tl.sum(found_rows, 0))
    tl.store(sums + 2 * C, tl.sum(found_columns, 0))
    tl.store(sums + 3 * C, tl.sum(found_both, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _add_up_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    sums,
    table,
    styles,
    stride,
    found,
    columns,
    ADDED: tl.constexpr,
    TILES: tl.constexpr,
):
    # Partial sums of all layers, by `table`, see _list_work, into `found` [N, columns]. Rows are
    # taken four at a time: of bands these are a tile's four, which go to four columns of `up`'s
    # gradient, by the layer's own style, and by `up` into that style's.
    image = tl.program_id(0).to(tl.int64)
    table += tl.program_id(1) * 7
    # Four values at a time are read where addresses are known to be multiples of 16.
    start = tl.load(table).to(tl.int64) * 16
    rows = tl.load(table + 1)
    width = tl.load(table + 2) * 16
    first = tl.load(table + 3) * 16
    own = tl.load(table + 4)
    up = tl.load(table + 5)
    shown = tl.arange(0, ADDED) < tl.load(table + 6)
    sums += start * tl.num_programs(0) + image * rows * width + first
    row = 4 * tl.arange(0, TILES)[:, None, None] + tl.arange(0, 4)[None, :, None]
    at = row * width + tl.arange(0, ADDED)[None, None, :]
    total = tl.zeros([TILES, 4, ADDED], dtype=tl.float32)
    for begin in range(0, rows, 4 * TILES):
        total += tl.load(sums + begin * width + at, mask=row < rows - begin, other=0.0)
    four = tl.sum(total, 0)
    own += tl.arange(0, ADDED)
    bands = up + tl.arange(0, 4)[:, None] * width + tl.arange(0, ADDED)[None, :]
    styles += image * stride
    found += image * columns
    there = shown[None, :] & (up >= 0)
    scale = tl.load(styles + bands, mask=there, other=1.0)
    tl.store(found + own, tl.sum(four * scale, 0), mask=shown)
    style = tl.load(styles + own, mask=shown, other=0.0)
    tl.store(found + bands, four * style[None, :], mask=there)


def _tiles(rows: int, columns: int, n: int, height: int, width: int) -> int:  # pragma: no cover
    tiles: int = n * triton.cdiv(height, rows) * triton.cdiv(width, columns)
    return tiles


def _walk(
    rows: int, n: int, height: int, width: int, channels: int
) -> tuple[tuple[int, int], dict[str, int]]:  # pragma: no cover
    """How a kernel is launched that walks down the rows of a map: its grid and sizes."""
    narrow = min(channels, STRIP_CHANNELS)
    grid = (_tiles(rows, 2 * STRIP_PLACES, n, height, width), channels // narrow)
    sizes = {
        "ROWS": rows,
        "PLACES": STRIP_PLACES,
        "CHANNELS": narrow,
        "STAGES": STRIP_STAGES,
        "num_warps": STRIP_WARPS,
    }
    return grid, sizes


class Partial(NamedTuple):
    """Partial sums of one map with its gradient.

    Attributes:
        tiles: of an image, a sum each.
        channels: of the map.
        bands: whether the map is bands, which two styles modulate.
    """

    tiles: int
    channels: int
    bands: bool


def _measure(
    read: Tensor, *, bands: bool = False, painted: bool = False
) -> Partial:  # pragma: no cover
    """Of a map, perhaps bands, or what the image is made of."""
    _, height, width, channels = read.shape
    if painted:
        tiles = _tiles(PAINTED_ROWS, PAINTED_PLACES, 1, height, width)
    else:
        scale = 2 if bands else 1
        tiles = _tiles(GATHER_ROWS, 2 * STRIP_PLACES, 1, scale * height, scale * width)
    return Partial(tiles, channels, bands)


def _measure_all(maps: Sequence[Tensor], blocks: int) -> tuple[Partial, ...]:  # pragma: no cover
    """Of what a tail reads, from the first to the last: bands and a map a block, then the head."""
    wide = [index < 2 * blocks and index % 2 == 0 for index in range(len(maps) - 1)]
    found = [_measure(read, bands=bands) for read, bands in zip(maps, wide, strict=False)]
    return *found, _measure(maps[-1], painted=True)


def _make_room(
    partials: Sequence[Partial], n: int, device: torch.device
) -> tuple[Tensor, list[Tensor]]:  # pragma: no cover
    """Room for the sums of N images: one tensor, and each map's part of it, [N · tiles, C]."""
    sizes = [n * tiles * channels for tiles, channels, _ in partials]
    sums = torch.empty(sum(sizes), device=device)
    parts = sums.split_with_sizes(sizes)
    return sums, [
        part.view(-1, channels) for part, (_, channels, _) in zip(parts, partials, strict=True)
    ]


def _list_work(
    partials: Sequence[Partial], widths: Sequence[Sequence[int]], columns: int
) -> list[tuple[int, ...]]:  # pragma: no cover
    """What _add_up_kernel's programs do for each image, the longest first.

    Args:
        partials: of all maps.
        widths: of the styles, see `split_styles`; those of bands come before the layer's own.
        columns: of the styles' tensor.

    Returns:
        For each program: where the map's sums start if there is one image, in 16 values; their
        rows, of four to a tile if it is bands; C, in 16; the first channel, in 16; the first
        column of the style; that of `up`, or -1; how many columns there are. Columns of no style
        are a map's without rows: 0.
    """
    places = split_styles(torch.arange(columns)[None], widths)
    given = iter([(int(place[0, 0]), place.shape[1]) for place in places])
    work: list[tuple[int, ...]] = []
    free, start = torch.ones(columns, dtype=torch.bool), 0
    for tiles, channels, bands in partials:
        rows, up, four = tiles, -1, 0
        if bands:
            rows, (up, four) = 4 * tiles, next(given)
            assert four == channels
            free[up : up + four] = False
        own, width = next(given)
        assert width * rows == channels * tiles and width % ADDED == 0
        free[own : own + width] = False
        for first in range(0, width, ADDED):
            of_up = up + first if bands else -1
            sizes = (start // 16, rows, width // 16, first // 16)
            work.append((*sizes, own + first, of_up, ADDED))
        start += tiles * channels
    work.sort(key=lambda one: -one[1])
    surplus = free.nonzero().flatten().tolist()
    while surplus:
        own, count = surplus[0], 1
        while count < min(ADDED, len(surplus)) and surplus[count] == own + count:
            count += 1
        work.append((0, 0, 0, 0, own, -1, count))
        del surplus[:count]
    return work


@cache
def _make_table(
    partials: tuple[Partial, ...],
    widths: tuple[tuple[int, ...], ...],
    columns: int,
    device: torch.device,
) -> Tensor:  # pragma: no cover
    """_list_work on the device, made once and kept: graphs that were captured read it.

    It is the same for any number of images, so there is one before anything is captured: kernels
    are checked with one image before their first use.
    """
    return torch.tensor(_list_work(partials, widths, columns), dtype=torch.int32, device=device)


def _add_up(
    sums: Tensor,
    partials: tuple[Partial, ...],
    styles: Tensor,
    widths: Sequence[Sequence[int]],
) -> Tensor:  # pragma: no cover
    """Partial sums of all maps, see `_make_room` -> gradients of styles [N, S]."""
    n, columns = styles.shape
    found = torch.empty_like(styles, memory_format=torch.contiguous_format)
    table = _make_table(partials, tuple(map(tuple, widths)), columns, styles.device)
    _add_up_kernel[(n, len(table))](
        sums,
        table,
        styles,
        styles.stride(0),
        found,
        columns,
        ADDED=ADDED,
        TILES=ADDED_TILES,
        num_warps=ADDED_WARPS,
    )
    return found


# Styles are [N, C], columns of a larger tensor as a rule. Of their gradients the functions below
# leave partial sums where they are told, see `_make_room`.


def _spread(x: Tensor, style: Tensor, taps: Tensor) -> Tensor:  # pragma: no cover
    """Modulation and depthwise 3×3 of x [N, h, w, C]."""
    n, height, width, channels = x.shape
    out = torch.empty_like(x)
    grid, sizes = _walk(SPREAD_ROWS, n, height, width, channels)
    _spread_kernel[grid](x, style, style.stride(0), taps, out, height, width, C=channels, **sizes)
    return out


def _spread_bands(x: Tensor, up: Tensor, style: Tensor, taps: Tensor) -> Tensor:  # pragma: no cover
    """The same of the map [N, 2 h, 2 w, C] that bands x [N, h, w, 4 C] make, modulated by `up`."""
    n, height, width, bands = x.shape
    channels = bands // 4
    out = x.new_empty(n, 2 * height, 2 * width, channels)
    narrow = min(channels, STRIP_CHANNELS)
    # Smaller strips of small maps, so that there are enough of them.
    places = max(8, min(SPREAD_VALUES // narrow, width // 4))
    rows = min(SPREAD_BANDS, max(4, height // 4))
    tiles = _tiles(rows, places, n, height, width)
    _spread_bands_kernel[(tiles, channels // narrow)](
        x,
        up,
        up.stride(0),
        style,
        style.stride(0),
        taps,
        out,
        height,
        width,
        C=channels,
        ROWS=rows,
        PLACES=places,
        CHANNELS=narrow,
        STAGES=SPREAD_STAGES,
        num_warps=STRIP_WARPS,
    )
    return out


def _size_product(layer: Any, paints: bool) -> tuple[int, int, int, int, int]:  # pragma: no cover
    """See `PRODUCT`, for a layer."""
    outputs, inputs = layer.weight.shape
    narrow = min(inputs, outputs) <= NARROW_PRODUCT[1]
    sizes = PAINTING_PRODUCT if paints else NARROW_PRODUCT if narrow else PRODUCT
    m, wide, terms, warps, stages = sizes
    return m, min(wide, outputs), min(terms, inputs), warps, stages


@cache
def _count_processors(device: torch.device) -> int:  # pragma: no cover
    if device.type != "cuda":  # interpreted: few, so that each has several tiles
        return 2
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _stream(x: Tensor, layer: Any, out: Tensor) -> bool:  # pragma: no cover
    """The product by programs that keep their weights; False if they do not fit it."""
    outputs, inputs = layer.weight.shape
    sizes = STREAM.get(inputs * x.element_size())
    rows, places = x.numel() // inputs, x[0].numel() // inputs
    if sizes is None or rows % sizes[0] or outputs % sizes[1]:
        return False
    m, wide, warps, stages, share = sizes
    across, tiles = outputs // wide, rows // m
    programs = max(1, share * _count_processors(x.device) // across)
    _stream_kernel[(min(programs, tiles), across)](
        x,
        layer.weight,
        layer.constant,
        layer.bias,
        out,
        tiles,
        places,
        LEAK,
        C_IN=inputs,
        C_OUT=outputs,
        CONSTANTS=layer.constant.shape[-1],
        BIAS=layer.bias is not None,
        M=m,
        N=wide,
        STAGES=stages,
        num_warps=warps,
    )
    return True


def _product(
    x: Tensor,
    layer: Any,
    style: Tensor | None = None,
    head: Any = None,
    image: Tensor | None = None,
) -> Tensor:  # pragma: no cover
    """The 1×1 convolution of x [N, h, w, I], noise, bias, leaky ReLU.

    With an image [N, 3, 2 h, 2 w] it also paints that, of the result by `style` [N, O] and `head`.
    """
    n, height, width, inputs = x.shape
    outputs = layer.weight.shape[0]
    out = x.new_empty(n, height, width, outputs)
    if image is None and _stream(x, layer, out):
        return out
    rows = n * height * width
    m, wide, terms, warps, stages = _size_product(layer, image is not None)
    _product_kernel[(triton.cdiv(rows, m) * triton.cdiv(outputs, wide),)](
        x,
        layer.weight,
        layer.constant,
        layer.bias,
        out,
        rows,
        height * width,
        LEAK,
        style,
        None if style is None else style.stride(0),
        None if head is None else head.columns,
        None if head is None else head.constant,
        image,
        None if image is None else width,
        C_IN=inputs,
        C_OUT=outputs,
        CONSTANTS=layer.constant.shape[-1],
        BIAS=layer.bias is not None,
        EVEN=rows % m == 0 and outputs % wide == 0,
        PAINTS=image is not None,
        M=m,
        N=wide,
        K=terms,
        STAGES=stages,
        num_warps=warps,
    )
    return out


def _layer(x: Tensor, style: Tensor, layer: Any) -> Tensor:  # pragma: no cover
    return _product(_spread(x, style, layer.taps), layer)


def _image(
    y: Tensor, style: Tensor, head: LoweredHead, skipped: Tensor | None, skip_style: Tensor | None
) -> Tensor:  # pragma: no cover
    n, height, width, channels = y.shape
    out = torch.empty(n, 3, 2 * height, 2 * width, device=y.device)
    _image_kernel[(_tiles(ROWS, COLUMNS, n, height, width),)](
        y,
        style,
        style.stride(0),
        head.columns,
        skipped,
        skip_style,
        0 if skip_style is None else skip_style.stride(0),
        head.skip_columns,
        head.constant,
        out,
        height,
        width,
        C=channels,
        SKIPPED=0 if skipped is None else skipped.shape[-1],
        CONSTANTS=1 if head.constant.ndim == 1 else COLOURS,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        CHANNELS=min(channels, CHANNELS),
        num_warps=WARPS,
        num_stages=1,
    )
    return out


def _last_layer(
    x: Tensor, style: Tensor, layer: Any, own: Tensor, head: Any
) -> tuple[Tensor, Tensor]:  # pragma: no cover
    """The layer before a head of one product, and the image, of which `own` is the style."""
    x = _spread(x, style, layer.taps)
    n, height, width, _ = x.shape
    m, wide, *_ = _size_product(layer, True)
    # A program that paints needs all channels of its places, and those of one image.
    if wide < len(layer.weight) or height * width % m:
        y = _product(x, layer)
        return y, _image(y, own, head, None, None)
    image = torch.empty(n, 3, 2 * height, 2 * width, device=x.device)
    return _product(x, layer, own, head, image), image


def _back_image(
    pixels: Tensor, colours: Tensor, y: Tensor, style: Tensor, weight: Tensor, sums: Tensor
) -> Tensor:  # pragma: no cover
    """From an image to behind the 1×1 convolution before it.

    Args:
        pixels: [N, 3, 2 h, 2 w], the image's gradient.
        colours: [16, K], what made it of the map.
        y: [N, h, w, K], the map.
        style: [N, K], what it was modulated with.
        weight: [O, K], of the 1×1 convolution that made it, transposed.
        sums: [tiles, K], for the style's gradient.

    Returns:
        Gradients [N, h, w, O].
    """
    n, height, width, channels = y.shape
    outputs = len(weight)
    # Tensor cores take 64 at least, of which some may be surplus.
    wide = max(64, min(outputs, OUTPUTS))
    tiles = _tiles(PAINTED_ROWS, PAINTED_PLACES, n, height, width)
    assert sums.shape == (tiles, channels)
    out = y.new_empty(n, height, width, outputs)
    _back_image_kernel[(tiles, triton.cdiv(outputs, wide))](
        pixels,
        colours,
        y,
        style,
        style.stride(0),
        weight,
        sums,
        out,
        height,
        width,
        LEAK,
        K=channels,
        C_OUT=outputs,
        ROWS=PAINTED_ROWS,
        PLACES=PAINTED_PLACES,
        OUTPUTS=wide,
        num_warps=WARPS,
        num_stages=1,
    )
    return out


def _gather(
    gradient: Tensor,
    taps: Tensor,
    y: Tensor,
    style: Tensor,
    sums: Tensor,
    more: Tensor | None = None,
) -> Tensor:  # pragma: no cover
    """From behind a layer's depthwise convolution to before the activation that it reads.

    Args:
        gradient: [N, h, w, C], behind the convolution with `taps`.
        y: [N, h, w, C], the activated map.
        style: [N, C], what it was modulated with.
        sums: [tiles, C], for the style's gradient.
        more: [N, h, w, C], gradient of another reader of the modulated map.

    Returns:
        Gradients [N, h, w, C].
    """
    n, height, width, channels = y.shape
    grid, sizes = _walk(GATHER_ROWS, n, height, width, channels)
    assert sums.shape == (grid[0], channels)
    out = torch.empty_like(y)
    _gather_kernel[grid](
        gradient,
        taps,
        more,
        y,
        style,
        style.stride(0),
        sums,
        out,
        height,
        width,
        LEAK,
        C=channels,
        MORE=more is not None,
        **sizes,
    )
    return out


def _gather_bands(
    gradient: Tensor,
    taps: Tensor,
    x: Tensor,
    up: Tensor,
    style: Tensor,
    sums: Tensor,
    *,
    activated: bool,
) -> Tensor:  # pragma: no cover
    """The same through the bands x [N, h, w, 4 C], which `up` [N, 4 C] modulates.

    Sums, [tiles, 4 C], are for both styles' gradients.
    """
    n, height, width, bands = x.shape
    channels = bands // 4
    grid, sizes = _walk(GATHER_ROWS, n, 2 * height, 2 * width, channels)
    assert sums.shape == (grid[0], bands)
    out = torch.empty_like(x)
    _gather_bands_kernel[grid](
        gradient,
        taps,
        x,
        up,
        up.stride(0),
        style,
        style.stride(0),
        sums,
        out,
        height,
        width,
        LEAK,
        C=channels,
        ACTIVATED=activated,
        **sizes | {"ROWS": GATHER_ROWS // 2, "STAGES": BANDS_STAGES},
    )
    return out


def _unpaint(pixels: Tensor) -> Tensor:  # pragma: no cover
    """Images [N, 3, 2 h, 2 w] -> [N, h, w, 12], columns in the order of `LoweredHead`."""
    n, _, height, width = pixels.shape
    parts = pixels.reshape(n, 3, height // 2, 2, width // 2, 2)
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3)


class _Tail(torch.autograd.Function):  # pragma: no cover
    """`LoweredTail` of bands [N, h, w, 4 C] and styles [N, S]."""

    @staticmethod
    def forward(ctx: Any, tail: LoweredTail, x: Tensor, styles: Tensor) -> Tensor:
        x, styles = x.contiguous(), styles.float()
        if styles.stride(1) != 1:
            styles = styles.contiguous()
        maps, given, head = [x], tail.split(styles), tail.head
        last = None if head.layers else tail.blocks[-1]
        for block in tail.blocks:
            up, first, second = given[:3]
            del given[:3]
            conv: Any = block.conv1
            maps.append(_product(_spread_bands(maps[-1], up, first, conv.taps), conv))
            if block is last:
                y, images = _last_layer(maps[-1], second, block.conv2, given[0], head)
                maps.append(y)
            else:
                maps.append(_layer(maps[-1], second, block.conv2))
        if head.layers:
            features = maps[-1]
            maps.append(_layer(features, given[0], head.layers[0]))
            maps.append(_layer(maps[-1], given[1], head.layers[1]))
            images = _image(maps[-1], given[2], head, features, given[0])
        ctx.tail = tail
        ctx.save_for_backward(styles, *maps)
        return images

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tail, pixels = ctx.tail, gradients[0].contiguous()
        together, *maps = ctx.saved_tensors
        partials = _measure_all(maps, len(tail.blocks))
        # Styles, maps and their sums are taken from the last to the first.
        sums, parts = _make_room(partials, len(together), together.device)
        styles = tail.split(together)
        head, blocks = tail.head, list(tail.blocks)
        below = head.layers[1] if head.layers else blocks[-1].conv2
        last = maps.pop(), styles.pop(), below.columns, parts.pop()
        gradient = _back_image(pixels, head.rows, *last)
        if head.layers:
            conv1, conv2 = head.layers
            gradient = _gather(gradient, conv2.taps, maps.pop(), styles.pop(), parts.pop())
            # The product that skips both layers.
            more = _unpaint(pixels).to(gradient.dtype) @ head.skip_rows[:12]
            gradient = gradient @ conv1.weight
            gradient = _gather(gradient, conv1.taps, maps.pop(), styles.pop(), parts.pop(), more)
            gradient = gradient @ blocks[-1].conv2.weight
        while blocks:
            block = blocks.pop()
            gradient = _gather(gradient, block.conv2.taps, maps.pop(), styles.pop(), parts.pop())
            style, up = styles.pop(), styles.pop()
            gradient = _gather_bands(
                gradient @ block.conv1.weight,
                block.conv1.taps,
                maps.pop(),
                up,
                style,
                parts.pop(),
                activated=bool(blocks),
            )
            if blocks:
                gradient = gradient @ blocks[-1].conv2.weight
        return None, gradient, _add_up(sums, partials, together, tail.widths)


def paint(tail: LoweredTail, x: Tensor, styles: Tensor) -> Tensor:  # pragma: no cover
    """`tail(x, styles)` by these kernels; `tail.has_kernels` says whether they fit it."""
    images: Tensor = _Tail.apply(tail, x, styles)
    return images
