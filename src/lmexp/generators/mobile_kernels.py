"""What runs on a GPU of MobileStyleGAN's large layers; `mobile_triton` launches it and says why.

Maps are [N, h, w, C], channels-last in memory; a style is [N, C], a column range of one tensor, so
the next image's is `stride` further.
"""

# "no cover": they run on GPUs and, when tested, in a process of their own.
# Upper case marks what a kernel is compiled for, as in Triton's own code.
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from lmexp.kernel_launch import await_turn


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
def spread_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
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
    await_turn()
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
def spread_bands_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
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
    await_turn()
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
def product_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
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
    await_turn()
    # [rows, C_IN] · weight [C_OUT, C_IN] turned, constant, bias, leaky ReLU. If PAINTS, also the
    # image of the result, as in `image_kernel`: `style` [images, C_OUT], `colours` [C_OUT, 16],
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
def stream_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
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
    await_turn()
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
def image_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
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
    await_turn()
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
def back_image_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
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
    await_turn()
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
def gather_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
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
    await_turn()
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
def gather_bands_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
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
    await_turn()
    # As gather_kernel, through the inverse Haar transform that the layer reads: `x` and `out`
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
def add_up_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    sums,
    table,
    styles,
    stride,
    found,
    columns,
    ADDED: tl.constexpr,
    TILES: tl.constexpr,
):
    await_turn()
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
