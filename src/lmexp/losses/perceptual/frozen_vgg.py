"""A VGG trunk in half precision, whose distance has kernels of its own on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lmexp.convolutions import LoweredConv

_TERMS = 32
"""Of the first convolution's product: nine places of three colours, filled up to what tensor cores
take."""


class FrozenVgg(nn.Module):
    """3×3 convolutions with ReLUs in blocks, the last map of each is read, 2×2 pools between them.

    Args:
        blocks: each block's convolutions, which this module shares with its owner.
        shift, gain: [3], RGB; the first convolution reads gain · (image + shift), 0 beyond the
            border.
        reverses: whether the first convolution reads BGR.
        weights: one [C] a block, how much each channel of its last map counts.
        rounds_up: whether pools round odd sides up.

    Attributes:
        first, first_back: the first convolution's weight as the kernels want it, [32, C] and
            [C, 32].
    """

    shift: Tensor
    gain: Tensor
    first: Tensor
    first_back: Tensor
    first_bias: Tensor

    def __init__(
        self,
        blocks: Sequence[Sequence[LoweredConv]],
        shift: Tensor,
        gain: Tensor,
        weights: Sequence[Tensor],
        *,
        reverses: bool,
        rounds_up: bool,
    ) -> None:
        super().__init__()
        first = blocks[0][0]
        assert first.bias is not None
        weight = first.weight.flip(1) if reverses else first.weight
        # Row 9 (row of the kernel) + 3 (its column) + colour.
        terms = weight.permute(2, 3, 1, 0).reshape(27, -1)
        terms = nn.functional.pad(terms, (0, 0, 0, _TERMS - 27))
        self.register_buffer("first", terms.contiguous())
        self.register_buffer("first_back", terms.T.contiguous())
        self.register_buffer("first_bias", first.bias.flatten())
        for name, values in (("shift", shift), ("gain", gain)):
            self.register_buffer(name, nn.functional.pad(values.repeat(9), (0, _TERMS - 27)))
        self.blocks = nn.ModuleList(
            nn.ModuleList(convs[1:] if index == 0 else convs) for index, convs in enumerate(blocks)
        )
        self._count = len(blocks)
        for index, values in enumerate(weights):
            self.register_buffer(f"weight{index}", values.float())
        self.rounds_up = rounds_up

    @property
    def convs(self) -> list[list[Any]]:
        """Each block's convolutions, without the first."""
        return [list(block.children()) for block in self.blocks]

    @property
    def weights(self) -> list[Tensor]:
        return [self.get_buffer(f"weight{index}") for index in range(self._count)]

    @property
    def has_kernels(self) -> bool:
        """Whether `vgg_triton` can compute it: on CUDA, with channels in powers of two."""
        widths = [len(self.first_bias), *(len(conv.weight) for part in self.convs for conv in part)]
        powers = all(width >= 16 and not width & (width - 1) for width in widths)
        return self.first.is_cuda and powers

    def pooled(self, height: int, width: int) -> tuple[int, int]:
        """The sides of a map after a pool."""
        more = int(self.rounds_up)
        return (height + more) // 2, (width + more) // 2

    def split(self, rows: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """`vgg_triton.distance`'s rows: targets, and weights of places or None for each."""
        targets, places = rows[: self._count], rows[self._count :]
        return targets, places or [None] * self._count
