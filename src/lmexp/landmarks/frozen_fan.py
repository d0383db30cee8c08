"""A trained FAN of any number of stacks in half precision, with its normalisations folded.

What is frozen can be computed once: every BatchNorm is one factor and one summand per channel;
those right behind a convolution are part of its weights; and between stacks, where the maps are
fed back, three 1×1 convolutions in a row without anything between are one. What is left between
the convolutions has kernels of its own on CUDA (`fan_triton`) and is plain operations elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmexp.acceleration import Checked
from lmexp.convolutions import LoweredConv, UnshuffledConv
from lmexp.landmarks.fan import CEILING, Fan


def rectify(x: Tensor, scale: Tensor | None, shift: Tensor, ceiling: float) -> Tensor:
    """clamp(scale · x + shift, 0, ceiling), in float32, rounded once.

    Args:
        x: [N, C, h, w].
        scale, shift: [C], float32; no scale is 1.
        ceiling: `math.inf` for a ReLU.

    Returns:
        the same shape and type as x.
    """
    y = (x if scale is None else x * scale[:, None, None]) + shift[:, None, None]
    return (F.relu(y) if ceiling == math.inf else y.clamp(0.0, ceiling)).to(x.dtype)


def add(x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    """x + y + shift, in float32, rounded once: [N, C, h, w] twice and [C], float32."""
    return (x.float() + y + shift[:, None, None]).to(x.dtype)


def halve(x: Tensor) -> Tensor:
    """[N, C, h, w] averaged over 2×2 places."""
    return F.avg_pool2d(x, 2)


def merge(fine: Tensor, coarse: Tensor) -> Tensor:
    """[N, C, 2h, 2w] plus [N, C, h, w], each of whose values counts for four places."""
    n, width, height, side = coarse.shape
    # By index alone, which a compiler fuses.
    spread = coarse[:, :, :, None, :, None].expand(n, width, height, 2, side, 2)
    summed: Tensor = fine + spread.reshape(n, width, 2 * height, 2 * side)
    return summed


class FoldedNorm(nn.Module):
    """A frozen BatchNorm and what rectifies it.

    Args:
        norm: in evaluation mode.
        ceiling: see `rectify`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d, ceiling: float) -> None:
        super().__init__()
        scale, shift = fold(norm)
        self.register_buffer("scale", scale.float())
        self.register_buffer("shift", shift.float())
        self.ceiling = ceiling

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] → the same, in x's type."""
        return rectify(x, self.scale, self.shift, self.ceiling)


class RectifiedConv(nn.Module):
    """A frozen convolution, its bias, and what rectifies both.

    Args:
        conv: without a bias.
        bias: [O].
        ceiling: see `rectify`.
    """

    shift: Tensor

    def __init__(self, conv: nn.Module, bias: Tensor, ceiling: float) -> None:
        super().__init__()
        self.conv = conv
        self.register_buffer("shift", bias.float())
        self.ceiling = ceiling

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, h, w] → [N, O, h', w']."""
        return rectify(self.conv(x), None, self.shift, self.ceiling)


def fold(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A frozen BatchNorm's factor and summand, [C] each, float64."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale


def fold_behind(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the BatchNorm that follows it, float64."""
    scale, shift = fold(norm)
    bias = 0 if conv.bias is None else conv.bias.detach().double()
    return conv.weight.detach().double() * scale[:, None, None, None], shift + scale * bias


class FrozenBlock(nn.Module):
    """The hierarchical block, see `lmexp.landmarks.fan.HierarchicalBlock`.

    Args:
        layers: the three BatchNorms and convolutions of the branch, in order.
        skip: those of the way around it; None: it is the identity.
        ceiling: see `FoldedNorm`.
        dtype: half precision.
    """

    def __init__(
        self,
        layers: Sequence[tuple[nn.BatchNorm2d, nn.Conv2d]],
        skip: tuple[nn.BatchNorm2d, nn.Conv2d] | None,
        ceiling: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()

        def lower(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> nn.Sequential:
            lowered = LoweredConv(conv.weight, conv.bias, dtype, padding=conv.padding)
            return nn.Sequential(FoldedNorm(norm, ceiling), lowered)

        self.layers = nn.ModuleList(lower(*layer) for layer in layers)
        self.skip: Any = nn.Identity() if skip is None else lower(*skip)
        self.ceiling = ceiling

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, h, w] → [N, outputs, h, w]."""
        outputs: list[Tensor] = []
        for layer in self.layers:
            outputs.append(layer(outputs[-1] if outputs else x))
        around: Tensor = self.skip(x)
        return torch.cat(outputs, dim=1) + around

    @property
    def norm_around(self) -> FoldedNorm | None:
        """The normalisation of the way around the layers; None: that is the identity."""
        if isinstance(self.skip, nn.Identity):
            return None
        norm: FoldedNorm = self.skip[0]
        return norm


class FrozenHourglass(nn.Module):
    """See `lmexp.landmarks.fan.Hourglass`.

    Args:
        levels: the blocks across, down and up of each resolution, the finest first.
        bottom: the block at the coarsest.
    """

    def __init__(
        self, levels: Sequence[tuple[FrozenBlock, FrozenBlock, FrozenBlock]], bottom: FrozenBlock
    ) -> None:
        super().__init__()
        across, down, up = levels[0]
        self.across, self.down, self.up = across, down, up
        self.inner: nn.Module = FrozenHourglass(levels[1:], bottom) if len(levels) > 1 else bottom

    def forward(self, x: Tensor) -> Tensor:
        """[N, width, h, w] → the same."""
        return merge(self.across(x), self.up(self.inner(self.down(halve(x)))))

    @property
    def is_innermost(self) -> bool:
        """Whether what is inside is the block at the coarsest resolution."""
        return isinstance(self.inner, FrozenBlock)


class FrozenFan(nn.Module):
    """The network; build it with `of_embedded` or `of_published`.

    Args:
        stem: convolution and BatchNorm at the image.
        blocks: the three blocks between stem and hourglass.
        stacks: per stack its hourglass, its block on top, and the convolution with the BatchNorm
            that follow.
        heatmaps: the last stack's convolution to maps.
        feedback: per stack but the last, weight and bias, float64, from the features before its
            maps to the next stack's.
        ceiling: see `FoldedNorm`.
        dtype: half precision.
    """

    def __init__(
        self,
        stem: tuple[nn.Conv2d, nn.BatchNorm2d],
        blocks: Sequence[FrozenBlock],
        stacks: Sequence[tuple[FrozenHourglass, FrozenBlock, tuple[nn.Conv2d, nn.BatchNorm2d]]],
        heatmaps: nn.Conv2d,
        feedback: Sequence[tuple[Tensor, Tensor]],
        ceiling: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()

        def lower(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> RectifiedConv:
            weight, bias = fold_behind(conv, norm)
            return RectifiedConv(LoweredConv(weight, None, dtype), bias, ceiling)

        weight, bias = fold_behind(*stem)
        self.unshuffled = UnshuffledConv(weight, None, dtype)
        self.stem = RectifiedConv(self.unshuffled.conv, bias, ceiling)
        self.blocks = nn.ModuleList(blocks)
        self.hourglasses = nn.ModuleList(hourglass for hourglass, _, _ in stacks)
        self.tops = nn.ModuleList(top for _, top, _ in stacks)
        self.lasts = nn.ModuleList(lower(*last) for _, _, last in stacks)
        self.feedback = nn.ModuleList(LoweredConv(weight, None, dtype) for weight, _ in feedback)
        self.shifts = nn.ParameterList(bias.float() for _, bias in feedback)
        self.heatmaps = LoweredConv(heatmaps.weight, heatmaps.bias, dtype)
        self.ceiling = ceiling
        self._kernels: Checked | None = None
        self.requires_grad_(False).eval()

    @classmethod
    def of_embedded(cls, fan: Fan, dtype: torch.dtype) -> FrozenFan:
        """Of a one-stack FAN of this package."""

        def block(module: Any) -> FrozenBlock:
            layers = [(getattr(module, f"norm{i}"), getattr(module, f"conv{i}")) for i in (1, 2, 3)]
            way = module.skip
            skip = None if isinstance(way, nn.Identity) else (way[0], way[2])
            return FrozenBlock(layers, skip, CEILING, dtype)

        levels, inner = [], fan.hourglass
        while True:
            levels.append((block(inner.across), block(inner.down), block(inner.up)))
            if not isinstance(inner.inner, type(fan.hourglass)):
                break
            inner = inner.inner
        hourglass = FrozenHourglass(levels, block(inner.inner))
        return cls(
            stem=(fan.stem, fan.stem_norm),
            blocks=[block(fan.block1), block(fan.block2), block(fan.block3)],
            stacks=[(hourglass, block(fan.top), (fan.last, fan.last_norm))],
            heatmaps=fan.heatmaps,
            feedback=[],
            ceiling=CEILING,
            dtype=dtype,
        )

    @classmethod
    def of_published(cls, fan: Any, dtype: torch.dtype) -> FrozenFan:
        """Of a `face_alignment.models.FAN` of any number of stacks."""

        def block(module: Any) -> FrozenBlock:
            layers = [(getattr(module, f"bn{i}"), getattr(module, f"conv{i}")) for i in (1, 2, 3)]
            way = module.downsample
            return FrozenBlock(layers, None if way is None else (way[0], way[2]), math.inf, dtype)

        def hourglass(module: Any) -> FrozenHourglass:
            levels = [
                tuple(block(getattr(module, f"b{kind}_{level}")) for kind in (1, 2, 3))
                for level in range(module.depth, 0, -1)
            ]
            return FrozenHourglass(levels, block(module.b2_plus_1))  # type: ignore[arg-type]

        count = fan.num_modules

        def part(name: str, index: int) -> Any:
            return getattr(fan, f"{name}{index}")

        return cls(
            stem=(fan.conv1, fan.bn1),
            blocks=[block(fan.conv2), block(fan.conv3), block(fan.conv4)],
            stacks=[
                (
                    hourglass(part("m", i)),
                    block(part("top_m_", i)),
                    (part("conv_last", i), part("bn_end", i)),
                )
                for i in range(count)
            ],
            heatmaps=part("l", count - 1),
            feedback=[join(part("l", i), part("al", i), part("bl", i)) for i in range(count - 1)],
            ceiling=math.inf,
            dtype=dtype,
        )

    @property
    def has_kernels(self) -> bool:
        """Whether what is between the convolutions is more than plain operations."""
        return self.heatmaps.weight.is_cuda

    def forward(self, images: Tensor) -> Tensor:
        """Draw the last stack's heat maps.

        Args:
            images: [N, 3, R, R], RGB in the range that the network was trained with.

        Returns:
            heatmaps: [N, K, R/4, R/4], float32.
        """
        return self.draw(self.arrange(images))

    def arrange(self, images: Tensor) -> Tensor:
        """Images as `draw` takes them: plain operations, for a compiler to make one of."""
        return self.unshuffled.arrange(images)

    def draw(self, arranged: Tensor) -> Tensor:
        """The heat maps of images that are arranged."""
        if not self.has_kernels:
            return self.draw_plainly(arranged)
        if self._kernels is None:
            # Triton comes with PyTorch's CUDA builds alone.
            from lmexp.landmarks import fan_triton

            plain, fast = self.draw_plainly, partial(fan_triton.draw, self)
            self._kernels = Checked("the landmark network", fast, plain, plain, errors=_ERRORS)
        return self._kernels(arranged)

    def draw_plainly(self, arranged: Tensor) -> Tensor:
        """`draw` in plain operations, which say what its kernels compute."""
        first, second, third = self.blocks
        x = third(second(halve(first(self.stem(arranged)))))
        for index, hourglass in enumerate(self.hourglasses):
            y = self.lasts[index](self.tops[index](hourglass(x)))
            if index < len(self.feedback):
                x = add(x, self.feedback[index](y), self.shifts[index])
        heatmaps: Tensor = self.heatmaps(y)
        return heatmaps.float().contiguous()


_ERRORS = 0.1, 0.8
"""With the weights of the package, kernels differ from plain operations, both in bfloat16, by up to
0.7 and 25 % on a face, 3.5 and 52 % on noise (one H200, 2026-12-01)."""


def join(maps: nn.Conv2d, back: nn.Conv2d, beside: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """`back` of `maps` plus `beside`, all 1×1, as one convolution: weight and bias, float64."""

    def matrix(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
        assert conv.bias is not None
        return conv.weight.detach()[:, :, 0, 0].double(), conv.bias.detach().double()

    (w1, b1), (w2, b2), (w3, b3) = matrix(maps), matrix(back), matrix(beside)
    return (w2 @ w1 + w3)[:, :, None, None], w2 @ b1 + b2 + b3
