"""SFace: 128 numbers of an aligned face that are alike for one person.

Source: Zhong et al., "SFace: sigmoid-constrained hypersphere loss for robust face recognition",
IEEE TIP 2021, arXiv 2205.12010; trunk: Howard et al., "MobileNets", arXiv 1704.04861, whose
first stride is 1 here, and whose activations are PReLUs. Weights: OpenCV Zoo (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

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

    def forward(self, images: Tensor) -> Tensor:
        """images: [N, 3, 112, 112], RGB in [-1, 1], aligned -> [N, 128], of any length.

        People are compared by the cosine. Each image is treated alone.
        """
        x = self.trunk(images * _INPUT_SCALE)
        x = x * self.scale[:, None, None] + self.shift[:, None, None]
        # The linear layer counts channels first, whatever the memory's layout is.
        answer: Tensor = self.linear(x.contiguous().flatten(1))
        return answer
