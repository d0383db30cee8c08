"""Shift-tolerant LPIPS: anti-aliased AlexNet and VGG16 with their linear heads.

Source: Ghildyal & Liu, "Shift-tolerant perceptual similarity metric", ECCV 2022, arXiv
2207.13686; blur pooling: Zhang, "Making convolutional networks shift-invariant again",
arXiv 1904.11486. Weights: the wheel stlpips-pytorch (BSD-2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp.convolutions import lower_convolutions
from lmexp.weights import store


def load(trunk: str) -> ShiftTolerantAlex | ShiftTolerantVgg:
    """The published network of that trunk, "alex" or "vgg", with its trained weights."""
    stored = store.load(f"stlpips_{trunk}")
    network = ShiftTolerantAlex if trunk == "alex" else ShiftTolerantVgg
    return network(stored.tensors, stored.sha256)


def blur_pool(x: Tensor) -> Tensor:
    """Halve the side: binomial [1, 2, 1] blur of stride 2 after reflecting two pixels.

    x: [N, C, H, W] -> [N, C, (H + 1) // 2 + 1, (W + 1) // 2 + 1].
    """
    # Two box filters are the binomial one, and pooling is faster than a depthwise conv.
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    return F.avg_pool2d(F.avg_pool2d(x, 2, stride=1), 2, stride=2)


class _ShiftTolerant(nn.Module):
    """What both trunks share: input scaling and linear heads.

    Inputs in [-1, 1] are standardised per channel with ImageNet's moments, expressed in
    that range: (x - shift) / scale.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], weights_sha256: str, layers: int) -> None:
        super().__init__()
        self.weights_sha256 = weights_sha256
        self.register_buffer("shift", tensors["scaling_layer.shift"].clone())
        self.register_buffer("scale", tensors["scaling_layer.scale"].clone())
        for index in range(layers):
            head = tensors[f"lin{index}.model.1.weight"]
            self.register_buffer(f"head{index}", head.reshape(-1).clone())
        self._layers = layers

    @property
    def channel_weights(self) -> list[Tensor]:
        return [self.get_buffer(f"head{index}") for index in range(self._layers)]

    def lower_precision(self, dtype: torch.dtype) -> None:
        lower_convolutions(self, dtype)
        for module in self.modules():
            if isinstance(module, BlurredConv):
                module.lower(dtype)

    def _standardise(self, images: Tensor) -> Tensor:
        return (images - self.shift) / self.scale


def _conv(tensors: Mapping[str, Tensor], name: str, padding: int) -> nn.Conv2d:
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=padding)
    conv.weight.data = weight.clone()
    conv.bias = nn.Parameter(bias.clone())
    return conv


class ShiftTolerantAlex(_ShiftTolerant):
    """AlexNet whose strides are blur pools; five layers, read after each ReLU.

    Args:
        tensors: the published state dict.
        weights_sha256: its digest.
    """

    def __init__(self, tensors: Mapping[str, Tensor], weights_sha256: str) -> None:
        super().__init__(tensors, weights_sha256, layers=5)
        self.conv1 = BlurredConv(tensors["net.slice1.0.weight"], tensors["net.slice1.0.bias"], 2)
        self.conv2 = _conv(tensors, "net.slice2.5", padding=2)
        self.conv3 = _conv(tensors, "net.slice3.9", padding=1)
        self.conv4 = _conv(tensors, "net.slice4.11", padding=1)
        self.conv5 = _conv(tensors, "net.slice5.13", padding=1)

    def features(self, images: Tensor) -> list[Tensor]:
        """images: [N, 3, H, W], RGB in [-1, 1], H and W ≥ 32."""
        x1 = F.relu(self.conv1(self._standardise(images)))
        x2 = F.relu(self.conv2(blur_pool(F.max_pool2d(x1, 3, stride=1))))
        x3 = F.relu(self.conv3(blur_pool(F.max_pool2d(x2, 3, stride=1))))
        x4 = F.relu(self.conv4(x3))
        x5 = F.relu(self.conv5(x4))
        return [x1, x2, x3, x4, x5]


class BlurredConv(nn.Module):
    """A convolution of stride 1 and then `blur_pool`, at about a third of their cost.

    Both are linear, so away from the border they are one convolution of stride 2 whose
    kernel is two taps longer. At the border the reflection of the convolution's output
    has to be honoured: the first row of the blurred map repeats the second; the last
    repeats its neighbour if the unblurred side is odd, and is the mean of the last two
    unblurred rows if it is even. Columns likewise.
    """

    inner: Tensor
    bottom: Tensor
    right: Tensor
    corner: Tensor
    bias: Tensor
    edge_bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, padding: int) -> None:
        super().__init__()
        binomial, mean = (0.25, 0.5, 0.25), (0.5, 0.5)
        inner = _convolve(weight, rows=binomial, columns=binomial)
        # Stride 2 on C channels is stride 1 on the 4 C of 2×2 blocks, whose gradient is
        # computed in half the time. The even number of taps it needs is filled up with 0.
        inner = F.pad(inner, (0, inner.shape[3] % 2, 0, inner.shape[2] % 2))
        self.register_buffer("inner", F.pixel_unshuffle(inner, 2))
        self.register_buffer("bottom", _convolve(weight, rows=mean, columns=binomial))
        self.register_buffer("right", _convolve(weight, rows=binomial, columns=mean))
        self.register_buffer("corner", _convolve(weight, rows=mean, columns=mean))
        self.register_buffer("bias", bias.clone())
        self.register_buffer("edge_bias", bias.clone())
        self.padding = padding
        self.taps = weight.shape[2]

    def lower(self, dtype: torch.dtype) -> None:
        """Compute in half precision from here on."""
        names = ["inner", "bias"]
        # Of a strip in bfloat16 as narrow as its kernel, oneDNN (torch 2.14) reads memory that
        # nobody has written, on processors with AMX. A strip is little to compute.
        if dtype is not torch.bfloat16 or self.inner.device.type != "cpu":
            names += ["bottom", "right", "corner", "edge_bias"]
        for name in names:
            kernel = self.get_buffer(name).to(dtype)
            if kernel.ndim == 4:
                kernel = kernel.contiguous(memory_format=torch.channels_last)
            self.register_buffer(name, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C_in, H, W] -> [N, C_out, h, w]."""
        x = x.to(self.inner.dtype)
        last = self.taps + 1
        x = F.pad(x, (self.padding,) * 4)
        even_rows = (x.shape[2] - self.taps + 1) % 2 == 0
        even_columns = (x.shape[3] - self.taps + 1) % 2 == 0
        blocks = F.pixel_unshuffle(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)), 2)
        y = F.conv2d(blocks, self.inner, self.bias)
        if even_columns:
            y = torch.cat([y, self._edge(x[..., -last:], self.right, stride=2)], 3)
        if even_rows:
            below = x[:, :, -last:]
            row = self._edge(below, self.bottom, stride=2)
            if even_columns:
                end = self._edge(below[..., -last:], self.corner, stride=1)
                row = torch.cat([row, end], 3)
            y = torch.cat([y, row], 2)
        return _repeat_border(y, bottom=not even_rows, right=not even_columns)

    def _edge(self, strip: Tensor, kernel: Tensor, stride: int) -> Tensor:
        """The convolution of a strip as narrow as its kernel."""
        edge = F.conv2d(strip.to(kernel.dtype), kernel, self.edge_bias, stride=stride)
        return edge.to(strip.dtype)


def _repeat_border(x: Tensor, *, bottom: bool, right: bool) -> Tensor:
    """x: [N, C, h, w] -> its first row and column twice, its last ones too if asked for."""
    if not torch.compiler.is_compiling():
        return F.pad(x, (1, int(right), 1, int(bottom)), mode="replicate")
    # Compilers expect the gradient of that in another memory layout than it has.
    x = torch.cat([x[:, :, :1], x, x[:, :, -1:]][: 3 if bottom else 2], 2)
    return torch.cat([x[..., :1], x, x[..., -1:]][: 3 if right else 2], 3)


def _convolve(weight: Tensor, rows: Sequence[float], columns: Sequence[float]) -> Tensor:
    """The kernel of `weight` followed by a separable filter; in float64, it is done once."""
    taps = torch.outer(torch.tensor(rows).double(), torch.tensor(columns).double())
    out_channels, in_channels, height, width = weight.shape
    planes = weight.double().reshape(-1, 1, height, width)
    # conv2d correlates; these filters are symmetric, so that is the convolution.
    margin = (len(columns) - 1,) * 2 + (len(rows) - 1,) * 2
    full = F.conv2d(F.pad(planes, margin), taps[None, None])
    return full.reshape(out_channels, in_channels, *full.shape[2:]).to(weight.dtype)


class ShiftTolerantVgg(_ShiftTolerant):
    """VGG16 whose max pools are of stride 1, followed by a blur pool; five layers.

    Args:
        tensors: the published state dict.
        weights_sha256: its digest.
    """

    _CONVS = ((0, 2), (6, 8), (12, 14, 16), (20, 22, 24), (28, 30, 32))

    def __init__(self, tensors: Mapping[str, Tensor], weights_sha256: str) -> None:
        super().__init__(tensors, weights_sha256, layers=5)
        self.blocks = nn.ModuleList(
            nn.ModuleList(_conv(tensors, f"net.slice{block}.{index}", padding=1) for index in convs)
            for block, convs in enumerate(self._CONVS, start=1)
        )

    def features(self, images: Tensor) -> list[Tensor]:
        """images: [N, 3, H, W], RGB in [-1, 1], H and W ≥ 16."""
        x = self._standardise(images)
        outputs: list[Tensor] = []
        for block in self.blocks:
            if outputs:
                x = blur_pool(F.max_pool2d(x, 2, stride=1))
            assert isinstance(block, nn.ModuleList)
            for conv in block:
                x = F.relu(conv(x))
            outputs.append(x)
        return outputs
