"""Random weights in the place of third parties' files: the same shapes, so the same time.

`random_weights` opens the door through which every network of lmexp gets its tensors,
`lmexp.weights.store.load`, and answers itself. Everything behind it is what really runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from lmexp.weights import store
from lmexp.weights.store import StoredWeights

MOMENTS = Path(__file__).with_name("benchmark_moments.json")
"""Of the weights that come in packages: per tensor its shape, mean and standard deviation."""

Moments = dict[str, tuple[list[int], float, float]]

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
"""Widths of its convolutions, 0 for a pooling (Simonyan & Zisserman, arXiv 1409.1556, D)."""

FAN_GAIN = 0.3
"""Of the FAN's convolutions: blocks add up, and dozens of them must not overflow bfloat16."""


def vgg16() -> Moments:
    """torchvision's VGG16 without its classifier; convolutions keep the second moment."""
    moments: Moments = {}
    index, before = 0, 3
    for width in VGG16:
        if width:
            deviation = (2 / (9 * before)) ** 0.5
            moments[f"features.{index}.weight"] = ([width, before, 3, 3], 0.0, deviation)
            moments[f"features.{index}.bias"] = ([width], 0.0, 0.05)
            before = width
        index += 2 if width else 1  # a ReLU follows each convolution
    return moments


def fan(stacks: int) -> Moments:
    """A state dict of face-alignment's FAN (Bulat & Tzimiropoulos, arXiv 1703.07332)."""
    moments: Moments = {}

    def convolve(name: str, out: int, into: int, kernel: int, bias: bool) -> None:
        deviation = FAN_GAIN / (into * kernel**2) ** 0.5
        moments[f"{name}.weight"] = ([out, into, kernel, kernel], 0.0, deviation)
        if bias:
            moments[f"{name}.bias"] = ([out], 0.0, 0.05)

    def normalise(name: str, width: int) -> None:
        for part, mean in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0)):
            moments[f"{name}.{part}"] = ([width], mean, 0.05)
        moments[f"{name}.running_var"] = ([width], 1.0, 0.0)

    def block(name: str, into: int, out: int) -> None:
        widths = (into, out // 2, out // 4, out // 4)
        for index in (1, 2, 3):
            normalise(f"{name}.bn{index}", widths[index - 1])
            convolve(f"{name}.conv{index}", widths[index], widths[index - 1], 3, bias=False)
        if into != out:
            normalise(f"{name}.downsample.0", into)
            convolve(f"{name}.downsample.2", out, into, 1, bias=False)

    convolve("conv1", 64, 3, 7, bias=True)
    normalise("bn1", 64)
    for index, (into, out) in enumerate(((64, 128), (128, 128), (128, 256)), start=2):
        block(f"conv{index}", into, out)
    for stack in range(stacks):
        for level in (4, 3, 2, 1):
            for part in ("b1", "b2", "b3", *(("b2_plus",) if level == 1 else ())):
                block(f"m{stack}.{part}_{level}", 256, 256)
        block(f"top_m_{stack}", 256, 256)
        convolve(f"conv_last{stack}", 256, 256, 1, bias=True)
        normalise(f"bn_end{stack}", 256)
        convolve(f"l{stack}", 68, 256, 1, bias=True)
        if stack < stacks - 1:
            convolve(f"bl{stack}", 256, 256, 1, bias=True)
            convolve(f"al{stack}", 256, 68, 1, bias=True)
    return moments


def draw(moments: Moments) -> dict[str, Tensor]:
    """Normal tensors of these moments; each depends on its own name alone."""
    tensors = {}
    for name, (shape, mean, deviation) in moments.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        values = np.random.RandomState(seed).standard_normal(shape) * deviation + mean
        # Heads and scales are not negative in the originals, and roots are taken of some.
        if name.endswith((".model.1.weight", "scaling_layer.scale")):
            values = np.abs(values)
        tensors[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return tensors


@contextmanager
def random_weights(stacks: int = 4) -> Iterator[list[str]]:
    """Within it, third parties' weights are random; those of this package are its own.

    Args:
        stacks: of the FAN; the published one has four.

    Yields:
        The names that were answered so, as they are asked for.
    """
    packed: dict[str, Moments] = json.loads(MOMENTS.read_text())
    packed |= {"torchvision_vgg16": vgg16(), "face_alignment_2dfan4": fan(stacks)}
    asked: list[str] = []
    real = store.load

    def load(name: str, *args: Any, **keywords: Any) -> StoredWeights:
        if name not in packed:
            return real(name, *args, **keywords)
        asked.append(name)
        return StoredWeights(draw(packed[name]), f"random {name}", Path(f"random:{name}"))

    with mock.patch.object(store, "load", load):
        yield asked
