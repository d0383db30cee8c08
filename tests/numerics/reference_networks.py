"""Small networks and pictures that the published projectors and ours can both be given.

All of it is drawn from numpy's frozen stream, so that the numbers in
`tests/data/reference_projector.npz` can be made again.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

WIDTHS = (8, 8, 16, 16, 16)


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal, float32: `numpy.random.RandomState(seed).standard_normal(shape)`."""
    values = np.random.RandomState(seed).standard_normal(shape)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def draw_picture(seed: int, side: int) -> NDArray[np.uint8]:
    """[side, side, 3]: 16 x 16 squares of random colours."""
    squares = np.random.RandomState(seed).randint(0, 256, (16, 16, 3))
    picture: NDArray[np.uint8] = squares.astype(np.uint8)
    return picture.repeat(side // 16, axis=0).repeat(side // 16, axis=1)


class Trunk(nn.Module):
    """In VGG16's place: five 3x3 convolutions, each read after its ReLU, halved in between.

    Attributes:
        heads: [C_l] for each layer, how much a channel counts, ≥ 0.
        weights_sha256: stands for a digest.
    """

    weights_sha256 = "trunk"

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Tensor] = []
        before = 3
        for index, width in enumerate(WIDTHS):
            gain = (2 / (9 * before)) ** 0.5
            self.kernels.append(gain * draw(100 + index, width, before, 3, 3))
            before = width
        self.heads = [draw(200 + index, width).abs() for index, width in enumerate(WIDTHS)]

    @property
    def channel_weights(self) -> list[Tensor]:
        return self.heads

    def layers(self, colours: Tensor) -> list[Tensor]:
        """colours: [N, 3, H, W] in [0, 255], as the published network takes them."""
        x, found = colours / 64 - 2, []
        for index, kernel in enumerate(self.kernels):
            x = F.softplus(F.conv2d(F.avg_pool2d(x, 2) if index else x, kernel, padding=1))
            found.append(x)
        return found

    def features(self, images: Tensor) -> list[Tensor]:
        """images: [N, 3, H, W] in [-1, 1], as our protocol has it."""
        return self.layers((images + 1) * (255 / 2))


class Heatmaps(nn.Module):
    """In the FAN's place: 68 maps of 64 x 64 between 0 and 1 from colours in [0, 1]."""

    weights_sha256 = "heatmaps"

    def __init__(self) -> None:
        super().__init__()
        self.first = 0.2 * draw(300, 16, 3, 7, 7)
        self.second = 0.1 * draw(301, 68, 16, 3, 3)

    def maps(self, colours: Tensor) -> Tensor:
        """colours: [N, 3, 256, 256] in [0, 1], as the published code shows them to its network."""
        x = F.softplus(F.conv2d(F.avg_pool2d(colours - 0.5, 4), self.first, padding=3))
        return torch.sigmoid(F.conv2d(x, self.second, padding=1) - 3)

    def forward(self, images: Tensor) -> Tensor:
        """images: [N, 3, R, R] in [-1, 1]; smaller ones are enlarged as the published code does."""
        return self.maps((F.interpolate(images, 256) + 1) / 2)
