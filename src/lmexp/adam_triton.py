"""Adam's step of a batch on a GPU, in one pass over memory, or two where noise is made noise again.

Operation by operation, the step of a noise map is two dozen passes over it, and a generator has 17
of them, of up to 4 MB a job. The meaning of every argument is that of `batch.advance`, the
same in plain operations.
"""

# "no cover": they run on GPUs and, when tested, in a process of their own.
# Upper case marks what a kernel is compiled for, as in Triton's own code.
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lmexp.adam import EPSILON
from lmexp.kernel_launch import await_turn, launch

BLOCK, WARPS = 1024, 4
"""Elements that a program works on at a time, and its warps."""
MOST = 256
"""Programs of a row at most: each leaves two partial sums, which all of the second pass add up."""


@triton.jit  # type: ignore[untyped-decorator]
def _step_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    value,
    mean,
    square,
    last_good,
    gradient,
    size,
    root,
    moving,
    broken,
    partial,
    count,
    turns,
    beta1,
    beta2,
    EPSILON: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    await_turn()
    row = tl.program_id(1).to(tl.int64)
    # Blocks, not numbers: Triton's interpreter combines the conditions of those alone.
    moves = tl.full([BLOCK], tl.load(moving + row), tl.float32) != 0
    breaks = tl.full([BLOCK], tl.load(broken + row), tl.int32) != 0
    rate = tl.load(size + row)
    correction = tl.load(root + row)
    first = row * count
    total = tl.zeros([BLOCK], dtype=tl.float32)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    programs = tl.num_programs(0)
    for turn in range(turns):
        at = (turn * programs + tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
        there = at < count
        place = first + at
        goes = there & moves & ~breaks
        old = tl.load(value + place, mask=there, other=0.0)
        slope = tl.load(gradient + place, mask=goes, other=0.0)
        m = tl.load(mean + place, mask=goes, other=0.0)
        v = tl.load(square + place, mask=goes, other=0.0)
        m += (1 - beta1) * (slope - m)
        v = v * beta2 + (1 - beta2) * slope * slope
        new = old - rate * m / (tl.sqrt(v) / correction + EPSILON)
        tl.store(mean + place, m, mask=goes)
        tl.store(square + place, v, mask=goes)
        tl.store(last_good + place, old, mask=goes)
        tl.store(value + place, new, mask=goes)
        returns = there & moves & breaks
        back = tl.load(last_good + place, mask=returns, other=0.0)
        tl.store(value + place, back, mask=returns)
        if SUMS:
            new = tl.where(goes, new, 0.0)
            total += new
            squares += new * new
    if SUMS:
        own = partial + (row * programs + tl.program_id(0)) * 2
        tl.store(own, tl.sum(total, 0))
        tl.store(own + 1, tl.sum(squares, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _normalise_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    value,
    moving,
    broken,
    partial,
    programs,
    count,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    await_turn()
    row = tl.program_id(1).to(tl.int64)
    moves = tl.full([BLOCK], tl.load(moving + row), tl.float32) != 0
    breaks = tl.full([BLOCK], tl.load(broken + row), tl.int32) != 0
    index = tl.arange(0, MOST)
    known = index < programs
    own = partial + (row * programs + index) * 2
    average = tl.sum(tl.load(own, mask=known, other=0.0), 0) / count
    variance = tl.sum(tl.load(own + 1, mask=known, other=0.0), 0) / count - average * average
    scale = 1 / tl.sqrt(variance)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = (at < count) & moves & ~breaks
    place = row * count + at
    x = tl.load(value + place, mask=there, other=0.0)
    tl.store(value + place, (x - average) * scale, mask=there)


def advance(
    value: Tensor,
    mean: Tensor,
    square: Tensor,
    last_good: Tensor,
    gradient: Tensor,
    size: Tensor,
    root: Tensor,
    moving: Tensor,
    broken: Tensor,
    betas: tuple[float, float],
    is_noise: bool,
) -> None:  # pragma: no cover
    """See `batch.advance`; all tensors are float32 but `broken`, which is bool."""
    rows, count = len(value), value[0].numel()
    blocks = triton.cdiv(count, BLOCK)
    programs = min(blocks, MOST)
    partial = value.new_empty(rows, programs, 2)
    launch(
        _step_kernel,
        (programs, rows),
        value,
        mean,
        square,
        last_good,
        gradient.contiguous(),
        size,
        root,
        moving,
        broken,
        partial,
        count,
        triton.cdiv(blocks, programs),
        *betas,
        EPSILON=EPSILON,
        SUMS=is_noise,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    if is_noise:
        launch(
            _normalise_kernel,
            (blocks, rows),
            value,
            moving,
            broken,
            partial,
            programs,
            count,
            BLOCK=BLOCK,
            MOST=MOST,
            num_warps=WARPS,
        )
