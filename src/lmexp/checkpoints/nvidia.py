"""StyleGAN2-ADA's PyTorch pickles: modules as `torch_utils.persistence` writes them.

What is read of a module is its tensors and a few plain attributes; the source text that comes
with every one of them is left alone. Names as in `training/networks.py` of stylegan2-ada-pytorch
and `training/networks_stylegan2.py` of stylegan3, whose weights are laid out canonically.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lmexp.checkpoints.networks import (
    Network,
    Weight,
    infer_discriminator,
    infer_generator,
    read_taps,
)
from lmexp.checkpoints.refusal import RefusedError, show
from lmexp.checkpoints.values import Record, StoredTensor, require_record, require_tensor

KIND = "stylegan2-ada-pytorch"
MAX_MODULES = 1000
"""Modules that are visited; a 1024 px generator has 90. One may occur below several others."""

_GENERATOR_NAMES = (
    (r"mapping\.(embed\.(?:weight|bias)|w_avg)", r"mapping.\1"),
    (r"mapping\.fc(\d{1,3})\.(weight|bias)", r"mapping.layers.\1.\2"),
    (r"synthesis\.b4\.const", r"synthesis.const"),
    (r"synthesis\.b(\d{1,4})\.(conv[01])\.noise_const", r"synthesis.\1.\2.noise"),
    (
        r"synthesis\.b(\d{1,4})\.(conv[01])\.(weight|bias|affine\.(?:weight|bias)|noise_strength)",
        r"synthesis.\1.\2.\3",
    ),
    (
        r"synthesis\.b(\d{1,4})\.torgb\.(weight|bias|affine\.(?:weight|bias))",
        r"synthesis.\1.to_rgb.\2",
    ),
    (r"synthesis\.b(\d{1,4})\.skip\.weight", r"synthesis.\1.skip.weight"),
)
_DISCRIMINATOR_NAMES = (
    (r"mapping\.embed\.(weight|bias)", r"discriminator.mapping.embed.\1"),
    (r"mapping\.fc(\d{1,3})\.(weight|bias)", r"discriminator.mapping.layers.\1.\2"),
    (r"b(\d{1,4})\.fromrgb\.(weight|bias)", r"discriminator.\1.from_rgb.\2"),
    (r"b(\d{1,4})\.(conv[01]?|skip)\.(weight|bias)", r"discriminator.\1.\2.\3"),
    (r"b4\.fc\.(weight|bias)", r"discriminator.4.dense.\1"),
    (r"b4\.out\.(weight|bias)", r"discriminator.4.output.\1"),
)


@dataclass
class _Module:
    """A module and all below it.

    Attributes:
        tensors: by dotted name.
        attributes: every module's own, by its dotted name.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    attributes: dict[str, dict[str, object]] = field(default_factory=dict)


def matches(value: object) -> bool:
    """Whether the value of a pickle is such a file's."""
    if not isinstance(value, Record):
        return False
    if value.kind.startswith("persistent "):
        return True
    fields = value.fields()
    return any(_is_module(fields.get(name)) for name in ("G_ema", "G"))


def convert(value: Record) -> Network:
    """Find G_ema (or G), and D if there is one.

    Raises:
        RefusedError: it is another architecture.
    """
    if value.kind.startswith("persistent "):
        return _convert_generator(value)
    fields = value.fields()
    has_average = _is_module(fields.get("G_ema"))
    network = _convert_generator(require_record(fields["G_ema" if has_average else "G"], "G"))
    if not has_average:
        network.notes.append("it has no G_ema; G was taken, whose weights are not averaged")
    if _is_module(fields.get("D")):
        try:
            _add_discriminator(network, require_record(fields["D"], "D"))
        except RefusedError as refusal:
            network.notes.append(f"its discriminator can't be used: {refusal.reason}")
    return network


def _is_module(value: object) -> bool:
    return isinstance(value, Record) and value.kind.startswith("persistent ")


def _collect(
    module: Record, name: str = "", into: _Module | None = None, depth: int = 0
) -> _Module:
    found = _Module() if into is None else into
    attributes = module.attributes()
    if depth > 8 or len(found.attributes) >= MAX_MODULES:
        raise RefusedError("its modules are nested as no network's are")
    found.attributes[name] = attributes
    dot = f"{name}." if name else ""
    for group in ("_parameters", "_buffers"):
        for key, tensor in require_record(attributes.get(group), f"{dot}{group}").fields().items():
            if tensor is not None:
                found.tensors[dot + key] = require_tensor(tensor, dot + key)
    children = require_record(attributes.get("_modules"), f"{dot}_modules")
    for key, child in children.fields().items():
        if child is not None:
            if len(key) > 100:
                raise RefusedError("its modules are named as no network's are")
            _collect(require_record(child, dot + key), dot + key, found, depth + 1)
    return found


def _rename(
    module: _Module, names: tuple[tuple[str, str], ...]
) -> tuple[dict[str, Weight], tuple[float, ...]]:
    weights: dict[str, Weight] = {}
    filters: list[StoredTensor] = []
    for name, stored in module.tensors.items():
        if name.rpartition(".")[2] == "resample_filter":
            filters.append(stored)
            continue
        for pattern, canonical in names:
            match = re.fullmatch(pattern, name)
            if match:
                weights[match.expand(canonical)] = Weight(stored)
                break
        else:
            raise RefusedError(f"it has {show(name)}, so it is no StyleGAN2 that is known")
    return weights, read_taps(filters)


def _convert_generator(record: Record) -> Network:
    module = _collect(record)
    if any(name.startswith("synthesis.input") for name in module.attributes):
        raise RefusedError("StyleGAN3 is not supported", "give a StyleGAN2 checkpoint")
    weights, taps = _rename(module, _GENERATOR_NAMES)
    _require_activation(module)
    config = infer_generator(
        weights,
        lr_multiplier=_number(module, r"mapping\.fc\d+", "bias_gain", 0.01) or 0.01,
        conv_clamp=_number(module, r"synthesis\.b\d+\.(conv\d|torgb)", "conv_clamp", None),
        resample_filter=taps,
    )
    return Network(KIND, config, weights)


def _add_discriminator(network: Network, record: Record) -> None:
    module = _collect(record)
    weights, taps = _rename(module, _DISCRIMINATOR_NAMES)
    _require_activation(module)
    group = _number(module, r"b4\.mbstd", "group_size", 4.0)
    network.discriminator = infer_discriminator(
        weights,
        lr_multiplier=_number(module, r"mapping\.fc\d+", "bias_gain", 0.01) or 0.01,
        conv_clamp=_number(module, r"b\d+\.(conv\d?|fromrgb)", "conv_clamp", None),
        resample_filter=taps,
        mbstd_group_size=None if group is None else int(group),
    )
    network.weights.update(weights)


def _number(module: _Module, pattern: str, key: str, default: float | None) -> float | None:
    """The number that all modules of such names hold under `key`."""
    found = [
        _plain_number(attributes.get(key), f"{name}.{key}")
        for name, attributes in module.attributes.items()
        if re.fullmatch(pattern, name)
    ]
    if not found:
        return default
    if any(value != found[0] for value in found):
        raise RefusedError(f"its layers differ in {key}")
    return found[0]


def _plain_number(value: object, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, StoredTensor) and value.shape == ():
        return float(value.read())
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RefusedError(f"{show(name)} is no number")
    try:
        return float(value)
    except OverflowError:
        raise RefusedError(f"{show(name)} is no number") from None


def _require_activation(module: _Module) -> None:
    linear = re.compile(r"(.+\.)?(affine|embed|skip|out)")
    for name, attributes in module.attributes.items():
        wanted = "linear" if linear.fullmatch(name) else "lrelu"
        if attributes.get("activation", wanted) != wanted:
            raise RefusedError(f"{show(name)} has the activation {show(attributes['activation'])}")
