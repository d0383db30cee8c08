"""MobileStyleGAN's synthesis in half precision: its lowered layers, by kernels where there are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lmexp.acceleration import Checked
from lmexp.generators.mobile_lowered import LoweredBlock, LoweredHead, LoweredTail, lower
from lmexp.generators.mobile_styles import StackedStyles


class LoweredSynthesis(nn.Module):
    """A MobileStyleGAN's synthesis, lowered.

    Args:
        trunk: `mobile_stylegan.Trunk`, in float32.
        head: its head, in float32.
        dtype: half precision.
    """

    input: Tensor

    def __init__(self, trunk: nn.Module, head: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("input", trunk.get_buffer("input").permute(0, 2, 3, 1).contiguous())
        self.conv = lower(trunk.get_submodule("conv"), dtype)
        blocks = [LoweredBlock(block, dtype) for block in trunk.get_submodule("blocks").children()]
        small = [block for block in blocks if block.conv1.dense]
        self.blocks = nn.ModuleList(small)
        self.styles = StackedStyles(_list_modulations(trunk, head))
        self.tail = LoweredTail(
            blocks[len(small) :], LoweredHead(head, dtype), self.styles.widths[1 + 2 * len(small) :]
        )
        self._start: Callable[[Tensor], tuple[Tensor, Tensor]] = self.start
        self._end: Callable[[Tensor, Tensor], Tensor] = self.tail.forward
        self._kernels: Checked | None = None

    def compile_regions(self, fuse: Callable[..., Callable[..., Tensor]]) -> None:
        """Compile what has no kernels."""
        self._start = fuse(self.start)  # type: ignore[assignment]
        self._end = fuse(self.tail.forward)

    def start(self, ws: Tensor) -> tuple[Tensor, Tensor]:
        """ws: [N, num_ws, w_dim] -> features of the small blocks and the tail's styles, [N, S]."""
        styles, of_tail = self.styles(ws, apart=1 + 2 * len(self.blocks))
        x = self.conv(self.input, styles[0])
        for index, block in enumerate(self.blocks):
            x = block(x, *styles[1 + 3 * index : 4 + 3 * index])
        return x, of_tail

    def forward(self, ws: Tensor) -> Tensor:
        """ws: [N, num_ws, w_dim] -> images: [N, 3, R, R], float32."""
        x, styles = self._start(ws)
        if not (x.is_cuda and self.tail.has_kernels):
            return self._end(x, styles)
        if self._kernels is None:
            from lmexp.generators.mobile_triton import paint

            self._kernels = Checked(
                "MobileStyleGAN",
                lambda x, styles: paint(self.tail, x, styles),
                lambda x, styles: self.tail(x, styles),
                lambda x, styles: self._end(x, styles),
            )
        return self._kernels(x, styles)


def _list_modulations(trunk: nn.Module, head: nn.Module) -> list[list[nn.Module]]:
    """Modulations of a network, by the style vector that they read."""
    found = [[trunk.get_submodule("modulation")]]
    for block in trunk.get_submodule("blocks").children():
        found.append([block.get_submodule("up"), block.get_submodule("modulation1")])
        found.append([block.get_submodule("modulation2")])
    there = dict(head.named_modules())
    names = ("layer1.modulation", "layer2.modulation", "modulation")
    return found + [[there[name]] for name in names if name in there]
