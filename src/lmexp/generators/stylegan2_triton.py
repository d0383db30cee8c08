"""The epilogue of StyleGAN2's convolutions as Triton kernels, forward and backward.

What these kernels are for: an epilogue reads and writes every feature map, and its backward pass
needs sums over pixels (gradients of styles and demodulation), sums over channels (gradients of
noise maps) and a map of the gradient itself. A compiler that fuses loops over one axis makes a
kernel of each, and every one of them reads all features again. Here a tile holds all channels of a
few pixels, so that one pass does it all.

The meaning of every argument is that of `stylegan2_epilogue.epilogue`, which has the same
computation as plain tensor operations. Everything is computed in float32, whatever is stored.
Feature maps lie in memory channels-last. Sums over pixels are made of one partial sum a program,
added up afterwards, so that they are the same at every run.
"""

# They run on GPUs and, when tested, in a process of their own: "no cover" is for those who count
# lines in this one.
# Upper case marks what a kernel is compiled for, as in Triton's own code.
# ruff: noqa: N803

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmexp.kernel_launch import await_turn, launch

FORWARD_TILE, FORWARD_WARPS = 2048, 4
BACKWARD_TILE, BACKWARD_WARPS = 1024, 4
FILTER_TILE = 1024
"""Elements of a tile (where there is a filter, one of four in a cell) and warps that work on it."""
STAGES = 3
"""Tiles of the backward pass under way at once, without a filter. Its sums take the registers that
further warps would need, so loads ahead, not warps, have to hide the memory's latency."""
GROW_BLOCK = 1024
"""Pixels of a program on the image's way."""
PROGRAMS = 1584
"""Programs that share the pixels of a batch in the backward pass: 12 for each of 132 processors."""


@triton.jit  # type: ignore[untyped-decorator]
def _tap(index: tl.constexpr, TAPS: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    # (1, 3, 3, 1) / 4, or what is left of it after a factor of (1, 1).
    if TAPS == 4:
        return 0.75 if index == 1 or index == 2 else 0.25
    return 0.5 if index == 1 else 0.25


@triton.jit  # type: ignore[untyped-decorator]
def _locate(row, column, width, C: tl.constexpr, PHASES: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    if PHASES:
        cell = (row // 2) * (width // 2) + column // 2
        return (cell * 4 + (row % 2) * 2 + column % 2) * C
    return (row * width + column) * C


@triton.jit  # type: ignore[untyped-decorator]
def _filter(  # type: ignore[no-untyped-def] # pragma: no cover
    source,
    top,
    left,
    channel,
    mask,
    height,
    width,
    C: tl.constexpr,
    PHASES: tl.constexpr,
    TAPS: tl.constexpr,
    P_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
):
    # The filter at the four pixels of a cell. They share most of what they read, and the filter is
    # separable: less than half of the reads and additions of four times one pixel.
    upper_left = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
    upper_right = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
    lower_left = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
    lower_right = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
    for down in tl.static_range(TAPS + 1):
        y = top + down
        in_rows = (y >= 0) & (y < height)
        one = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
        other = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
        for right in tl.static_range(TAPS + 1):
            x = left + right
            inside = mask & (in_rows & (x >= 0) & (x < width))[:, None]
            offset = _locate(y, x, width, C, PHASES)
            value = tl.load(source + offset[:, None] + channel[None, :], mask=inside, other=0.0)
            value = value.to(tl.float32)
            if right < TAPS:
                one += value * _tap(right, TAPS)
            if right > 0:
                other += value * _tap(right - 1, TAPS)
        if down < TAPS:
            upper_left += one * _tap(down, TAPS)
            upper_right += other * _tap(down, TAPS)
        if down > 0:
            lower_left += one * _tap(down - 1, TAPS)
            lower_right += other * _tap(down - 1, TAPS)
    return upper_left, upper_right, lower_left, lower_right


@triton.jit  # type: ignore[untyped-decorator]
def _finish(  # type: ignore[no-untyped-def] # pragma: no cover
    convolved,
    pixel,
    pixels,
    channel,
    there,
    mask,
    demodulate,
    shift,
    noise,
    factor,
    style,
    rgb,
    features,
    image,
    rgb_stride,
    clamp,
    C: tl.constexpr,
    NOISE: tl.constexpr,
    STYLES: tl.constexpr,
    FEATURES: tl.constexpr,
    RGB: tl.constexpr,
    CLAMP: tl.constexpr,
    LEAK: tl.constexpr,
):
    x = convolved * demodulate
    if NOISE:
        added = tl.load(noise + pixel, mask=there, other=0.0)
        x += (added * factor)[:, None]
    x += shift
    x = tl.where(x > 0, x, x * LEAK)
    if CLAMP:
        x = tl.minimum(tl.maximum(x, -clamp), clamp)
    if FEATURES:
        modulated = x
        if STYLES:
            modulated = x * style
        tl.store(features + pixel[:, None] * C + channel[None, :], modulated, mask=mask)
    if RGB:
        for colour in tl.static_range(3):
            row = tl.load(rgb + colour * rgb_stride + channel, mask=channel < C, other=0.0)
            total = tl.sum(x * row[None, :], 1)
            tl.store(image + colour * pixels + pixel, total, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    source,
    demodulation,
    bias,
    noise,
    strength,
    styles,
    rgb,
    features,
    image,
    height,
    width,
    source_height,
    source_width,
    noise_stride,
    demodulation_stride,
    styles_stride,
    rgb_stride,
    clamp,
    C: tl.constexpr,
    C_BLOCK: tl.constexpr,
    P_BLOCK: tl.constexpr,
    PHASES: tl.constexpr,
    TAPS: tl.constexpr,
    BORDER: tl.constexpr,
    NOISE: tl.constexpr,
    SCALED: tl.constexpr,
    STYLES: tl.constexpr,
    FEATURES: tl.constexpr,
    RGB: tl.constexpr,
    CLAMP: tl.constexpr,
    LEAK: tl.constexpr,
):
    await_turn()
    n = tl.program_id(1).to(tl.int64)
    pixels = height * width
    channel = tl.arange(0, C_BLOCK)
    known = channel < C
    demodulate = tl.load(demodulation + n * demodulation_stride + channel, mask=known, other=0.0)
    demodulate = demodulate[None, :]
    shift = tl.load(bias + channel, mask=known, other=0.0)[None, :]
    factor = 1.0
    if SCALED:
        factor = tl.load(strength)
    style = 1.0
    if STYLES:
        style = tl.load(styles + n * styles_stride + channel, mask=known, other=0.0)[None, :]
    source += n * source_height * source_width * C
    if NOISE:
        noise += n * noise_stride
    features += n * pixels * C
    if RGB:
        rgb += n * 3 * rgb_stride
        image += n * 3 * pixels
    unit = tl.program_id(0) * P_BLOCK + tl.arange(0, P_BLOCK)
    if TAPS == 1:
        there = unit < pixels
        mask = there[:, None] & known[None, :]
        offset = unit * C
        if PHASES:
            offset = _locate(unit // width, unit % width, width, C, PHASES)
        convolved = tl.load(source + offset[:, None] + channel[None, :], mask=mask, other=0.0)
        _finish(
            convolved.to(tl.float32), unit, pixels, channel, there, mask, demodulate, shift, noise,
            factor, style, rgb, features, image, rgb_stride, clamp, C, NOISE, STYLES, FEATURES, RGB,
            CLAMP, LEAK,
        )  # fmt: skip
    else:
        there = unit < pixels // 4
        mask = there[:, None] & known[None, :]
        row = unit // (width // 2) * 2
        column = unit % (width // 2) * 2
        cell = _filter(
            source, row - BORDER, column - BORDER, channel, mask, source_height, source_width, C,
            PHASES, TAPS, P_BLOCK, C_BLOCK,
        )  # fmt: skip
        for corner in tl.static_range(4):
            _finish(
                cell[corner], (row + corner // 2) * width + column + corner % 2, pixels, channel,
                there, mask, demodulate, shift, noise, factor, style, rgb, features, image,
                rgb_stride, clamp, C, NOISE, STYLES, FEATURES, RGB, CLAMP, LEAK,
            )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _differentiate(  # type: ignore[no-untyped-def] # pragma: no cover
    convolved,
    pixel,
    pixels,
    channel,
    there,
    mask,
    demodulate,
    shift,
    noise,
    factor,
    style,
    red,
    green,
    blue,
    grad_features,
    grad_image,
    grad_noise,
    clamp,
    sum_demodulation,
    sum_styles,
    sum_red,
    sum_green,
    sum_blue,
    C: tl.constexpr,
    NOISE: tl.constexpr,
    NOISE_GRADIENT: tl.constexpr,
    STYLES: tl.constexpr,
    FEATURES: tl.constexpr,
    RGB: tl.constexpr,
    CLAMP: tl.constexpr,
    LEAK: tl.constexpr,
):
    u = convolved * demodulate
    if NOISE:
        added = tl.load(noise + pixel, mask=there, other=0.0)
        u += (added * factor)[:, None]
    u += shift
    slope = tl.where(u > 0, 1.0, LEAK)
    x = u * slope
    if CLAMP:
        slope = tl.where((x >= -clamp) & (x <= clamp), slope, 0.0)
        x = tl.minimum(tl.maximum(x, -clamp), clamp)
    gradient = tl.zeros_like(convolved)
    if FEATURES:
        offset = pixel[:, None] * C + channel[None, :]
        gradient = tl.load(grad_features + offset, mask=mask, other=0.0).to(tl.float32)
        if STYLES:
            sum_styles += gradient * x
            gradient = gradient * style
    if RGB:
        colour = tl.load(grad_image + pixel, mask=there, other=0.0)[:, None]
        sum_red += colour * x
        gradient += colour * red
        colour = tl.load(grad_image + pixels + pixel, mask=there, other=0.0)[:, None]
        sum_green += colour * x
        gradient += colour * green
        colour = tl.load(grad_image + 2 * pixels + pixel, mask=there, other=0.0)[:, None]
        sum_blue += colour * x
        gradient += colour * blue
    gradient = gradient * slope
    sum_demodulation += gradient * convolved
    if NOISE_GRADIENT:
        tl.store(grad_noise + pixel, tl.sum(gradient, 1) * factor, mask=there)
    return gradient * demodulate, sum_demodulation, sum_styles, sum_red, sum_green, sum_blue


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    grad_features,
    grad_image,
    source,
    demodulation,
    bias,
    noise,
    strength,
    styles,
    rgb,
    grad_source,
    grad_noise,
    partial,
    height,
    width,
    source_height,
    source_width,
    noise_stride,
    demodulation_stride,
    styles_stride,
    rgb_stride,
    clamp,
    programs,
    C: tl.constexpr,
    C_BLOCK: tl.constexpr,
    P_BLOCK: tl.constexpr,
    PHASES: tl.constexpr,
    TAPS: tl.constexpr,
    BORDER: tl.constexpr,
    NOISE: tl.constexpr,
    SCALED: tl.constexpr,
    NOISE_GRADIENT: tl.constexpr,
    STYLES: tl.constexpr,
    FEATURES: tl.constexpr,
    RGB: tl.constexpr,
    CLAMP: tl.constexpr,
    LEAK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    await_turn()
    n = tl.program_id(1).to(tl.int64)
    program = tl.program_id(0)
    pixels = height * width
    channel = tl.arange(0, C_BLOCK)
    known = channel < C
    demodulate = tl.load(demodulation + n * demodulation_stride + channel, mask=known, other=0.0)
    demodulate = demodulate[None, :]
    shift = tl.load(bias + channel, mask=known, other=0.0)[None, :]
    factor = 1.0
    if SCALED:
        factor = tl.load(strength)
    style = 1.0
    if STYLES:
        style = tl.load(styles + n * styles_stride + channel, mask=known, other=0.0)[None, :]
    red = 0.0
    green = 0.0
    blue = 0.0
    if RGB:
        rgb += n * 3 * rgb_stride
        red = tl.load(rgb + channel, mask=known, other=0.0)[None, :]
        green = tl.load(rgb + rgb_stride + channel, mask=known, other=0.0)[None, :]
        blue = tl.load(rgb + 2 * rgb_stride + channel, mask=known, other=0.0)[None, :]
    source += n * source_height * source_width * C
    if NOISE:
        noise += n * noise_stride
    grad_features += n * pixels * C
    grad_image += n * 3 * pixels
    grad_noise += n * pixels
    grad_source += n * pixels * C
    sum_demodulation = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
    sum_styles = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
    sum_red = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
    sum_green = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
    sum_blue = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
    units = pixels if TAPS == 1 else pixels // 4
    for tile in tl.range(program, tl.cdiv(units, P_BLOCK), programs, num_stages=STAGES):
        unit = tile * P_BLOCK + tl.arange(0, P_BLOCK)
        there = unit < units
        mask = there[:, None] & known[None, :]
        if TAPS == 1:
            offset = unit * C
            if PHASES:
                offset = _locate(unit // width, unit % width, width, C, PHASES)
            place = offset[:, None] + channel[None, :]
            convolved = tl.load(source + place, mask=mask, other=0.0).to(tl.float32)
            gradient, sum_demodulation, sum_styles, sum_red, sum_green, sum_blue = _differentiate(
                convolved, unit, pixels, channel, there, mask, demodulate, shift, noise, factor,
                style, red, green, blue, grad_features, grad_image, grad_noise, clamp,
                sum_demodulation, sum_styles, sum_red, sum_green, sum_blue, C, NOISE,
                NOISE_GRADIENT, STYLES, FEATURES, RGB, CLAMP, LEAK,
            )  # fmt: skip
            tl.store(grad_source + place, gradient, mask=mask)
        else:
            row = unit // (width // 2) * 2
            column = unit % (width // 2) * 2
            cell = _filter(
                source, row - BORDER, column - BORDER, channel, mask, source_height, source_width,
                C, PHASES, TAPS, P_BLOCK, C_BLOCK,
            )  # fmt: skip
            for corner in tl.static_range(4):
                pixel = (row + corner // 2) * width + column + corner % 2
                (
                    gradient, sum_demodulation, sum_styles, sum_red, sum_green, sum_blue,
                ) = _differentiate(
                    cell[corner], pixel, pixels, channel, there, mask, demodulate, shift, noise,
                    factor, style, red, green, blue, grad_features, grad_image, grad_noise, clamp,
                    sum_demodulation, sum_styles, sum_red, sum_green, sum_blue, C, NOISE,
                    NOISE_GRADIENT, STYLES, FEATURES, RGB, CLAMP, LEAK,
                )  # fmt: skip
                place = pixel[:, None] * C + channel[None, :]
                tl.store(grad_source + place, gradient, mask=mask)
    partial += (n * programs + program) * ROWS * C
    tl.store(partial + channel, tl.sum(sum_demodulation, 0), mask=known)
    if STYLES:
        tl.store(partial + C + channel, tl.sum(sum_styles, 0), mask=known)
    if RGB:
        partial += (ROWS - 3) * C
        tl.store(partial + channel, tl.sum(sum_red, 0), mask=known)
        tl.store(partial + C + channel, tl.sum(sum_green, 0), mask=known)
        tl.store(partial + 2 * C + channel, tl.sum(sum_blue, 0), mask=known)


@triton.jit  # type: ignore[untyped-decorator]
def _adjoint_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    gradient,
    grad_source,
    height,
    width,
    source_height,
    source_width,
    C: tl.constexpr,
    C_BLOCK: tl.constexpr,
    P_BLOCK: tl.constexpr,
    PHASES: tl.constexpr,
    TAPS: tl.constexpr,
    BORDER: tl.constexpr,
):
    await_turn()
    # The filter is symmetric: its adjoint is itself, with the other border.
    n = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0) * P_BLOCK + tl.arange(0, P_BLOCK)
    channel = tl.arange(0, C_BLOCK)
    across = (source_width + 1) // 2
    row = unit // across * 2
    column = unit % across * 2
    mask = (row < source_height)[:, None] & (channel < C)[None, :]
    cell = _filter(
        gradient + n * height * width * C, row - BORDER, column - BORDER,
        channel, mask, height, width, C, False, TAPS, P_BLOCK, C_BLOCK,
    )  # fmt: skip
    grad_source += n * source_height * source_width * C
    for corner in tl.static_range(4):
        y = row + corner // 2
        x = column + corner % 2
        inside = mask & ((y < source_height) & (x < source_width))[:, None]
        place = _locate(y, x, source_width, C, PHASES)[:, None] + channel[None, :]
        tl.store(grad_source + place, cell[corner], mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _grow_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    image,
    layer,
    out,
    height,
    width,
    LAYER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    await_turn()
    # height and width are the small image's. A program has a part of one plane.
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < 4 * height * width
    plane = tl.program_id(1).to(tl.int64)
    x = at % (2 * width)
    y = at // (2 * width)
    column = x // 2
    row = y // 2
    beside = column + x % 2 * 2 - 1
    above = row + y % 2 * 2 - 1
    image += plane * (height * width)
    in_columns = there & (beside >= 0) & (beside < width)
    in_rows = (above >= 0) & (above < height)
    value = tl.load(image + row * width + column, mask=there, other=0.0) * 0.5625
    value += tl.load(image + row * width + beside, mask=in_columns, other=0.0) * 0.1875
    value += tl.load(image + above * width + column, mask=there & in_rows, other=0.0) * 0.1875
    value += tl.load(image + above * width + beside, mask=in_columns & in_rows, other=0.0) * 0.0625
    place = plane * (4 * height * width) + at
    if LAYER:
        value += tl.load(layer + place, mask=there, other=0.0)
    tl.store(out + place, value, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _shrink_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    gradient,
    out,
    height,
    width,
    BLOCK: tl.constexpr,
):
    await_turn()
    # The transposed of the one above; height and width are the small image's, too.
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < height * width
    plane = tl.program_id(1).to(tl.int64)
    column = at % width
    row = at // width
    gradient += plane * (4 * height * width)
    value = tl.zeros([BLOCK], dtype=tl.float32)
    for down in tl.static_range(4):
        y = 2 * row + down - 1
        for right in tl.static_range(4):
            x = 2 * column + right - 1
            inside = there & (y >= 0) & (y < 2 * height) & (x >= 0) & (x < 2 * width)
            part = tl.load(gradient + y * (2 * width) + x, mask=inside, other=0.0)
            value += part * (_tap(down, 4) * _tap(right, 4))
    tl.store(out + plane * (height * width) + at, value, mask=there)


def _block(C: int, tile: int, taps: int) -> tuple[int, int]:  # pragma: no cover
    """(channels, pixels; where there is a filter, cells of four) of a tile."""
    channels = triton.next_power_of_2(C)
    return channels, max(1, (tile if taps == 1 else FILTER_TILE) // channels)


def _sizes(
    source: Tensor, phases: bool, taps: int
) -> tuple[int, int, int, int, int, int]:  # pragma: no cover
    """(N, C, height, width, height and width of the source's own grid)."""
    N, C, source_height, source_width = source.shape
    if phases:
        C, source_height, source_width = C // 4, source_height * 2, source_width * 2
    border = {1: 0, 3: 2, 4: 1}[taps]
    return N, C, source_height - border, source_width - border, source_height, source_width


def _in_rows(table: Tensor) -> Tensor:  # pragma: no cover
    """[..., C] with all rows at the same distance, as a cut through wider tables has them."""
    even = table.ndim == 2 or table.stride(0) == table.shape[1] * table.stride(1)
    return table if table.stride(-1) == 1 and even else table.contiguous()


def _packed(x: Tensor) -> Tensor:  # pragma: no cover
    return x.contiguous(memory_format=torch.channels_last)


def forward(
    source: Tensor,
    demodulation: Tensor,
    bias: Tensor,
    noise: Tensor | None,
    strength: Tensor | None,
    styles: Tensor | None,
    rgb: Tensor | None,
    features: bool,
    phases: bool,
    taps: int,
    clamp: float,
    *,
    leak: float,
) -> tuple[Tensor, Tensor]:  # pragma: no cover
    """(features [N, C, H, W] in the source's type, image [N, 3, H, W]); [0] for what is not."""
    source = _packed(source)
    N, C, height, width, source_height, source_width = _sizes(source, phases, taps)
    made = source.new_empty(0)
    if features:
        made = torch.empty(
            (N, C, height, width),
            dtype=source.dtype,
            device=source.device,
            memory_format=torch.channels_last,
        )
    shape = (0,) if rgb is None else (N, 3, height, width)
    image = torch.empty(shape, dtype=torch.float32, device=source.device)
    C_BLOCK, P_BLOCK = _block(C, FORWARD_TILE, taps)
    noise = None if noise is None else noise.contiguous()
    demodulation = _in_rows(demodulation)
    styles = None if styles is None else _in_rows(styles)
    rgb = None if rgb is None else _in_rows(rgb)
    units = height * width if taps == 1 else height * width // 4
    launch(
        _forward_kernel,
        (triton.cdiv(units, P_BLOCK), N),
        source,
        demodulation,
        bias,
        noise,
        strength,
        styles,
        rgb,
        made,
        image,
        height,
        width,
        source_height,
        source_width,
        0 if noise is None or len(noise) == 1 else height * width,
        demodulation.stride(0),
        0 if styles is None else styles.stride(0),
        0 if rgb is None else rgb.stride(1),
        clamp,
        C=C,
        C_BLOCK=C_BLOCK,
        P_BLOCK=P_BLOCK,
        PHASES=phases,
        TAPS=taps,
        BORDER=1 if taps == 4 else 0,
        NOISE=noise is not None,
        SCALED=strength is not None,
        STYLES=styles is not None,
        FEATURES=features,
        RGB=rgb is not None,
        CLAMP=clamp > 0,
        LEAK=leak,
        num_warps=FORWARD_WARPS,
    )
    return made, image


def backward(
    grad_features: Tensor,
    grad_image: Tensor,
    source: Tensor,
    demodulation: Tensor,
    bias: Tensor,
    noise: Tensor | None,
    strength: Tensor | None,
    styles: Tensor | None,
    rgb: Tensor | None,
    features: bool,
    phases: bool,
    taps: int,
    clamp: float,
    noise_gradient: bool,
    *,
    leak: float,
) -> tuple[Tensor, Tensor, Tensor]:  # pragma: no cover
    """Gradients.

    Returns:
        (of the source, of the noise maps [N, 1, H, W] or [0], and the rows of `sum_rows`
        [N, rows, C]: of demodulation, styles if there are any, and rgb if there is one).
    """
    source = _packed(source)
    N, C, height, width, source_height, source_width = _sizes(source, phases, taps)
    C_BLOCK, P_BLOCK = _block(C, BACKWARD_TILE, taps)
    units = height * width if taps == 1 else height * width // 4
    programs = min(triton.cdiv(units, P_BLOCK), triton.cdiv(PROGRAMS, N))
    rows = 1 + (styles is not None) + 3 * (rgb is not None)
    partial = torch.empty((N, programs, rows, C), dtype=torch.float32, device=source.device)
    grad_source = torch.empty_like(source, memory_format=torch.channels_last)
    shape = (N, 1, height, width) if noise_gradient else (0,)
    grad_noise = torch.empty(shape, dtype=torch.float32, device=source.device)
    convolved = grad_source
    if taps > 1:
        convolved = torch.empty(
            (N, C, height, width),
            dtype=source.dtype,
            device=source.device,
            memory_format=torch.channels_last,
        )
    noise = None if noise is None else noise.contiguous()
    demodulation = _in_rows(demodulation)
    styles = None if styles is None else _in_rows(styles)
    rgb = None if rgb is None else _in_rows(rgb)
    launch(
        _backward_kernel,
        (programs, N),
        _packed(grad_features) if features else grad_features,
        grad_image.contiguous(),
        source,
        demodulation,
        bias,
        noise,
        strength,
        styles,
        rgb,
        convolved,
        grad_noise,
        partial,
        height,
        width,
        source_height,
        source_width,
        0 if noise is None or len(noise) == 1 else height * width,
        demodulation.stride(0),
        0 if styles is None else styles.stride(0),
        0 if rgb is None else rgb.stride(1),
        clamp,
        programs,
        C=C,
        C_BLOCK=C_BLOCK,
        P_BLOCK=P_BLOCK,
        PHASES=phases,
        TAPS=taps,
        BORDER=1 if taps == 4 else 0,
        NOISE=noise is not None,
        SCALED=strength is not None,
        NOISE_GRADIENT=noise_gradient,
        STYLES=styles is not None,
        FEATURES=features,
        RGB=rgb is not None,
        CLAMP=clamp > 0,
        LEAK=leak,
        ROWS=rows,
        STAGES=STAGES if taps == 1 else 1,
        num_warps=BACKWARD_WARPS,
    )
    if taps > 1:
        cells = (source_height + 1) // 2 * ((source_width + 1) // 2)
        launch(
            _adjoint_kernel,
            (triton.cdiv(cells, P_BLOCK), N),
            convolved,
            grad_source,
            height,
            width,
            source_height,
            source_width,
            C=C,
            C_BLOCK=C_BLOCK,
            P_BLOCK=P_BLOCK,
            PHASES=phases,
            TAPS=taps,
            BORDER=2,
            num_warps=4,
        )
    return grad_source, grad_noise, partial.sum(1)


class Grown(torch.autograd.Function):  # pragma: no cover
    """`stylegan2_epilogue.grow`: (image, layer or None) -> the image of twice the side."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, layer: Tensor | None) -> Tensor:
        image = image.contiguous()
        N, C, height, width = image.shape
        out = image.new_empty(N, C, 2 * height, 2 * width)
        launch(
            _grow_kernel,
            (triton.cdiv(4 * height * width, GROW_BLOCK), N * C),
            image,
            None if layer is None else layer.contiguous(),
            out,
            height,
            width,
            LAYER=layer is not None,
            BLOCK=GROW_BLOCK,
        )
        ctx.layered = layer is not None
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        gradient = gradients[0].contiguous()
        N, C, height, width = gradient.shape
        height, width = height // 2, width // 2
        out = gradient.new_empty(N, C, height, width)
        launch(
            _shrink_kernel,
            (triton.cdiv(height * width, GROW_BLOCK), N * C),
            gradient,
            out,
            height,
            width,
            BLOCK=GROW_BLOCK,
        )
        return out, gradient if ctx.layered else None
