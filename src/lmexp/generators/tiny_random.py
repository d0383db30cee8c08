"""A tiny StyleGAN2-like generator with random weights: for tests, and to try a config quickly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lmexp.errors import LmexpError
from lmexp.weights import store

LEAK = 0.2


class TinyRandom(nn.Module):
    """A constant, one modulated 3x3 convolution with noise per resolution, a modulated RGB layer.

    It has everything that the projection touches in a large generator (a mapping network, a
    style for every layer, noise maps that can be optimised) at a thousandth of the cost. Its
    images are coloured blobs. The same seed gives the same weights on every device.

    Args:
        resolution: side of the image, px.
        dim: size of z and w.
        channels: channels of every layer.
        seed: seed of the weights.
    """

    constant: Tensor
    rgb: Tensor

    def __init__(
        self,
        resolution: Literal[16, 32, 64, 128, 256] = 32,
        dim: Annotated[int, Field(ge=2, le=512)] = 16,
        channels: Annotated[int, Field(ge=4, le=256)] = 16,
        seed: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=random) * std

        sides = [4 * 2**index for index in range(int(math.log2(resolution)) - 1)]
        self.z_dim = self.w_dim = dim
        self.resolution = resolution
        self.num_ws = len(sides) + 1
        self.noise_shapes: tuple[tuple[int, int], ...] = tuple((side, side) for side in sides)
        for index in range(2):
            self.register_buffer(f"mapping_{index}", normal(dim, dim, std=math.sqrt(2 / dim)))
        self.register_buffer("constant", normal(1, channels, 4, 4))
        for index, side in enumerate(sides):
            kernel = normal(channels, channels, 3, 3, std=math.sqrt(2 / (9 * channels)))
            self.register_buffer(f"kernel_{index}", kernel)
            self.register_buffer(f"noise_{index}", normal(1, 1, side, side))
        for index in range(self.num_ws):
            # Of a style's size, whatever `dim`: w has unit variance per component.
            self.register_buffer(f"style_{index}", normal(channels, dim, std=0.5 / math.sqrt(dim)))
        self.register_buffer("rgb", normal(3, channels, 1, 1, std=math.sqrt(1 / channels)))
        self.weights_sha256 = store.digest(self.state_dict())
        self.eval()

    def mapping(self, z: Tensor) -> Tensor:
        """z: [N, z_dim], standard normal -> w: [N, w_dim], without truncation."""
        w = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)
        for index in range(2):
            w = F.leaky_relu(F.linear(w, self.get_buffer(f"mapping_{index}")), LEAK)
        return w

    def synthesis(self, ws: Tensor, noise_bufs: Sequence[Tensor] = ()) -> Tensor:
        """Render images.

        Args:
            ws: [N, num_ws, w_dim].
            noise_bufs: one [N, 1, h, w] per entry of `noise_shapes`, or none for its own noise.

        Returns:
            images: [N, 3, resolution, resolution], in (-1, 1).

        Raises:
            LmexpError: a shape does not fit.
        """
        if ws.ndim != 3 or ws.shape[1:] != (self.num_ws, self.w_dim):
            raise LmexpError(
                f"ws: shape {tuple(ws.shape)}, but this generator reads "
                f"[N, {self.num_ws}, {self.w_dim}]; repeat w or choose the generator it belongs to"
            )
        shapes = tuple(tuple(noise.shape[2:]) for noise in noise_bufs)
        if noise_bufs and shapes != self.noise_shapes:
            raise LmexpError(
                f"noise_bufs: sizes {shapes}, but this generator takes {self.noise_shapes}"
            )
        x = self.constant
        for index in range(len(self.noise_shapes)):
            if index:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            noise = noise_bufs[index] if noise_bufs else self.get_buffer(f"noise_{index}")
            x = F.conv2d(x * self._style(ws, index), self.get_buffer(f"kernel_{index}"), padding=1)
            x = F.leaky_relu(x + 0.1 * noise, LEAK)
        return torch.tanh(0.5 * F.conv2d(x * self._style(ws, self.num_ws - 1), self.rgb))

    def _style(self, ws: Tensor, index: int) -> Tensor:
        """[N, channels, 1, 1], around one."""
        return 1 + F.linear(ws[:, index], self.get_buffer(f"style_{index}"))[:, :, None, None]
