"""How far the judges of landmarks can be trusted: their mouths against annotated ones.

    python scripts/evaluate_judges.py --data HELEN/testset [HELEN/trainset …]

Folders hold NAME.jpg and NAME.pts (300-W). Every face is framed as FFHQ's are, at 256 px, as the
scores see it; dlib's predictor and the packaged FANs say how far its mouth is open, and the
annotation how far it is. A table by annotated opening: mean absolute error and mean error (below
0: mouths are seen too shut). Both kinds of network were trained on faces of 300-W; what they were
trained on flatters them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from evaluate_landmarks import find, framings
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.landmarks.embedded import EmbeddedFan
from lmexp.landmarks.framing import read_faces
from lmexp.metrics.aspect_ratios import mouth_aspect_ratio
from lmexp.metrics.dlib_judge import DlibJudge
from lmexp.recording.images import to_picture

SIDE = 256
"""Of the pictures, px: that of the scores."""

BOUNDS = (0.0, 0.1, 0.3, 0.5, 0.7, float("inf"))
"""Between which openings are counted together."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--least", type=float, default=0.0, help="leave out mouths less open")
    args = parser.parse_args(arguments)
    try:
        wanted, seen = judge(args.data, args.least)
    except LmexpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(write_table(wanted, seen))
    return 0


def judge(folders: Sequence[Path], least: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Annotated openings [N], and each judge's [N] by name.

    Raises:
        LmexpError: a folder has no annotated faces, or a judge's weights cannot be had.
    """
    pictures, wanted = [], []
    for folder in folders:
        images, landmarks = read_faces(folder)
        framed, points = framings(images, landmarks, SIDE)["ffhq"]
        chosen = mouth_aspect_ratio(points) >= least
        pictures.append(framed[chosen])
        wanted.append(mouth_aspect_ratio(points[chosen]))
    faces = torch.cat(pictures)
    by_dlib = DlibJudge()
    landmarks = np.stack([by_dlib.look_at(to_picture(face * 2 - 1)).landmarks for face in faces])
    seen = {"dlib": mouth_aspect_ratio(torch.from_numpy(landmarks))}
    for variant in ("full", "slim"):
        seen[f"FAN, {variant}"] = mouth_aspect_ratio(find(EmbeddedFan(variant).eval(), faces))
    return torch.cat(wanted), seen


def write_table(wanted: Tensor, seen: dict[str, Tensor]) -> str:
    """Markdown, a row an opening."""
    lines = [
        f"| mouth's aspect ratio, annotated | faces | {' | '.join(seen)} |",
        f"|---|{'---:|' * (1 + len(seen))}",
    ]
    for low, high in itertools.pairwise(BOUNDS):
        there = (wanted >= low) & (wanted < high)
        if not there.any():
            continue
        errors = [(ratios - wanted)[there] for ratios in seen.values()]
        cells = [f"{float(e.abs().mean()):.3f} ({float(e.mean()):+.3f})" for e in errors]
        name = f"{low:g} to {high:g}" if high < float("inf") else f"from {low:g}"
        lines.append(f"| {name} | {int(there.sum())} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
