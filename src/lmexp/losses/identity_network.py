"""SFace: 128 numbers of an aligned face that are alike for one person.

Source: Zhong et al., "SFace: sigmoid-constrained hypersphere loss for robust face recognition",
IEEE TIP 2021, arXiv 2205.12010; trunk: Howard et al., "MobileNets", arXiv 1704.04861, whose
first stride is 1 here, and whose activations are PReLUs. Weights: OpenCV Zoo (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmexp.acceleration import Checked
from lmexp.losses.identity_layers import LoweredLayer, separable
from lmexp.weights import store
from lmexp.weights.converters import SFACE_CONVOLUTIONS

SIDE = 112
"""Of the aligned face that the network reads, px."""

_STRIDED = ("conv_3_dw", "conv_5_dw", "conv_7_dw", "conv_13_dw")
"""Convolutions that halve the side: 112 px to 7."""

_INPUT_SCALE = 127.5 * 0.0078125
"""The original reads (level - 127.5) / 128 of levels 0–255: this times an image in [-1, 1]."""


def load() -> IdentityNetwork:
    """The published network, frozen.

    Raises:
        LmexpError: the weights cannot be had.
    """
    stored = store.load("sface")
    network = IdentityNetwork(stored.tensors, stored.sha256)
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


class IdentityNetwork(nn.Module):
    """A MobileNet whose last map is read whole by one linear layer, so that place counts.

    Args:
        tensors: as `lmexp.weights.converters.convert_sface` names them; widths are read from them.
        weights_sha256: their digest.

    Attributes:
        weights_sha256: written into every run's summary.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], weights_sha256: str) -> None:
        super().__init__()
        self.weights_sha256 = weights_sha256
        layers: list[nn.Module] = []
        for name in SFACE_CONVOLUTIONS:
            weight = tensors[f"{name}.weight"]
            width, _, kernel, _ = weight.shape
            groups = width if name.endswith("_dw") else 1
            conv = nn.Conv2d(
                weight.shape[1] * groups,
                width,
                kernel,
                stride=2 if name in _STRIDED else 1,
                padding=kernel // 2,
                groups=groups,
            )
            conv.load_state_dict({"weight": weight, "bias": tensors[f"{name}.bias"]})
            activation = nn.PReLU(width)
            activation.load_state_dict({"weight": tensors[f"{name}.slope"]})
            layers += [conv, activation]
        self.trunk = nn.Sequential(*layers)
        self.register_buffer("scale", tensors["head.scale"].clone())
        self.register_buffer("shift", tensors["head.shift"].clone())
        weight = tensors["linear.weight"]
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.linear.load_state_dict({"weight": weight, "bias": tensors["linear.bias"]})

        self._lowered: LoweredIdentity | None = None
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Compute in half precision from here on; answers stay float32, there is no way back."""
        self._lowered = LoweredIdentity(self, dtype)

    def compile_regions(self, fuse: Callable[..., Callable[..., Tensor]]) -> None:
        """Compile what has no kernels of its own."""
        if self._lowered is None:
            self.forward = fuse(self.forward)  # type: ignore[method-assign]
        elif not self.scale.is_cuda:
            self._compiled = fuse(self._lowered.forward)

    def forward(self, images: Tensor) -> Tensor:
        """images: [N, 3, 112, 112], RGB in [-1, 1], aligned -> [N, 128], of any length.

        People are compared by the cosine. Each image is treated alone.
        """
        if self._lowered is not None:
            crops = images * _INPUT_SCALE
            lowered: Tensor = (self._compiled or self._lowered)(crops)
            return lowered
        x = self.trunk(images * _INPUT_SCALE)
        x = x * self.scale[:, None, None] + self.shift[:, None, None]
        # The linear layer counts channels first, whatever the memory's layout is.
        answer: Tensor = self.linear(x.contiguous().flatten(1))
        return answer


class LoweredIdentity(nn.Module):
    """The whole network in half precision.

    Args:
        network: in float32.
        dtype: half precision.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, network: IdentityNetwork, dtype: torch.dtype) -> None:
        super().__init__()
        layers = list(network.trunk)
        self.trunk = nn.Sequential(
            *(
                LoweredLayer(conv, activation, dtype)  # type: ignore[arg-type]
                for conv, activation in zip(layers[::2], layers[1::2], strict=True)
            )
        )
        self.dtype = dtype
        self._kernels: Checked | None = None
        # The normalisation before the linear layer is part of it.
        channels = len(network.scale)
        weight = network.linear.weight.detach().double()
        weight = weight.reshape(len(weight), channels, -1)
        bias = network.linear.bias.detach().double() + (weight.sum(2) @ network.shift.double())
        weight = (weight * network.scale.double()[:, None]).transpose(1, 2)
        self.register_buffer("weight", weight.flatten(1).to(dtype))
        self.register_buffer("bias", bias.float())

    def forward(self, images: Tensor) -> Tensor:
        """images: [N, 3, 112, 112], scaled -> [N, 128], float32."""
        if not images.is_cuda:
            return self.read(images, separable)
        if self._kernels is None:
            from lmexp.losses import identity_triton

            plain = partial(self.read, pair=separable)
            fast = partial(self.read, pair=identity_triton.separable)
            self._kernels = Checked("SFace", fast, plain, plain)
        return self._kernels(images)

    def read(self, images: Tensor, pair: Callable[..., Tensor]) -> Tensor:
        """`forward`, by one form or the other of `separable`."""
        first, *others = self.trunk
        x = first.convolve(images.permute(0, 2, 3, 1).to(self.dtype))  # type: ignore[operator]
        for before, grouped, dense in zip(
            [first, *others[1::2]], others[::2], others[1::2], strict=False
        ):
            x = pair(x, before, grouped, dense)
        x = others[-1].activate(x)  # type: ignore[operator]
        return F.linear(x.flatten(1), self.weight).float() + self.bias
