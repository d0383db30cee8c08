"""All styles of MobileStyleGAN's layers by one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ALIGNED = 16
"""Columns that each style vector's are a multiple of: wide loads want aligned addresses."""


class StackedStyles(nn.Module):
    """Frozen affine maps of style vectors: one batched product for all, forward and backward.

    A layer's own product is small enough to cost what its launch costs. Here each style vector has
    the same number of columns, as many as the widest needs. Its layers' styles lie there side by
    side, and the columns left over are 0. So no vector is read twice, and the way back to `ws` is a
    product alone: nothing is gathered or added up, in whatever order.

    Args:
        modulations: of each style vector, the maps that read it, each with a `weight` [C, w_dim]
            and a `bias` [C].

    Attributes:
        widths: C of each map, style vector by style vector.
        columns: of each style vector.
        weight, bias: [num_ws, w_dim, columns] and [num_ws, 1, columns].
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, modulations: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__()
        maps = [
            [(_tensor(module, "weight"), _tensor(module, "bias")) for module in of_vector]
            for of_vector in modulations
        ]
        self.widths = tuple(tuple(len(bias) for _, bias in of_vector) for of_vector in maps)
        self.columns = -(-max(map(sum, self.widths)) // _ALIGNED) * _ALIGNED
        like = maps[0][0][0]
        weight = like.new_zeros(len(maps), like.shape[1], self.columns)
        bias = like.new_zeros(len(maps), 1, self.columns)
        for index, of_vector in enumerate(maps):
            width = sum(self.widths[index])
            weight[index, :, :width] = torch.cat([part for part, _ in of_vector]).T
            bias[index, 0, :width] = torch.cat([part for _, part in of_vector])
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, ws: Tensor, apart: int) -> tuple[list[Tensor], Tensor]:
        """Compute all styles.

        Args:
            ws: [N, num_ws, w_dim].
            apart: number of style vectors, from the first, whose styles are returned one by one.

        Returns:
            Those styles, [N, C] each; and all others in one tensor [N, (num_ws - apart) · columns],
            which `split_styles` takes apart. All are views of one tensor.
        """
        styles = torch.bmm(ws.transpose(0, 1), self.weight) + self.bias
        found, rest = _split(styles.transpose(0, 1).flatten(1), self.widths[:apart], self.columns)
        return found, rest


def split_styles(styles: Tensor, widths: Sequence[Sequence[int]]) -> list[Tensor]:
    """Styles of several style vectors in one tensor, layer by layer.

    Args:
        styles: [N, len(widths) · columns].
        widths: C of each layer, style vector by style vector.

    Returns:
        [N, C] each, views.
    """
    return _split(styles, widths, styles.shape[1] // len(widths))[0]


def _split(
    styles: Tensor, widths: Sequence[Sequence[int]], columns: int
) -> tuple[list[Tensor], Tensor]:
    """Styles of the first style vectors, [N, C] each, and those of all others."""
    # One split, not slices: its gradient is one concatenation.
    sizes: list[int] = []
    wanted: list[int] = []
    for of_vector in widths:
        wanted += range(len(sizes), len(sizes) + len(of_vector))
        surplus = columns - sum(of_vector)
        sizes += [*of_vector, surplus] if surplus else of_vector
    parts = styles.split_with_sizes([*sizes, styles.shape[1] - sum(sizes)], dim=1)
    return [parts[index] for index in wanted], parts[-1]


def _tensor(module: nn.Module, name: str) -> Tensor:
    tensor = getattr(module, name)
    assert isinstance(tensor, Tensor)
    return tensor.detach()
