"""What a StyleGAN2 is made of, and the complete names and shapes of its tensors.

The canonical state: every converter of `lmexp.checkpoints` produces it, our safetensors hold it,
and `generators/stylegan2.py` and `generators/stylegan2_discriminator.py` compute with it. Weights
are as they were trained; the equalised learning rate's gains are applied by the networks. Float32.

Orientation: dense weights are [out, in], convolutions [out, in, height, width]. Every convolution
correlates, except for `conv0` of the generator, which is the kernel of a transposed convolution
(`conv_transpose2d` of its first two axes swapped, stride 2). Style biases hold the 1 that they
start from. These are StyleGAN2-ADA's conventions.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any, Literal, Self, get_args

from lmexp.errors import LmexpError

Architecture = Literal["skip", "resnet", "orig"]

MAX_RESOLUTION = 4096
MAX_WIDTH = 8192
MAX_MAPPING_LAYERS = 64
MAX_TAPS = 32
"""Bounds far above anything published: a damaged header must not claim terabytes."""


def channel_table(
    resolution: int, channel_base: int = 32768, channel_max: int = 512
) -> dict[int, int]:
    """Channels of every resolution's feature maps: min(channel_base / side, channel_max).

    Config F of the paper (arXiv 1912.04958) has a base of 32768, config E and StyleGAN2-ADA's
    256 px networks half of it.

    Args:
        resolution: side of the image, px: a power of two, at least 4.
        channel_base: channels times side.
        channel_max: upper bound.

    Returns:
        Side of the feature map, px -> channels, from 4 up to `resolution`.
    """
    sides = [side for side in (2**power for power in range(2, 13)) if side <= resolution]
    return {side: min(channel_base // side, channel_max) for side in sides}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StyleGAN2Config:
    """A StyleGAN2 generator's sizes and constants.

    Tensors (R runs over 4, 8, … `resolution`; C_R is `channels[R]`; `tensor_shapes` lists them):

    - `mapping.embed.{weight,bias}` (conditional ones only), `mapping.layers.{i}.{weight,bias}`,
      `mapping.w_avg`;
    - `synthesis.const`; `synthesis.{R}.conv0.*` (doubles the side; absent at 4),
      `synthesis.{R}.conv1.*`, `synthesis.{R}.to_rgb.*` (every R with "skip", else the last),
      `synthesis.{R}.skip.weight` ("resnet", absent at 4);
    - a convolution has `weight`, `bias`, `affine.{weight,bias}` and, with `use_noise`, `noise`
      [R, R] and `noise_strength` []; `to_rgb` has `weight`, `bias`, `affine.{weight,bias}`.

    Attributes:
        z_dim: size of the input latent.
        c_dim: number of classes, 0 if unconditional.
        w_dim: size of a style vector.
        resolution: side of the image, px: a power of two from 4 to 4096.
        channels: side of a feature map, px -> its channels, for every side from 4 up.
        mapping_layers: depth of the mapping network.
        mapping_lr_multiplier: the mapping network's weights and biases are multiplied by it.
        mapping_features: width of the mapping network's inner layers; None: `w_dim`.
        embed_features: size of the embedded label; None: `w_dim`.
        architecture: how blocks meet the image: "skip" (config E, F), "resnet", "orig".
        conv_clamp: bound on every convolution's output, None if there is none.
        resample_filter: taps of the separable low-pass filter, before it is normalised.
        img_channels: channels of the image.
        use_noise: there are noise maps.

    Raises:
        LmexpError: a value is outside its range.
    """

    z_dim: int = 512
    c_dim: int = 0
    w_dim: int = 512
    resolution: int
    channels: dict[int, int]
    mapping_layers: int = 8
    mapping_lr_multiplier: float = 0.01
    mapping_features: int | None = None
    embed_features: int | None = None
    architecture: Architecture = "skip"
    conv_clamp: float | None = None
    resample_filter: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0)
    img_channels: int = 3
    use_noise: bool = True

    def __post_init__(self) -> None:
        _require_width("z_dim", self.z_dim)
        _require_width("w_dim", self.w_dim)
        _require_image(self.resolution, self.channels, self.img_channels)
        _require_mapping(self.c_dim, self.mapping_layers, self.mapping_lr_multiplier, least=1)
        _require_optional_width("mapping_features", self.mapping_features)
        _require_optional_width("embed_features", self.embed_features)
        _require_convolutions(self.architecture, self.conv_clamp, self.resample_filter)
        _require(isinstance(self.use_noise, bool), "use_noise", self.use_noise, "true or false")

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the feature maps, px, from 4 to `resolution`."""
        return tuple(sorted(self.channels))

    @property
    def num_ws(self) -> int:
        """Number of style vectors: one a convolution and one for the last image layer."""
        return 2 * len(self.sides)

    @property
    def noise_shapes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every noise map, from 4 px up: one at 4 px, two at larger sides."""
        if not self.use_noise:
            return ()
        return tuple((side, side) for side in self.sides for _ in range(1 if side == 4 else 2))

    def has_to_rgb(self, side: int) -> bool:
        """Whether the block of this side, px, has an image layer."""
        return self.architecture == "skip" or side == self.resolution

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads."""
        return _to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            LmexpError: it is no JSON object of this class's keys, or a value is outside its range.
        """
        return cls(**_read_json(cls, text))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StyleGAN2DiscriminatorConfig:
    """A StyleGAN2 discriminator's sizes and constants.

    Tensors (R runs over `resolution`, … 8; C_R is `channels[R]`; `tensor_shapes` lists them):

    - `discriminator.{R}.from_rgb.{weight,bias}` (R = `resolution`; with "skip" every R, and 4),
      `discriminator.{R}.conv0.{weight,bias}` (C_R to C_R), `discriminator.{R}.conv1.{weight,bias}`
      (C_R to C_{R/2}, halves the side), `discriminator.{R}.skip.weight` ("resnet": C_R to C_{R/2},
      1x1, halves the side);
    - `discriminator.4.conv.{weight,bias}` (reads `mbstd_channels` channels more),
      `discriminator.4.dense.{weight,bias}` (all 4x4 features, channel by channel, to C_4),
      `discriminator.4.output.{weight,bias}` (C_4 to 1, or to `cmap_dim` if conditional);
    - conditional ones: `discriminator.mapping.embed.{weight,bias}`,
      `discriminator.mapping.layers.{i}.{weight,bias}`, from the label to `cmap_dim`.

    Attributes:
        c_dim: number of classes, 0 if unconditional.
        resolution: side of the image, px: a power of two from 4 to 4096.
        channels: side of a feature map, px -> its channels, for every side from 4 up.
        architecture: how blocks meet the image: "resnet" (config E, F), "skip", "orig".
        conv_clamp: bound on every convolution's output, None if there is none.
        resample_filter: taps of the separable low-pass filter, before it is normalised.
        img_channels: channels of the image.
        mbstd_group_size: images whose deviation the minibatch layer takes; None: the whole batch.
        mbstd_channels: channels that it adds; 0 if there is no such layer.
        cmap_dim: size of the mapped label; None: `channels[4]`. Not used if unconditional.
        mapping_layers: depth of the label's mapping network, 0 for the embedding alone.
        mapping_lr_multiplier: its weights and biases are multiplied by it.
        mapping_features: width of its inner layers; None: `cmap_dim`.
        embed_features: size of the embedded label; None: `cmap_dim`.

    Raises:
        LmexpError: a value is outside its range.
    """

    c_dim: int = 0
    resolution: int
    channels: dict[int, int]
    architecture: Architecture = "resnet"
    conv_clamp: float | None = None
    resample_filter: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0)
    img_channels: int = 3
    mbstd_group_size: int | None = 4
    mbstd_channels: int = 1
    cmap_dim: int | None = None
    mapping_layers: int = 8
    mapping_lr_multiplier: float = 0.01
    mapping_features: int | None = None
    embed_features: int | None = None

    def __post_init__(self) -> None:
        _require_image(self.resolution, self.channels, self.img_channels)
        _require_mapping(self.c_dim, self.mapping_layers, self.mapping_lr_multiplier, least=0)
        _require_optional_width("mbstd_group_size", self.mbstd_group_size)
        _require_optional_width("cmap_dim", self.cmap_dim)
        _require_optional_width("mapping_features", self.mapping_features)
        _require_optional_width("embed_features", self.embed_features)
        _require_convolutions(self.architecture, self.conv_clamp, self.resample_filter)
        fits = _is_int(self.mbstd_channels) and 0 <= self.mbstd_channels <= self.channels[4]
        fits = fits and (not self.mbstd_channels or self.channels[4] % self.mbstd_channels == 0)
        _require(fits, "mbstd_channels", self.mbstd_channels, "0 or a divisor of channels[4]")
        # Without further layers the embedded label is the mapped one.
        fits = self.mapping_layers > 0 or self.embed_features in (None, self.label_features)
        _require(fits, "embed_features", self.embed_features, "cmap_dim if mapping_layers is 0")

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the feature maps, px, from `resolution` down to 4."""
        return tuple(sorted(self.channels, reverse=True))

    @property
    def label_features(self) -> int:
        """Size of the mapped label, 0 if unconditional."""
        if not self.c_dim:
            return 0
        return self.channels[4] if self.cmap_dim is None else self.cmap_dim

    def has_from_rgb(self, side: int) -> bool:
        """Whether the block of this side, px, reads the image."""
        return self.architecture == "skip" or side == self.resolution

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads."""
        return _to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            LmexpError: it is no JSON object of this class's keys, or a value is outside its range.
        """
        return cls(**_read_json(cls, text))


def tensor_shapes(
    config: StyleGAN2Config | StyleGAN2DiscriminatorConfig,
) -> dict[str, tuple[int, ...]]:
    """All tensors of a network, in the order of its computation: canonical name -> shape."""
    if isinstance(config, StyleGAN2Config):
        return _generator_shapes(config)
    return _discriminator_shapes(config)


def _generator_shapes(config: StyleGAN2Config) -> dict[str, tuple[int, ...]]:
    width = config.w_dim
    inner = config.mapping_features or width
    embedded = (config.embed_features or width) if config.c_dim else 0
    widths = [config.z_dim + embedded, *[inner] * (config.mapping_layers - 1), width]
    shapes = _mapping_shapes("mapping", config.c_dim, embedded, widths)
    shapes["mapping.w_avg"] = (width,)
    shapes["synthesis.const"] = (config.channels[4], 4, 4)

    def add_layer(name: str, channels_in: int, channels_out: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (channels_out, channels_in, kernel, kernel)
        shapes[f"{name}.bias"] = (channels_out,)
        shapes[f"{name}.affine.weight"] = (channels_in, width)
        shapes[f"{name}.affine.bias"] = (channels_in,)

    def add_convolution(name: str, channels_in: int, channels_out: int, side: int) -> None:
        add_layer(name, channels_in, channels_out, 3)
        if config.use_noise:
            shapes[f"{name}.noise"] = (side, side)
            shapes[f"{name}.noise_strength"] = ()

    for side in config.sides:
        name, channels = f"synthesis.{side}", config.channels[side]
        if side > 4:
            below = config.channels[side // 2]
            add_convolution(f"{name}.conv0", below, channels, side)
            if config.architecture == "resnet":
                shapes[f"{name}.skip.weight"] = (channels, below, 1, 1)
        add_convolution(f"{name}.conv1", channels, channels, side)
        if config.has_to_rgb(side):
            add_layer(f"{name}.to_rgb", channels, config.img_channels, 1)
    return shapes


def _discriminator_shapes(config: StyleGAN2DiscriminatorConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    labels, last = config.label_features, config.channels[4]
    if config.c_dim:
        inner = config.mapping_features or labels
        embedded = config.embed_features or labels
        widths = [embedded, *[inner] * (config.mapping_layers - 1)]
        widths += [labels] * (config.mapping_layers > 0)
        shapes |= _mapping_shapes("discriminator.mapping", config.c_dim, embedded, widths)

    def add(name: str, *weight: int, bias: bool = True) -> None:
        shapes[f"discriminator.{name}.weight"] = weight
        if bias:
            shapes[f"discriminator.{name}.bias"] = weight[:1]

    for side in config.sides:
        channels = config.channels[side]
        if config.has_from_rgb(side):
            add(f"{side}.from_rgb", channels, config.img_channels, 1, 1)
        if side > 4:
            above = config.channels[side // 2]
            add(f"{side}.conv0", channels, channels, 3, 3)
            add(f"{side}.conv1", above, channels, 3, 3)
            if config.architecture == "resnet":
                add(f"{side}.skip", above, channels, 1, 1, bias=False)
    add("4.conv", last, last + config.mbstd_channels, 3, 3)
    add("4.dense", last, last * 16)
    add("4.output", labels or 1, last)
    return shapes


def _mapping_shapes(
    name: str, c_dim: int, embedded: int, widths: list[int]
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    if c_dim:
        shapes[f"{name}.embed.weight"] = (embedded, c_dim)
        shapes[f"{name}.embed.bias"] = (embedded,)
    for index, (before, after) in enumerate(itertools.pairwise(widths)):
        shapes[f"{name}.layers.{index}.weight"] = (after, before)
        shapes[f"{name}.layers.{index}.bias"] = (after,)
    return shapes


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _require(fits: bool, key: str, value: object, wanted: str) -> None:
    if not fits:
        raise LmexpError(
            f"StyleGAN2 {key}: {value!r}, but it must be {wanted}; give another value or checkpoint"
        )


def _require_width(key: str, value: object) -> None:
    fits = isinstance(value, int) and _is_int(value) and 1 <= value <= MAX_WIDTH
    _require(fits, key, value, f"a whole number from 1 to {MAX_WIDTH}")


def _require_optional_width(key: str, value: object) -> None:
    if value is not None:
        _require_width(key, value)


def _require_image(resolution: int, channels: object, img_channels: object) -> None:
    sides = [2**power for power in range(2, MAX_RESOLUTION.bit_length())]
    _require(
        _is_int(resolution) and resolution in sides,
        "resolution",
        resolution,
        f"a power of two from 4 to {MAX_RESOLUTION}",
    )
    wanted = [side for side in sides if side <= resolution]
    # As sets: keys of a hostile header need not be of one kind, so they cannot be sorted.
    fits = isinstance(channels, dict) and set(channels) == set(wanted)
    _require(fits, "channels", channels, f"given for the sides {wanted}")
    if isinstance(channels, dict):
        for side, count in channels.items():
            _require_width(f"channels[{side}]", count)
    _require_width("img_channels", img_channels)


def _require_mapping(c_dim: object, layers: object, multiplier: object, least: int) -> None:
    fits = isinstance(c_dim, int) and _is_int(c_dim) and 0 <= c_dim <= 1_000_000
    _require(fits, "c_dim", c_dim, "a whole number from 0 to 1,000,000")
    fits = isinstance(layers, int) and _is_int(layers) and least <= layers <= MAX_MAPPING_LAYERS
    _require(fits, "mapping_layers", layers, f"from {least} to {MAX_MAPPING_LAYERS}")
    fits = isinstance(multiplier, int | float) and _is_number(multiplier) and multiplier > 0
    _require(fits, "mapping_lr_multiplier", multiplier, "above 0")


def _require_convolutions(architecture: object, clamp: object, taps: object) -> None:
    choices = get_args(Architecture)
    _require(architecture in choices, "architecture", architecture, f"one of {', '.join(choices)}")
    fits = clamp is None or (isinstance(clamp, int | float) and _is_number(clamp) and clamp > 0)
    _require(fits, "conv_clamp", clamp, "above 0, or null")
    fits = isinstance(taps, tuple) and 2 <= len(taps) <= MAX_TAPS and all(map(_is_number, taps))
    fits = fits and isinstance(taps, tuple) and sum(taps) != 0
    _require(fits, "resample_filter", taps, f"2 to {MAX_TAPS} numbers whose sum is not 0")


def _to_json(config: StyleGAN2Config | StyleGAN2DiscriminatorConfig) -> str:
    return json.dumps(dataclasses.asdict(config))


def _read_json(cls: type[Any], text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise LmexpError(
            f"{cls.__name__}: it is no JSON ({fault}); convert the checkpoint again"
        ) from fault
    known = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(values, dict) or not set(values) <= known:
        extra = sorted(set(values) - known) if isinstance(values, dict) else values
        raise LmexpError(f"{cls.__name__}: unknown keys {extra}; convert the checkpoint again")
    missing = sorted({"resolution", "channels"} - set(values))
    if missing:
        raise LmexpError(
            f"{cls.__name__}: {', '.join(missing)} missing; convert the checkpoint again"
        )
    if isinstance(values["channels"], dict):
        values["channels"] = {
            int(key) if key.isascii() and key.isdecimal() and len(key) < 9 else key: count
            for key, count in values["channels"].items()
        }
    if isinstance(values.get("resample_filter"), list):
        values["resample_filter"] = tuple(values["resample_filter"])
    return values
