"""The kernels of MobileStyleGAN's large layers, each alone, with several sizes of their programs.

    python scripts/time_mobile_layers.py --batch 8 --out layers.json

Each of the kernels of `lmexp.generators.mobile_triton` runs alone in a CUDA graph, on maps of the
sizes of the network at 1024 px, with the sizes that the module sets and with some others. Beside
them stands what reading and writing each map once would take at `--bandwidth`. Weights and maps are
random: times are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from lmexp.generators import mobile_triton as kernels
from lmexp.generators.mobile_lowered import LoweredLayer

LAYERS = (
    (32, 128, 512),
    (32, 512, 512),
    (64, 128, 512),
    (64, 512, 512),
    (128, 128, 256),
    (128, 256, 256),
    (256, 64, 128),
    (256, 128, 128),
    (512, 32, 64),
    (512, 64, 64),
)
"""Side, px, inputs and outputs; of two of a side, the first reads merged bands."""
STRIPS = tuple(
    {
        "STRIP_PLACES": places,
        "STRIP_WARPS": warps,
        "STRIP_STAGES": stages,
        "BANDS_STAGES": stages,
        "SPREAD_ROWS": rows,
        "GATHER_ROWS": rows,
    }
    for rows, places, warps, stages in (
        (16, 16, 4, 4),
        (32, 16, 4, 3),
        (32, 16, 4, 5),
        (64, 16, 4, 3),
        (32, 16, 8, 3),
        (32, 32, 8, 4),
    )
)
BANDS = tuple(
    {"SPREAD_BANDS": rows, "SPREAD_STAGES": stages, "SPREAD_VALUES": values}
    for rows, stages, values in ((16, 3, 1024), (32, 2, 1024), (32, 3, 512), (64, 3, 1024))
)
PRODUCTS = (
    *(
        {"PRODUCT": sizes, "NARROW_PRODUCT": sizes, "STREAM": {}}
        for sizes in (
            (64, 128, 64, 4, 4),
            (128, 64, 64, 4, 4),
            (128, 128, 64, 4, 3),
            (128, 128, 64, 8, 3),
            (128, 256, 64, 8, 3),
        )
    ),
    *(
        {"STREAM": dict.fromkeys((64, 128, 256, 512), sizes)}
        for sizes in ((64, 64, 4, 4, 4), (64, 128, 4, 3, 2), (64, 128, 8, 4, 1), (64, 256, 8, 3, 1))
    ),
)
PAINTING = tuple(
    {"PAINTING_PRODUCT": sizes}
    for sizes in ((64, 64, 64, 4, 3), (64, 64, 64, 8, 4), (128, 64, 64, 4, 4), (128, 64, 64, 8, 4))
)
PAINTED = tuple(
    {"PAINTED_ROWS": rows, "PAINTED_PLACES": places, "WARPS": warps}
    for rows, places, warps in ((16, 64, 4), (64, 64, 4), (16, 128, 8), (32, 32, 4))
)
ADDING = tuple(
    {"ADDED_TILES": tiles, "ADDED_WARPS": warps}
    for tiles, warps in ((16, 2), (16, 4), (32, 2), (32, 4), (64, 8), (128, 8))
)


@dataclass
class Timed:
    """A kernel on one map.

    Attributes:
        what: the kernel, or `product back`, which is torch's.
        side, inputs, outputs: of the layer; px and channels. Of all layers together 0.
        now: µs, with the module's sizes.
        best: µs, with the fastest of those tried.
        sizes: those of `best`; none where they are the module's.
        least: µs that reading each input and writing each output once would take.
    """

    what: str
    side: int
    inputs: int
    outputs: int
    now: float
    best: float
    sizes: dict[str, Any]
    least: float


def clock(work: Callable[[], Any]) -> float:
    """µs of one call, the median of nine graphs' replays of ten calls each."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
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


@contextlib.contextmanager
def sized(sizes: dict[str, Any]) -> Iterator[None]:
    """The module with other sizes."""
    with contextlib.ExitStack() as stack:
        for name, value in sizes.items():
            stack.enter_context(mock.patch.object(kernels, name, value))
        yield


def make_layer(side: int, inputs: int, outputs: int, dtype: torch.dtype) -> LoweredLayer:
    """A layer with kernels, of random weights."""
    layer = LoweredLayer.__new__(LoweredLayer)
    nn.Module.__init__(layer)
    layer.dense = False
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    for name, value in (
        ("weight", weight),
        ("taps", torch.randn(3, 3, inputs) / 3),
        ("constant", torch.randn(side, side, 1)),
        ("bias", torch.randn(outputs)),
    ):
        layer.register_buffer(name, value)
    return layer.cuda()


def make_room(read: torch.Tensor, **kind: bool) -> torch.Tensor:
    """Room for a map's partial sums, which is as much as its kernel has programs."""
    partial = kernels._measure(read, **kind)
    return kernels._make_room([partial], len(read), read.device)[1][0]


Work = tuple[str, Callable[[], Any], Sequence[dict[str, Any]], int]
"""A name, what is timed, sizes to try, and values read and written."""


def list_work(side: int, inputs: int, outputs: int, batch: int) -> Iterator[Work]:
    """What a layer is made of, there and back."""
    dtype, places = torch.bfloat16, batch * side**2

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    layer = make_layer(side, inputs, outputs, dtype)
    taps: Any = layer.taps
    x = make(batch, side, side, inputs)
    # Columns of one tensor, as in the network.
    styles = torch.randn(batch, 5 * inputs, device="cuda")
    up, style = styles.split([4 * inputs, inputs], dim=1)
    gradient = make(batch, side, side, outputs)
    if inputs == outputs:
        yield "spread", lambda: kernels._spread(x, style, taps), STRIPS, 2 * places * inputs
    yield "product", lambda: kernels._product(x, layer), PRODUCTS, places * (inputs + outputs)
    yield "product back", lambda: gradient @ layer.weight, (), places * (inputs + outputs)
    if inputs == outputs:
        yield (
            "gather",
            lambda: kernels._gather(x, taps, x, style, make_room(x)),
            STRIPS,
            3 * places * inputs,
        )
        return
    bands = make(batch, side // 2, side // 2, 4 * inputs)
    yield (
        "spread bands",
        lambda: kernels._spread_bands(bands, up, style, taps),
        BANDS,
        2 * places * inputs,
    )
    yield (
        "gather bands",
        lambda: kernels._gather_bands(
            x, taps, bands, up, style, make_room(bands, bands=True), activated=True
        ),
        STRIPS,
        3 * places * inputs,
    )


def list_painting(side: int, channels: int, batch: int) -> Iterator[Work]:
    """The image by the last layer's product, and the way back through both."""
    layer = make_layer(side, channels, channels, torch.bfloat16)
    columns = layer.weight.T.contiguous()
    colours = torch.randn(16, channels, device="cuda").to(torch.bfloat16)
    pixels = torch.randn(batch, 3, 2 * side, 2 * side, device="cuda")
    y = torch.randn(batch, side, side, channels, device="cuda").to(torch.bfloat16)
    style = torch.randn(batch, channels, device="cuda")
    head = SimpleNamespace(columns=colours.T.contiguous(), constant=torch.randn(16, device="cuda"))
    image = torch.empty_like(pixels)
    yield (
        "product and image",
        lambda: kernels._product(y, layer, style, head, image),
        PAINTING,
        batch * side**2 * (2 * channels + 2 * 12),  # pixels are float32
    )
    yield (
        "back image",
        lambda: kernels._back_image(pixels, colours, y, style, columns, make_room(y, painted=True)),
        PAINTED,
        batch * side**2 * (2 * channels + 2 * 12),
    )


def list_adding(batch: int) -> Iterator[Work]:
    """Adding up the partial sums of all layers and of the image."""
    partials: list[kernels.Partial] = []
    widths: list[tuple[int, ...]] = []
    for side, inputs, outputs in LAYERS:
        read = torch.empty(batch, side, side, inputs, device="meta")
        bands = inputs != outputs
        if bands:
            read = read.view(batch, side // 2, side // 2, 4 * inputs)
        partials.append(kernels._measure(read, bands=bands))
        widths.append((4 * inputs, inputs) if bands else (inputs,))
    partials.append(kernels._measure(read, painted=True))
    widths.append((inputs,))
    sums, _ = kernels._make_room(partials, batch, torch.device("cuda"))
    styles = torch.randn(batch, max(map(sum, widths)) * len(widths), device="cuda")
    yield (
        "add up",
        lambda: kernels._add_up(sums, tuple(partials), styles, widths),
        ADDING,
        2 * (sums.numel() + 2 * styles.numel()),  # float32
    )


def time_work(work: Work, layer: tuple[int, int, int], bandwidth: float) -> Timed:
    """One kernel, with each of its sizes."""
    what, call, choices, values = work
    now = best = clock(call)
    chosen: dict[str, Any] = {}
    for sizes in choices:
        with sized(sizes):
            try:
                took = clock(call)
            except Exception as error:  # sizes that the card has no room for
                print(f"{what} at {layer[0]} px, {sizes}: {error}", file=sys.stderr)
                continue
        if took < best:
            best, chosen = took, sizes
    return Timed(what, *layer, now, best, chosen, values * 2 / bandwidth * 1e6)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bandwidth", type=float, default=4.2e12, help="bytes a second")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="of the network, from 0; all, unless given"
    )
    parser.add_argument("--kernels", nargs="+", help="such as spread; all, unless given")
    parser.add_argument("--as-set", action="store_true", help="try no other sizes")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU here, and these kernels run on nothing else")
    torch.manual_seed(0)
    found = []

    def time_all(works: Iterable[Work], layer: tuple[int, int, int] = (0, 0, 0)) -> None:
        for what, call, choices, values in works:
            if args.kernels and what not in args.kernels:
                continue
            work = (what, call, () if args.as_set else choices, values)
            found.append(time_work(work, layer, args.bandwidth))

    for index in args.layers or range(len(LAYERS)):
        layer = LAYERS[index]
        time_all(list_work(*layer, args.batch), layer)
        if index == len(LAYERS) - 1:
            time_all(list_painting(*layer[:2], args.batch), layer)
    if not args.layers:
        time_all(list_adding(args.batch))
    print("| | side | channels | µs | best | with | least |")
    print("|---|---:|---:|---:|---:|---|---:|")
    for t in found:
        sizes = ", ".join(f"{name}={value}" for name, value in t.sizes.items())
        print(
            f"| {t.what} | {t.side} | {t.inputs} → {t.outputs} | {t.now:.0f} | {t.best:.0f} | "
            f"{sizes} | {t.least:.0f} |"
        )
    if args.out is not None:
        args.out.write_text(json.dumps([asdict(t) for t in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
