"""What the perceptual term needs to know of a feature network, and how one is found."""

from __future__ import annotations

import importlib
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

NetworkName = Literal[
    "stlpips_alex", "stlpips_vgg", "hed_vgg16", "lpips_alex", "lpips_vgg", "lpips_squeeze"
]


@runtime_checkable
class PerceptualNetwork(Protocol):
    """A frozen image network that is read after several layers (LPIPS and its kin).

    Implementations are `torch.nn.Module`s in eval mode whose parameters need no
    gradient. One that has `lower_precision(dtype)` computes in half precision after it, for
    good, and its features are of that type; others stay float32 on every hardware. It may have
    `frozen` from then on, a `FrozenVgg` that has kernels for the distance itself.

    Attributes:
        weights_sha256: digest of the weights, written into every run's summary.
    """

    weights_sha256: str

    @property
    def channel_weights(self) -> list[Tensor]:
        """One [C_l] per layer, ≥ 0: how much each unit-normalised channel counts."""
        ...

    def features(self, images: Tensor) -> list[Tensor]:
        """images: [N, 3, H, W], RGB in [-1, 1] -> activations, one [N, C_l, h_l, w_l] a layer.

        The activations are not normalised. Each image is treated alone.
        """
        ...


def load_network(name: NetworkName) -> PerceptualNetwork:
    """Build `family_trunk` by the `load(trunk)` of this package's module `family`.

    A further network is one more module with such a function, and its name above.

    Raises:
        LmexpError: the weights cannot be had.
    """
    family, _, trunk = name.partition("_")
    module = importlib.import_module(f"lmexp.losses.perceptual.{family}")
    network: torch.nn.Module = module.load(trunk)
    network.eval().requires_grad_(False)
    # Twice as fast on CPUs as the default layout, and the tensor cores' own.
    return cast(PerceptualNetwork, network.to(memory_format=torch.channels_last))
