"""A frozen FAN on CUDA: what lies between its convolutions as Triton kernels, forward and backward.

What these kernels are for: a FAN is dozens of small convolutions with a normalisation, a ReLU, a
concatenation and a sum around each, and on a GPU these take several times the convolutions' time,
one pass through memory an operation. Here each gap between two convolutions is one pass in each
direction, however many sums, changes of resolution and readers lie in it, and nothing is kept for
the backward pass but the rectified maps, which the convolutions' shapes need anyway. A compiler
comes close, but takes minutes for a network of this many parts.

The whole network is one function to autograd. Its forward pass (`_run_…`) puts on a tape what each
part keeps; its backward pass (`_back_…`) takes that off again from the end. There are two kinds of
gap: `_make` finishes a map and hands it to whoever reads it, `_collect` finishes a gradient.

Feature maps lie in memory channels-last; everything is computed in float32 and rounded where the
plain operations of `frozen_fan`, which define what is computed here, have a map of their own.
"""

# "no cover": they run on GPUs and, when tested, in a process of their own.
# Upper case marks what a kernel is compiled for, as in Triton's own code.
# ruff: noqa: N803

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lmexp.kernel_launch import await_turn, launch
from lmexp.side_streams import SideStream

BLOCK, WARPS = 2048, 4
"""Elements of a program, and warps that work on them."""

QUAD_BLOCK, QUAD_WARPS = 512, 2
"""The same where each element stands for 2×2 places."""

MAP_PLACES = 32
"""Places of a program that draws heat maps."""


@triton.jit  # type: ignore[untyped-decorator]
def _read(  # type: ignore[no-untyped-def] # pragma: no cover
    x, begin, place, channel, there, C: tl.constexpr
):
    # `begin` is one number, and may be large; what is a vector stays within 32 bits.
    return tl.load(x + begin * C + (place * C + channel), mask=there, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def] # pragma: no cover
    x, value, begin, place, channel, there, C: tl.constexpr
):
    tl.store(x + begin * C + (place * C + channel), value, mask=there)


@triton.jit
def _round(value, like):  # type: ignore[no-untyped-def] # pragma: no cover
    return value.to(like.dtype.element_ty).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _clamp(value, ceiling, BOUNDED: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    value = tl.maximum(value, 0.0)
    if BOUNDED:
        value = tl.minimum(value, ceiling)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _passes(level, ceiling, BOUNDED: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    passes = level > 0.0
    if BOUNDED:
        passes = passes & (level < ceiling)
    return passes


@triton.jit  # type: ignore[untyped-decorator]
def _join(  # type: ignore[no-untyped-def] # pragma: no cover
    x, half, quarter, last, begin, place, channel, there, C: tl.constexpr
):
    value = _read(x, begin, place, channel, there, C)
    if half is not None:
        value += _read(half, begin, place, channel, there & (channel < C // 2), C // 2)
        within = channel - C // 2
        second = there & (within >= 0) & (within < C // 4)
        value += _read(quarter, begin, place, within, second, C // 4)
        within -= C // 4
        value += _read(last, begin, place, within, there & (within >= 0), C // 4)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _look_up(vector, channel, there, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # pragma: no cover
    value = tl.zeros([BLOCK], dtype=tl.float32)
    if vector is not None:
        value = tl.load(vector + channel, mask=there, other=0.0)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _serve(  # type: ignore[no-untyped-def] # pragma: no cover
    value,
    whole,
    first,
    first_scale,
    first_shift,
    around,
    around_scale,
    around_shift,
    begin,
    place,
    channel,
    there,
    ceiling,
    C: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    # A map itself, and as each normalisation that reads it leaves it.
    if whole is not None:
        _write(whole, value, begin, place, channel, there, C)
    if first is not None:
        made = _clamp(value * first_scale + first_shift, ceiling, BOUNDED)
        _write(first, made, begin, place, channel, there, C)
    if around is not None:
        made = _clamp(value * around_scale + around_shift, ceiling, BOUNDED)
        _write(around, made, begin, place, channel, there, C)


@triton.jit  # type: ignore[untyped-decorator]
def _make_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    x,
    half,
    quarter,
    last,
    coarse_x,
    coarse_half,
    coarse_quarter,
    coarse_last,
    more,
    shift,
    first_scale,
    first_shift,
    around_scale,
    around_shift,
    halved_first_scale,
    halved_first_shift,
    halved_around_scale,
    halved_around_shift,
    whole,
    first,
    around,
    halved,
    halved_first,
    halved_around,
    width,
    ceiling,
    C: tl.constexpr,
    CORNERS: tl.constexpr,
    CLAMPED: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    await_turn()
    # A program has a part of one row of `width` places, each of which is 2×2 of the map if there
    # are four corners. With one, a row is a whole image.
    begin = tl.program_id(0).to(tl.int64) * width
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < width * C
    place = at // C
    channel = at % C
    # All reading comes first: past a store to who knows where, no load may be moved up.
    first_scale = _look_up(first_scale, channel, there, BLOCK)
    first_shift = _look_up(first_shift, channel, there, BLOCK)
    around_scale = _look_up(around_scale, channel, there, BLOCK)
    around_shift = _look_up(around_shift, channel, there, BLOCK)
    halved_first_scale = _look_up(halved_first_scale, channel, there, BLOCK)
    halved_first_shift = _look_up(halved_first_shift, channel, there, BLOCK)
    halved_around_scale = _look_up(halved_around_scale, channel, there, BLOCK)
    halved_around_shift = _look_up(halved_around_shift, channel, there, BLOCK)
    if coarse_x is not None:
        below = _join(
            coarse_x, coarse_half, coarse_quarter, coarse_last, begin, place, channel, there, C
        )
        below = _round(below, x)
    corner = place
    if CORNERS == 4:
        corner = place * 2
    values = ()
    for k in tl.static_range(CORNERS):
        fine = begin * CORNERS + (k // 2) * 2 * width + k % 2
        value = _join(x, half, quarter, last, fine, corner, channel, there, C)
        if more is not None:
            value += _read(more, fine, corner, channel, there, C)
        if shift is not None:
            value += tl.load(shift + channel, mask=there, other=0.0)
        if CLAMPED:
            value = _clamp(value, ceiling, BOUNDED)
        value = _round(value, x)
        if coarse_x is not None:
            value = _round(value + below, x)
        values += (value,)  # type: ignore[assignment]
    for k in tl.static_range(CORNERS):
        fine = begin * CORNERS + (k // 2) * 2 * width + k % 2
        _serve(
            values[k],
            whole,
            first,
            first_scale,
            first_shift,
            around,
            around_scale,
            around_shift,
            fine,
            corner,
            channel,
            there,
            ceiling,
            C,
            BOUNDED,
        )
    if CORNERS == 4:
        mean = (values[0] + values[1] + values[2] + values[3]) * 0.25  # type: ignore[misc]
        _serve(
            _round(mean, x),
            halved,
            halved_first,
            halved_first_scale,
            halved_first_shift,
            halved_around,
            halved_around_scale,
            halved_around_shift,
            begin,
            place,
            channel,
            there,
            ceiling,
            C,
            BOUNDED,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _come_back(  # type: ignore[no-untyped-def] # pragma: no cover
    gradient,
    rectified,
    scale,
    begin,
    place,
    channel,
    there,
    ceiling,
    C: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    value = _read(gradient, begin, place, channel, there, C)
    if scale is not None:
        value *= tl.load(scale + channel, mask=there, other=0.0)
    level = _read(rectified, begin, place, channel, there, C)
    return tl.where(_passes(level, ceiling, BOUNDED), value, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def] # pragma: no cover
    base,
    back,
    back_level,
    back_scale,
    around,
    around_level,
    around_scale,
    like,
    begin,
    place,
    channel,
    there,
    ceiling,
    C: tl.constexpr,
    BASE_C: tl.constexpr,
    FIRST: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    value = tl.zeros(channel.shape, dtype=tl.float32)
    if base is not None:
        value = _read(base, begin, place, channel + FIRST, there, BASE_C)
    if around is not None:
        value = _come_back(
            around,
            around_level,
            around_scale,
            begin,
            place,
            channel,
            there,
            ceiling,
            C,
            BOUNDED,
        )
        value = _round(value, like)
    if back is not None:
        value += _come_back(
            back, back_level, back_scale, begin, place, channel, there, ceiling, C, BOUNDED
        )
    return _round(value, like)


@triton.jit  # type: ignore[untyped-decorator]
def _hand_on(  # type: ignore[no-untyped-def] # pragma: no cover
    value, whole, tail, begin, place, channel, there, C: tl.constexpr
):
    # A gradient itself, and its last quarter of channels by itself.
    _write(whole, value, begin, place, channel, there, C)
    if tail is not None:
        within = channel - (C - C // 4)
        _write(tail, value, begin, place, within, there & (within >= 0), C // 4)


@triton.jit  # type: ignore[untyped-decorator]
def _collect_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    base,
    back,
    back_level,
    back_scale,
    around,
    around_level,
    around_scale,
    coarse_base,
    coarse_back,
    coarse_back_level,
    coarse_back_scale,
    coarse_around,
    coarse_around_level,
    coarse_around_scale,
    more,
    through,
    whole,
    tail,
    halved,
    halved_tail,
    width,
    ceiling,
    C: tl.constexpr,
    BASE_C: tl.constexpr,
    FIRST: tl.constexpr,
    CORNERS: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    await_turn()
    # Programs have their parts as in `_make_kernel`.
    begin = tl.program_id(0).to(tl.int64) * width
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < width * C
    place = at // C
    channel = at % C
    if coarse_back is not None:
        below = _gather(
            coarse_base,
            coarse_back,
            coarse_back_level,
            coarse_back_scale,
            coarse_around,
            coarse_around_level,
            coarse_around_scale,
            whole,
            begin,
            place,
            channel,
            there,
            ceiling,
            C,
            C,
            0,
            BOUNDED,
        )
        # A halved map is a mean.
        below *= 0.25
    corner = place
    if CORNERS == 4:
        corner = place * 2
    values = ()
    for k in tl.static_range(CORNERS):
        fine = begin * CORNERS + (k // 2) * 2 * width + k % 2
        value = _gather(
            base,
            back,
            back_level,
            back_scale,
            around,
            around_level,
            around_scale,
            whole,
            fine,
            corner,
            channel,
            there,
            ceiling,
            C,
            BASE_C,
            FIRST,
            BOUNDED,
        )
        if coarse_back is not None:
            value = _round(value + below, whole)
        if more is not None:
            value = _round(value + _read(more, fine, corner, channel, there, C), whole)
        if through is not None:
            level = _read(through, fine, corner, channel, there, C)
            value = tl.where(_passes(level, ceiling, BOUNDED), value, 0.0)
        values += (value,)  # type: ignore[assignment]
    for k in tl.static_range(CORNERS):
        fine = begin * CORNERS + (k // 2) * 2 * width + k % 2
        _hand_on(values[k], whole, tail, fine, corner, channel, there, C)
    if halved is not None:
        # A value that counted for four places gets all their gradients.
        total = values[0] + values[1] + values[2] + values[3]  # type: ignore[misc]
        _hand_on(_round(total, whole), halved, halved_tail, begin, place, channel, there, C)


@triton.jit  # type: ignore[untyped-decorator]
def _draw_kernel(  # type: ignore[no-untyped-def] # pragma: no cover
    x,
    bias,
    maps,
    places,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    await_turn()
    # One pass from channels-last to maps in float32, which are rounded as any other result.
    image = tl.program_id(0).to(tl.int64)
    place = (tl.program_id(1) * PLACES + tl.arange(0, PLACES))[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    there = (place < places) & (channel < K)
    value = tl.load(x + image * places * K + (place * K + channel), mask=there, other=0.0)
    value = value.to(tl.float32) + tl.load(bias + channel, mask=channel < K, other=0.0)
    out = maps + image * places * K + (channel * places + place)
    tl.store(out, _round(value, x), mask=there)


class _Parts(NamedTuple):
    """A map that is still to be summed: x plus, of a block, its branch's three outputs."""

    x: Tensor
    half: Tensor | None = None
    quarter: Tensor | None = None
    last: Tensor | None = None


class _Reader(NamedTuple):
    """What is wanted of a map: itself, and behind which normalisations (`FoldedNorm`)."""

    whole: bool = False
    first: Any = None
    around: Any = None


class _Read(NamedTuple):
    """The maps that a `_Reader` wants; the others are missing."""

    whole: Any
    first: Any
    around: Any


class _Back(NamedTuple):
    """What comes back through a rectification: the gradient behind it, its result, its scale."""

    gradient: Tensor
    level: Tensor
    scale: Tensor | None


class _Due(NamedTuple):
    """A gradient that is still to be summed; `base` and `around` exclude each other."""

    base: Tensor | None = None
    back: _Back | None = None
    around: _Back | None = None


class _Slope(NamedTuple):
    """A gradient, and the last quarter of its channels by itself, with which a block begins."""

    whole: Tensor
    tail: Any


PARTS = ("", "_level", "_scale")
"""What `_collect_kernel` calls the parts of a `_Back`, after its name."""

Tape = deque[tuple[Tensor, ...]]
"""What each part keeps for the backward pass, in the order of the forward pass."""

NOTHING = _Reader()


def _packed(x: Tensor) -> Tensor:  # pragma: no cover
    return x.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, *size: int) -> Tensor:  # pragma: no cover
    return torch.empty(
        (len(like), *size),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def _convolve(x: Tensor, conv: Any) -> Tensor:  # pragma: no cover
    """A frozen convolution of stride 1, without its bias."""
    return _packed(F.conv2d(x, conv.weight, None, 1, conv.padding))


def _convolve_back(gradient: Tensor, x: Tensor, conv: Any) -> Tensor:  # pragma: no cover
    """The gradient of `_convolve` with respect to x, of which the shape alone counts."""
    padding = conv.padding
    pad = [padding, padding] if isinstance(padding, int) else list(padding)
    mask = [True, False, False]
    back: Callable[..., tuple[Tensor, Any, Any]] = torch.ops.aten.convolution_backward
    made = back(gradient, x, conv.weight, None, [1, 1], pad, [1, 1], False, [0, 0], 1, mask)
    return _packed(made[0])


def _launch_over(
    kernel: Any, size: torch.Size, quads: bool, ceiling: float, **arguments: Any
) -> None:  # pragma: no cover
    """Run over all elements of maps [N, C, h, w], or over those of all 2×2 places."""
    N, C, height, width = size
    rows, places = (N * height // 2, width // 2) if quads else (N, height * width)
    block, warps = (QUAD_BLOCK, QUAD_WARPS) if quads else (BLOCK, WARPS)
    launch(
        kernel,
        (rows, triton.cdiv(places * C, block)),
        **arguments,
        width=places,
        ceiling=min(ceiling, 1e30),
        C=C,
        CORNERS=4 if quads else 1,
        BOUNDED=ceiling < math.inf,
        BLOCK=block,
        num_warps=warps,
    )


def _make(
    parts: _Parts,
    ceiling: float,
    reader: _Reader = NOTHING,
    *,
    halved: _Reader | None = None,
    coarse: _Parts | None = None,
    more: Tensor | None = None,
    shift: Tensor | None = None,
    clamped: bool = False,
) -> tuple[_Read, _Read]:  # pragma: no cover
    """Finish a map and hand it on, in one pass.

    Args:
        ceiling: of all rectifications.
        reader: what is wanted of the map.
        halved: what is wanted of its means over 2×2 places.
        coarse: a summand of half the resolution, each of whose values counts for four places.
        more, shift: further summands, [N, C, h, w] and [C].
        clamped: whether the map itself is rectified.

    Returns:
        what is wanted of the map, and of its means.
    """
    C, height, width = parts.x.shape[1:]

    def place(reader: _Reader, *size: int) -> _Read:
        return _Read(*(_empty(parts.x, C, *size) if wanted else None for wanted in reader))

    made = place(reader, height, width)
    means = place(halved or NOTHING, height // 2, width // 2)
    below = coarse or (None,) * 4
    _launch_over(
        _make_kernel,
        parts.x.shape,
        coarse is not None or halved is not None,
        ceiling,
        **parts._asdict(),
        **dict(zip((f"coarse_{name}" for name in _Parts._fields), below, strict=True)),
        more=more,
        shift=shift,
        **_factors("", reader),
        **_factors("halved_", halved or NOTHING),
        **made._asdict(),
        halved=means.whole,
        halved_first=means.first,
        halved_around=means.around,
        CLAMPED=clamped,
    )
    return made, means


def _factors(prefix: str, reader: _Reader) -> dict[str, Tensor | None]:  # pragma: no cover
    return {
        f"{prefix}{name}_{kind}": getattr(norm, kind, None)
        for name, norm in (("first", reader.first), ("around", reader.around))
        for kind in ("scale", "shift")
    }


def _collect(
    due: _Due,
    ceiling: float,
    *,
    coarse: _Due | None = None,
    more: Tensor | None = None,
    through: Tensor | None = None,
    tail: bool = True,
    halves: bool = False,
) -> tuple[_Slope, _Slope | None]:  # pragma: no cover
    """Finish a gradient, in one pass: `_make`'s counterpart.

    Args:
        ceiling: of all rectifications.
        coarse: the gradient of the map's means over 2×2 places.
        more: a further summand.
        through: the map itself, if that is rectified.
        tail: whether the map is a block's result.
        halves: whether the gradient of a `coarse` summand is wanted.

    Returns:
        the map's gradient, and that of a `coarse` summand.
    """
    like = due.base if due.back is None else due.back.gradient
    if like is None:
        assert coarse is not None and coarse.back is not None
        like = coarse.back.gradient
        C, height, width = like.shape[1], 2 * like.shape[2], 2 * like.shape[3]
    else:
        C, height, width = like.shape[1:]

    def place(tail: bool, *size: int) -> _Slope:
        return _Slope(_empty(like, C, *size), _empty(like, C // 4, *size) if tail else None)

    made = place(tail, height, width)
    halved = place(True, height // 2, width // 2) if halves else None
    _launch_over(
        _collect_kernel,
        made.whole.shape,
        coarse is not None or halves,
        ceiling,
        **_summands("", due),
        **_summands("coarse_", coarse or _Due()),
        more=more,
        through=through,
        **made._asdict(),
        halved=None if halved is None else halved.whole,
        halved_tail=None if halved is None else halved.tail,
        BASE_C=C,
        FIRST=0,
    )
    return made, halved


def _collect_part(
    whole: Tensor | None, first: int, channels: int, back: _Back | None, ceiling: float
) -> Tensor:  # pragma: no cover
    """Channels of a gradient from `first` on, plus what comes back through a rectification."""
    like = whole if back is None else back.gradient
    assert like is not None
    out = _empty(like, channels, *like.shape[2:])
    names = ("more", "through", "tail", "halved", "halved_tail")
    _launch_over(
        _collect_kernel,
        out.shape,
        False,
        ceiling,
        **_summands("", _Due(whole, back)),
        **_summands("coarse_", _Due()),
        **dict.fromkeys(names),
        whole=out,
        BASE_C=channels if whole is None else whole.shape[1],
        FIRST=first,
    )
    return out


def _summands(prefix: str, due: _Due) -> dict[str, Tensor | None]:  # pragma: no cover
    back, around = (part or (None,) * 3 for part in (due.back, due.around))
    names = ("base", *(f"{way}{part}" for way in ("back", "around") for part in PARTS))
    return {
        f"{prefix}{name}": value
        for name, value in zip(names, (due.base, *back, *around), strict=True)
    }


def _draw_maps(x: Tensor, conv: Any) -> Tensor:  # pragma: no cover
    """A convolution and its bias, as maps one after the other in float32."""
    y = _convolve(x, conv)
    N, K, height, width = y.shape
    maps = torch.empty(y.shape, device=y.device)
    launch(
        _draw_kernel,
        (N, triton.cdiv(height * width, MAP_PLACES)),
        x=y,
        bias=conv.bias,
        maps=maps,
        places=height * width,
        K=K,
        PLACES=MAP_PLACES,
        CHANNELS=triton.next_power_of_2(K),
    )
    return maps


def _reader(block: Any) -> _Reader:  # pragma: no cover
    """What a `FrozenBlock` wants of its input; itself, if nothing is in the way around."""
    first, around = block.layers[0][0], block.norm_around
    return _Reader(around is None, first, around)


def _run_block(block: Any, read: _Read, tape: Tape) -> _Parts:  # pragma: no cover
    kept: list[Tensor] = []
    made: list[Tensor] = []
    for norm, conv in block.layers:
        level = read.first
        if made:
            level = _make(_Parts(made[-1]), block.ceiling, _Reader(first=norm))[0].first
        kept.append(level)
        made.append(_convolve(level, conv))
    around = read.whole
    if read.around is not None:
        kept.append(read.around)
        around = _convolve(read.around, block.skip[1])
    tape.append(tuple(kept))
    return _Parts(around, *made)


def _back_block(block: Any, slope: _Slope, tape: Tape) -> _Due:  # pragma: no cover
    kept = tape.pop()
    own, first = slope.tail, slope.whole.shape[1]
    back: _Back | None = None
    for (norm, conv), level in zip(reversed(block.layers), reversed(kept[:3]), strict=True):
        channels = conv.weight.shape[0]
        first -= channels
        if back is not None:
            own = _collect_part(slope.whole, first, channels, back, block.ceiling)
        back = _Back(_convolve_back(own, level, conv), level, norm.scale)
    if block.norm_around is None:
        return _Due(slope.whole, back)
    norm, conv = block.skip
    around = _Back(_convolve_back(slope.whole, kept[3], conv), kept[3], norm.scale)
    return _Due(None, back, around)


def _run_hourglass(
    hourglass: Any, fine: _Read, halved: _Read, reader: _Reader, tape: Tape, depth: int = 0
) -> _Read:  # pragma: no cover
    """From what the blocks across and down read to what follows.

    The block across has nothing to do with all that is inside, which is small: the two run side by
    side.

    Here and below nothing has a name for longer than it is needed: names hold memory.
    """
    ceiling, inner, up = hourglass.across.ceiling, hourglass.inner, _reader(hourglass.up)
    aside: Tape = deque(maxlen=tape.maxlen)
    with SideStream(fine.first.device, depth) as beside:
        across = _run_block(hourglass.across, fine, aside)
    down = _run_block(hourglass.down, halved, tape)
    if hourglass.is_innermost:
        down = _run_block(inner, _make(down, ceiling, _reader(inner))[0], tape)
        read = _make(down, ceiling, up)[0]
    else:
        reads = _make(down, ceiling, _reader(inner.across), halved=_reader(inner.down))
        del down
        read = _run_hourglass(inner, *reads, up, tape, depth + 1)
    coarse = _run_block(hourglass.up, read, tape)
    # Backward, it is the block across that comes first.
    tape.extend(aside)
    beside.join(*across)
    return _make(across, ceiling, reader, coarse=coarse)[0]


def _back_hourglass(
    hourglass: Any, fine: _Slope, coarse: Any, tape: Tape, depth: int = 0
) -> tuple[_Due, _Due]:  # pragma: no cover
    """From the gradients of the blocks across and up to those of what across and down read."""
    ceiling, inner = hourglass.across.ceiling, hourglass.inner
    held = tape[-1]  # read within, see `SideStream`
    with SideStream(fine.whole.device, depth) as beside:
        across = _back_block(hourglass.across, fine, tape)
    due = _back_block(hourglass.up, coarse, tape)
    if hourglass.is_innermost:
        due = _back_block(inner, _collect(due, ceiling)[0], tape)
        slope = _collect(due, ceiling)[0]
    else:
        slopes = _collect(due, ceiling, halves=True)
        del due
        wide, down = _back_hourglass(inner, *slopes, tape, depth + 1)
        slope = _collect(wide, ceiling, coarse=down)[0]
    halved = _back_block(hourglass.down, slope, tape)
    beside.join(*(back.gradient for back in (across.back, across.around) if back is not None))
    del held
    return across, halved


def _run_rectified(conv: Any, x: Tensor, reader: _Reader) -> _Read:  # pragma: no cover
    """`frozen_fan.RectifiedConv`, its result and what else is wanted of that."""
    parts, reader = _Parts(_convolve(x, conv.conv)), reader._replace(whole=True)
    return _make(parts, conv.ceiling, reader, shift=conv.shift, clamped=True)[0]


def _run_top(block: Any, last: Any, read: _Read, tape: Tape) -> Tensor:  # pragma: no cover
    """From what the block on top reads to the features of a stack."""
    x = _make(_run_block(block, read, tape), block.ceiling, _Reader(whole=True))[0].whole
    del read
    features: Tensor = _run_rectified(last, x, NOTHING).whole
    tape.append((x, features))
    return features


def _back_top(
    block: Any, last: Any, gradient: Tensor, conv: Any, tape: Tape
) -> _Due:  # pragma: no cover
    """The same backward, from the gradient of a convolution of the features."""
    x, features = tape.pop()
    back = _Back(_convolve_back(gradient, features, conv), features, None)
    del features
    own = _collect_part(None, 0, back.level.shape[1], back, last.ceiling)
    del back
    whole = _convolve_back(own, x, last.conv)
    del own, x
    C = whole.shape[1]
    tail = _collect_part(whole, C - C // 4, C // 4, None, last.ceiling)
    return _back_block(block, _Slope(whole, tail), tape)


def _run(network: Any, arranged: Tensor, tape: Tape) -> Tensor:  # pragma: no cover
    """`FrozenFan.draw_plainly`."""
    ceiling, (first, second, third) = network.ceiling, network.blocks
    read = _run_rectified(network.stem, arranged, _reader(first))
    tape.append((read.whole,))
    read = _make(_run_block(first, read, tape), ceiling, halved=_reader(second))[1]
    read = _make(_run_block(second, read, tape), ceiling, _reader(third))[0]
    x = _run_block(third, read, tape)
    features: Any = None
    for index, hourglass in enumerate(network.hourglasses):
        fine, halved = _make(
            x,
            ceiling,
            _reader(hourglass.across)._replace(whole=True),
            halved=_reader(hourglass.down),
            more=None if index == 0 else _convolve(features, network.feedback[index - 1]),
            shift=None if index == 0 else network.shifts[index - 1],
        )
        x = _Parts(fine.whole)
        top, last = network.tops[index], network.lasts[index]
        features = _run_top(
            top, last, _run_hourglass(hourglass, fine, halved, _reader(top), tape), tape
        )
    return _draw_maps(features, network.heatmaps)


def _back_stack(
    network: Any, index: int, gradient: Tensor, following: _Slope | None, tape: Tape
) -> _Slope:  # pragma: no cover
    """The gradient of what a stack reads.

    Args:
        gradient: of the convolution of its features that follows.
        following: of what the next stack reads.
    """
    ceiling, hourglass = network.ceiling, network.hourglasses[index]
    conv = [*network.feedback, network.heatmaps][index]
    due = _back_top(network.tops[index], network.lasts[index], gradient, conv, tape)
    slopes = _collect(due, ceiling, halves=True)
    del due
    across, down = _back_hourglass(hourglass, *slopes, tape)
    more = None if following is None else following.whole
    # Between stacks a map is not a block's result.
    return _collect(across, ceiling, coarse=down, more=more, tail=index == 0)[0]


def _run_back(
    network: Any, gradient: Tensor, arranged: Tensor, tape: Tape
) -> Tensor:  # pragma: no cover
    """The gradient of `_run` with respect to what is arranged."""
    ceiling, (first, second, third) = network.ceiling, network.blocks
    gradient = gradient.to(arranged.dtype, memory_format=torch.channels_last)
    slope: Any = None
    for index in reversed(range(len(network.hourglasses))):
        slope = _back_stack(network, index, gradient, slope, tape)
        gradient = slope.whole
    del gradient
    slope = _collect(_back_block(third, slope, tape), ceiling)[0]
    slope = _collect(_Due(), ceiling, coarse=_back_block(second, slope, tape))[0]
    due = _back_block(first, slope, tape)
    del slope
    (level,) = tape.pop()
    whole = _collect(due, ceiling, through=level, tail=False)[0].whole
    return _convolve_back(whole, arranged, network.stem.conv)


class _Drawn(torch.autograd.Function):  # pragma: no cover
    @staticmethod
    def forward(ctx: Any, arranged: Tensor, network: Any) -> Tensor:
        ctx.save_for_backward(arranged)
        ctx.network, ctx.tape = network, deque()
        return _run(network, arranged, ctx.tape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # The tape frees each map after its last use, and so serves once.
        if not ctx.tape:
            raise RuntimeError("a FAN's kernels keep nothing for a second backward pass")
        (arranged,) = ctx.saved_tensors
        return _run_back(ctx.network, gradients[0], arranged, ctx.tape), None


def draw(network: Any, arranged: Tensor) -> Tensor:
    """See `frozen_fan.FrozenFan.draw_plainly`; the network is one."""
    arranged = _packed(arranged.to(network.heatmaps.weight.dtype))
    if not (arranged.requires_grad and torch.is_grad_enabled()):
        return _run(network, arranged, deque(maxlen=0))
    maps: Tensor = _Drawn.apply(arranged, network)
    return maps
