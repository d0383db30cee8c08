"""What a device can do, and the least that a part of a step asks of it.

The limit of a part is the sum over its convolutions and matrix products of the longer of two
times: their floating point operations at the device's measured rate, and reading what they read and
writing what they write once at its measured bandwidth. Everything else counts as free, as if it
were fused into them.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Rates:
    """Of a device, measured.

    Attributes:
        flops: of a large matrix product, floating point operations a second.
        bytes: of a large copy, read and written, a second.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Operation:
    """One convolution or matrix product.

    Attributes:
        flops: multiplications and additions.
        numbers: elements read and written.
    """

    flops: float
    numbers: float


class Census(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists the convolutions and matrix products that run within it, backward passes too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            flops = float(count(*args, **kwargs, out_val=out))
            made = out if isinstance(out, tuple | list) else [out]
            tensors = [x for x in (*args, *made) if isinstance(x, Tensor)]
            self.operations.append(Operation(flops, sum(x.numel() for x in tensors)))
        return out


def take_census(work: Callable[[], object]) -> list[Operation]:
    """The operations of `work`."""
    census = Census()
    with census:
        work()
    return census.operations


def extrapolate(one: Sequence[Operation], two: Sequence[Operation], batch: int) -> list[Operation]:
    """Operations of a batch from those of one job and of two: weights are read but once."""
    if len(one) != len(two):
        raise ValueError(f"{len(one)} operations of one job, {len(two)} of two")
    grow = batch - 1
    return [
        Operation(a.flops + grow * (b.flops - a.flops), a.numbers + grow * (b.numbers - a.numbers))
        for a, b in zip(one, two, strict=True)
    ]


def limit(operations: Sequence[Operation], rates: Rates, number_size: int) -> dict[str, float]:
    """Least seconds.

    Returns:
        `arithmetic` alone, `traffic` alone, and `limit`, operation by operation the longer.
    """
    arithmetic = [o.flops / rates.flops for o in operations]
    traffic = [o.numbers * number_size / rates.bytes for o in operations]
    return {
        "flops": sum(o.flops for o in operations),
        "arithmetic": sum(arithmetic),
        "traffic": sum(traffic),
        "limit": sum(max(pair) for pair in zip(arithmetic, traffic, strict=True)),
    }


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The device's rates: median of ten after three warm-ups, random numbers."""
    side, length = (8192, 2**28) if device.type == "cuda" else (1024, 2**24)
    a = torch.randn(side, side, device=device, dtype=dtype)
    b = torch.randn(side, side, device=device, dtype=dtype)
    allow = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions are by default
    product = time_repeats(lambda: a @ b, device, 10)
    torch.backends.cuda.matmul.allow_tf32 = allow
    source = torch.randn(length, device=device)
    target = torch.empty_like(source)
    copied = time_repeats(lambda: target.copy_(source), device, 10)
    return Rates(2 * side**3 / product, 2 * source.numel() * source.element_size() / copied)


def time_repeats(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of `work`: events on a GPU, the clock elsewhere; at most three warm-ups."""
    for _ in range(min(3, repeats)):
        work()
    if device.type == "cuda":
        event: Any = torch.cuda.Event
        marks = [event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        torch.cuda.synchronize(device)
        pairs = itertools.pairwise(marks)
        return float(statistics.median(a.elapsed_time(b) for a, b in pairs)) / 1000
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def capture(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`work` as a CUDA graph, after three runs aside; raises RuntimeError if it can't be one."""
    aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
