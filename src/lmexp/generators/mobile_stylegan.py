"""MobileStyleGAN on FFHQ, written from its exported graph and paper.

Belousov, "MobileStyleGAN: A Lightweight Convolutional Neural Network for High-Fidelity
Image Synthesis", arXiv 2104.04767. Its W space is that of NVIDIA's StyleGAN2 config F.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp.errors import LmexpError
from lmexp.generators.mobile_head import ImageHead, merge_bands
from lmexp.generators.mobile_synthesis import LoweredSynthesis
from lmexp.weights import store

LEAK = 0.2


class MappingNetwork(nn.Module):
    """z -> w: pixel norm, then linear layers each with LeakyReLU(0.2) and a gain of sqrt(2).

    Args:
        tensors: `mapping.{i}.weight [out, in]` and `mapping.{i}.bias [out]`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.depth = sum(name.startswith("mapping.") for name in tensors) // 2
        for index in range(self.depth):
            self.register_buffer(f"weight_{index}", tensors[f"mapping.{index}.weight"])
            self.register_buffer(f"bias_{index}", tensors[f"mapping.{index}.bias"])

    @property
    def z_dim(self) -> int:
        """Size of the input latent."""
        return int(self.get_buffer("weight_0").shape[1])

    @property
    def w_dim(self) -> int:
        """Size of the style vector."""
        return int(self.get_buffer(f"weight_{self.depth - 1}").shape[0])

    def forward(self, z: Tensor) -> Tensor:
        """z: [N, z_dim], standard normal -> w: [N, w_dim]."""
        w = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)
        for index in range(self.depth):
            w = F.linear(w, self.get_buffer(f"weight_{index}"), self.get_buffer(f"bias_{index}"))
            w = F.leaky_relu(w, LEAK) * math.sqrt(2)
        return w


class Modulation(nn.Module):
    """A frozen affine map of w that scales the channels of an activation.

    Args:
        weight: [channels, w_dim].
        bias: [channels].
        scale: constant gain, folded into both.
        order: channel permutation, folded into both; None keeps the order.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor, scale: float, order: Tensor | None = None
    ) -> None:
        super().__init__()
        if order is not None:
            weight, bias = weight[order], bias[order]
        self.register_buffer("weight", weight * scale)
        self.register_buffer("bias", bias * scale)

    def forward(self, w: Tensor) -> Tensor:
        """w: [N, w_dim] -> scales: [N, channels]."""
        return F.linear(w, self.weight, self.bias)


class ActivatedConv(nn.Module):
    """An optional depthwise 3x3 and a dense convolution, baked noise, bias, LeakyReLU(0.2).

    Args:
        tensors: all weights of the network.
        name: stem of this layer's tensors.
        order: permutation of its output channels; None keeps the order.
    """

    weight: Tensor
    bias: Tensor
    noise: Tensor
    depthwise: Tensor | None

    def __init__(self, tensors: Mapping[str, Tensor], name: str, order: Tensor | None) -> None:
        super().__init__()
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        if order is not None:
            weight, bias = weight[order], bias[order]
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("noise", tensors[f"{name}.noise"])
        self.register_buffer("depthwise", tensors.get(f"{name}.depthwise"))

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C_in, h, w], already modulated -> [N, C_out, h, w]."""
        if self.depthwise is not None:
            x = F.conv2d(x, self.depthwise, padding=1, groups=x.shape[1])
        x = F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)
        return F.leaky_relu_(x.add_(self.noise), LEAK)


class Block(nn.Module):
    """Double the side: inverse Haar transform, then two depthwise-separable convolutions.

    Args:
        tensors: all weights of the network.
        name: stem of this block's tensors, such as "layers.3".
        permute_output: store the output channels band by band, as the next block's inverse
            Haar transform wants them.
    """

    def __init__(self, tensors: Mapping[str, Tensor], name: str, permute_output: bool) -> None:
        super().__init__()
        bands = tensors[f"{name}.up.modulation.weight"].shape[0]
        channels = tensors[f"{name}.conv1.modulation.weight"].shape[0]
        width = tensors[f"{name}.conv2.modulation.weight"].shape[0]
        if bands != 4 * channels:
            raise LmexpError(
                f"{name}: {bands} Haar bands do not make {channels} channels; "
                "the weights are of another architecture"
            )
        self.up = Modulation(
            tensors[f"{name}.up.modulation.weight"],
            tensors[f"{name}.up.modulation.bias"],
            # The half is the gain of the inverse Haar transform.
            scale=0.5,
            order=band_order(channels),
        )
        self.modulation1 = Modulation(
            tensors[f"{name}.conv1.modulation.weight"],
            tensors[f"{name}.conv1.modulation.bias"],
            scale=1 / math.sqrt(9 * channels),
        )
        self.conv1 = ActivatedConv(tensors, f"{name}.conv1", None)
        self.modulation2 = Modulation(
            tensors[f"{name}.conv2.modulation.weight"],
            tensors[f"{name}.conv2.modulation.bias"],
            scale=1 / math.sqrt(9 * width),
        )
        order = band_order(width // 4) if permute_output else None
        self.conv2 = ActivatedConv(tensors, f"{name}.conv2", order)

    def forward(self, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        """x: [N, 4C, h, w], w1 and w2: [N, w_dim] -> [N, C_out, 2h, 2w]."""
        # Modulating a channel before the inverse Haar transform with its four bands' common
        # factor equals modulating it afterwards, at the same number of values: one pass less.
        scales = self.up(w1) * self.modulation1(w1).repeat(1, 4)
        x = self.conv1(merge_bands(x * scales[:, :, None, None]))
        activated: Tensor = self.conv2(x * self.modulation2(w2)[:, :, None, None])
        return activated


class Trunk(nn.Module):
    """From ws to features: the constant, the first convolution and `depth` blocks.

    Args:
        tensors: all weights of the network, as the converter names them.
        depth: number of blocks to build; None builds all.
    """

    input: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], depth: int | None = None) -> None:
        super().__init__()
        total = count_blocks(tensors)
        depth = total if depth is None else depth
        self.register_buffer("input", tensors["input"])
        channels = tensors["conv1.modulation.weight"].shape[0]
        self.modulation = Modulation(
            tensors["conv1.modulation.weight"],
            tensors["conv1.modulation.bias"],
            scale=1 / math.sqrt(9 * channels),
        )
        self.conv = ActivatedConv(tensors, "conv1", band_order(channels // 4))
        # The last block of the whole network feeds an image head, all others a Haar transform.
        self.blocks = nn.ModuleList(
            Block(tensors, f"layers.{index}", permute_output=index < total - 1)
            for index in range(depth)
        )

    @property
    def num_ws(self) -> int:
        """Number of style vectors it reads."""
        return 1 + 2 * len(self.blocks)

    def forward(self, ws: Tensor, tap: int | None = None) -> tuple[Tensor, Tensor]:
        """Run all blocks.

        Args:
            ws: [N, >= num_ws, w_dim].
            tap: also return the output of this many blocks; None taps the end.

        Returns:
            (tapped features, final features), each [N, C, h, w].
        """
        x = self.conv(self.input * self.modulation(ws[:, 0])[:, :, None, None])
        # A single style's product is laid out both ways at once, so say which one is meant:
        # that of the buffers, which `.to(memory_format=...)` chooses.
        x = x.contiguous(memory_format=memory_format_of(self.input))
        tapped = x
        for index, block in enumerate(self.blocks):
            x = block(x, ws[:, 1 + 2 * index], ws[:, 2 + 2 * index])
            if tap is not None and index + 1 == tap:
                tapped = x
        return (x if tap is None else tapped), x


class FullHead(nn.Module):
    """The published last layer: a modulated 1x1 convolution to Haar bands of the image.

    Args:
        tensors: all weights of the network.
        name: stem of the layer's tensors, such as "layers.6.to_img".
    """

    num_ws = 1
    weight: Tensor
    bias: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        super().__init__()
        order = band_order(3)
        channels = tensors[f"{name}.modulation.weight"].shape[0]
        self.modulation = Modulation(
            tensors[f"{name}.modulation.weight"],
            tensors[f"{name}.modulation.bias"],
            scale=1 / math.sqrt(channels),
        )
        # The half is the gain of the inverse Haar transform.
        self.register_buffer("weight", tensors[f"{name}.weight"][order] * 0.5)
        self.register_buffer("bias", tensors[f"{name}.bias"][order] * 0.5)

    def forward(self, x: Tensor, ws: Tensor) -> Tensor:
        """x: [N, C, h, w], ws: [N, 1, w_dim] -> images: [N, 3, 2h, 2w]."""
        x = x * self.modulation(ws[:, 0])[:, :, None, None]
        return merge_bands(F.conv2d(x, self.weight, self.bias))


def band_order(channels: int) -> Tensor:
    """Channel order that stores 4 * channels Haar bands band by band.

    The published network stores the low-pass band of every channel, then the three
    high-pass bands channel by channel. Index with the result to get all first bands, all
    second bands, and so on.
    """
    low = torch.arange(channels)
    high = channels + torch.arange(3 * channels).view(channels, 3).T.flatten()
    return torch.cat([low, high])


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Channels last if `x` [N, C, h, w] is laid out so and no other way, else contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def count_blocks(tensors: Mapping[str, Tensor]) -> int:
    """Number of blocks whose tensors are there."""
    return sum(name.endswith(".up.modulation.weight") for name in tensors)


class MobileNetwork(nn.Module):
    """A MobileStyleGAN of any size from its tensors; behaves as a `Generator`.

    Args:
        tensors: weights as `lmexp.weights.converters.convert_mobile_stylegan` names them.
        weights_sha256: digest to report.
        head: image head on the features after `head_depth` blocks; None takes the
            published head after the last block.
        head_depth: number of blocks below `head`.
    """

    noise_shapes: tuple[tuple[int, int], ...] = ()

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        weights_sha256: str,
        head: ImageHead | None = None,
        head_depth: int | None = None,
    ) -> None:
        super().__init__()
        depth = count_blocks(tensors)
        self._mapping = MappingNetwork(tensors)
        self._lowered: LoweredSynthesis | None = None
        self._trunk = Trunk(tensors, depth if head is None else head_depth)
        self._head = FullHead(tensors, f"layers.{depth - 1}.to_img") if head is None else head
        self.z_dim = self._mapping.z_dim
        self.w_dim = self._mapping.w_dim
        self.num_ws = self._trunk.num_ws + self._head.num_ws
        self.resolution = 2 * int(tensors["input"].shape[-1]) * 2 ** len(self._trunk.blocks)
        self.weights_sha256 = weights_sha256
        self.eval().requires_grad_(False)

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Compute `synthesis` in half precision from here on; images stay float32.

        Styles, noise, biases and sums stay float32, too; there is no way back.
        """
        self._lowered = LoweredSynthesis(self._trunk, self._head, dtype)
        del self._trunk, self._head  # their weights take memory

    def compile_regions(self, fuse: Callable[..., Callable[..., Tensor]]) -> None:
        """Compile what has no kernels of its own: all of it in float32."""
        if self._lowered is None:
            self.synthesis = fuse(self.synthesis)  # type: ignore[method-assign]
        else:
            self._lowered.compile_regions(fuse)

    def mapping(self, z: Tensor) -> Tensor:
        """z: [N, z_dim], standard normal -> w: [N, w_dim], without truncation."""
        w: Tensor = self._mapping(z)
        return w

    def synthesis(self, ws: Tensor, noise_bufs: Sequence[Tensor] = ()) -> Tensor:
        """ws: [N, num_ws, w_dim] -> images: [N, 3, resolution, resolution] in about [-1, 1].

        Raises:
            LmexpError: `ws` has another shape, or there are noise maps: its noise is baked.
        """
        if ws.ndim != 3 or ws.shape[1:] != (self.num_ws, self.w_dim):
            raise LmexpError(
                f"ws: shape {tuple(ws.shape)}, but this generator reads "
                f"[N, {self.num_ws}, {self.w_dim}]; repeat w or choose the generator it belongs to"
            )
        if len(noise_bufs):
            raise LmexpError(
                f"noise_bufs: {len(noise_bufs)} maps, but this generator's noise is part of its "
                "weights; pass none"
            )
        if self._lowered is not None:
            lowered: Tensor = self._lowered(ws)
            return lowered
        features, _ = self._trunk(ws)
        images: Tensor = self._head(features, ws[:, self._trunk.num_ws :])
        return images


class MobileStyleGAN(MobileNetwork):
    """MobileStyleGAN on FFHQ with its packaged weights.

    At 1024 px it is the published network: 16 style vectors influence the image (the first
    convolution's; two a block, the first of which drives the up-sampling and its
    convolution; the image layer's). At 256 px the blocks after the 128 px features are replaced by
    a small head trained in this project to reproduce the area-downsampled 1024 px image (see
    docs/models/mobile_head_256.md): 14 style vectors, the first 11 the same; `expand_ws` carries a
    256 px latent to 1024 px.

    Args:
        resolution: side of the image, px.

    Raises:
        LmexpError: the weights can't be had, or are damaged.
    """

    def __init__(self, resolution: Literal[256, 1024] = 1024) -> None:
        trunk = store.load("mobile_stylegan_ffhq")
        if resolution == 1024:
            super().__init__(trunk.tensors, trunk.sha256)
            return
        stored = store.load("mobile_head_256")
        head = ImageHead.from_tensors(stored.tensors)
        digest = hashlib.sha256(f"{trunk.sha256}{stored.sha256}".encode()).hexdigest()
        super().__init__(trunk.tensors, digest, head, HEAD_DEPTH)


HEAD_DEPTH = 5
"""Number of blocks below the 256 px head: features of 128 px."""


def expand_ws(ws: Tensor, num_ws: int) -> Tensor:
    """Carry the latent of a smaller generator of this family to a larger one.

    The styles both read keep their places; the larger one's further styles get the last one,
    as in the training of the 256 px head.

    Args:
        ws: [N, n, w_dim].
        num_ws: the larger generator's number of styles, at least n.

    Returns:
        ws: [N, num_ws, w_dim].
    """
    return torch.cat([ws, ws[:, -1:].expand(-1, num_ws - ws.shape[1], -1)], dim=1)
