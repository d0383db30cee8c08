"""SFace's layers in half precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmexp.convolutions import LoweredConv, depthwise, taps_of


class LoweredLayer(nn.Module):
    """One of the trunk's convolutions and its PReLU, channels last in the shape.

    Args:
        conv: dense of 1×1 or 3×3, or depthwise.
        activation: what follows it.
        dtype: half precision.
    """

    bias: Tensor
    slope: Tensor
    weight: Tensor

    def __init__(self, conv: nn.Conv2d, activation: nn.PReLU, dtype: torch.dtype) -> None:
        super().__init__()
        assert conv.bias is not None
        self.register_buffer("bias", conv.bias.detach().float().clone())
        self.register_buffer("slope", activation.weight.detach().float().clone())
        self.stride = conv.stride[0]
        self.grouped = conv.groups > 1
        self.dense = LoweredConv(conv.weight, None, dtype, padding=1) if not self.grouped else None
        if self.grouped:
            self.register_buffer("weight", taps_of(conv.weight.detach()))
        elif conv.kernel_size == (1, 1):
            self.register_buffer("weight", conv.weight.detach()[:, :, 0, 0].to(dtype))
            self.dense = None

    def convolve(self, x: Tensor) -> Tensor:
        """x: [N, h, w, I] -> [N, h', w', O], before the bias."""
        if self.dense is not None:
            y: Tensor = self.dense(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return y
        return depthwise(x, self.weight, self.stride) if self.grouped else F.linear(x, self.weight)

    def activate(self, x: Tensor) -> Tensor:
        """What follows the convolution: bias and PReLU."""
        shifted = x + self.bias
        return torch.where(shifted >= 0, shifted, self.slope * shifted).to(x.dtype)


def separable(
    x: Tensor, before: LoweredLayer, grouped: LoweredLayer, dense: LoweredLayer
) -> Tensor:
    """A depthwise and a 1×1 convolution, from before one activation to before another.

    Args:
        x: [N, h, w, C], what `before` convolved.

    Returns:
        [N, h', w', O], what `dense` convolved.
    """
    return dense.convolve(grouped.activate(grouped.convolve(before.activate(x))))
