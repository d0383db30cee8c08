"""MobileStyleGAN's large layers on a GPU: the kernels in use, and the same work in two parts.

    python scripts/time_mobile_layers.py --batch 8 --out layers.json
    TRITON_INTERPRET=1 python scripts/time_mobile_layers.py --check    # values alone, on a CPU

`lmexp.generators.mobile_triton` computes a layer in one pass: each program adds up the nine shifts
of its depthwise convolution while the 1×1 product is under way, and where a layer has more outputs
than a program computes, the shifts are added up again for each share of them. The other form tried
here writes what the shifts add up to, and leaves the product to a kernel that does nothing else
(forward, with noise, bias and activation) or to torch's (backward). That is twice the memory's
traffic, for loads that the tensor cores can be fed with. Which one is faster depends on the layer
and the card, so both are timed, with several tilings, each alone in a CUDA graph; beside them
stands what reading and writing each map once would take at `--bandwidth`.

Weights are random: times are the same.
"""

# Upper case marks what a kernel is compiled for, as in Triton's own code.
# ruff: noqa: N803

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from lmexp.convolutions import depthwise
from lmexp.generators import mobile_triton as fused
from lmexp.generators.mobile_lowered import LoweredLayer, merge_last
from lmexp.generators.mobile_stylegan import MobileStyleGAN

PLACES = tuple(
    dict(zip(("ROWS", "COLUMNS", "CHANNELS", "num_warps"), row, strict=True))
    for row in ((2, 8, 64, 4), (4, 8, 64, 4), (1, 16, 64, 4), (2, 8, 32, 2), (4, 8, 32, 4))
)
"""Tilings of what adds up shifts; a place stands for 2×2 pixels."""
PRODUCTS = tuple(
    dict(zip(("M", "N", "K", "num_warps", "num_stages"), row, strict=True))
    for row in (
        (128, 128, 64, 8, 3),
        (128, 64, 64, 4, 4),
        (64, 128, 64, 4, 4),
        (128, 256, 64, 8, 3),
    )
)
"""Tilings of a product: rows, outputs and terms of a step."""


@triton.jit
def _spread_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    x,
    style,
    taps,
    out,
    height,
    width,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # Depthwise 3×3 of the modulated map: what a layer's product is of.
    tile = tl.program_id(0)
    image, row, column, _ = fused._place(tile, height // 2, width // 2, ROWS, COLUMNS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x += image * height * width * C
    out += image * height * width * C
    own = tl.load(style + image * C + channel)[None, :]
    a, b, c, d = fused._convolve(x, taps, row, column, channel, height, width, C, False)
    value = fused._stack(a * own, b * own, c * own, d * own)
    pixel, inside = fused._place_pixels(tile, height, width, ROWS, COLUMNS)
    tl.store(out + (pixel * C)[:, None] + channel[None, :], value, mask=inside[:, None])


@triton.jit
def _product_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    x,
    weight,
    constant,
    bias,
    out,
    rows,
    places,
    leak,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    CONSTANTS: tl.constexpr,
    BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    # [rows, C_IN] · weight [C_OUT, C_IN] turned, constant, bias, leaky ReLU.
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    output = tl.program_id(1) * N + tl.arange(0, N)
    there = row < rows
    total = tl.zeros([M, N], dtype=tl.float32)
    for start in range(0, C_IN, K):
        term = start + tl.arange(0, K)
        inside = term < C_IN
        left = tl.load(
            x + row[:, None] * C_IN + term[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + output[None, :] * C_IN + term[:, None],
            mask=inside[:, None] & (output < C_OUT)[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    shown = there[:, None] & (output < C_OUT)[None, :]
    if CONSTANTS == 1:
        total += tl.load(constant + row % places, mask=there, other=0.0)[:, None]
    else:
        at = (row % places)[:, None] * C_OUT + output[None, :]
        total += tl.load(constant + at, mask=shown, other=0.0)
    if BIAS:
        total += tl.load(bias + output, mask=output < C_OUT, other=0.0)[None, :]
    total = tl.where(total > 0, total, leak * total)
    tl.store(out + row[:, None] * C_OUT + output[None, :], total, mask=shown)


@triton.jit
def _gather_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    gradient,
    taps,
    more,
    y,
    style,
    sums,
    out,
    height,
    width,
    leak,
    C: tl.constexpr,
    MORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # Back through a depthwise convolution, a style and an activation; sums for the style.
    tile = tl.program_id(0)
    image, row, column, _ = fused._place(tile, height // 2, width // 2, ROWS, COLUMNS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    size = image * height * width * C
    gradient += size
    y += size
    out += size
    a, b, c, d = fused._convolve(gradient, taps, row, column, channel, height, width, C, True)
    if MORE:
        more += size
        a += fused._read(more, 2 * row, 2 * column, channel, height, width, C)
        b += fused._read(more, 2 * row, 2 * column + 1, channel, height, width, C)
        c += fused._read(more, 2 * row + 1, 2 * column, channel, height, width, C)
        d += fused._read(more, 2 * row + 1, 2 * column + 1, channel, height, width, C)
    level_a = fused._read(y, 2 * row, 2 * column, channel, height, width, C)
    level_b = fused._read(y, 2 * row, 2 * column + 1, channel, height, width, C)
    level_c = fused._read(y, 2 * row + 1, 2 * column, channel, height, width, C)
    level_d = fused._read(y, 2 * row + 1, 2 * column + 1, channel, height, width, C)
    found = a * level_a + b * level_b + c * level_c + d * level_d
    tl.store(sums + tile.to(tl.int64) * C + channel, tl.sum(found, 0))
    own = tl.load(style + image * C + channel)[None, :]
    a *= tl.where(level_a > 0, own, leak * own)
    b *= tl.where(level_b > 0, own, leak * own)
    c *= tl.where(level_c > 0, own, leak * own)
    d *= tl.where(level_d > 0, own, leak * own)
    pixel, inside = fused._place_pixels(tile, height, width, ROWS, COLUMNS)
    at = (pixel * C)[:, None] + channel[None, :]
    tl.store(out + at, fused._stack(a, b, c, d), mask=inside[:, None])


@triton.jit
def _gather_bands_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    gradient,
    taps,
    x,
    up,
    style,
    sums,
    out,
    height,
    width,
    leak,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # The same through the inverse Haar transform that the layer reads: x [N, h, w, 4 C] are the
    # bands, the gradient is [N, 2 h, 2 w, C].
    tile = tl.program_id(0)
    image, row, column, inside = fused._place(tile, height, width, ROWS, COLUMNS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    gradient += image * (4 * height * width * C)
    x += image * (height * width * 4 * C)
    out += image * (height * width * 4 * C)
    up += image * (4 * C)
    sums += tile.to(tl.int64) * (4 * C)
    a, b, c, d = fused._convolve(
        gradient, taps, row, column, channel, 2 * height, 2 * width, C, True
    )
    own = tl.load(style + image * C + channel)[None, :]
    at = out + ((row * width + column) * (4 * C))[:, None]
    there = inside[:, None]
    low = _back_band(
        (a + b) + (c + d), own, x, up, sums, row, column, channel, height, width, leak, 4 * C
    )
    tl.store(at + channel[None, :], low, mask=there)
    rows = _back_band(
        (a + b) - (c + d), own, x, up, sums, row, column, C + channel, height, width, leak, 4 * C
    )
    tl.store(at + (C + channel)[None, :], rows, mask=there)
    columns = _back_band(
        (a - b) + (c - d),
        own,
        x,
        up,
        sums,
        row,
        column,
        2 * C + channel,
        height,
        width,
        leak,
        4 * C,
    )
    tl.store(at + (2 * C + channel)[None, :], columns, mask=there)
    both = _back_band(
        (a - b) - (c - d),
        own,
        x,
        up,
        sums,
        row,
        column,
        3 * C + channel,
        height,
        width,
        leak,
        4 * C,
    )
    tl.store(at + (3 * C + channel)[None, :], both, mask=there)


@triton.jit
def _back_band(  # type: ignore[no-untyped-def] # pragma: no cover
    value, own, x, up, sums, row, column, stored, height, width, leak, BANDS: tl.constexpr
):
    # As mobile_triton's, whose program of the first outputs alone stores the sums.
    level = fused._read(x, row, column, stored, height, width, BANDS)
    tl.store(sums + stored, tl.sum(value * level, 0))
    scale = tl.load(up + stored)[None, :] * own
    return value * tl.where(level > 0, scale, leak * scale)


def split_layer(
    x: Tensor, style: Tensor, layer: Any, places: dict[str, int], product: dict[str, int]
) -> Tensor:
    """`mobile_triton._layer` in two parts."""
    n, height, width, inputs = x.shape
    outputs = layer.weight.shape[0]
    spread = torch.empty_like(x)
    tiles = fused._tiles(places["ROWS"], places["COLUMNS"], n, height // 2, width // 2)
    own = places | {"CHANNELS": min(places["CHANNELS"], inputs)}
    _spread_kernel[(tiles, inputs // own["CHANNELS"])](
        x, style, layer.taps, spread, height, width, C=inputs, **own
    )
    out = x.new_empty(n, height, width, outputs)
    rows = n * height * width
    own = product | {
        "N": min(product["N"], max(16, outputs)),
        "K": min(product["K"], max(16, inputs)),
    }
    _product_kernel[(triton.cdiv(rows, own["M"]), triton.cdiv(outputs, own["N"]))](
        spread,
        layer.weight,
        layer.constant,
        layer.bias,
        out,
        rows,
        height * width,
        fused.LEAK,
        C_IN=inputs,
        C_OUT=outputs,
        CONSTANTS=layer.constant.shape[-1],
        BIAS=layer.bias is not None,
        **own,
    )
    return out


def split_back(
    gradient: Tensor,
    taps: Tensor,
    y: Tensor,
    style: Tensor,
    weight: Tensor,
    more: Tensor | None,
    places: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """`mobile_triton._back` in two parts, the second torch's own product."""
    n, height, width, channels = y.shape
    own = places | {"CHANNELS": min(places["CHANNELS"], channels)}
    tiles = fused._tiles(own["ROWS"], own["COLUMNS"], n, height // 2, width // 2)
    sums = torch.empty(tiles, channels, device=y.device)
    value = torch.empty_like(y)
    _gather_kernel[(tiles, channels // own["CHANNELS"])](
        gradient,
        taps,
        more,
        y,
        style,
        sums,
        value,
        height,
        width,
        fused.LEAK,
        C=channels,
        MORE=more is not None,
        **own,
    )
    out = value.flatten(0, 2) @ weight.T
    return out.view(n, height, width, -1), fused._add_up(sums, n)


@dataclass
class Timed:
    """One layer one way: the fastest tiling of each form.

    Attributes:
        what: `layer` (forward), `back` (from a layer of as many channels as this one's outputs), or
            `back to bands` (from a block that reads these as bands).
        side, inputs, outputs: of the layer; px and channels.
        fused, split: µs.
        tiling: of the fastest of the second form.
        least: µs that reading each input and writing each output once would take.
        error: of the second form against the first (with --check: plain operations), relative.
    """

    what: str
    side: int
    inputs: int
    outputs: int
    fused: float
    split: float
    tiling: list[dict[str, int]]
    least: float
    error: float


def split_back_bands(
    gradient: Tensor,
    taps: Tensor,
    x: Tensor,
    up: Tensor,
    style: Tensor,
    weight: Tensor,
    places: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """`mobile_triton._back_merge` in two parts, the second torch's own product."""
    n, height, width, bands = x.shape
    channels = bands // 4
    own = places | {"CHANNELS": min(places["CHANNELS"], channels)}
    tiles = fused._tiles(own["ROWS"], own["COLUMNS"], n, height, width)
    sums = torch.empty(tiles, bands, device=x.device)
    value = torch.empty_like(x)
    _gather_bands_kernel[(tiles, channels // own["CHANNELS"])](
        gradient, taps, x, up, style, sums, value, height, width, fused.LEAK, C=channels, **own
    )
    found = fused._add_up(sums, n).view(n, 4, channels)
    of_up = (found * style[:, None]).flatten(1)
    out = (value.flatten(0, 2) @ weight.T).view(n, height, width, -1)
    return out, of_up, (found * up.view(n, 4, channels)).sum(1)


def back_bands(
    gradient: Tensor, taps: Tensor, x: Tensor, up: Tensor, style: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    """`mobile_triton._back_merge` by torch's own derivatives."""
    before, up, style = (value.detach().requires_grad_() for value in (x, up, style))
    merged = merge_last(before * up[:, None, None]) * style[:, None, None]
    value = depthwise(gradient, taps.flip(0).view(3, 3, -1))
    of_x, *of_styles = torch.autograd.grad(merged, (before, up, style), value)
    return (torch.where(x > 0, of_x, fused.LEAK * of_x) @ weight.T, *of_styles)


def back(
    gradient: Tensor, taps: Tensor, y: Tensor, style: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """`mobile_triton._back` in plain operations."""
    value = depthwise(gradient, taps.flip(0).view(3, 3, -1))
    slope = torch.where(y > 0, style[:, None, None], fused.LEAK * style[:, None, None])
    return (value * slope) @ weight.T, (value * y).sum((1, 2))


def clock(work: Callable[[], Any], device: torch.device) -> float:
    """µs of one call, the median of nine graphs' replays of ten calls each."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            work()
    found = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 100)
    return statistics.median(found[1:])


def relative(got: Tensor | tuple[Tensor, ...], wanted: Tensor | tuple[Tensor, ...]) -> float:
    """The largest of the results' relative errors."""
    if isinstance(got, Tensor) and isinstance(wanted, Tensor):
        return float((got.float() - wanted.float()).norm() / wanted.float().norm())
    return max(itertools.starmap(relative, zip(got, wanted, strict=True)))


def try_layer(
    layer: LoweredLayer, batch: int, bandwidth: float, device: torch.device, *, check: bool
) -> list[Timed]:
    """Both forms of one layer, forward, and back from the layer behind it."""
    side = layer.constant.shape[0]
    outputs, inputs = layer.weight.shape
    dtype, draw = layer.weight.dtype, torch.Generator(device).manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device).to(dtype)

    x, style = make(batch, side, side, inputs), make(batch, inputs).float()
    # Back from a layer of as many channels as this one has outputs.
    y, gradient = make(batch, side, side, outputs), make(batch, side, side, outputs)
    taps, below = make(9, outputs).float(), make(inputs, outputs) / outputs**0.5
    own = make(batch, outputs).float()
    # The layer before ends in bands, read with a quarter of the channels at twice the side.
    bands, up, narrow = y, make(batch, outputs).float(), make(batch, outputs // 4).float()
    spread = make(batch, 2 * side, 2 * side, outputs // 4)
    of_bands = make(9, outputs // 4).float()
    traffic = batch * side**2 * x.element_size()
    found = []
    for what, one, several, tilings, maps in (
        (
            "layer",
            lambda: layer(x, style) if check else fused._layer(x, style, layer),
            lambda *t: split_layer(x, style, layer, *t),
            list(itertools.product(PLACES, PRODUCTS)),
            inputs + outputs,
        ),
        (
            "back",
            lambda: (back if check else fused._back)(gradient, taps, y, own, below),
            lambda *t: split_back(gradient, taps, y, own, below, None, *t),
            [(places,) for places in PLACES],
            2 * outputs + inputs,
        ),
        (
            "back to bands",
            lambda: (back_bands if check else fused._back_merge)(
                spread, of_bands, bands, up, narrow, below
            ),
            lambda *t: split_back_bands(spread, of_bands, bands, up, narrow, below, *t),
            [(places,) for places in PLACES],
            2 * outputs + inputs,
        ),
    ):
        wanted = one()
        error, best, tiling = 0.0, float("inf"), tilings[0]
        for candidate in tilings[:1] if check else tilings:
            got = several(*candidate)
            error = max(error, relative(got, wanted))
            if (
                not check
                and (seconds := clock(lambda c=candidate, s=several: s(*c), device)) < best
            ):
                best, tiling = seconds, candidate
        found.append(
            Timed(
                what,
                side,
                inputs,
                outputs,
                float("nan") if check else clock(one, device),
                best,
                list(tiling),
                traffic * maps / bandwidth * 1e6,
                error,
            )
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bandwidth", type=float, default=4.2e12, help="bytes a second")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--check", action="store_true", help="small maps, values alone")
    args = parser.parse_args(arguments)
    device = torch.device("cpu" if args.check else "cuda")
    dtype = torch.float32 if args.check else torch.bfloat16
    if args.check:
        layers = [make_layer(8, 32, 64, 1, device, dtype), make_layer(8, 64, 16, 16, device, dtype)]
    else:
        layers = find_layers(device, dtype)
    found = []
    for layer in layers:
        found += try_layer(
            layer, 2 if args.check else args.batch, args.bandwidth, device, check=args.check
        )
    print("| | side | channels | fused µs | in two parts | least | error |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for t in found:
        print(
            f"| {t.what} | {t.side} | {t.inputs} → {t.outputs} | {t.fused:.0f} | {t.split:.0f} | "
            f"{t.least:.0f} | {t.error:.1e} |"
        )
    if args.out is not None:
        args.out.write_text(json.dumps([asdict(t) for t in found], indent=1) + "\n")
    return int(any(t.error > (1e-5 if args.check else 0.02) for t in found))


def make_layer(
    side: int, inputs: int, outputs: int, constants: int, device: torch.device, dtype: torch.dtype
) -> LoweredLayer:
    """A layer with kernels, of random weights."""
    torch.manual_seed(side + inputs)
    layer = LoweredLayer.__new__(LoweredLayer)
    nn.Module.__init__(layer)
    layer.dense = False
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    for name, value in (
        ("weight", weight),
        ("columns", weight.T.contiguous()),
        ("taps", torch.randn(3, 3, inputs) / 3),
        ("constant", torch.randn(side, side, constants)),
        ("bias", torch.randn(outputs)),
    ):
        layer.register_buffer(name, value)
    return layer.to(device)


def find_layers(device: torch.device, dtype: torch.dtype) -> list[LoweredLayer]:
    """The large layers of MobileStyleGAN at 1024 px, with its own weights."""
    network = MobileStyleGAN(resolution=1024).eval().requires_grad_(False).to(device)
    network.lower_precision(dtype)
    return [
        module
        for module in network.modules()
        if isinstance(module, LoweredLayer) and not module.dense
    ]


if __name__ == "__main__":
    sys.exit(main())
