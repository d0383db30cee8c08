"""Renders faces of the packaged generator for training and scoring landmark networks.

    python scripts/render_faces.py --out DIR --first 100000 --count 500

Each is FFHQ-aligned, 256 px, and drawn by its own seed: two in five as the generator draws it (ψ
0.6 to 1), two with a mouth opened and one with eyes closed along the generator's own statistics
(`lmexp.expression_map`). Writes FIRST.jpg, FIRST + 1.jpg, …; there are no annotations.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from landmark_warps import move_lids, move_mouth
from PIL import Image

from lmexp import expression_map, latents
from lmexp.generators.mobile_stylegan import MobileStyleGAN
from lmexp.inputs import draw_z
from lmexp.landmarks.embedded import EmbeddedFan
from lmexp.landmarks.groups import GROUPS
from lmexp.recording.images import to_picture

ROWS = (2, 9)
"""The ws that an expression moves: those of 8 to 64 px."""


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="seed of the first face")
    parser.add_argument("--count", type=int, default=120)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    generator = MobileStyleGAN(resolution=256).eval().requires_grad_(False)
    network = EmbeddedFan("slim")
    statistics = latents.measure(generator, 10_000, 123, torch.device("cpu"))
    moves = expression_map.find(generator, network, statistics, 9000)
    assert moves is not None  # packaged
    mouth, eyes = torch.full((1, 68), 0.2), torch.full((1, 68), 0.2)
    mouth[:, 48:] = 1
    for group in ("left_eye", "right_eye"):
        eyes[:, list(GROUPS[group])] = 1
    for seed in range(args.first, args.first + args.count):
        random = torch.Generator().manual_seed(seed)
        truncation, amount = torch.rand(2, generator=random).tolist()
        w = generator.mapping(draw_z(seed, generator.z_dim))
        w = statistics.w_avg + (0.6 + 0.4 * truncation) * (w - statistics.w_avg)
        ws = latents.expand(w[:, None], generator.num_ws)
        kind = seed % 5
        if kind >= 2:
            now = expression_map.locate(generator, network, ws) * 256
            one = torch.ones(1)
            if kind < 4:
                ratio = one * (0.3 + 0.7 * amount)
                moved, weights = move_mouth(now, ratio, 0.8 * one, 0.8 * one, 0 * one), mouth
            else:
                moved, weights = move_lids(now, 0.6 * amount * torch.ones(1, 2), one), eyes
            ws = expression_map.head_start(
                *(ws, moves, generator, network, statistics),
                look_landmarks=now,
                expression_landmarks=moved,
                weights=weights,
                share=0.8,
                rows=ROWS,
            )
        picture = Image.fromarray(to_picture(generator.synthesis(ws)[0]))
        picture.save(args.out / f"{seed:06d}.jpg", quality=92)


if __name__ == "__main__":
    main()
