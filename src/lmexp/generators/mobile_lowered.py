"""MobileStyleGAN's layers in half precision, laid out for a GPU.

Here channels are the last axis of the shape, not of the memory alone: 1×1 convolutions are matrix
products, the inverse Haar transform is one pass of indices and signs, and a depthwise convolution
is a sum of shifts in which modulation, noise, bias and activation have their part. Small maps are
left to a compiler; those above `DENSE_SIDE`, nearly all of the memory's traffic, have kernels of
their own on CUDA (`mobile_triton`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmexp.convolutions import depthwise, taps_of
from lmexp.generators.mobile_head import merge_bands
from lmexp.generators.mobile_styles import split_styles

LEAK = 0.2

DENSE_SIDE = 16
"""Up to this side, px, a depthwise and its 1×1 convolution are one dense 3×3 convolution.

That is nine times the arithmetic and half the kernels; small maps are bound by the latter.
"""

_COLUMNS = 16
"""Of the product that gives four pixels of three colours: what tensor cores take at least."""


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
    columns: Tensor
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
        if not self.dense:
            self.register_buffer("columns", weight.T.contiguous())
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


class LoweredBlock(nn.Module):
    """`mobile_stylegan.Block` with its layers lowered.

    Args:
        block: the block in float32.
        dtype: half precision.
    """

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv1 = lower(block.get_submodule("conv1"), dtype)
        self.conv2 = lower(block.get_submodule("conv2"), dtype)

    def forward(self, x: Tensor, up: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """x: [N, h, w, 4C], styles of the bands and of both layers -> [N, 2h, 2w, C_out]."""
        # The bands' factor and that of the channels they make, at a quarter of the values each.
        x = merge_last((x * up[:, None, None]).to(x.dtype))
        y: Tensor = self.conv2(self.conv1(x, first), second)
        return y


class LoweredHead(nn.Module):
    """What makes an image of features, at half its side: either head, lowered.

    The inverse Haar transform is part of the weights: a place's product is its four pixels.

    Args:
        head: `mobile_stylegan.FullHead`, or `mobile_head.ImageHead`, frozen, in float32.
        dtype: half precision.

    Attributes:
        rows, columns: [16, C] and [C, 16]; column 4 colour + 2 down + right, four surplus.
        constant: [16], or [h, w, 16] where there is noise.
        layers: none, or the two before the product.
        skip_rows, skip_columns: of a second product, of what the first of them reads.
    """

    rows: Tensor
    columns: Tensor
    constant: Tensor
    skip_rows: Tensor | None
    skip_columns: Tensor | None

    def __init__(self, head: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        tensors = {
            name: t.detach() for name, t in (*head.named_parameters(), *head.named_buffers())
        }
        self.layers = nn.ModuleList()
        constant, skip = tensors["bias"].float(), None
        if "skip" in tensors:
            for name in ("layer1", "layer2"):
                self.layers.append(
                    LoweredLayer(
                        tensors[f"{name}.weight"],
                        tensors[f"{name}.frozen_constant"],
                        None,
                        tensors[f"{name}.depthwise"],
                        dtype,
                    )
                )
            constant = tensors["noise"][0].permute(1, 2, 0).float() + constant
            skip = _to_pixels(tensors["skip"][:, :, 0, 0]).to(dtype)
        weight = tensors["to_bands" if "skip" in tensors else "weight"][:, :, 0, 0]
        rows = _to_pixels(weight).to(dtype)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", rows.T.contiguous())
        self.register_buffer(
            "constant", _to_pixels(constant.movedim(-1, 0)).movedim(0, -1).contiguous()
        )
        self.register_buffer("skip_rows", skip)
        self.register_buffer("skip_columns", None if skip is None else skip.T.contiguous())

    def forward(self, x: Tensor, *styles: Tensor) -> Tensor:
        """x: [N, h, w, C], styles of both layers and of the product -> [N, 3, 2h, 2w], float32."""
        # float32 from the sum on: these are the image's values.
        total = self.constant
        if self.skip_rows is not None:
            total = total + F.linear((x * styles[0][:, None, None]).to(x.dtype), self.skip_rows)
            for layer, style in zip(self.layers, styles, strict=False):
                x = layer(x, style)
        total = total + F.linear((x * styles[-1][:, None, None]).to(x.dtype), self.rows)
        n, height, width = total.shape[:3]
        pixels = total[..., :12].reshape(n, height, width, 3, 2, 2)
        return pixels.permute(0, 3, 1, 4, 2, 5).reshape(n, 3, 2 * height, 2 * width)


class LoweredTail(nn.Module):
    """Blocks above `DENSE_SIDE` and the head.

    Args:
        blocks: with no dense layer among them.
        head: what follows.
        widths: channels of their styles, style vector by style vector.
    """

    def __init__(
        self,
        blocks: Sequence[LoweredBlock],
        head: LoweredHead,
        widths: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.widths = widths

    @property
    def has_kernels(self) -> bool:
        """Whether `mobile_triton` can compute it: its tiles are of powers of two from 16 up."""
        layers = [
            *(conv for block in self.blocks for conv in (block.conv1, block.conv2)),
            *self.head.layers,
        ]
        widths = [width for layer in layers for width in layer.weight.shape[:2]]
        return (
            bool(self.blocks)
            and not any(layer.dense for layer in layers)
            and all(width >= 16 and not width & (width - 1) for width in widths)
        )

    def split(self, styles: Tensor) -> list[Tensor]:
        """styles: [N, S], see `StackedStyles` -> three a block, then the head's, [N, C] each."""
        return split_styles(styles, self.widths)

    def forward(self, x: Tensor, styles: Tensor) -> Tensor:
        """x: [N, h, w, C], styles: [N, S], as `split` takes them -> images, float32."""
        given = self.split(styles)
        count = 3 * len(self.blocks)
        for index, block in enumerate(self.blocks):
            x = block(x, *given[3 * index : 3 * index + 3])
        images: Tensor = self.head(x, *given[count:])
        return images


def _to_pixels(bands: Tensor) -> Tensor:
    """Haar bands of three colours along the first axis, [12, …] -> four pixels', [16, …].

    Rows 4 colour + 2 down + right; the last four are 0.
    """
    places = bands.reshape(12, -1).T[:, :, None, None]
    pixels = merge_bands(places).permute(1, 2, 3, 0).reshape(bands.shape)
    return torch.cat([pixels, pixels.new_zeros(_COLUMNS - 12, *bands.shape[1:])])


def lower(layer: nn.Module, dtype: torch.dtype) -> LoweredLayer:
    """An `ActivatedConv`, lowered."""
    buffers = dict(layer.named_buffers())
    return LoweredLayer(
        buffers["weight"], buffers["noise"], buffers["bias"], buffers.get("depthwise"), dtype
    )
