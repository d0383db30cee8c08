"""From a checkpoint's tensors under canonical names to a StyleGAN2's config and weights.

The converters only rename and turn; what the names and shapes make of a network is found here,
and what does not add up to exactly one is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from lmexp.checkpoints.refusal import RefusedError, show
from lmexp.checkpoints.values import StoredTensor
from lmexp.errors import LmexpError
from lmexp.generators.stylegan2_config import (
    MAX_TAPS,
    Architecture,
    StyleGAN2Config,
    StyleGAN2DiscriminatorConfig,
    tensor_shapes,
)

W_AVG_SAMPLES = 10_000

_USUAL_TAPS = (1.0, 3.0, 3.0, 1.0)


@dataclass(frozen=True)
class Weight:
    """A stored tensor, and what brings it to the canonical layout.

    Attributes:
        stored: as it is in the file.
        axes: the order of its axes in the canonical layout; None: as they are.
        flip: whether height and width run backwards.
        shift: what is added to every element.
        reshaped: its shape in the end, None if only the axes change it.
    """

    stored: StoredTensor
    axes: tuple[int, ...] | None = None
    flip: bool = False
    shift: float = 0.0
    reshaped: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the canonical layout."""
        if self.reshaped is not None:
            return self.reshaped
        if self.axes is None:
            return self.stored.shape
        if len(self.axes) != len(self.stored.shape):
            raise RefusedError(f"a weight has the shape {list(self.stored.shape)}")
        return tuple(self.stored.shape[axis] for axis in self.axes)

    def read(self) -> Tensor:
        """The canonical tensor, float32 and contiguous."""
        tensor = self.stored.read()
        if self.axes is not None:
            tensor = tensor.permute(self.axes)
        if self.flip:
            tensor = tensor.flip(-2, -1)
        tensor = tensor.reshape(self.shape)
        return (tensor + self.shift if self.shift else tensor).contiguous()


def without_ones(stored: StoredTensor, dimensions: int) -> Weight:
    """`stored` with its leading axes dropped, down to so many; they have to be of size 1."""
    leading = len(stored.shape) - dimensions
    if leading < 0 or any(size != 1 for size in stored.shape[:leading]):
        raise RefusedError(f"a weight has the shape {list(stored.shape)}")
    return Weight(stored, reshaped=stored.shape[leading:])


@dataclass
class Network:
    """What a converter found.

    Attributes:
        kind: the program that writes such files.
        generator: its config.
        weights: by canonical name, the discriminator's too.
        discriminator: its config, None if the file has none that can be used.
        notes: what the user should know.
    """

    kind: str
    generator: StyleGAN2Config
    weights: dict[str, Weight]
    discriminator: StyleGAN2DiscriminatorConfig | None = None
    notes: list[str] = field(default_factory=list)

    def read(self, file_bytes: int) -> dict[str, Tensor]:
        """All tensors, by canonical name, checked against the configs and for finite values.

        Maps of constant noise and `w_avg`, which some files lack, are made, and `notes` says so.

        Args:
            file_bytes: size of the file; weights that would take much more are refused.

        Raises:
            RefusedError: names, shapes or values are not those of such a network.
        """
        expected = tensor_shapes(self.generator)
        if self.discriminator is not None:
            expected |= tensor_shapes(self.discriminator)
        missing = [name for name in expected if name not in self.weights]
        noise = [name for name in missing if name.endswith(".noise")]
        others = [name for name in missing if name not in {*noise, "mapping.w_avg"}]
        if others:
            raise RefusedError(f"it lacks {show(others[0])}, so it is no StyleGAN2 that is known")
        extra = next((name for name in self.weights if name not in expected), None)
        if extra is not None:
            raise RefusedError(f"it has {show(extra)}, so it is no StyleGAN2 that is known")
        for name, weight in self.weights.items():
            if weight.shape != expected[name] or weight.stored.count != math.prod(expected[name]):
                raise RefusedError(
                    f"{show(name)} has the shape {list(weight.shape)}, but the other "
                    f"tensors ask for {list(expected[name])}"
                )
        # Names may share a storage; together they must not become much larger than the file.
        if 4 * sum(map(math.prod, expected.values())) > 4 * file_bytes + 2**24:
            raise RefusedError("its tensors claim more than the file holds")
        tensors = {name: weight.read() for name, weight in self.weights.items()}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise RefusedError(f"{show(name)} has values that are not finite", "fetch it again")
        if noise:
            generator = torch.Generator().manual_seed(0)
            for name in noise:
                tensors[name] = torch.randn(expected[name], generator=generator)
            self.notes.append("it has no maps of constant noise; seeded ones were drawn")
        if "mapping.w_avg" in missing:
            tensors["mapping.w_avg"] = average_w(self.generator, tensors)
            self.notes.append(
                f"it has no w_avg; the mean of {W_AVG_SAMPLES:,} seeded samples was taken"
            )
        return {name: tensors[name] for name in expected}


def average_w(config: StyleGAN2Config, tensors: Mapping[str, Tensor]) -> Tensor:
    """Mean of w over seeded normal z, [w_dim], for files that do not store it.

    Raises:
        RefusedError: the generator is conditional, so that there is no such mean.
    """
    if config.c_dim:
        raise RefusedError("it is conditional and has no w_avg")
    z = torch.randn(
        W_AVG_SAMPLES, config.z_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
    for index in range(config.mapping_layers):
        weight = tensors[f"mapping.layers.{index}.weight"]
        gain = config.mapping_lr_multiplier / math.sqrt(weight.shape[1])
        bias = tensors[f"mapping.layers.{index}.bias"] * config.mapping_lr_multiplier
        w = F.leaky_relu(F.linear(w, weight * gain, bias), 0.2) * math.sqrt(2)
    return w.mean(0)


def find_sides(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> list[int]:
    """Sides, px, for which `shapes` has the name that `pattern` makes of them.

    Raises:
        RefusedError: there are none, or one between them is missing.
    """
    sides = [2**power for power in range(2, 13) if pattern.format(2**power) in shapes]
    if not sides:
        raise RefusedError("it has none of a StyleGAN2's layers")
    if sides != [2**power for power in range(2, 2 + len(sides))]:
        raise RefusedError("it lacks the layers of some resolutions", "fetch it again")
    return sides


def infer_generator(
    weights: Mapping[str, Weight],
    *,
    lr_multiplier: float,
    conv_clamp: float | None,
    resample_filter: tuple[float, ...],
) -> StyleGAN2Config:
    """The config that canonical names and shapes tell, with what they don't tell.

    Raises:
        RefusedError: names are missing, or sizes are impossible.
    """
    shapes = _Shapes({name: weight.shape for name, weight in weights.items()})
    sides = find_sides(shapes, "synthesis.{}.conv1.weight")
    layers = _count_layers(shapes, "mapping")
    embedded = shapes.embedding("mapping")
    first = shapes["mapping.layers.0.weight"]
    w_dim = shapes[f"mapping.layers.{layers - 1}.weight"][0]
    architecture: Architecture = "skip"
    if any(f"synthesis.{side}.skip.weight" in shapes for side in sides):
        architecture = "resnet"
    elif "synthesis.4.to_rgb.weight" not in shapes:
        architecture = "orig"
    try:
        return StyleGAN2Config(
            z_dim=first[1] - embedded[0],
            c_dim=embedded[1],
            w_dim=w_dim,
            resolution=sides[-1],
            channels={side: shapes[f"synthesis.{side}.conv1.weight"][0] for side in sides},
            mapping_layers=layers,
            mapping_lr_multiplier=lr_multiplier,
            mapping_features=_unless(w_dim, first[0] if layers > 1 else w_dim),
            embed_features=_unless(w_dim, embedded[0] or w_dim),
            architecture=architecture,
            conv_clamp=conv_clamp,
            resample_filter=resample_filter,
            img_channels=shapes[f"synthesis.{sides[-1]}.to_rgb.weight"][0],
            use_noise="synthesis.4.conv1.noise_strength" in shapes,
        )
    except LmexpError as fault:
        raise _refuse(fault) from fault


def infer_discriminator(
    weights: Mapping[str, Weight],
    *,
    lr_multiplier: float,
    conv_clamp: float | None,
    resample_filter: tuple[float, ...],
    mbstd_group_size: int | None,
) -> StyleGAN2DiscriminatorConfig:
    """The config that canonical names and shapes tell, with what they don't tell.

    Raises:
        RefusedError: names are missing, or sizes are impossible.
    """
    prefix = "discriminator."
    shapes = _Shapes({name: weight.shape for name, weight in weights.items()})
    last = shapes["discriminator.4.dense.weight"]
    blocks = find_sides(
        {**shapes, "discriminator.4.conv0.weight": ()}, "discriminator.{}.conv0.weight"
    )
    channels = {side: shapes[f"{prefix}{side}.conv0.weight"][0] for side in blocks[1:]}
    channels[4] = last[0]
    architecture: Architecture = "resnet"
    if f"{prefix}4.from_rgb.weight" in shapes and len(blocks) > 1:
        architecture = "skip"
    elif len(blocks) > 1 and f"{prefix}8.skip.weight" not in shapes:
        architecture = "orig"
    layers, c_dim, label, embedded, inner = 8, 0, None, None, None
    embedding = shapes.embedding(f"{prefix}mapping")
    if embedding[1]:
        layers = _count_layers(shapes, f"{prefix}mapping", least=0)
        c_dim, label = embedding[1], shapes[f"{prefix}4.output.weight"][0]
        embedded = _unless(label, embedding[0])
        inner = shapes[f"{prefix}mapping.layers.0.weight"][0] if layers > 1 else label
        inner, label = _unless(label, inner), _unless(channels[4], label)
    try:
        return StyleGAN2DiscriminatorConfig(
            c_dim=c_dim,
            resolution=blocks[-1],
            channels=dict(sorted(channels.items())),
            architecture=architecture,
            conv_clamp=conv_clamp,
            resample_filter=resample_filter,
            img_channels=shapes[f"{prefix}{blocks[-1]}.from_rgb.weight"][1],
            mbstd_group_size=mbstd_group_size,
            mbstd_channels=shapes[f"{prefix}4.conv.weight"][1] - channels[4],
            cmap_dim=label,
            mapping_layers=layers,
            mapping_lr_multiplier=lr_multiplier,
            mapping_features=inner,
            embed_features=embedded,
        )
    except LmexpError as fault:
        raise _refuse(fault) from fault


def _refuse(fault: LmexpError) -> RefusedError:
    reason, _, way_out = str(fault).rpartition("; ")
    return RefusedError(reason, way_out)


class _Shapes(dict[str, tuple[int, ...]]):
    """Shapes by name; a weight has at least two dimensions."""

    def embedding(self, mapping: str) -> tuple[int, ...]:
        """Size of the embedded label and number of classes, zeros if there is no such layer."""
        name = f"{mapping}.embed.weight"
        return self[name] if name in self else (0, 0)  # noqa: SIM401 get would not check it

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise RefusedError(f"it lacks {name}, so it is no StyleGAN2 that is known")

    def __getitem__(self, name: str) -> tuple[int, ...]:
        shape = super().__getitem__(name)
        if name.endswith(".weight") and len(shape) < 2:
            raise RefusedError(f"{name} has the shape {list(shape)}")
        return shape


def _count_layers(shapes: Mapping[str, tuple[int, ...]], name: str, least: int = 1) -> int:
    count = 0
    while f"{name}.layers.{count}.weight" in shapes:
        count += 1
    if count < least:
        raise RefusedError("it has no mapping network")
    return count


def _unless(default: int, value: int) -> int | None:
    return None if value == default else value


def read_taps(filters: Iterable[StoredTensor]) -> tuple[float, ...]:
    """Taps of the separable low-pass filter that all of `filters` are products of.

    Args:
        filters: [k] or [k, k], each with any gain.

    Raises:
        RefusedError: they differ, or are no products of equal one-dimensional filters.
    """
    found: Tensor | None = None
    for stored in filters:
        if not 1 <= len(stored.shape) <= 2 or not 1 <= stored.count <= MAX_TAPS**2:
            raise RefusedError(f"a filter has the shape {list(stored.shape)}")
        values = stored.read().double()
        taps = values if values.ndim == 1 else values.sum(0)
        taps = taps / taps.sum()
        square = values / values.sum()
        if not torch.isfinite(taps).all() or not (
            values.ndim == 1 or _are_close(taps.outer(taps), square)
        ):
            raise RefusedError("a filter is not separable")
        if found is not None and not _are_close(found, taps):
            raise RefusedError("its layers have different filters")
        found = taps
    if found is None or _are_close(found, torch.tensor(_USUAL_TAPS, dtype=torch.float64) / 8):
        return _USUAL_TAPS
    return tuple(found.tolist())


def _are_close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=1e-6)
