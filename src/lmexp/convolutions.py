"""Convolutions of frozen networks in half precision, in the forms that a compiler makes fast.

Activations are half precision in memory and float32 between reading and writing: what a compiler
puts into one kernel is rounded once. Weights are cast once, biases and per-channel factors stay
float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _DepthwiseSum(torch.autograd.Function):
    """`depthwise` of stride 1; its gradient is one with the taps turned round."""

    @staticmethod
    def forward(x: Tensor, taps: Tensor) -> Tensor:
        return _sum_of_shifts(x, taps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (taps,) = ctx.saved_tensors
        return _sum_of_shifts(gradients[0], taps.flip(0, 1)), None


def _sum_of_shifts(x: Tensor, taps: Tensor, stride: int = 1) -> Tensor:
    rows, columns = taps.shape[:2]
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, columns // 2, columns // 2, rows // 2, rows // 2))
    total: Tensor | None = None
    for i in range(rows):
        for j in range(columns):
            shifted = padded[:, i : i + height : stride, j : j + width : stride]
            part = shifted * taps[i, j]
            total = part if total is None else total + part
    assert total is not None
    return total.to(x.dtype)


def depthwise(x: Tensor, taps: Tensor, stride: int = 1) -> Tensor:
    """A convolution of each channel by itself, zero beyond the border, as a sum of shifts.

    Libraries' depthwise kernels for half precision and channels last use a small part of a GPU's
    bandwidth; nine shifted products are one pass when they are compiled.

    Args:
        x: [N, h, w, C], channels last in the shape, too.
        taps: [k, k, C], float32, k odd; they get no gradient.
        stride: 1 or 2.

    Returns:
        [N, ⌈h / stride⌉, ⌈w / stride⌉, C] of x's type.
    """
    if stride == 1:
        summed: Tensor = _DepthwiseSum.apply(x, taps)
        return summed
    return _sum_of_shifts(x, taps, stride)


def taps_of(weight: Tensor) -> Tensor:
    """A depthwise convolution's weight [C, 1, k, k] as `depthwise` takes it, float32."""
    return weight[:, 0].float().permute(1, 2, 0).contiguous()


class LoweredConv(nn.Module):
    """A frozen convolution whose product is half precision and whose bias is added in float32.

    Args:
        weight: [O, I, k, k].
        bias: [O] or None.
        dtype: of the product and the result.
        stride, padding: as in `torch.nn.functional.conv2d`.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
    ) -> None:
        super().__init__()
        weight = weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight)
        column = None if bias is None else bias.detach().float().clone()[:, None, None]
        self.register_buffer("bias", column)
        self.stride = stride
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, I, h, w], any float type -> [N, O, h', w']."""
        y = F.conv2d(x.to(self.weight.dtype), self.weight, None, self.stride, self.padding)
        return y if self.bias is None else (y + self.bias).to(y.dtype)


def lower_convolutions(module: nn.Module, dtype: torch.dtype) -> None:
    """Put a `LoweredConv` in the place of every dense `Conv2d` inside a frozen module."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and child.groups == 1:
            lowered = LoweredConv(child.weight, child.bias, dtype, child.stride, child.padding)
            setattr(module, name, lowered)
        else:
            lower_convolutions(child, dtype)


class UnshuffledConv(nn.Module):
    """A convolution of stride 2 of few channels, as one of stride 1 of four times as many.

    Each 2×2 block of pixels becomes one of four times the channels. Gradients with respect to the
    image of strided convolutions with three channels are several times slower.

    Args:
        weight: [O, I, k, k], k odd, padded by k // 2; [O, 16, (k + 1) / 2, (k + 1) / 2] is kept,
            whose surplus channels are 0, for the tensor cores' sake.
        bias: [O] or None.
        dtype: of the product and the result.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.pad = weight.shape[-1] // 2
        blocks = F.pixel_unshuffle(F.pad(weight, (0, 1, 0, 1)), 2)
        self.surplus = -blocks.shape[1] % 8
        self.conv = LoweredConv(F.pad(blocks, (0, 0, 0, 0, 0, self.surplus)), bias, dtype)

    def arrange(self, x: Tensor) -> Tensor:
        """x: [N, I, h, w], h and w even -> what `conv` reads, [N, 16, h / 2 + …, w / 2 + …]."""
        x = x.to(self.conv.weight.dtype)
        x = F.pixel_unshuffle(F.pad(x, (self.pad,) * 4), 2)
        x = F.pad(x, (0, 0, 0, 0, 0, self.surplus))
        return x.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, I, h, w], h and w even -> [N, O, h / 2, w / 2]."""
        y: Tensor = self.conv(self.arrange(x))
        return y
