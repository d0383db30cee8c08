"""Scores a landmark network on annotated face crops.

    python scripts/evaluate_landmarks.py --data DIR/val [--variant full | --weights FILE]

DIR/val holds NAME.jpg and NAME.pts (300-W). Every face is shown twice: in a tight crop, and
as the FFHQ alignment frames it. Prints a table on stderr and JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from lmexp.errors import LmexpError
from lmexp.landmarks.decoding import decode
from lmexp.landmarks.embedded import EmbeddedFan
from lmexp.landmarks.fan import INPUT_SIDE
from lmexp.landmarks.framing import ffhq_views, place, read_faces, resample, tight_views
from lmexp.landmarks.groups import GROUPS
from lmexp.landmarks.score import Score, score


@torch.no_grad()
def evaluate(network: EmbeddedFan, folder: Path, side: int, device: str) -> dict[str, Score]:
    """Score `network` on views of `side` px of every face in `folder`, per framing."""
    images, reference = (tensor.to(device) for tensor in read_faces(folder))
    scores = {}
    for framing, views in (("tight", tight_views(reference)), ("ffhq", ffhq_views(reference))):
        found = []
        for part, view in zip(images.split(16), views.split(16), strict=True):
            shown = resample(part.float() / 127.5 - 1, view, side)
            found.append(decode(network(shown), side))
        scores[framing] = score(torch.cat(found), place(reference, views, side))
    return scores


def table(scores: dict[str, Score]) -> str:
    """One line per group, one column per framing."""
    lines = [f"{'NME, % of outer eye distance':30}" + "".join(f"{name:>9}" for name in scores)]
    for group in GROUPS:
        lines.append(f"{group:30}" + "".join(f"{s.groups[group]:9.2f}" for s in scores.values()))
    lines.append(f"{'all':30}" + "".join(f"{s.nme:9.2f}" for s in scores.values()))
    lines.append(f"{'median face':30}" + "".join(f"{s.median:9.2f}" for s in scores.values()))
    faces = next(iter(scores.values())).faces
    lines.append(
        f"{f'failures above 10 % of {faces}':30}"
        + "".join(f"{s.failures:9d}" for s in scores.values())
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME.jpg and NAME.pts")
    parser.add_argument("--variant", choices=("slim", "full"), default="slim")
    parser.add_argument("--weights", help="safetensors of train_landmarks.py instead")
    parser.add_argument("--side", type=int, default=INPUT_SIDE, help="px of the views shown")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    try:
        network = EmbeddedFan(args.variant, args.weights).to(args.device)
        scores = evaluate(network, args.data, args.side, args.device)
    except LmexpError as error:
        sys.exit(str(error))
    print(table(scores), file=sys.stderr)
    report = {framing: result.as_dict() for framing, result in scores.items()}
    print(json.dumps({"weights_sha256": network.weights_sha256, **report}, indent=1))


if __name__ == "__main__":
    main()
