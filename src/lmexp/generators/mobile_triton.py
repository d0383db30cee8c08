"""The large layers of MobileStyleGAN by Triton kernels (`mobile_kernels`), forward and backward.

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

# "no cover": it runs on GPUs and, when tested, in a process of its own.

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lmexp.generators.mobile_kernels import (
    add_up_kernel,
    back_image_kernel,
    gather_bands_kernel,
    gather_kernel,
    image_kernel,
    product_kernel,
    spread_bands_kernel,
    spread_kernel,
    stream_kernel,
)
from lmexp.generators.mobile_lowered import LoweredHead, LoweredTail
from lmexp.generators.mobile_styles import split_styles
from lmexp.kernel_launch import launch

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
    """What add_up_kernel's programs do for each image, the longest first.

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
    launch(
        add_up_kernel,
        (n, len(table)),
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
    launch(
        spread_kernel,
        grid,
        x,
        style,
        style.stride(0),
        taps,
        out,
        height,
        width,
        C=channels,
        **sizes,
    )
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
    launch(
        spread_bands_kernel,
        (tiles, channels // narrow),
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
    launch(
        stream_kernel,
        (min(programs, tiles), across),
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
    launch(
        product_kernel,
        (triton.cdiv(rows, m) * triton.cdiv(outputs, wide),),
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
    launch(
        image_kernel,
        (_tiles(ROWS, COLUMNS, n, height, width),),
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
    launch(
        back_image_kernel,
        (tiles, triton.cdiv(outputs, wide)),
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
    launch(
        gather_kernel,
        grid,
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
    launch(
        gather_bands_kernel,
        grid,
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
