"""rosinality's `.pt` files: state dictionaries of his StyleGAN2, saved by torch.

His weights are laid out as ours but for axes of size 1: modulated kernels are [1, out, in, k, k],
biases of image layers [1, 3, 1, 1], noise maps [1, 1, side, side]. The mean w is stored only by
his converter of TensorFlow files, maps of constant noise only by newer versions. Optimizer
states, the augmentation's probability and the command line's arguments are left alone.

Source of the names: `model.py` of rosinality/stylegan2-pytorch.
"""

from __future__ import annotations

import math
import re

from lmexp.checkpoints.networks import (
    Network,
    Weight,
    infer_discriminator,
    infer_generator,
    read_taps,
    without_ones,
)
from lmexp.checkpoints.refusal import RefusedError, show
from lmexp.checkpoints.values import Record, StoredTensor, require_tensor

KIND = "rosinality"
LR_MULTIPLIER = 0.01
"""His generator's default for the mapping network, which no file tells."""

GROUP_SIZE = 4
"""Images whose deviation his discriminator takes."""

_STYLED_PARTS = {
    "conv.weight": ("weight", 4),
    "conv.modulation.weight": ("affine.weight", 2),
    "conv.modulation.bias": ("affine.bias", 1),
    "activate.bias": ("bias", 1),
    "noise.weight": ("noise_strength", 0),
}
_IMAGE_PARTS = {
    "conv.weight": ("weight", 4),
    "conv.modulation.weight": ("affine.weight", 2),
    "conv.modulation.bias": ("affine.bias", 1),
}


def matches(value: object) -> bool:
    """Whether the value of a torch file is such a file's."""
    return isinstance(value, Record) and _find_generator(value) is not None


def convert(value: Record) -> Network:
    """Find `g_ema` (or `g`), and `d` if there is one.

    Raises:
        RefusedError: it is another architecture.
    """
    found = _find_generator(value)
    assert found is not None
    key, state = found
    fields = value.fields()
    average = fields.get("latent_avg")
    network = _convert_generator(state, average)
    if key == "g":
        network.notes.append("it has no g_ema; g was taken, whose weights are not averaged")
    discriminator = fields.get("d")
    if isinstance(discriminator, Record):
        try:
            _add_discriminator(network, discriminator)
        except RefusedError as refusal:
            network.notes.append(f"its discriminator can't be used: {refusal.reason}")
    return network


def _find_generator(value: Record) -> tuple[str, Record] | None:
    """Its key and state dictionary: `g_ema`, else `g`, else the whole file."""
    fields = value.fields()
    for key in ("g_ema", "g"):
        state = fields.get(key)
        if isinstance(state, Record) and "input.input" in state.fields():
            return key, state
    return ("", value) if "input.input" in fields else None


def _convert_generator(state: Record, average: object) -> Network:
    weights: dict[str, Weight] = {}
    filters: list[StoredTensor] = []
    for name, value in state.fields().items():
        if name == "latent_avg":
            average = value
            continue
        stored = require_tensor(value, name)
        if re.fullmatch(r".*\.(blur|upsample)\.kernel", name):
            filters.append(stored)
            continue
        canonical, weight = _convert_tensor(name, stored)
        weights[canonical] = weight
    if average is not None:
        weights["mapping.w_avg"] = without_ones(require_tensor(average, "latent_avg"), 1)
    config = infer_generator(
        weights, lr_multiplier=LR_MULTIPLIER, conv_clamp=None, resample_filter=read_taps(filters)
    )
    return Network(KIND, config, weights)


def _convert_tensor(name: str, stored: StoredTensor) -> tuple[str, Weight]:
    if name == "input.input":
        return "synthesis.const", without_ones(stored, 3)
    # style.0 normalises and has no weights.
    if match := re.fullmatch(r"style\.([1-9]\d{0,2})\.(weight|bias)", name):
        return f"mapping.layers.{int(match[1]) - 1}.{match[2]}", Weight(stored)
    if match := re.fullmatch(r"noises\.noise_(\d{1,2})", name):
        index = int(match[1])
        layer = "conv1" if index % 2 == 0 else "conv0"
        return f"synthesis.{2 ** ((index + 5) // 2)}.{layer}.noise", without_ones(stored, 2)
    if match := re.fullmatch(r"(conv1|convs\.(\d{1,2}))\.(.+)", name):
        index = -1 if match[2] is None else int(match[2])
        side, layer = (4, "conv1") if index < 0 else (2 ** (index // 2 + 3), f"conv{index % 2}")
        return _convert_part(f"synthesis.{side}.{layer}", _STYLED_PARTS, match[3], name, stored)
    if match := re.fullmatch(r"(to_rgb1|to_rgbs\.(\d{1,2}))\.(.+)", name):
        side = 4 if match[2] is None else 2 ** (int(match[2]) + 3)
        layer = f"synthesis.{side}.to_rgb"
        if match[3] == "bias":
            if stored.shape != (1, stored.count, 1, 1):
                raise RefusedError(f"{show(name)} has the shape {list(stored.shape)}")
            return f"{layer}.bias", Weight(stored, reshaped=(stored.count,))
        return _convert_part(layer, _IMAGE_PARTS, match[3], name, stored)
    raise RefusedError(f"it has {show(name)}, so it is no StyleGAN2 that is known")


def _convert_part(
    layer: str,
    parts: dict[str, tuple[str, int]],
    part: str,
    name: str,
    stored: StoredTensor,
) -> tuple[str, Weight]:
    if part not in parts:
        raise RefusedError(f"it has {show(name)}, so it is no StyleGAN2 that is known")
    canonical, dimensions = parts[part]
    return f"{layer}.{canonical}", without_ones(stored, dimensions)


def _add_discriminator(network: Network, state: Record) -> None:
    resolution = network.generator.resolution
    last = int(math.log2(resolution)) - 2
    weights: dict[str, Weight] = {}
    filters: list[StoredTensor] = []
    for name, value in state.fields().items():
        stored = require_tensor(value, name)
        if name.endswith(".kernel"):
            filters.append(stored)
            continue
        canonical = _discriminator_name(name, resolution, last)
        weights[f"discriminator.{canonical}"] = Weight(stored)
    network.discriminator = infer_discriminator(
        weights,
        # An unconditional discriminator has no mapping network.
        lr_multiplier=LR_MULTIPLIER,
        conv_clamp=None,
        resample_filter=read_taps(filters),
        mbstd_group_size=GROUP_SIZE,
    )
    network.weights.update(weights)


def _discriminator_name(name: str, resolution: int, last: int) -> str:
    if match := re.fullmatch(r"convs\.0\.(0\.weight|1\.bias)", name):
        return f"{resolution}.from_rgb.{match[1][2:]}"
    pattern = r"convs\.(\d{1,2})\.(conv1\.0|conv1\.1|conv2\.1|conv2\.2|skip\.1)\.(weight|bias)"
    if (match := re.fullmatch(pattern, name)) and 1 <= int(match[1]) <= last:
        layer = {"conv1": "conv0", "conv2": "conv1", "skip": "skip"}[match[2].split(".")[0]]
        return f"{resolution >> (int(match[1]) - 1)}.{layer}.{match[3]}"
    if match := re.fullmatch(r"final_conv\.(0\.weight|1\.bias)", name):
        return f"4.conv.{match[1][2:]}"
    if match := re.fullmatch(r"final_linear\.([01])\.(weight|bias)", name):
        return f"4.{'output' if match[1] == '1' else 'dense'}.{match[2]}"
    raise RefusedError(f"it has {show(name)}, so it is no StyleGAN2 that is known")
