"""StyleGAN2, written from its papers.

Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", arXiv 1912.04958 (weight
demodulation, skip and residual generators), and "Training Generative Adversarial Networks with
Limited Data", arXiv 2006.06676 (the published weights' sizes, clamped half precision).

Weights are modulated without touching them. With styles s of one image, a demodulated convolution
is y_o = d_o · Σ_i w_oi * (s_i x_i), d_o = (Σ_i s_i² Σ_k w_oik² + ε)^-½: scale what goes in,
convolve the whole batch with one kernel, scale what comes out. So frozen weights need no gradient,
and images of a batch share the convolution. The image layers alone modulate weights: they have
three rows, and a batched matrix product was three to four times as fast on a CPU.

Two structures compute this. Float32 takes layer after layer, as measured best on CPUs. Half
precision, which is for GPUs, computes all styles and demodulation coefficients at once
(`StyleTables`) and everything between two convolutions in one pass (`stylegan2_epilogue`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lmexp.errors import LmexpError
from lmexp.generators.stylegan2_config import (
    MAX_RESOLUTION,
    Architecture,
    StyleGAN2Config,
    StyleGAN2DiscriminatorConfig,
    channel_table,
)
from lmexp.generators.stylegan2_discriminator import StyleGAN2Discriminator
from lmexp.generators.stylegan2_epilogue import (
    Split,
    compose,
    convolve,
    double_side,
    epilogue,
    grow,
)
from lmexp.generators.stylegan2_layers import (
    EPSILON,
    GAIN,
    LEAK,
    Dense,
    LowPass,
    check_class,
    check_tensors,
    make_random_state,
    normalize_second_moment,
)
from lmexp.latents import draw_normal
from lmexp.weights import store

if TYPE_CHECKING:
    from lmexp.checkpoints.checkpoint import Checkpoint

NoiseMode = Literal["const", "random", "none"]
HalfDtype = Literal["bfloat16", "float16"]
HALF_CLAMP = 256.0
"""Bound on float16 features where the checkpoint names none (arXiv 2006.06676, appendix D)."""


class MappingNetwork(nn.Module):
    """z, and the label if there is one -> w.

    Args:
        config: of the generator.
        tensors: the canonical state.
        class_index: the label; None if unconditional.
    """

    label: Tensor | None

    def __init__(
        self, config: StyleGAN2Config, tensors: Mapping[str, Tensor], class_index: int | None
    ) -> None:
        super().__init__()
        label = None
        if class_index is not None:
            # The label never changes, so neither does its embedding.
            embed = Dense(tensors, "mapping.embed")
            one_hot = F.one_hot(torch.tensor([class_index]), config.c_dim).float()
            label = normalize_second_moment(embed(one_hot))
        self.register_buffer("label", label)
        self.layers = nn.ModuleList(
            Dense(tensors, f"mapping.layers.{index}", config.mapping_lr_multiplier, activate=True)
            for index in range(config.mapping_layers)
        )

    def forward(self, z: Tensor) -> Tensor:
        """z: [N, z_dim], standard normal -> w: [N, w_dim]."""
        w = normalize_second_moment(z)
        if self.label is not None:
            w = torch.cat([w, self.label.expand(len(w), -1)], dim=1)
        for layer in self.layers:
            w = layer(w)
        return w


def choose_split(side: int) -> Split:
    """How half precision upsamples to feature maps of this side, px.

    Measured on one H200 (bfloat16, channels-last, config F, batch of 8, forward and backward, us an
    image of the convolution alone, as transposed / quads / phases): 32 px 9 / 11 / 16; 64 px
    17 / 29 / 81; 128 px 32 / 49 / 99; 256 px 35 / 47 / 99; 512 px 50 / 53 / 103. Against that,
    filtering 3x3 or 4x4 taps costs the epilogue reads, and its backward pass a further kernel.
    Small maps wait for launches, so fewest kernels win; then multiplications matter, then reads.
    The whole synthesis at 1024 px took 1.67 ms an image with this choice, 1.73 with quads
    everywhere, 1.77 with phases and 1.98 with transposed; that was with kernels that filtered
    pixel by pixel. At 1024 px itself nobody has timed the three apart.
    """
    if side <= 32:
        return "phases"
    if side <= 128:
        return "transposed"
    return "quads" if side <= 512 else "phases"


class ModulatedConv(nn.Module):
    """Modulated and demodulated 3x3 convolution, noise, bias, LeakyReLU(0.2), optional clamp.

    Args:
        config: of the generator.
        tensors: the canonical state.
        name: stem of its tensors, such as "synthesis.64.conv0".
        noise: its own noise map, [R, R]; None for no noise.
        low_pass: doubles the side with this filter; None keeps the side.
        gain: of its output, and of the clamp.
    """

    weight: Tensor
    squares: Tensor
    bias: Tensor
    noise: Tensor | None
    noise_strength: Tensor

    def __init__(
        self,
        config: StyleGAN2Config,
        tensors: Mapping[str, Tensor],
        name: str,
        noise: Tensor | None,
        low_pass: LowPass | None = None,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.low_pass = low_pass
        self.split: Split = "same"
        self.clamp = None if config.conv_clamp is None else config.conv_clamp * gain
        weight = tensors[f"{name}.weight"].float()
        weight = weight / math.sqrt(weight[0].numel())
        self.affine = Dense(tensors, f"{name}.affine")
        self.register_buffer("squares", weight.square().sum((2, 3)))
        if low_pass is not None:
            weight = weight.transpose(0, 1)
        self.register_buffer("weight", weight.contiguous())
        # LeakyReLU is positively homogeneous: its gain is carried by what goes into it.
        self.gain = GAIN * gain
        bias = tensors[f"{name}.bias"].float() * self.gain
        self.register_buffer("bias", bias[:, None, None])
        if noise is not None:
            strength = tensors[f"{name}.noise_strength"].float() * self.gain
            self.register_buffer("noise_strength", strength)
            noise = (noise.float() * strength)[None, None]
        self.register_buffer("noise", noise)

    def lower(self, dtype: torch.dtype, side: int) -> None:
        """Make it a layer that `convolve_modulated` computes, in place.

        Args:
            dtype: of weights and features.
            side: of what it makes, px.
        """
        weight = self.weight if self.low_pass is None else self.weight.transpose(0, 1)
        # Demodulation undoes any factor of a row. With its largest weight at fan_in^-½ and
        # styles of at most 1, sums stay within the range of float16.
        fan_in = weight[0].numel()
        weight = weight / (weight.abs().amax((1, 2, 3), keepdim=True) * math.sqrt(fan_in))
        self.squares = weight.square().sum((2, 3))
        self.filters_apart = self.low_pass is not None and not self.low_pass.is_binomial
        if self.low_pass is not None:
            self.split = "transposed" if self.filters_apart else choose_split(side)
        weight = compose(weight, self.split).to(dtype)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        if self.clamp is None and dtype == torch.float16:
            self.clamp = HALF_CLAMP * (self.gain / GAIN)

    def convolve_modulated(
        self,
        x: Tensor,
        demodulation: Tensor,
        noise: Tensor | None,
        styles: Tensor | None,
        rgb: Tensor | None,
        features: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute, in half precision.

        Args:
            x: [N, C_in, h, w], modulated.
            demodulation: [N, C_out], its gain included.
            noise: [N, 1, H, W]; None for its own.
            styles: [N, C_out], of the layer that reads what this one makes; None: no modulation.
            rgb: [N, 3, C_out], modulated weights of the image layer; None if there is none.
            features: whether features are wanted.

        Returns:
            (features [N, C_out, H, W], modulated; the image layer's product [N, 3, H, W]).
        """
        x = convolve(x, self.weight, self.split)
        split = self.split
        if self.filters_apart and self.low_pass is not None:
            x, split = self.low_pass.upsample_convolved(x), "same"
        strength = None
        if self.noise is None:
            noise = None
        elif noise is None:
            noise = self.noise
        else:
            strength = self.noise_strength
        bias = self.bias[:, 0, 0]
        return epilogue(
            x, demodulation, bias, noise, strength, styles, rgb, features, split, self.clamp
        )

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """Compute.

        Args:
            x: [N, C_in, h, w].
            w: [N, w_dim].
            noise: [N, 1, H, W]; None for its own.

        Returns:
            [N, C_out, H, W]; H = 2h where it doubles the side, else h.
        """
        styles = self.affine(w)
        demodulation = torch.rsqrt(F.linear(styles.square(), self.squares) + EPSILON) * self.gain
        x = x * styles[:, :, None, None]
        if self.low_pass is None:
            x = F.conv2d(x, self.weight, padding=1)
        else:
            x = F.conv_transpose2d(x, self.weight, stride=2)
            x = self.low_pass.upsample_convolved(x)
        x = x * demodulation[:, :, None, None]
        if self.noise is not None:
            x = x.add_(self.noise if noise is None else noise * self.noise_strength)
        x = F.leaky_relu_(x.add_(self.bias), LEAK)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to the image's channels, bias, optional clamp.

    Args:
        config: of the generator.
        tensors: the canonical state.
        name: stem of its tensors, such as "synthesis.64.to_rgb".
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, config: StyleGAN2Config, tensors: Mapping[str, Tensor], name: str) -> None:
        super().__init__()
        self.clamp = config.conv_clamp
        self.affine = Dense(tensors, f"{name}.affine")
        weight = tensors[f"{name}.weight"].float().flatten(1)
        self.register_buffer("weight", weight / math.sqrt(weight.shape[1]))
        self.register_buffer("bias", tensors[f"{name}.bias"].float()[:, None, None])

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x: [N, C, h, w], w: [N, w_dim] -> [N, img_channels, h, w], float32."""
        weight = self.weight * self.affine(w)[:, None]
        image = torch.bmm(weight, x.flatten(2))
        return self.finish(image.reshape(len(x), -1, *x.shape[2:]))

    def finish(self, product: Tensor) -> Tensor:
        """What follows the product of weights and features, [N, img_channels, h, w]."""
        image = product + self.bias
        return image if self.clamp is None else image.clamp(-self.clamp, self.clamp)


class Block(nn.Module):
    """All layers of one resolution.

    Args:
        config: of the generator.
        tensors: the canonical state.
        side: of its feature maps, px.
        noises: its convolutions' own noise maps; None where there is none.
        low_pass: the filter between resolutions.
    """

    skip: Tensor | None

    def __init__(
        self,
        config: StyleGAN2Config,
        tensors: Mapping[str, Tensor],
        side: int,
        noises: Sequence[Tensor | None],
        low_pass: LowPass,
    ) -> None:
        super().__init__()
        name, residual = f"synthesis.{side}", config.architecture == "resnet"
        self.side = side
        self.half_dtype: torch.dtype | None = None
        self.low_pass = low_pass
        self.conv0 = None
        if side > 4:
            self.conv0 = ModulatedConv(config, tensors, f"{name}.conv0", noises[0], low_pass)
        skip = tensors[f"{name}.skip.weight"] if side > 4 and residual else None
        gain = 1.0 if skip is None else math.sqrt(0.5)
        self.conv1 = ModulatedConv(config, tensors, f"{name}.conv1", noises[-1], gain=gain)
        self.to_rgb = None
        if config.has_to_rgb(side):
            self.to_rgb = ToRGB(config, tensors, f"{name}.to_rgb")
        if skip is not None:
            skip = skip.float() / math.sqrt(2 * skip.shape[1])
        self.register_buffer("skip", skip)

    def forward(
        self, x: Tensor, image: Tensor | None, ws: Sequence[Tensor], noises: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Compute in float32.

        Args:
            x: [N, C_in, h, w].
            image: what smaller resolutions made, [N, img_channels, h, w].
            ws: a [N, w_dim] for every convolution and one for the image layer.
            noises: a [N, 1, H, W] for every convolution, or None for its own.

        Returns:
            (features [N, C_out, H, W], image [N, img_channels, H, W] if there is one by now).
        """
        shortcut = None
        if self.conv0 is not None:
            if self.skip is not None:
                shortcut = self.low_pass.upsample(F.conv2d(x, self.skip))
            x = self.conv0(x, ws[0], noises[0])
        x = self.conv1(x, ws[-2], noises[-1])
        if shortcut is not None:
            x = x + shortcut
        if image is not None:
            image = self.low_pass.upsample(image)
        if self.to_rgb is not None:
            layer = self.to_rgb(x, ws[-1])
            image = layer if image is None else image + layer
        return x, image

    def lower(self, dtype: torch.dtype) -> None:
        """Make it a block that `compute_modulated` computes, in place; not that of 4 px."""
        assert self.conv0 is not None
        self.half_dtype = dtype
        self.conv0.lower(dtype, self.side)
        self.conv1.lower(dtype, self.side)
        if self.skip is not None:
            self.skip = self.skip.to(dtype).contiguous(memory_format=torch.channels_last)
        if self.to_rgb is not None and self.to_rgb.clamp is None and dtype == torch.float16:
            self.to_rgb.clamp = HALF_CLAMP

    def compute_modulated(
        self,
        x: Tensor,
        image: Tensor | None,
        layers: Sequence[Coefficients],
        rgb: Tensor | None,
        next_styles: Tensor | None,
        noises: Sequence[Tensor | None],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute in half precision.

        Args:
            x: [N, C_in, h, w]; modulated, unless the block has a shortcut.
            image: what smaller resolutions made, [N, 3, h, w], float32.
            layers: those of its two convolutions.
            rgb: [N, 3, C_out], modulated weights of its image layer; None if it has none.
            next_styles: of the next block's first convolution; None: there is no next block.
            noises: a [N, 1, H, W] for every convolution, or None for its own.

        Returns:
            (features [N, C_out, H, W], modulated unless the block has a shortcut, None in the last
            block; image [N, 3, H, W] if there is one by now).
        """
        assert self.conv0 is not None and self.half_dtype is not None
        # A no-op unless the resolution below computes in the other half precision.
        x = x.to(self.half_dtype)
        shortcut, own_rgb = None, rgb
        if self.skip is not None:
            shortcut = F.conv2d(x, self.skip)
            shortcut = self._double_side(shortcut)
            x = modulate(x, layers[0].styles, x.dtype)
            next_styles, own_rgb = None, None
        middle, _ = self.conv0.convolve_modulated(
            x, layers[0].demodulation, noises[0], layers[1].styles, None
        )
        assert middle is not None
        features = next_styles is not None or shortcut is not None
        made, layer = self.conv1.convolve_modulated(
            middle, layers[1].demodulation, noises[1], next_styles, own_rgb, features
        )
        if shortcut is not None and made is not None:
            made = made + shortcut
            if rgb is not None:
                # A row a pixel: of channels-last features, that is a view.
                rows = made.permute(0, 2, 3, 1).flatten(1, 2) @ rgb.transpose(1, 2).to(made.dtype)
                layer = rows.transpose(1, 2).reshape(len(made), -1, *made.shape[2:]).to(rgb.dtype)
        if self.to_rgb is not None and layer is not None:
            layer = self.to_rgb.finish(layer)
        if image is None:
            return made, layer
        if self.low_pass.is_binomial:
            return made, grow(image, layer)
        image = self.low_pass.upsample(image)
        return made, image if layer is None else image + layer

    def _double_side(self, x: Tensor) -> Tensor:
        return double_side(x) if self.low_pass.is_binomial else self.low_pass.upsample(x)


class Coefficients(NamedTuple):
    """What modulates one convolution in half precision.

    Attributes:
        styles: [N, C_in], of at most 1.
        demodulation: [N, C_out], the gain included.
    """

    styles: Tensor
    demodulation: Tensor


class StyleTables(nn.Module):
    """Styles and demodulation of many layers by three products of matrices.

    Layer by layer they are hundreds of small kernels, whose launches cost a GPU more than the
    arithmetic. Layers of fewer channels are filled up with zeros.

    Args:
        convs: in the order of the computation, each of which reads the next style vector.
        images: image layers, each of which reads the second style vector after its predecessor's.
        first: index of the first convolution's style vector.
        first_image: of the first image layer's.
    """

    conv_weight: Tensor
    conv_bias: Tensor
    squares: Tensor
    gains: Tensor
    image_weight: Tensor
    image_bias: Tensor
    rgb: Tensor

    def __init__(
        self,
        convs: Sequence[ModulatedConv],
        images: Sequence[ToRGB],
        first: int,
        first_image: int,
    ) -> None:
        super().__init__()
        self.first, self.first_image = first, first_image
        self.channels = [conv.squares.shape for conv in convs]
        self.image_channels = [layer.weight.shape[1] for layer in images]
        self.register_buffer("conv_weight", _stack([c.affine.weight.T for c in convs]))
        self.register_buffer("conv_bias", _stack([c.affine.bias[None] for c in convs]))
        self.register_buffer("squares", _stack([conv.squares.T for conv in convs]))
        gains = self.squares.new_tensor([conv.gain for conv in convs])
        self.register_buffer("gains", gains[:, None, None])
        self.register_buffer("image_weight", _stack([i.affine.weight.T for i in images]))
        self.register_buffer("image_bias", _stack([i.affine.bias[None] for i in images]))
        self.register_buffer("rgb", _stack([layer.weight for layer in images])[:, None])

    def forward(self, ws: Tensor) -> tuple[list[Coefficients], list[Tensor]]:
        """ws: [N, num_ws, w_dim] -> (of every convolution; [N, 3, C] of every image layer)."""
        own = ws[:, self.first : self.first + len(self.channels)].transpose(0, 1)
        styles = torch.baddbmm(self.conv_bias, own, self.conv_weight)
        # No gradient has to pass through a factor that demodulation undoes.
        styles = styles / styles.detach().abs().amax(2, keepdim=True)
        demodulation = torch.rsqrt(torch.bmm(styles.square(), self.squares) + EPSILON) * self.gains
        own = ws[:, self.first_image :: 2].transpose(0, 1)
        image_styles = torch.baddbmm(self.image_bias, own, self.image_weight)
        rgb = self.rgb * image_styles[:, :, None]
        layers = zip(styles.unbind(), demodulation.unbind(), self.channels, strict=True)
        return (
            [Coefficients(_cut(s, C_in), _cut(d, C_out)) for s, d, (C_out, C_in) in layers],
            [_cut(r, C) for r, C in zip(rgb.unbind(), self.image_channels, strict=True)],
        )


def _stack(tables: Sequence[Tensor]) -> Tensor:
    """Tables [a, b] of several sizes, filled up with zeros: [L, max a, max b]."""
    rows, columns = (max(table.shape[axis] for table in tables) for axis in (0, 1))
    filled = [F.pad(t, [0, columns - t.shape[1], 0, rows - t.shape[0]]) for t in tables]
    return torch.stack(filled)


def _cut(x: Tensor, channels: int) -> Tensor:
    return x if x.shape[-1] == channels else x[..., :channels]


def modulate(x: Tensor, styles: Tensor, dtype: torch.dtype) -> Tensor:
    """x: [N, C, h, w], styles: [N, C] -> their product, channels-last, in `dtype`."""
    x = (x * styles[:, :, None, None]).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


class StyleGAN2Network(nn.Module):
    """A frozen StyleGAN2 of any size; behaves as a `Generator`.

    Half precision: the `half_precision` highest resolutions (never 4 px) compute with
    `half_dtype`, all of them after `lower_precision`; styles, demodulation coefficients, noise
    maps, w and the image are float32 all the way, and so is whatever lies between two convolutions.
    Demodulated layers divide styles by their largest and weights by each row's largest,
    which demodulation undoes. Features are clamped at `conv_clamp`, with float16 at 256 if there is
    none. bfloat16 has float32's range and needs neither; it has 8 bits of precision, not 11.

    Noise: `noise_bufs`, where given, are used. Otherwise "const" takes the checkpoint's own maps,
    "random" unit normal ones drawn once from `noise_seed` (on the CPU, so the same on every
    device; the same for every image and call). "none" adds none and takes none.

    Args:
        config: its sizes.
        tensors: the canonical state (`stylegan2_config`), float32, as trained.
        weights_sha256: digest to report; None computes it.
        noise_mode: what is added where no maps are given.
        noise_seed: of "random".
        optimize_noise: offer the maps in `noise_shapes`; else they are part of the weights.
        class_index: the class of a conditional model; None if unconditional.
        half_precision: number of resolutions, counted from the highest, in half precision.
        half_dtype: of those.

    Attributes:
        config: its sizes.
        w_avg: [w_dim], the average w that training tracked.

    Raises:
        LmexpError: tensors do not fit the config, or the class does not exist.
    """

    w_avg: Tensor
    const: Tensor

    def __init__(
        self,
        config: StyleGAN2Config,
        tensors: Mapping[str, Tensor],
        weights_sha256: str | None = None,
        *,
        noise_mode: NoiseMode = "const",
        noise_seed: int = 0,
        optimize_noise: bool = True,
        class_index: int | None = None,
        half_precision: int = 0,
        half_dtype: HalfDtype = "bfloat16",
    ) -> None:
        super().__init__()
        check_tensors(config, tensors)
        check_class(config.c_dim, class_index)
        if config.img_channels != 3:
            raise LmexpError(
                f"StyleGAN2: it makes images of {config.img_channels} channels, but a face has 3; "
                "choose another checkpoint"
            )
        self.config = config
        self.class_index = class_index
        self.z_dim, self.w_dim = config.z_dim, config.w_dim
        self.num_ws, self.resolution = config.num_ws, config.resolution
        free = optimize_noise and noise_mode != "none"
        self.noise_shapes: tuple[tuple[int, int], ...] = config.noise_shapes if free else ()
        self._mapping = MappingNetwork(config, tensors, class_index)
        self.register_buffer("w_avg", tensors["mapping.w_avg"].float())
        self.register_buffer("const", tensors["synthesis.const"].float()[None])
        noises = _own_noises(config, tensors, noise_mode, noise_seed)
        low_pass = LowPass(config.resample_filter)
        self._blocks = nn.ModuleList()
        for side in config.sides:
            count = 1 if side == 4 else 2
            own, noises = noises[:count], noises[count:]
            self._blocks.append(Block(config, tensors, side, own, low_pass))
        self._tables: StyleTables | None = None
        if half_precision:
            half = torch.bfloat16 if half_dtype == "bfloat16" else torch.float16
            self._lower(half, max(8, 2 * config.resolution >> half_precision))
        if weights_sha256 is None:
            weights_sha256 = store.digest(tensors)
        self.weights_sha256 = weights_sha256
        self.eval().requires_grad_(False)

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Compute every resolution from 8 px up in `dtype`, in place, with the same safeguards.

        Resolutions that compute in half precision already stay as they are.

        Args:
            dtype: torch.bfloat16 or torch.float16.

        Raises:
            LmexpError: another type.
        """
        if dtype not in (torch.bfloat16, torch.float16):
            raise LmexpError(
                f"StyleGAN2 precision: {dtype}, but it computes in bfloat16 or float16 or, as it "
                "is built, float32; choose one of the former or leave it as it is"
            )
        self._lower(dtype, 8)

    def _lower(self, dtype: torch.dtype, smallest: int) -> None:
        blocks = self._list_blocks()
        lowered = [block for block in blocks if block.side >= smallest]
        for block in lowered:
            if block.half_dtype is None:
                block.lower(dtype)
        first = len(blocks) - len(lowered)
        images = [(index, block.to_rgb) for index, block in enumerate(blocks[first:], first)]
        self._tables = StyleTables(
            [conv for block in lowered for conv in (block.conv0, block.conv1) if conv is not None],
            [layer for _, layer in images if layer is not None],
            2 * first - 1,
            next(2 * index + 1 for index, layer in images if layer is not None),
        ).requires_grad_(False)

    def compile_regions(
        self, fuse: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
    ) -> None:
        """Compile the whole; nothing in half precision, which has kernels of its own."""
        if self._tables is None:
            self.synthesis = fuse(self.synthesis)  # type: ignore[method-assign]

    def _list_blocks(self) -> list[Block]:
        return cast("list[Block]", list(self._blocks))

    def mapping(self, z: Tensor) -> Tensor:
        """z: [N, z_dim], standard normal -> w: [N, w_dim], without truncation."""
        w: Tensor = self._mapping(z)
        return w

    def map_to_ws(
        self, z: Tensor, truncation_psi: float = 1.0, truncation_cutoff: int | None = None
    ) -> Tensor:
        """Map, repeat for every layer, and pull towards `w_avg` (the truncation trick).

        Args:
            z: [N, z_dim], standard normal.
            truncation_psi: 1 leaves w as it is, 0 gives `w_avg`.
            truncation_cutoff: number of style vectors, from the first, that are pulled; None: all.

        Returns:
            ws: [N, num_ws, w_dim].
        """
        ws = self.mapping(z)[:, None].repeat(1, self.num_ws, 1)
        cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        pulled = self.w_avg.lerp(ws[:, :cutoff], truncation_psi)
        return torch.cat([pulled, ws[:, cutoff:]], dim=1)

    def synthesis(self, ws: Tensor, noise_bufs: Sequence[Tensor] = ()) -> Tensor:
        """Render images.

        Args:
            ws: [N, num_ws, w_dim].
            noise_bufs: one [N, 1, h, w] (or [1, 1, h, w]) per entry of `noise_shapes`, or none.

        Returns:
            images: [N, 3, resolution, resolution], float32, nominally in [-1, 1].

        Raises:
            LmexpError: a shape does not fit.
        """
        if ws.ndim != 3 or ws.shape[1:] != (self.num_ws, self.w_dim):
            raise LmexpError(
                f"ws: shape {tuple(ws.shape)}, but this generator reads "
                f"[N, {self.num_ws}, {self.w_dim}]; repeat w or choose the generator it belongs to"
            )
        if noise_bufs:
            shapes = tuple(tuple(noise.shape[1:]) for noise in noise_bufs)
            if shapes != tuple((1, *shape) for shape in self.noise_shapes):
                raise LmexpError(
                    f"noise_bufs: shapes {shapes} after N, but this generator takes one channel of "
                    f"{self.noise_shapes or 'nothing: its noise is part of its weights'}"
                )
        styles = ws.unbind(1)
        noises = tuple(noise_bufs) or (None,) * (len(styles) - 1)
        x: Tensor = self.const
        image: Tensor | None = None
        for index, block in enumerate(self._list_blocks()):
            if block.half_dtype is not None:
                return self._synthesize_modulated(x, image, index, ws, noises)
            first, last = max(0, 2 * index - 1), 2 * index + 1
            x, image = block(x, image, styles[first : last + 1], noises[first:last])
        assert image is not None
        return image

    def _synthesize_modulated(
        self,
        x: Tensor,
        image: Tensor | None,
        index: int,
        ws: Tensor,
        noises: Sequence[Tensor | None],
    ) -> Tensor:
        """The blocks from this index on, which compute in half precision."""
        assert self._tables is not None
        layers, weights = self._tables(ws)
        rgbs = iter(weights)
        first, blocks = index, self._list_blocks()[index:]
        dtype = blocks[0].half_dtype
        assert dtype is not None
        if self.config.architecture == "resnet":
            x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        else:
            x = modulate(x, layers[0].styles, dtype)
        for index, block in enumerate(blocks):
            own = layers[2 * index : 2 * index + 3]
            noise = 2 * (first + index) - 1
            made, image = block.compute_modulated(
                x,
                image,
                own[:2],
                None if block.to_rgb is None else next(rgbs),
                own[2].styles if len(own) == 3 else None,
                noises[noise : noise + 2],
            )
            x = x if made is None else made
        assert image is not None
        return image


def _own_noises(
    config: StyleGAN2Config, tensors: Mapping[str, Tensor], mode: NoiseMode, seed: int
) -> list[Tensor | None]:
    """The noise map of every convolution, in the order of the computation."""
    names = [
        f"synthesis.{side}.{conv}.noise"
        for side in config.sides
        for conv in (("conv1",) if side == 4 else ("conv0", "conv1"))
    ]
    if mode == "none" or not config.use_noise:
        return [None] * len(names)
    if mode == "const":
        return [tensors[name] for name in names]
    shapes = enumerate(config.noise_shapes)
    return [draw_normal(shape, seed, "stylegan2 noise", index) for index, shape in shapes]


class StyleGAN2(StyleGAN2Network):
    """A StyleGAN2 from a checkpoint; see `StyleGAN2Network` for noise and half precision.

    Args:
        checkpoint: a name of `python -m lmexp.weights list`, or the path of a file: NVIDIA's
            pickles (PyTorch and TensorFlow), rosinality's .pt, or our own safetensors. No
            code in it is run.
        noise_mode: what is added where no maps are given.
        noise_seed: of "random".
        optimize_noise: noise maps are variables of the projection; else part of the weights.
        class_index: the class of a conditional model; null if unconditional.
        half_precision: number of resolutions, counted from the highest, in half precision.
        half_dtype: of those.

    Raises:
        LmexpError: the checkpoint can't be had or read, or the class does not exist.
    """

    def __init__(
        self,
        checkpoint: str,
        noise_mode: NoiseMode = "const",
        noise_seed: Annotated[int, Field(ge=0)] = 0,
        optimize_noise: bool = True,
        class_index: Annotated[int, Field(ge=0)] | None = None,
        half_precision: Annotated[int, Field(ge=0, le=10)] = 0,
        half_dtype: HalfDtype = "bfloat16",
    ) -> None:
        loaded = _read(checkpoint)
        generator = {
            name: tensor
            for name, tensor in loaded.tensors.items()
            if not name.startswith("discriminator.")
        }
        super().__init__(
            loaded.generator,
            generator,
            noise_mode=noise_mode,
            noise_seed=noise_seed,
            optimize_noise=optimize_noise,
            class_index=class_index,
            half_precision=half_precision,
            half_dtype=half_dtype,
        )
        self._checkpoint = checkpoint

    def discriminator(self) -> StyleGAN2Discriminator:
        """The checkpoint's discriminator, frozen, on this generator's device, for its class.

        It is read anew at every call: keep it.

        Raises:
            LmexpError: the checkpoint holds none.
        """
        loaded = _read(self._checkpoint)
        if loaded.discriminator is None:
            raise LmexpError(
                f"checkpoint {self._checkpoint}: it holds no discriminator; take one that does "
                "(NVIDIA's pickles), or set the discriminator term's weight to 0"
            )
        network = StyleGAN2Discriminator(loaded.discriminator, loaded.tensors, self.class_index)
        return network.to(self.const.device)


def _read(checkpoint: str) -> Checkpoint:
    # Readers are wanted here alone, not where a network of random weights is built.
    from lmexp.checkpoints.checkpoint import load

    return load(store.checkpoint_path(checkpoint, store.say_on_stderr), store.say_on_stderr)


class StyleGAN2Random(StyleGAN2Network):
    """A StyleGAN2 with random weights (`make_random_state`): no faces, but the real costs.

    Args:
        resolution: side of the image, px: a power of two.
        channel_base: channels times side; 32768 is config F, 16384 config E.
        channel_max: upper bound of the channels.
        latent_dim: size of z and w.
        mapping_layers: depth of the mapping network.
        architecture: how blocks meet the image.
        conv_clamp: bound on every convolution's output; null for none.
        seed: of the weights.
        noise_mode: what is added where no maps are given.
        noise_seed: of "random".
        optimize_noise: noise maps are variables of the projection; else part of the weights.
        half_precision: number of resolutions, counted from the highest, in half precision.
        half_dtype: of those.

    Raises:
        LmexpError: `resolution` is no power of two, or a layer would have no channels.
    """

    def __init__(
        self,
        resolution: Annotated[int, Field(ge=8, le=MAX_RESOLUTION)] = 1024,
        channel_base: Annotated[int, Field(ge=1)] = 32768,
        channel_max: Annotated[int, Field(ge=1)] = 512,
        latent_dim: Annotated[int, Field(ge=1, le=4096)] = 512,
        mapping_layers: Annotated[int, Field(ge=1, le=32)] = 8,
        architecture: Architecture = "skip",
        conv_clamp: Annotated[float, Field(gt=0)] | None = None,
        seed: Annotated[int, Field(ge=0)] = 0,
        noise_mode: NoiseMode = "const",
        noise_seed: Annotated[int, Field(ge=0)] = 0,
        optimize_noise: bool = True,
        half_precision: Annotated[int, Field(ge=0, le=10)] = 0,
        half_dtype: HalfDtype = "bfloat16",
    ) -> None:
        config = StyleGAN2Config(
            z_dim=latent_dim,
            w_dim=latent_dim,
            resolution=resolution,
            channels=channel_table(resolution, channel_base, channel_max),
            mapping_layers=mapping_layers,
            architecture=architecture,
            conv_clamp=conv_clamp,
        )
        super().__init__(
            config,
            make_random_state(config, seed),
            noise_mode=noise_mode,
            noise_seed=noise_seed,
            optimize_noise=optimize_noise,
            half_precision=half_precision,
            half_dtype=half_dtype,
        )
        self._seed = seed

    def discriminator(self) -> StyleGAN2Discriminator:
        """A residual discriminator of random weights and the same channels, on this device."""
        config = StyleGAN2DiscriminatorConfig(
            resolution=self.resolution,
            channels=self.config.channels,
            conv_clamp=self.config.conv_clamp,
        )
        network = StyleGAN2Discriminator(config, make_random_state(config, self._seed))
        return network.to(self.const.device)
