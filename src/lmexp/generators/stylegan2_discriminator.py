"""StyleGAN2's discriminator, written from its papers (arXiv 1912.04958 and 2006.06676).

Its last block appends the standard deviation of its features over a group of images, so
the published network's verdict on an image depends on its neighbours. Here every image is a
group of its own unless a caller says otherwise: that is what the published network computes for a
batch of one, it keeps the jobs of a batch strangers, and the appended channel is then the
constant sqrt(1e-8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp.errors import LmexpError
from lmexp.generators.stylegan2_config import StyleGAN2DiscriminatorConfig
from lmexp.generators.stylegan2_layers import (
    EPSILON,
    GAIN,
    LEAK,
    Dense,
    LowPass,
    check_class,
    check_tensors,
    normalize_second_moment,
)


class Conv(nn.Module):
    """A frozen convolution, bias, LeakyReLU(0.2), optional clamp.

    Args:
        tensors: `{name}.weight [out, in, k, k]`, as trained, and `{name}.bias [out]`.
        name: stem of its tensors.
        clamp: bound on its output, None if there is none.
        gain: of its output, and of the clamp.
        low_pass: halves the side with this filter; None keeps the side.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        name: str,
        clamp: float | None,
        gain: float = 1.0,
        low_pass: LowPass | None = None,
    ) -> None:
        super().__init__()
        self.low_pass = low_pass
        self.clamp = None if clamp is None else clamp * gain
        weight = tensors[f"{name}.weight"].float()
        # LeakyReLU is positively homogeneous: its gain is carried by what goes into it.
        gain *= GAIN
        self.register_buffer("weight", weight * (gain / math.sqrt(weight[0].numel())))
        self.register_buffer("bias", tensors[f"{name}.bias"].float() * gain)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C_in, h, w] -> [N, C_out, h, w], or half the side."""
        if self.low_pass is None:
            x = F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)
        else:
            x = F.conv2d(self.low_pass.before_stride(x), self.weight, self.bias, stride=2)
        x = F.leaky_relu_(x, LEAK)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class DiscriminatorBlock(nn.Module):
    """All layers of one resolution above 4 px; halves the side.

    Args:
        config: of the discriminator.
        tensors: the canonical state.
        side: of its feature maps, px.
        low_pass: the filter between resolutions.
    """

    skip: Tensor | None

    def __init__(
        self,
        config: StyleGAN2DiscriminatorConfig,
        tensors: Mapping[str, Tensor],
        side: int,
        low_pass: LowPass,
    ) -> None:
        super().__init__()
        name, clamp = f"discriminator.{side}", config.conv_clamp
        residual = config.architecture == "resnet"
        self.low_pass = low_pass
        self.passes_image = config.architecture == "skip"
        self.from_rgb = None
        if config.has_from_rgb(side):
            self.from_rgb = Conv(tensors, f"{name}.from_rgb", clamp)
        self.conv0 = Conv(tensors, f"{name}.conv0", clamp)
        gain = math.sqrt(0.5) if residual else 1.0
        self.conv1 = Conv(tensors, f"{name}.conv1", clamp, gain, low_pass)
        skip = None
        if residual:
            skip = tensors[f"{name}.skip.weight"].float()
            skip = skip / math.sqrt(2 * skip.shape[1])
        self.register_buffer("skip", skip)

    def forward(self, x: Tensor | None, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute.

        Args:
            x: [N, C, side, side]; None in the first block.
            image: [N, img_channels, side, side].

        Returns:
            (features [N, C', side/2, side/2], the image for the next block).
        """
        if self.from_rgb is not None:
            y = self.from_rgb(image)
            x = y if x is None else x + y
        assert x is not None
        if self.passes_image:
            image = self.low_pass.downsample(image)
        y = self.conv1(self.conv0(x))
        if self.skip is not None:
            y = y + F.conv2d(self.low_pass.downsample(x), self.skip)
        return y, image


class StyleGAN2Discriminator(nn.Module):
    """A frozen StyleGAN2 discriminator of any size.

    Args:
        config: its sizes.
        tensors: the canonical state (`stylegan2_config`); others than its own are let be.
        class_index: the class it judges membership of; None if unconditional.

    Attributes:
        resolution: side of the images it reads, px.

    Raises:
        LmexpError: tensors do not fit the config, or the class does not exist.
    """

    label: Tensor | None

    def __init__(
        self,
        config: StyleGAN2DiscriminatorConfig,
        tensors: Mapping[str, Tensor],
        class_index: int | None = None,
    ) -> None:
        super().__init__()
        check_tensors(config, tensors)
        check_class(config.c_dim, class_index)
        self.config = config
        self.resolution = config.resolution
        low_pass = LowPass(config.resample_filter)
        self._blocks = nn.ModuleList(
            DiscriminatorBlock(config, tensors, side, low_pass) for side in config.sides[:-1]
        )
        self._from_rgb = None
        if config.has_from_rgb(4):
            # Published networks do not clamp this layer.
            self._from_rgb = Conv(tensors, "discriminator.4.from_rgb", None)
        self._conv = Conv(tensors, "discriminator.4.conv", config.conv_clamp)
        self._dense = Dense(tensors, "discriminator.4.dense", activate=True)
        self._output = Dense(tensors, "discriminator.4.output")
        label = None
        if class_index is not None:
            label = _map_label(config, tensors, class_index)
        self.register_buffer("label", label)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, group_size: int | None = 1) -> Tensor:
        """Judge images.

        Args:
            images: [N, img_channels, resolution, resolution], nominally in [-1, 1].
            group_size: images whose features share a standard deviation, as in training: N has
                to be a multiple of it, or not above it; None: all N. 1 keeps images strangers.

        Returns:
            logits: [N], positive for what it takes for real.

        Raises:
            LmexpError: the images have another shape, or N can't be grouped.
        """
        wanted = (self.config.img_channels, self.resolution, self.resolution)
        if images.ndim != 4 or images.shape[1:] != wanted:
            raise LmexpError(
                f"images: shape {tuple(images.shape)}, but this discriminator reads "
                f"[N, {', '.join(map(str, wanted))}]; resize them or choose the one they belong to"
            )
        x, image = None, images
        for block in self._blocks:
            x, image = block(x, image)
        if self._from_rgb is not None:
            y = self._from_rgb(image)
            x = y if x is None else x + y
        assert x is not None
        if self.config.mbstd_channels:
            x = torch.cat([x, self._group_deviation(x, group_size)], dim=1)
        logits: Tensor = self._output(self._dense(self._conv(x).flatten(1)))
        if self.label is None:
            return logits[:, 0]
        return (logits * self.label).sum(1) / math.sqrt(logits.shape[1])

    def _group_deviation(self, x: Tensor, group_size: int | None) -> Tensor:
        """Standard deviation over each group, averaged: [N, mbstd_channels, 4, 4]."""
        N, channels = x.shape[0], self.config.mbstd_channels
        size = N if group_size is None else min(group_size, N)
        if size == 1:
            return x.new_full((N, channels, *x.shape[2:]), math.sqrt(EPSILON))
        if N % size:
            raise LmexpError(
                f"group_size: {size}, but {N} images are no multiple of it; choose another batch"
            )
        # Image n is of group n mod N/size.
        groups = x.reshape(size, N // size, channels, -1)
        deviation = (groups.var(0, correction=0) + EPSILON).sqrt().mean(2)
        return deviation.repeat(size, 1)[:, :, None, None].expand(-1, -1, *x.shape[2:])


def _map_label(
    config: StyleGAN2DiscriminatorConfig, tensors: Mapping[str, Tensor], class_index: int
) -> Tensor:
    """The mapped label, [1, cmap_dim]: it never changes."""
    one_hot = F.one_hot(torch.tensor([class_index]), config.c_dim).float()
    x = normalize_second_moment(Dense(tensors, "discriminator.mapping.embed")(one_hot))
    for index in range(config.mapping_layers):
        name = f"discriminator.mapping.layers.{index}"
        x = Dense(tensors, name, config.mapping_lr_multiplier, activate=True)(x)
    return x
