"""The noise regulariser as Triton kernels: two launches a size, one forward, one backward.

A generator's 17 noise maps have 74 levels of 9 sizes. Operation by operation that is hundreds of
launches a step, which a GPU spends more time on than on a single job's arithmetic, and a compiler
takes a minute for them. Here a launch has all maps of one size, the generator's own and those that
larger ones were halved to, and reads each once. Sums are made of one partial sum a program, added
up afterwards, so that they are the same at every run.
"""

# "no cover": they run on GPUs and, when tested, in a process of their own.
# Upper case marks what a kernel is compiled for, as in Triton's own code.
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmexp.kernel_launch import await_turn, launch
from lmexp.losses.autocorrelation import LEAST_SIDE

BLOCK = 512
"""Cells of 2×2, and in the backward pass places, that a program works on at a time."""
MOST = 64
"""Programs of a map in the forward pass at most; each leaves two partial sums."""
MOST_ROWS = 65535
"""Of a launch: CUDA's limit of a grid's second axis."""
COUNTS = ["halved", "jobs", "side", "turns", "bits"]
"""Not to be compiled for: they differ from size to size, and no load gets wider by them."""


@triton.jit
def _choose(buffer, first, second, halved, jobs, area):  # type: ignore[no-untyped-def] # pragma: no cover
    # Where this program's map lies: `halved` maps of all jobs in the buffer, then the own ones.
    row = tl.program_id(1)
    job = (row % jobs).to(tl.int64)
    chosen = buffer + row.to(tl.int64) * area
    if row >= halved * jobs:
        chosen = first + job * area
    if row >= (halved + 1) * jobs:
        chosen = second + job * area
    return chosen


@triton.jit(do_not_specialize=COUNTS)  # type: ignore[untyped-decorator]
def _correlate_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    buffer,
    first,
    second,
    partial,
    out,
    halved,
    jobs,
    side,
    bits,
    turns,
    MOST: tl.constexpr,
    HALVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    await_turn()
    # The side is 2 ** bits: no lane has to divide.
    area = side * side
    x = _choose(buffer, first, second, halved, jobs, area)
    row = tl.program_id(1).to(tl.int64)
    across = tl.zeros([BLOCK], dtype=tl.float32)
    down = tl.zeros([BLOCK], dtype=tl.float32)
    half = side // 2
    programs = tl.num_programs(0)
    for turn in range(turns):
        at = (turn * programs + tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
        there = at < half * half
        right = (at & (half - 1)) * 2
        low = (at >> (bits - 1)) * 2
        left = (right + side - 1) & (side - 1)
        above = (low + side - 1) & (side - 1)
        a = tl.load(x + low * side + right, mask=there, other=0.0)
        b = tl.load(x + low * side + right + 1, mask=there, other=0.0)
        c = tl.load(x + (low + 1) * side + right, mask=there, other=0.0)
        d = tl.load(x + (low + 1) * side + right + 1, mask=there, other=0.0)
        across += a * tl.load(x + low * side + left, mask=there, other=0.0) + a * b
        across += c * tl.load(x + (low + 1) * side + left, mask=there, other=0.0) + c * d
        down += a * tl.load(x + above * side + right, mask=there, other=0.0) + a * c
        down += b * tl.load(x + above * side + right + 1, mask=there, other=0.0) + b * d
        if HALVE:
            tl.store(out + row * (half * half) + at, (a + b + c + d) * 0.25, mask=there)
    own = partial + (row * MOST + tl.program_id(0)) * 2
    tl.store(own, tl.sum(across, 0) / area)
    tl.store(own + 1, tl.sum(down, 0) / area)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=COUNTS, do_not_specialize_on_alignment=["factors"]
)
def _differentiate_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    buffer,
    first,
    second,
    factors,
    coarse,
    grad_buffer,
    grad_first,
    grad_second,
    halved,
    jobs,
    side,
    bits,
    COARSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    await_turn()
    area = side * side
    x = _choose(buffer, first, second, halved, jobs, area)
    out = _choose(grad_buffer, grad_first, grad_second, halved, jobs, area)
    row = tl.program_id(1).to(tl.int64)
    across = tl.load(factors + row * 2) / area
    down = tl.load(factors + row * 2 + 1) / area
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < area
    last = side - 1
    place = at & last
    line = at >> bits
    value = tl.load(x + line * side + ((place + 1) & last), mask=there, other=0.0)
    value += tl.load(x + line * side + ((place + last) & last), mask=there, other=0.0)
    value *= across
    beside = tl.load(x + ((line + 1) & last) * side + place, mask=there, other=0.0)
    beside += tl.load(x + ((line + last) & last) * side + place, mask=there, other=0.0)
    value += beside * down
    if COARSE:
        cell = (line // 2) * (side // 2) + place // 2
        value += 0.25 * tl.load(coarse + row * (area // 4) + cell, mask=there, other=0.0)
    tl.store(out + at, value, mask=there)


@dataclass(frozen=True)
class _Level:
    """All maps of one side.

    Attributes:
        buffer: [M, N, side, side], halved from larger ones.
        own: the generator's of this side, [N, 1, side, side] each, two at most.
        first_row: of its maps among all levels'.
    """

    side: int
    buffer: Tensor
    own: tuple[Tensor, ...]
    first_row: int

    @property
    def count(self) -> int:
        return len(self.buffer) + len(self.own)


def applies(maps: Sequence[Tensor]) -> bool:
    """Whether maps are such as a generator has: square, a power of two, two of a side at most.

    And as many jobs in each, since a kernel would read on behind a map that has fewer.
    """
    sides, jobs = [noise.shape[-1] for noise in maps], len(maps[0])
    return 0 < jobs <= MOST_ROWS // len(maps) and all(
        noise.is_cuda
        and noise.device == maps[0].device
        and noise.dtype == torch.float32
        and noise.shape == (jobs, 1, side, side)
        and side > 1
        and side & (side - 1) == 0
        and sides.count(side) <= 2
        for noise, side in zip(maps, sides, strict=True)
    )


def _lay_out(maps: Sequence[Tensor]) -> list[_Level]:  # pragma: no cover
    """The levels, the largest first; buffers are still to be filled."""
    N, side, halved, row = len(maps[0]), max(noise.shape[-1] for noise in maps), 0, 0
    levels = []
    while side >= min(noise.shape[-1] for noise in maps) or halved:
        own = tuple(noise.contiguous() for noise in maps if noise.shape[-1] == side)
        buffer = maps[0].new_empty(halved, N, side, side)
        levels.append(_Level(side, buffer, own, row))
        row += levels[-1].count
        halved = levels[-1].count if side > LEAST_SIDE else 0
        side //= 2
    return levels


def _pointers(buffer: Tensor, own: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    # A kernel takes three pointers, whether it follows them or not.
    return buffer, own[0] if own else buffer, own[-1] if own else buffer


class _Autocorrelations(torch.autograd.Function):  # pragma: no cover
    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        N, levels = len(maps[0]), _lay_out(maps)
        rows = levels[-1].first_row + levels[-1].count
        partial = maps[0].new_zeros(rows * N, MOST, 2)
        for index, level in enumerate(levels):
            if not level.count:
                continue
            halve = level.side > LEAST_SIDE
            blocks = triton.cdiv(level.side**2 // 4, BLOCK)
            programs = min(blocks, MOST)
            launch(
                _correlate_kernel,
                (programs, level.count * N),
                *_pointers(level.buffer, level.own),
                partial[level.first_row * N :],
                levels[index + 1].buffer if halve else level.buffer,
                len(level.buffer),
                N,
                level.side,
                level.side.bit_length() - 1,
                triton.cdiv(blocks, programs),
                MOST=MOST,
                HALVE=halve,
                BLOCK=BLOCK,
            )
        means = partial.sum(1)
        ctx.save_for_backward(means, *(x for level in levels for x in (level.buffer, *level.own)))
        ctx.layout = [(level.side, len(level.own), level.first_row) for level in levels]
        ctx.order = [noise.shape[-1] for noise in maps]
        return means.view(rows, N, 2).square().sum((0, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("The noise regulariser's kernels have no second derivative.")
        means, *saved = ctx.saved_tensors
        levels = []
        for side, own_count, first_row in ctx.layout:
            levels.append(_Level(side, saved[0], tuple(saved[1 : 1 + own_count]), first_row))
            saved = saved[1 + own_count :]
        N = len(gradients[0])
        factors = (2 * means.view(-1, N, 2) * gradients[0][None, :, None]).contiguous()
        found: dict[int, list[Tensor]] = {}
        coarse: Tensor | None = None
        for level in reversed(levels):
            buffer = torch.empty_like(level.buffer)
            own = [torch.empty_like(noise) for noise in level.own]
            if level.count:
                halved = level.side > LEAST_SIDE
                launch(
                    _differentiate_kernel,
                    (triton.cdiv(level.side**2, BLOCK), level.count * N),
                    *_pointers(level.buffer, level.own),
                    factors[level.first_row :],
                    coarse if halved else buffer,
                    *_pointers(buffer, own),
                    len(buffer),
                    N,
                    level.side,
                    level.side.bit_length() - 1,
                    COARSE=halved,
                    BLOCK=BLOCK,
                )
            found[level.side] = own
            coarse = buffer
        return tuple(found[side].pop(0) for side in ctx.order)


def autocorrelations(maps: Sequence[Tensor]) -> Tensor:
    """See `lmexp.losses.autocorrelation.autocorrelations`; for maps that `applies` accepts."""
    total: Tensor = _Autocorrelations.apply(*maps)
    return total
