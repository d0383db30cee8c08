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

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_TILE, FORWARD_WARPS = 4096, 4
BACKWARD_TILE, BACKWARD_WARPS = 2048, 4
ADJOINT_TILE, ADJOINT_WARPS = 4096, 4
"""Elements of a tile and warps that work on it."""
PROGRAMS = 1056
"""Programs that share the pixels of a batch in the backward pass: 8 for each of 132 processors."""


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
def _gather(  # type: ignore[no-untyped-def] # pragma: no cover
    source,
    row,
    column,
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
    if TAPS == 1:
        offset = _locate(row, column, width, C, PHASES)
        value = tl.load(source + offset[:, None] + channel[None, :], mask=mask, other=0.0)
        total = value.to(tl.float32)
    else:
        total = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
        shift: tl.constexpr = 1 if TAPS == 4 else 0
        for down in tl.static_range(TAPS):
            for right in tl.static_range(TAPS):
                y = row + (down - shift)
                x = column + (right - shift)
                inside = mask
                if TAPS == 4:
                    there = (y >= 0) & (y < height) & (x >= 0) & (x < width)
                    inside = mask & there[:, None]
                offset = _locate(y, x, width, C, PHASES)
                value = tl.load(source + offset[:, None] + channel[None, :], mask=inside, other=0.0)
                total += value.to(tl.float32) * (_tap(down, TAPS) * _tap(right, TAPS))
    return total


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
    NOISE: tl.constexpr,
    SCALED: tl.constexpr,
    STYLES: tl.constexpr,
    FEATURES: tl.constexpr,
    RGB: tl.constexpr,
    CLAMP: tl.constexpr,
    LEAK: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    pixels = height * width
    pixel = tl.program_id(0) * P_BLOCK + tl.arange(0, P_BLOCK)
    channel = tl.arange(0, C_BLOCK)
    there = pixel < pixels
    known = channel < C
    mask = there[:, None] & known[None, :]
    x = _gather(
        source + n * source_height * source_width * C,
        pixel // width,
        pixel % width,
        channel,
        mask,
        source_height,
        source_width,
        C,
        PHASES,
        TAPS,
        P_BLOCK,
        C_BLOCK,
    )
    x = (
        x
        * tl.load(demodulation + n * demodulation_stride + channel, mask=known, other=0.0)[None, :]
    )
    if NOISE:
        added = tl.load(noise + n * noise_stride + pixel, mask=there, other=0.0)
        if SCALED:
            added = added * tl.load(strength)
        x += added[:, None]
    x += tl.load(bias + channel, mask=known, other=0.0)[None, :]
    x = tl.where(x > 0, x, x * LEAK)
    if CLAMP:
        x = tl.minimum(tl.maximum(x, -clamp), clamp)
    if FEATURES:
        modulated = x
        if STYLES:
            modulated = (
                x * tl.load(styles + n * styles_stride + channel, mask=known, other=0.0)[None, :]
            )
        offset = pixel[:, None] * C + channel[None, :]
        tl.store(features + n * pixels * C + offset, modulated, mask=mask)
    if RGB:
        for colour in tl.static_range(3):
            row = tl.load(rgb + (n * 3 + colour) * rgb_stride + channel, mask=known, other=0.0)
            tl.store(
                image + (n * 3 + colour) * pixels + pixel, tl.sum(x * row[None, :], 1), mask=there
            )


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
    NOISE: tl.constexpr,
    SCALED: tl.constexpr,
    NOISE_GRADIENT: tl.constexpr,
    STYLES: tl.constexpr,
    FEATURES: tl.constexpr,
    RGB: tl.constexpr,
    CLAMP: tl.constexpr,
    LEAK: tl.constexpr,
    ROWS: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    program = tl.program_id(0)
    pixels = height * width
    channel = tl.arange(0, C_BLOCK)
    known = channel < C
    demodulate = tl.load(demodulation + n * demodulation_stride + channel, mask=known, other=0.0)[
        None, :
    ]
    offset_bias = tl.load(bias + channel, mask=known, other=0.0)[None, :]
    source += n * source_height * source_width * C
    grad_source += n * pixels * C
    sum_demodulation = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
    if STYLES:
        style = tl.load(styles + n * styles_stride + channel, mask=known, other=0.0)[None, :]
        sum_styles = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
    if RGB:
        red = tl.load(rgb + n * 3 * rgb_stride + channel, mask=known, other=0.0)[None, :]
        green = tl.load(rgb + (n * 3 + 1) * rgb_stride + channel, mask=known, other=0.0)[None, :]
        blue = tl.load(rgb + (n * 3 + 2) * rgb_stride + channel, mask=known, other=0.0)[None, :]
        sum_red = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
        sum_green = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
        sum_blue = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
    factor = 1.0
    if SCALED:
        factor = tl.load(strength)
    for tile in range(program, tl.cdiv(pixels, P_BLOCK), programs):
        pixel = tile * P_BLOCK + tl.arange(0, P_BLOCK)
        there = pixel < pixels
        mask = there[:, None] & known[None, :]
        row = pixel // width
        column = pixel % width
        offset = pixel[:, None] * C + channel[None, :]
        convolved = _gather(
            source,
            row,
            column,
            channel,
            mask,
            source_height,
            source_width,
            C,
            PHASES,
            TAPS,
            P_BLOCK,
            C_BLOCK,
        )
        u = convolved * demodulate
        if NOISE:
            added = tl.load(noise + n * noise_stride + pixel, mask=there, other=0.0)
            u += (added * factor)[:, None]
        u += offset_bias
        slope = tl.where(u > 0, 1.0, LEAK)
        x = u * slope
        if CLAMP:
            slope = tl.where((x >= -clamp) & (x <= clamp), slope, 0.0)
            x = tl.minimum(tl.maximum(x, -clamp), clamp)
        gradient = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
        if FEATURES:
            gradient = tl.load(grad_features + n * pixels * C + offset, mask=mask, other=0.0).to(
                tl.float32
            )
            if STYLES:
                sum_styles += gradient * x
                gradient = gradient * style
        if RGB:
            base = grad_image + n * 3 * pixels + pixel
            colour = tl.load(base, mask=there, other=0.0)[:, None]
            sum_red += colour * x
            gradient += colour * red
            colour = tl.load(base + pixels, mask=there, other=0.0)[:, None]
            sum_green += colour * x
            gradient += colour * green
            colour = tl.load(base + 2 * pixels, mask=there, other=0.0)[:, None]
            sum_blue += colour * x
            gradient += colour * blue
        gradient = gradient * slope
        sum_demodulation += gradient * convolved
        if NOISE_GRADIENT:
            tl.store(grad_noise + n * pixels + pixel, tl.sum(gradient, 1) * factor, mask=there)
        gradient = gradient * demodulate
        if TAPS == 1:
            place = _locate(row, column, width, C, PHASES)
            tl.store(grad_source + place[:, None] + channel[None, :], gradient, mask=mask)
        else:
            tl.store(grad_source + offset, gradient, mask=mask)
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
):
    n = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * P_BLOCK + tl.arange(0, P_BLOCK)
    channel = tl.arange(0, C_BLOCK)
    there = pixel < source_height * source_width
    mask = there[:, None] & (channel < C)[None, :]
    row = pixel // source_width
    column = pixel % source_width
    gradient += n * height * width * C
    shift: tl.constexpr = 1 if TAPS == 4 else 0
    total = tl.zeros([P_BLOCK, C_BLOCK], dtype=tl.float32)
    for down in tl.static_range(TAPS):
        for right in tl.static_range(TAPS):
            y = row - (down - shift)
            x = column - (right - shift)
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            value = tl.load(
                gradient + ((y * width + x) * C)[:, None] + channel[None, :],
                mask=mask & inside[:, None],
                other=0.0,
            )
            total += value.to(tl.float32) * (_tap(down, TAPS) * _tap(right, TAPS))
    place = _locate(row, column, source_width, C, PHASES)
    grad_source += n * source_height * source_width * C
    tl.store(grad_source + place[:, None] + channel[None, :], total, mask=mask)


def _block(C: int, tile: int) -> tuple[int, int]:  # pragma: no cover
    """(channels, pixels) of a tile."""
    channels = triton.next_power_of_2(C)
    return channels, max(1, tile // channels)


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
    C_BLOCK, P_BLOCK = _block(C, FORWARD_TILE)
    noise = None if noise is None else noise.contiguous()
    demodulation = _in_rows(demodulation)
    styles = None if styles is None else _in_rows(styles)
    rgb = None if rgb is None else _in_rows(rgb)
    _forward_kernel[(triton.cdiv(height * width, P_BLOCK), N)](
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
    C_BLOCK, P_BLOCK = _block(C, BACKWARD_TILE)
    programs = min(triton.cdiv(height * width, P_BLOCK), triton.cdiv(PROGRAMS, N))
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
    _backward_kernel[(programs, N)](
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
        NOISE=noise is not None,
        SCALED=strength is not None,
        NOISE_GRADIENT=noise_gradient,
        STYLES=styles is not None,
        FEATURES=features,
        RGB=rgb is not None,
        CLAMP=clamp > 0,
        LEAK=leak,
        ROWS=rows,
        num_warps=BACKWARD_WARPS,
    )
    if taps > 1:
        C_BLOCK, P_BLOCK = _block(C, ADJOINT_TILE)
        _adjoint_kernel[(triton.cdiv(source_height * source_width, P_BLOCK), N)](
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
            num_warps=ADJOINT_WARPS,
        )
    return grad_source, grad_noise, partial.sum(1)
