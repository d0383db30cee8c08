"""What the projection needs to know of a generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Generator(Protocol):
    """A frozen face generator with a style space W (StyleGAN2 and its kin).

    Implementations are `torch.nn.Module`s in eval mode whose parameters need no
    gradient; gradients flow to `ws` and `noise_bufs` only.

    Attributes:
        z_dim: size of the input latent.
        w_dim: size of one style vector.
        num_ws: number of style vectors that `synthesis` reads; each of them
            influences the image.
        resolution: side of the square image, px.
        noise_shapes: (height, width) of every noise map that `synthesis` takes,
            in its order; empty when the noise is baked into the weights.
        weights_sha256: digest of the weights, written into every run's summary.
    """

    z_dim: int
    w_dim: int
    num_ws: int
    resolution: int
    noise_shapes: tuple[tuple[int, int], ...]
    weights_sha256: str

    def mapping(self, z: Tensor) -> Tensor:
        """z: [N, z_dim], standard normal -> w: [N, w_dim], without truncation."""
        ...

    def synthesis(self, ws: Tensor, noise_bufs: Sequence[Tensor] = ()) -> Tensor:
        """Render images.

        Args:
            ws: [N, num_ws, w_dim].
            noise_bufs: one [N, 1, h, w] per entry of `noise_shapes`, or nothing
                for the generator's own constant noise.

        Returns:
            images: [N, 3, resolution, resolution], RGB, nominally in [-1, 1]
            (not clamped).
        """
        ...
