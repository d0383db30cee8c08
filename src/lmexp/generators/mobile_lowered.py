"""MobileStyleGAN's synthesis in half precision, laid out for a compiler.

Here channels are the last axis of the shape, not of the memory alone: 1×1 convolutions are matrix
products, the inverse Haar transform is one pass of indices and signs, and a depthwise convolution
is a sum of shifts in which modulation, noise, bias and activation have their part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmexp.convolutions import depthwise, taps_of

LEAK = 0.2

DENSE_SIDE = 32
"""Up to this side, px, a depthwise and its 1×1 convolution are one dense 3×3 convolution.

That is nine times the arithmetic and half the kernels; small maps are bound by the latter.
"""

_COLUMNS = 16
"""Of the product that gives an image's 12 bands: a multiple of what tensor cores read at once."""


def merge_last(x: Tensor) -> Tensor:
    """Inverse Haar transform without its gain of 1/2, see `mobile_head.merge_bands`.

    Args:
        x: [N, h, w, 4C], band by band.

    Returns:
        [N, 2h, 2w, C].
    """
    n, height, width, bands = x.shape
    pixels = (n, height, 2, width, 2, bands // 4)
    low, rows, columns, both = (
        band[:, :, None, :, None, :].expand(pixels) for band in x.chunk(4, dim=3)
    )
    sign = 1.0 - 2.0 * torch.arange(2, device=x.device, dtype=torch.float32)
    down, right = sign[:, None, None, None], sign[:, None]
    merged = low + down * rows + right * columns + (down * right) * both
    return merged.to(x.dtype).reshape(n, 2 * height, 2 * width, bands // 4)


class LoweredLayer(nn.Module):
    """A depthwise 3×3 and a 1×1 convolution, or a dense 3×3 one; noise, bias, LeakyReLU(0.2).

    Args:
        weight: [O, I, 1, 1], or [O, I, 3, 3] without `taps`.
        constant: added to the product: [1, O or 1, h, w].
        bias: [O] or None.
        taps: [I, 1, 3, 3] or None.
        dtype: half precision.
    """

    taps: Tensor | None
    weight: Tensor
    constant: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        constant: Tensor,
        bias: Tensor | None,
        taps: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        if taps is not None and constant.shape[-1] <= DENSE_SIDE:
            weight, taps = weight * taps[None, :, 0], None
        self.dense = taps is None
        if self.dense:
            weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        else:
            weight = weight[:, :, 0, 0].to(dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("taps", None if taps is None else taps_of(taps))
        self.register_buffer("constant", constant[0].permute(1, 2, 0).float().contiguous())
        self.register_buffer("bias", None if bias is None else bias.float())

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x: [N, h, w, I], style: [N, I], float32 -> [N, h, w, O] of the product's type."""
        x = (x * style[:, None, None]).to(self.weight.dtype)
        if self.taps is None:
            rows = F.conv2d(x.permute(0, 3, 1, 2), self.weight, padding=1).permute(0, 2, 3, 1)
        else:
            rows = F.linear(depthwise(x, self.taps), self.weight)
        y = rows + self.constant
        if self.bias is not None:
            y = y + self.bias
        return F.leaky_relu(y, LEAK).to(rows.dtype)


class LoweredTrunk(nn.Module):
    """`mobile_stylegan.Trunk` with its layers lowered.

    Args:
        trunk: the network in float32.
        dtype: half precision.
    """

    input: Tensor

    def __init__(self, trunk: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("input", trunk.get_buffer("input").permute(0, 2, 3, 1).contiguous())
        self.modulation = trunk.get_submodule("modulation")
        self.conv = _lower(trunk.get_submodule("conv"), dtype)
        self.blocks = nn.ModuleList(
            LoweredBlock(block, dtype) for block in trunk.get_submodule("blocks").children()
        )

    @property
    def num_ws(self) -> int:
        """Number of style vectors it reads."""
        return 1 + 2 * len(self.blocks)

    def forward(self, ws: Tensor) -> tuple[Tensor, Tensor]:
        """ws: [N, >= num_ws, w_dim] -> the features, twice: [N, h, w, C]."""
        x = self.conv(self.input, self.modulation(ws[:, 0]))
        for index, block in enumerate(self.blocks):
            x = block(x, ws[:, 1 + 2 * index], ws[:, 2 + 2 * index])
        return x, x


class LoweredBlock(nn.Module):
    """`mobile_stylegan.Block` with its layers lowered.

    Args:
        block: the block in float32.
        dtype: half precision.
    """

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = block.get_submodule("up")
        self.modulation1 = block.get_submodule("modulation1")
        self.modulation2 = block.get_submodule("modulation2")
        self.conv1 = _lower(block.get_submodule("conv1"), dtype)
        self.conv2 = _lower(block.get_submodule("conv2"), dtype)

    def forward(self, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        """x: [N, h, w, 4C], w1 and w2: [N, w_dim] -> [N, 2h, 2w, C_out]."""
        # The bands' factor and that of the channels they make, at a quarter of the values each.
        x = merge_last((x * self.up(w1)[:, None, None]).to(x.dtype))
        x = self.conv1(x, self.modulation1(w1))
        y: Tensor = self.conv2(x, self.modulation2(w2))
        return y


class LoweredFullHead(nn.Module):
    """`mobile_stylegan.FullHead` as a matrix product.

    Args:
        head: the layer in float32.
        dtype: half precision.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, head: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.modulation = head.get_submodule("modulation")
        self.register_buffer("weight", to_columns(head.get_buffer("weight"), dtype))
        self.register_buffer("bias", head.get_buffer("bias").float())

    def forward(self, x: Tensor, ws: Tensor) -> Tensor:
        """x: [N, h, w, C], ws: [N, 1, w_dim] -> images: [N, 3, 2h, 2w], float32."""
        x = (x * self.modulation(ws[:, 0])[:, None, None]).to(self.weight.dtype)
        bands = F.linear(x, self.weight)[..., : len(self.bias)] + self.bias
        return merge_last(bands).permute(0, 3, 1, 2)


class LoweredImageHead(nn.Module):
    """`mobile_head.ImageHead` with its layers lowered.

    Args:
        head: the head in float32, frozen.
        dtype: half precision.
    """

    skip: Tensor
    to_bands: Tensor
    constant: Tensor

    def __init__(self, head: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.modulations = nn.ModuleList(
            head.get_submodule(name)
            for name in ("layer1.modulation", "layer2.modulation", "modulation")
        )
        for name in ("layer1", "layer2"):
            layer = head.get_submodule(name)
            lowered = LoweredLayer(
                layer.get_parameter("weight").detach(),
                layer.get_buffer("frozen_constant"),
                None,
                layer.get_parameter("depthwise").detach(),
                dtype,
            )
            self.add_module(name, lowered)
        self.register_buffer("skip", to_columns(head.get_parameter("skip"), dtype))
        self.register_buffer("to_bands", to_columns(head.get_parameter("to_bands"), dtype))
        constant = head.get_parameter("noise") + head.get_parameter("bias")[:, None, None]
        constant = constant.detach()[0].permute(1, 2, 0).float().contiguous()
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor, ws: Tensor) -> Tensor:
        """x: [N, h, w, C], ws: [N, 3, w_dim] -> images: [N, 3, 2h, 2w], float32."""
        first, second, third = (
            modulation(ws[:, index]) for index, modulation in enumerate(self.modulations)
        )
        skipped = F.linear((x * first[:, None, None]).to(x.dtype), self.skip)
        x = self.get_submodule("layer1")(x, first)
        x = self.get_submodule("layer2")(x, second)
        bands = F.linear((x * third[:, None, None]).to(x.dtype), self.to_bands)
        used = self.constant.shape[-1]
        # float32 from here: these are the image's values.
        total = bands[..., :used].float() + skipped[..., :used] + self.constant
        return merge_last(total).permute(0, 3, 1, 2)


def to_columns(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A 1×1 convolution's weight as a matrix whose surplus rows are 0: [16, I]."""
    matrix = weight.detach()[:, :, 0, 0].to(dtype)
    return F.pad(matrix, (0, 0, 0, -len(matrix) % _COLUMNS))


def _lower(layer: nn.Module, dtype: torch.dtype) -> LoweredLayer:
    """An `ActivatedConv`, lowered."""
    buffers = dict(layer.named_buffers())
    return LoweredLayer(
        buffers["weight"], buffers["noise"], buffers["bias"], buffers.get("depthwise"), dtype
    )
