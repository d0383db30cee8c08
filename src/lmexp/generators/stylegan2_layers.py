"""What StyleGAN2's generator and discriminator share: resampling, dense layers, random weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp.errors import LmexpError
from lmexp.generators.stylegan2_config import (
    StyleGAN2Config,
    StyleGAN2DiscriminatorConfig,
    tensor_shapes,
)

LEAK = 0.2
GAIN = math.sqrt(2)
"""Gain of a LeakyReLU, which keeps a unit normal's second moment nearly as it is."""
EPSILON = 1e-8


def check_tensors(
    config: StyleGAN2Config | StyleGAN2DiscriminatorConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Compare a state with what its config asks for; further tensors are let be.

    Raises:
        LmexpError: a tensor is missing, or has another shape or type.
    """
    for name, shape in tensor_shapes(config).items():
        tensor = tensors.get(name)
        if tensor is None:
            raise LmexpError(f"StyleGAN2 weights: {name} is missing; convert the checkpoint again")
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise LmexpError(
                f"StyleGAN2 weights: {name} is {tensor.dtype} {tuple(tensor.shape)}, but the "
                f"config asks for floating point {shape}; convert the checkpoint again"
            )


def check_class(c_dim: int, class_index: int | None) -> None:
    """Compare a chosen class with what a model has.

    Raises:
        LmexpError: it has no such class, or none was chosen.
    """
    if c_dim == 0 and class_index is not None:
        raise LmexpError(
            f"class_index: {class_index}, but this StyleGAN2 knows no classes; set it to null"
        )
    if c_dim and (class_index is None or not 0 <= class_index < c_dim):
        raise LmexpError(
            f"class_index: {'null' if class_index is None else class_index}, but this StyleGAN2 is "
            f"conditional; choose a class from 0 to {c_dim - 1}"
        )


def make_random_state(
    config: StyleGAN2Config | StyleGAN2DiscriminatorConfig, seed: int
) -> dict[str, Tensor]:
    """Random weights for tests and benchmarks; the same on every machine.

    Weights, constant and noise maps are unit normal (the mapping's over its lr multiplier), as
    they are before training. Biases and noise strengths, 0 before training, are normal with a
    deviation of 0.1 (the mapping's over its lr multiplier; styles' biases around 1), so that
    nothing is left out. `mapping.w_avg` is normal with a deviation of 0.1. Each tensor is drawn
    from numpy's MT19937 `RandomState`, whose streams are frozen, seeded with the first four bytes
    of SHA-256 of "SEED NAME".

    Args:
        config: of a generator or a discriminator.
        seed: any number.

    Returns:
        Canonical name -> tensor, float32.
    """
    state = {}
    for name, shape in tensor_shapes(config).items():
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        random = np.random.RandomState(int.from_bytes(digest[:4], "big"))
        values = random.standard_normal(shape)
        if name.endswith((".bias", ".noise_strength", ".w_avg")):
            values = values * 0.1
        if ".layers." in name:
            values = values / config.mapping_lr_multiplier
        if name.endswith("affine.bias"):
            values = values + 1
        state[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return state


def normalize_second_moment(x: Tensor) -> Tensor:
    """Scale every row of x [N, C] to a mean square of 1."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + EPSILON)


class Dense(nn.Module):
    """A frozen linear layer, optionally with LeakyReLU(0.2) and its gain.

    Args:
        tensors: `{name}.weight [out, in]`, as trained, and `{name}.bias [out]`.
        name: stem of its tensors.
        lr_multiplier: of weight and bias.
        activate: append the activation.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        name: str,
        lr_multiplier: float = 1.0,
        activate: bool = False,
    ) -> None:
        super().__init__()
        weight, bias = tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()
        self.activate = activate
        self.register_buffer("weight", weight * (lr_multiplier / math.sqrt(weight.shape[1])))
        self.register_buffer("bias", bias * lr_multiplier)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, in] -> [N, out]."""
        x = F.linear(x, self.weight, self.bias)
        return F.leaky_relu(x, LEAK) * GAIN if self.activate else x


class LowPass(nn.Module):
    """The separable low-pass filter between resolutions.

    A depthwise convolution with the 2-D kernel: on a CPU it beat two 1-D ones by a fifth, sums of
    slices by two, and both composed 6x6 kernels (one transposed convolution; four phases and a
    pixel shuffle), which quadruple the work of the convolution that it follows.

    Args:
        taps: of the 1-D filter, before they are normalised to a sum of 1.

    Attributes:
        is_binomial: whether it is (1, 3, 3, 1), as in all published networks.
    """

    kernel: Tensor

    def __init__(self, taps: Sequence[float]) -> None:
        super().__init__()
        # Filters convolve, conv2d correlates: turn it round once.
        line = torch.tensor(taps, dtype=torch.float64).flip(0)
        line = line / line.sum()
        self.taps = len(taps)
        self.is_binomial = torch.equal(line * 8, line.new_tensor((1.0, 3.0, 3.0, 1.0)))
        self.register_buffer("kernel", torch.outer(line, line).float()[None, None])

    def blur(
        self, x: Tensor, before: int, after: int, gain: float = 1.0, stride: int = 1
    ) -> Tensor:
        """Filter each channel of x [N, C, h, w] after padding with zeros.

        Args:
            x: features.
            before: rows and columns of zeros at the top and left; negative ones are cropped.
            after: the same at the bottom and right.
            gain: of the filter.
            stride: keep every such row and column.
        """
        channels = x.shape[1]
        kernel = (self.kernel * gain).to(x.dtype).expand(channels, 1, self.taps, self.taps)
        if before == after >= 0:
            return F.conv2d(x, kernel, stride=stride, padding=before, groups=channels)
        x = F.pad(x, [before, after, before, after])
        return F.conv2d(x, kernel, stride=stride, groups=channels)

    def upsample(self, x: Tensor) -> Tensor:
        """x: [N, C, h, w] -> [N, C, 2h, 2w]."""
        channels = x.shape[1]
        kernel = (self.kernel.flip(2, 3) * 4).to(x.dtype)
        kernel = kernel.expand(channels, 1, self.taps, self.taps)
        crop = self.taps - 1 - (self.taps + 1) // 2
        full = F.conv_transpose2d(x, kernel, stride=2, padding=crop, groups=channels)
        return full[..., : 2 * x.shape[2], : 2 * x.shape[3]]

    def upsample_convolved(self, x: Tensor) -> Tensor:
        """Filter what a transposed 3x3 convolution of stride 2 made.

        x: [N, C, 2h + 1, 2w + 1] -> [N, C, 2h, 2w].
        """
        return self.blur(x, (self.taps + 1) // 2 - 1, (self.taps - 2) // 2, gain=4.0)

    def downsample(self, x: Tensor) -> Tensor:
        """x: [N, C, 2h, 2w] -> [N, C, h, w]."""
        return self.blur(x, (self.taps - 1) // 2, (self.taps - 2) // 2, stride=2)

    def before_stride(self, x: Tensor) -> Tensor:
        """Filter what a 3x3 convolution of stride 2, without padding, is to read.

        x: [N, C, 2h, 2w] -> [N, C, 2h + 1, 2w + 1].
        """
        return self.blur(x, (self.taps - 1) // 2 + 1, (self.taps - 2) // 2 + 1)
