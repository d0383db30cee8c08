"""StyleGAN2, written from its papers.

Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", arXiv 1912.04958 (weight
demodulation, skip and residual generators), and "Training Generative Adversarial Networks with
Limited Data", arXiv 2006.06676 (the published weights' sizes, clamped half precision).

Weights are modulated without touching them. With styles s of one image, a demodulated convolution
is y_o = d_o · Σ_i w_oi * (s_i x_i), d_o = (Σ_i s_i² Σ_k w_oik² + ε)^-½: scale what goes in,
convolve the whole batch with one kernel, scale what comes out. So frozen weights need no gradient,
and images of a batch share the convolution. The image layers alone modulate weights: they have
three rows, and a batched matrix product was three to four times as fast on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

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


class ModulatedConv(nn.Module):
    """Modulated and demodulated 3x3 convolution, noise, bias, LeakyReLU(0.2), optional clamp.

    Args:
        config: of the generator.
        tensors: the canonical state.
        name: stem of its tensors, such as "synthesis.64.conv0".
        half: type of its features; None: the network's own, float32.
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
        half: torch.dtype | None,
        noise: Tensor | None,
        low_pass: LowPass | None = None,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.half_dtype = half
        self.low_pass = low_pass
        clamp = config.conv_clamp
        if clamp is None and half == torch.float16:
            clamp = HALF_CLAMP
        self.clamp = None if clamp is None else clamp * gain
        weight = tensors[f"{name}.weight"].float()
        fan_in = weight[0].numel()
        weight = weight / math.sqrt(fan_in)
        if half is not None:
            # Demodulation undoes any factor of a row. With its largest weight at fan_in^-½ and
            # styles of at most 1, sums stay within the range of float16.
            weight = weight / (weight.abs().amax((1, 2, 3), keepdim=True) * math.sqrt(fan_in))
        self.affine = Dense(tensors, f"{name}.affine")
        self.register_buffer("squares", weight.square().sum((2, 3)))
        if low_pass is not None:
            weight = weight.transpose(0, 1)
        self.register_buffer("weight", weight.to(half or torch.float32).contiguous())
        # LeakyReLU is positively homogeneous: its gain is carried by what goes into it.
        self.gain = GAIN * gain
        bias = tensors[f"{name}.bias"].float() * self.gain
        self.register_buffer("bias", bias.to(half or torch.float32)[:, None, None])
        if noise is not None:
            strength = tensors[f"{name}.noise_strength"].float() * self.gain
            self.register_buffer("noise_strength", strength)
            noise = (noise.float() * strength).to(half or torch.float32)[None, None]
        self.register_buffer("noise", noise)

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
        if self.half_dtype is not None:
            # No gradient has to pass through a factor that demodulation undoes.
            styles = styles / styles.detach().abs().amax(1, keepdim=True)
        demodulation = torch.rsqrt(F.linear(styles.square(), self.squares) + EPSILON) * self.gain
        x = x * styles.to(x.dtype)[:, :, None, None]
        if self.low_pass is None:
            x = F.conv2d(x, self.weight, padding=1)
        else:
            x = F.conv_transpose2d(x, self.weight, stride=2)
            x = self.low_pass.upsample_convolved(x)
        x = x * demodulation.to(x.dtype)[:, :, None, None]
        if self.noise is not None:
            if noise is None:
                x = x.add_(self.noise)
            else:
                x = x.add_((noise * self.noise_strength).to(x.dtype))
        x = F.leaky_relu_(x.add_(self.bias), LEAK)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to the image's channels, bias, optional clamp.

    Args:
        config: of the generator.
        tensors: the canonical state.
        name: stem of its tensors, such as "synthesis.64.to_rgb".
        half: type of its features; None: the network's own, float32.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        config: StyleGAN2Config,
        tensors: Mapping[str, Tensor],
        name: str,
        half: torch.dtype | None,
    ) -> None:
        super().__init__()
        clamp = config.conv_clamp
        self.clamp = HALF_CLAMP if clamp is None and half == torch.float16 else clamp
        self.affine = Dense(tensors, f"{name}.affine")
        weight = tensors[f"{name}.weight"].float().flatten(1)
        self.register_buffer("weight", weight / math.sqrt(weight.shape[1]))
        self.register_buffer("bias", tensors[f"{name}.bias"].float()[:, None, None])

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x: [N, C, h, w], w: [N, w_dim] -> [N, img_channels, h, w], float32."""
        weight = self.weight * self.affine(w)[:, None]
        image: Tensor = torch.bmm(weight.to(x.dtype), x.flatten(2))
        image = image.reshape(len(x), -1, *x.shape[2:]).to(self.bias.dtype) + self.bias
        return image if self.clamp is None else image.clamp(-self.clamp, self.clamp)


class Block(nn.Module):
    """All layers of one resolution.

    Args:
        config: of the generator.
        tensors: the canonical state.
        side: of its feature maps, px.
        half: type of its features; None: the network's own, float32.
        noises: its convolutions' own noise maps; None where there is none.
        low_pass: the filter between resolutions.
    """

    skip: Tensor | None

    def __init__(
        self,
        config: StyleGAN2Config,
        tensors: Mapping[str, Tensor],
        side: int,
        half: torch.dtype | None,
        noises: Sequence[Tensor | None],
        low_pass: LowPass,
    ) -> None:
        super().__init__()
        name, residual = f"synthesis.{side}", config.architecture == "resnet"
        self.half_dtype = half
        self.low_pass = low_pass
        self.conv0 = None
        if side > 4:
            self.conv0 = ModulatedConv(config, tensors, f"{name}.conv0", half, noises[0], low_pass)
        skip = tensors[f"{name}.skip.weight"] if side > 4 and residual else None
        gain = 1.0 if skip is None else math.sqrt(0.5)
        self.conv1 = ModulatedConv(config, tensors, f"{name}.conv1", half, noises[-1], gain=gain)
        self.to_rgb = None
        if config.has_to_rgb(side):
            self.to_rgb = ToRGB(config, tensors, f"{name}.to_rgb", half)
        if skip is not None:
            skip = (skip.float() / math.sqrt(2 * skip.shape[1])).to(half or torch.float32)
        self.register_buffer("skip", skip)

    def forward(
        self, x: Tensor, image: Tensor | None, ws: Sequence[Tensor], noises: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Compute.

        Args:
            x: [N, C_in, h, w].
            image: what smaller resolutions made, [N, img_channels, h, w].
            ws: a [N, w_dim] for every convolution and one for the image layer.
            noises: a [N, 1, H, W] for every convolution, or None for its own.

        Returns:
            (features [N, C_out, H, W], image [N, img_channels, H, W] if there is one by now).
        """
        x = x.to(self.half_dtype) if self.half_dtype is not None else x
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


class StyleGAN2Network(nn.Module):
    """A frozen StyleGAN2 of any size; behaves as a `Generator`.

    Half precision: the `half_precision` highest resolutions (never 4 px) compute with
    `half_dtype`; styles, demodulation coefficients, w and the image are float32 all the way.
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
        half = torch.bfloat16 if half_dtype == "bfloat16" else torch.float16
        first_half = max(8, 2 * config.resolution >> half_precision)
        self._blocks = nn.ModuleList()
        for side in config.sides:
            count = 1 if side == 4 else 2
            own, noises = noises[:count], noises[count:]
            chosen = half if half_precision and side >= first_half else None
            self._blocks.append(Block(config, tensors, side, chosen, own, low_pass))
        if weights_sha256 is None:
            weights_sha256 = store.digest(tensors)
        self.weights_sha256 = weights_sha256
        self.eval().requires_grad_(False)

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
        for index, block in enumerate(self._blocks):
            first, last = max(0, 2 * index - 1), 2 * index + 1
            x, image = block(x, image, styles[first : last + 1], noises[first:last])
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
