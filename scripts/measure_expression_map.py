"""Measure how a generator's latents move its landmarks, for `lmexp.expression_map`.

    python scripts/measure_expression_map.py \\
        --out src/lmexp/weights/data/expression_map_mobile.safetensors
    python -m lmexp.weights seal

The packaged map is of MobileStyleGAN (256 px head) and the full FAN. Prints one JSON line: the
samples, and the share of the landmarks' variance that the map explains.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from lmexp import expression_map, latents
from lmexp.generators.mobile_stylegan import MobileStyleGAN
from lmexp.landmarks.embedded import EmbeddedFan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = MobileStyleGAN(resolution=256).eval().requires_grad_(False).to(device)
    network = EmbeddedFan("full").eval().requires_grad_(False).to(device)
    statistics = latents.measure(generator, 10_000, 123, device)
    with torch.no_grad():
        made = expression_map.measure(
            generator, network, statistics, arguments.samples, batch=arguments.batch
        )
    tensors = expression_map.as_tensors(made) | {"w_avg": statistics.w_avg.cpu()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, arguments.out)
    explained, residual = made.explained.trace(), made.residual.trace()
    share = float(explained / (explained + residual))
    print(json.dumps({"samples": arguments.samples, "explained": round(share, 3)}))


if __name__ == "__main__":
    main()
