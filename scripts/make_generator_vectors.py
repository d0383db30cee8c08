"""Store what OpenVINO computes for MobileStyleGAN, as reference for our own implementation.

Run in an environment of its own: lmexp does not depend on OpenVINO.

    python -m venv vectors && vectors/bin/pip install openvino numpy
    vectors/bin/python -m pip download --no-deps random-face==2021.7.21.1
    vectors/bin/python scripts/make_generator_vectors.py random_face-2021.7.21.1-py3-none-any.whl \
        tests/data/mobile_stylegan.npz

Writes, for two latents: `z`, `w` [2, 512]; `small` [2, 3, 64, 64], the 1024 px image averaged over
16 x 16 px; `crops` [2, 2, 3, 32, 32], the pixels at `corners` (row, column) of the full image.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import openvino

SEED = 0
CORNERS = ((400, 360), (610, 500))
SIDE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="the random-face wheel")
    parser.add_argument("out", type=Path, help="the .npz to write")
    arguments = parser.parse_args()

    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(arguments.wheel) as archive:
            archive.extractall(folder)

        def compile_network(name: str) -> openvino.CompiledModel:
            path = Path(folder) / "random_face" / "data" / f"{name}.xml"
            # Its default precision on the CPU differs by up to 1.15 from float32.
            return core.compile_model(
                core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
            )

        mapping = compile_network("MappingNetwork")
        synthesis = compile_network("SynthesisNetwork")
        z = np.random.default_rng(SEED).standard_normal((2, 512)).astype(np.float32)
        w = np.concatenate([mapping({0: row[None]})[0] for row in z])
        images = np.concatenate([synthesis({0: row[None]})[0] for row in w])
    small = images.reshape(2, 3, 64, 16, 64, 16).mean(axis=(3, 5), dtype=np.float64)
    crops = np.stack(
        [images[:, :, top : top + SIDE, left : left + SIDE] for top, left in CORNERS], axis=1
    )
    np.savez_compressed(
        arguments.out,
        z=z,
        w=w,
        small=small.astype(np.float32),
        crops=crops,
        corners=np.array(CORNERS),
    )
    print(f"{arguments.out}: openvino {openvino.__version__}")


if __name__ == "__main__":
    main()
