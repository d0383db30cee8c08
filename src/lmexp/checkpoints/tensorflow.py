"""StyleGAN2's and StyleGAN2-ADA's TensorFlow pickles: a tuple of three `dnnlib.tflib` networks.

A network holds its variables as numpy arrays under scoped names, dense weights as [in, out] and
convolutions as [height, width, in, out]. The transposed convolutions' kernels run backwards
there, and style biases lack the 1 that is added when they are used.

Source of the names: `training/networks_stylegan2.py` of stylegan2 and `legacy.py` of
stylegan2-ada-pytorch.
"""

from __future__ import annotations

import math
import re

from lmexp.checkpoints.networks import (
    Network,
    Weight,
    infer_discriminator,
    infer_generator,
    without_ones,
)
from lmexp.checkpoints.refusal import RefusedError, show
from lmexp.checkpoints.values import Record, StoredTensor, require_record, require_tensor

KIND = "stylegan2-tensorflow"
MAX_VARIABLES = 2000

_LEAST_VERSION = 4
_HARMLESS = {
    # Sizes, which the tensors tell.
    "latent_size",
    "label_size",
    "dlatent_size",
    "resolution",
    "num_channels",
    "mapping_layers",
    "mapping_fmaps",
    "label_fmaps",
    "fmap_base",
    "fmap_decay",
    "fmap_min",
    "fmap_max",
    "architecture",
    "mbstd_num_features",
    "use_noise",
    # What training did, how it was computed, or what the caller chooses.
    "w_avg_beta",
    "dlatent_avg_beta",
    "num_fp16_res",
    "truncation_psi",
    "truncation_cutoff",
    "truncation_psi_val",
    "truncation_cutoff_val",
    "style_mixing_prob",
    "structure",
    "freeze_layers",
    "fused_modconv",
    "randomize_noise",
    "mapping_func",
    "synthesis_func",
}
_READ = {
    "mapping_lrmul",
    "conv_clamp",
    "resample_kernel",
    "mbstd_group_size",
}
_FIXED: dict[str, object] = {
    "mapping_nonlinearity": "lrelu",
    "nonlinearity": "lrelu",
    "normalize_latents": True,
    "dtype": "float32",
}
_STYLED = {
    "4x4/Conv": "4.conv1",
    "Conv0_up": "conv0",
    "Conv1": "conv1",
    "ToRGB": "to_rgb",
}


def matches(value: object) -> bool:
    """Whether the value of a pickle is such a file's."""
    if isinstance(value, Record):
        return value.kind == "Network"
    return isinstance(value, tuple) and any(
        isinstance(part, Record) and part.kind == "Network" for part in value
    )


def convert(value: object) -> Network:
    """Find Gs, and D: the last and the second of (G, D, Gs).

    Raises:
        RefusedError: it is another architecture.
    """
    if isinstance(value, Record):
        return _convert_generator(value)
    if not isinstance(value, tuple) or len(value) != 3:
        raise RefusedError("it does not hold the three networks (G, D, Gs)")
    network = _convert_generator(require_record(value[2], "Gs"))
    try:
        _add_discriminator(network, require_record(value[1], "D"))
    except RefusedError as refusal:
        network.notes.append(f"its discriminator can't be used: {refusal.reason}")
    return network


def _read_attributes(record: Record) -> dict[str, object]:
    attributes = record.attributes()
    version = attributes.get("version")
    if record.kind != "Network" or type(version) is not int or version < _LEAST_VERSION:
        raise RefusedError(
            "it is of StyleGAN (1), which is not supported", "give a StyleGAN2 checkpoint"
        )
    return attributes


def _read_options(attributes: dict[str, object]) -> dict[str, object]:
    options = require_record(attributes.get("static_kwargs"), "static_kwargs").fields()
    for name, value in options.items():
        if name in _FIXED:
            wanted = _FIXED[name]
            if type(value) is not type(wanted) or value != wanted:
                raise RefusedError(f"its {name} is not {wanted}, which is not supported")
        elif name not in _READ and name not in _HARMLESS:
            raise RefusedError(f"it was made with {show(name)}, which is not supported")
    return options


def _collect(record: Record, prefix: str, into: dict[str, StoredTensor], depth: int = 0) -> None:
    attributes = _read_attributes(record)
    variables = attributes.get("variables")
    if depth > 3 or not isinstance(variables, list) or len(variables) > MAX_VARIABLES:
        raise RefusedError("its networks are nested as no StyleGAN2's are")
    for variable in variables:
        if not isinstance(variable, tuple) or len(variable) != 2:
            raise RefusedError("a variable of it has no name")
        name, value = variable
        if not isinstance(name, str) or len(name) > 200 or len(into) > MAX_VARIABLES:
            raise RefusedError("a variable of it has no name")
        into[prefix + name] = require_tensor(value, prefix + name)
    components = require_record(attributes.get("components", Record()), "components").fields()
    if len(components) > 8:
        raise RefusedError("its networks are nested as no StyleGAN2's are")
    for name, component in components.items():
        if len(name) > 100:
            raise RefusedError("its networks are named as no StyleGAN2's are")
        _collect(require_record(component, name), f"{prefix}{name}/", into, depth + 1)


def _dense(stored: StoredTensor) -> Weight:
    return Weight(stored, axes=(1, 0))


def _convolution(stored: StoredTensor, flip: bool = False) -> Weight:
    return Weight(stored, axes=(3, 2, 0, 1), flip=flip)


def _convert_generator(record: Record) -> Network:
    attributes = _read_attributes(record)
    options = _read_options(attributes)
    variables: dict[str, StoredTensor] = {}
    _collect(record, "", variables)
    if any(name.startswith("mapping/LabelConcat/") for name in variables):
        raise RefusedError("it is a conditional StyleGAN2 of TensorFlow, which is not supported")
    _require_full_size(variables)
    sides = [_side(name) for name in variables if re.match(r"synthesis/\d{1,4}x", name)]
    resolution = max(sides, default=4)
    weights: dict[str, Weight] = {}
    for name, stored in variables.items():
        # Progressive growing keeps an image layer for each size; only the last one is in use.
        if name.endswith("/lod") or name == "lod" or re.match(r"synthesis/ToRGB_lod[1-9]", name):
            continue
        canonical, weight = _convert_variable(name, stored, resolution)
        weights[canonical] = weight
    config = infer_generator(
        weights,
        lr_multiplier=_number(options, "mapping_lrmul", 0.01) or 0.01,
        conv_clamp=_number(options, "conv_clamp", None),
        resample_filter=_taps(options),
    )
    return Network(KIND, config, weights)


def _require_full_size(variables: dict[str, StoredTensor]) -> None:
    for name in ("lod", "synthesis/lod"):
        lod = variables.get(name)
        if lod is not None and (lod.count != 1 or float(lod.read().reshape(())) != 0):
            raise RefusedError("it was saved while it was growing", "give its final checkpoint")


def _convert_variable(name: str, stored: StoredTensor, resolution: int) -> tuple[str, Weight]:
    if name == "dlatent_avg":
        return "mapping.w_avg", Weight(stored)
    if match := re.fullmatch(r"mapping/LabelEmbed/(weight|bias)", name):
        kind = match[1]
        return f"mapping.embed.{kind}", _dense(stored) if kind == "weight" else Weight(stored)
    if match := re.fullmatch(r"mapping/Dense(\d{1,3})/(weight|bias)", name):
        index, kind = int(match[1]), match[2]
        canonical = f"mapping.layers.{index}.{kind}"
        return canonical, _dense(stored) if kind == "weight" else Weight(stored)
    if name == "synthesis/4x4/Const/const":
        return "synthesis.const", without_ones(stored, 3)
    if match := re.fullmatch(r"synthesis/noise(\d{1,2})", name):
        index = int(match[1])
        layer = "conv1" if index % 2 == 0 else "conv0"
        return f"synthesis.{2 ** ((index + 5) // 2)}.{layer}.noise", without_ones(stored, 2)
    if match := re.fullmatch(r"synthesis/ToRGB_lod0/(\w+)", name):
        return _convert_styled(f"synthesis.{resolution}.to_rgb", match[1], name, stored)
    if match := re.fullmatch(r"synthesis/4x4/Conv/(\w+)", name):
        return _convert_styled("synthesis.4.conv1", match[1], name, stored)
    if match := re.fullmatch(r"synthesis/\d{1,4}x\d{1,4}/(Conv0_up|Conv1|ToRGB)/(\w+)", name):
        layer = f"synthesis.{_side(name)}.{_STYLED[match[1]]}"
        return _convert_styled(layer, match[2], name, stored)
    if re.fullmatch(r"synthesis/\d{1,4}x\d{1,4}/Skip/weight", name):
        return f"synthesis.{_side(name)}.skip.weight", _convolution(stored, flip=True)
    raise RefusedError(f"it has {show(name)}, so it is no StyleGAN2 that is known")


def _convert_styled(
    layer: str, variable: str, name: str, stored: StoredTensor
) -> tuple[str, Weight]:
    if variable == "weight":
        return f"{layer}.weight", _convolution(stored, flip=layer.endswith(".conv0"))
    if variable == "mod_weight":
        return f"{layer}.affine.weight", _dense(stored)
    if variable == "mod_bias":
        return f"{layer}.affine.bias", Weight(stored, shift=1.0)
    if variable in ("bias", "noise_strength"):
        return f"{layer}.{variable}", Weight(stored)
    raise RefusedError(f"it has {show(name)}, so it is no StyleGAN2 that is known")


def _side(name: str) -> int:
    match = re.search(r"(?:^|/)(\d{1,4})x\1/", name)
    if not match:
        raise RefusedError(f"it has {show(name)}, so it is no StyleGAN2 that is known")
    return int(match[1])


def _add_discriminator(network: Network, record: Record) -> None:
    attributes = _read_attributes(record)
    options = _read_options(attributes)
    variables: dict[str, StoredTensor] = {}
    _collect(record, "", variables)
    resolution = network.generator.resolution
    weights: dict[str, Weight] = {}
    for name, stored in variables.items():
        if name == "lod" or re.match(r"FromRGB_lod[1-9]", name):
            continue
        canonical, kind = _discriminator_name(name, resolution)
        weight = Weight(stored)
        if kind == "weight":
            weight = _convolution(stored) if len(stored.shape) == 4 else _dense(stored)
        weights[f"discriminator.{canonical}.{kind}"] = weight
    # StyleGAN2's build function has a group of four by default, StyleGAN2-ADA's the whole batch.
    ours = attributes.get("build_func_name") in ("D_stylegan2", "D_stylegan")
    group = _number(options, "mbstd_group_size", 4.0 if ours else None)
    network.discriminator = infer_discriminator(
        weights,
        lr_multiplier=_number(options, "mapping_lrmul", 0.1) or 0.1,
        conv_clamp=_number(options, "conv_clamp", None),
        resample_filter=_taps(options),
        mbstd_group_size=None if group is None else int(group),
    )
    network.weights.update(weights)


def _discriminator_name(name: str, resolution: int) -> tuple[str, str]:
    if match := re.fullmatch(r"FromRGB_lod0/(weight|bias)", name):
        return f"{resolution}.from_rgb", match[1]
    if match := re.fullmatch(r"LabelEmbed/(weight|bias)", name):
        return "mapping.embed", match[1]
    if match := re.fullmatch(r"Mapping(\d{1,3})/(weight|bias)", name):
        return f"mapping.layers.{int(match[1])}", match[2]
    if match := re.fullmatch(r"Output/(weight|bias)", name):
        return "4.output", match[1]
    layers = {
        "FromRGB": "from_rgb",
        "Conv0": "conv0",
        "Conv1_down": "conv1",
        "Skip": "skip",
        "Conv": "conv",
        "Dense0": "dense",
    }
    match = re.fullmatch(r"\d{1,4}x\d{1,4}/(\w+)/(weight|bias)", name)
    if not match or match[1] not in layers:
        raise RefusedError(f"it has {show(name)}, so it is no StyleGAN2 that is known")
    return f"{_side(name)}.{layers[match[1]]}", match[2]


def _number(options: dict[str, object], name: str, default: float | None) -> float | None:
    value = options.get(name, default)
    if isinstance(value, StoredTensor) and value.shape == ():
        value = float(value.read())
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise RefusedError(f"its {name} is no number")
    return float(value)


def _taps(options: dict[str, object]) -> tuple[float, ...]:
    kernel = options.get("resample_kernel", [1, 3, 3, 1])
    if not isinstance(kernel, list | tuple) or not 1 <= len(kernel) <= 32:
        raise RefusedError("its resample_kernel is no list of numbers")
    taps = [
        float(tap)
        for tap in kernel
        if isinstance(tap, int | float) and not isinstance(tap, bool) and abs(tap) < 1e9
    ]
    if len(taps) != len(kernel) or not math.fsum(taps):
        raise RefusedError("its resample_kernel is no list of numbers")
    return tuple(taps)
