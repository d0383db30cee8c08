"""A small image head that renders 256 px images from MobileStyleGAN's 128 px features."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAK = 0.2
NOISE_RANK = 4
"""Baked maps per layer: one for each of the four 256 px pixels within a 128 px one."""


def merge_bands(x: Tensor) -> Tensor:
    """Inverse Haar transform without its gain of 1/2, which callers fold into weights.

    Args:
        x: [N, 4C, h, w]: all low-pass bands, then all bands that differ between rows, between
            columns, and between both.

    Returns:
        [N, C, 2h, 2w].
    """
    low, rows, columns, both = x.chunk(4, dim=1)
    top, bottom = low + rows, low - rows
    top_step, bottom_step = columns + both, columns - both
    pixels = torch.stack(
        (top + top_step, top - top_step, bottom + bottom_step, bottom - bottom_step),
        dim=2,
    )
    return F.pixel_shuffle(pixels.flatten(1, 2), 2)


class HeadLayer(nn.Module):
    """Modulated depthwise 3x3 and 1x1 convolution, baked low-rank noise, bias, LeakyReLU(0.2).

    Args:
        channels_in: channels of its input.
        channels_out: channels of its output.
        side: side of the feature map, px.
        w_dim: size of a style vector.
    """

    frozen_constant: Tensor | None

    def __init__(self, channels_in: int, channels_out: int, side: int, w_dim: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(w_dim, channels_in)
        self.depthwise = nn.Parameter(torch.zeros(channels_in, 1, 3, 3))
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels_out))
        self.noise = nn.Parameter(torch.zeros(1, NOISE_RANK, side, side))
        self.noise_gain = nn.Parameter(torch.randn(channels_out, NOISE_RANK, 1, 1) * 0.5)
        nn.init.normal_(self.modulation.weight, std=0.02)
        nn.init.ones_(self.modulation.bias)
        nn.init.normal_(self.depthwise, std=0.1)
        nn.init.kaiming_normal_(self.weight, a=LEAK)
        with torch.no_grad():
            self.depthwise[:, :, 1, 1] += 1
        self.register_buffer("frozen_constant", None, persistent=False)

    def constant(self) -> Tensor:
        """Noise and bias, the same for every image: [1, channels_out, side, side]."""
        return F.conv2d(self.noise, self.noise_gain, self.bias)

    def freeze(self) -> None:
        """Compute `constant` once and for all; the layer is not trained any more."""
        self.requires_grad_(False)
        constant = self.constant().contiguous(memory_format=torch.channels_last)
        self.register_buffer("frozen_constant", constant, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, channels_in, side, side], already modulated -> [N, channels_out, side, side]."""
        x = F.conv2d(x, self.depthwise, padding=1, groups=x.shape[1])
        x = F.conv2d(x, self.weight)
        constant = self.constant() if self.frozen_constant is None else self.frozen_constant
        return F.leaky_relu_(x + constant, LEAK)


class ImageHead(nn.Module):
    """128 px features and three styles -> 256 px images.

    Two modulated separable layers and a modulated 1x1 convolution to the image's Haar bands,
    plus a direct 1x1 convolution from the modulated input. Trained by scripts/train_mobile_head.py.

    Args:
        channels: channels of the features.
        width: channels of its own layers.
        side: side of the features, px; the image is twice as large.
        w_dim: size of a style vector.
    """

    num_ws = 3

    def __init__(
        self, channels: int = 256, width: int = 128, side: int = 128, w_dim: int = 512
    ) -> None:
        super().__init__()
        self.layer1 = HeadLayer(channels, width, side, w_dim)
        self.layer2 = HeadLayer(width, width, side, w_dim)
        self.modulation = nn.Linear(w_dim, width)
        self.to_bands = nn.Parameter(torch.randn(12, width, 1, 1) * (0.1 / math.sqrt(width)))
        self.skip = nn.Parameter(torch.randn(12, channels, 1, 1) * (0.1 / math.sqrt(channels)))
        self.bias = nn.Parameter(torch.zeros(12))
        self.noise = nn.Parameter(torch.zeros(1, 12, side, side))
        nn.init.normal_(self.modulation.weight, std=0.02)
        nn.init.ones_(self.modulation.bias)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ImageHead:
        """Build the head that a state dict belongs to; its sizes are read from the shapes."""
        width, channels = tensors["layer1.weight"].shape[:2]
        head = cls(
            channels=channels,
            width=width,
            side=tensors["noise"].shape[-1],
            w_dim=tensors["modulation.weight"].shape[1],
        )
        head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return head.freeze()

    def freeze(self) -> ImageHead:
        """Prepare for use: no parameter needs a gradient, constants are folded."""
        self.layer1.freeze()
        self.layer2.freeze()
        return self.requires_grad_(False)

    def forward(self, x: Tensor, ws: Tensor) -> Tensor:
        """x: [N, channels, side, side], ws: [N, 3, w_dim] -> images: [N, 3, 2 side, 2 side]."""
        x = x * self.layer1.modulation(ws[:, 0])[:, :, None, None]
        skipped = F.conv2d(x, self.skip, self.bias)
        x = self.layer1(x)
        x = self.layer2(x * self.layer2.modulation(ws[:, 1])[:, :, None, None])
        # The last layer is narrow: modulating its input is still cheaper than its weights.
        x = x * self.modulation(ws[:, 2])[:, :, None, None]
        return merge_bands(F.conv2d(x, self.to_bands) + skipped + self.noise)
