"""Scores a landmark network on annotated face crops, on spoilt ones and on generated faces.

    python scripts/evaluate_landmarks.py --data DIR/val [--variant full | --weights FILE]
    python scripts/evaluate_landmarks.py --data DIR/val --spoilt --generated FACES

DIR/val holds NAME.jpg and NAME.pts (300-W). Every face is shown in a tight crop and as the
FFHQ alignment frames it; of the latter those with closed eyes and open mouths, by their
annotations, are scored alone, too. `--spoilt` opens mouths and closes eyes in the pictures
(scripts/landmark_warps.py), casts light of one colour on them and covers parts. FACES are aligned
pictures (scripts/render_faces.py): nobody annotated them, so dlib's predictor, which knows
nothing of our networks, is the reference, and errors are disagreements. `--keep` writes what dlib
found beside them as NAME.pts, which is read the next time, where dlib may be missing.

Prints tables on stderr and JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from landmark_warps import find_mouths, move_lids, move_mouth, paint_mouths, sources
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lmexp.errors import LmexpError
from lmexp.landmarks.decoding import decode
from lmexp.landmarks.embedded import EmbeddedFan
from lmexp.landmarks.fan import INPUT_SIDE
from lmexp.landmarks.framing import ffhq_views, place, read_faces, resample, tight_views
from lmexp.landmarks.groups import GROUPS, OUTER_EYE_CORNERS
from lmexp.landmarks.pts import write_pts
from lmexp.landmarks.score import Score, score
from lmexp.metrics.aspect_ratios import eye_aspect_ratio, mouth_aspect_ratio

CLOSED_EYES = 0.2
"""Faces whose eyes' aspect ratio is below this count as closed or nearly so."""

OPEN_MOUTH = 0.2
"""Faces whose mouth's aspect ratio is above this count as open."""

WIDE_MOUTH = 0.35
"""Generated mouths above this, as dlib sees them, count as wide open."""

Faces = tuple[Tensor, Tensor]
"""Pictures [N, 3, R, R] in [0, 1] and their landmarks [N, 68, 2], px."""


@torch.no_grad()
def find(network: EmbeddedFan, pictures: Tensor) -> Tensor:
    """Landmarks [N, 68, 2], px, of pictures in [0, 1]."""
    side = pictures.shape[3]
    return torch.cat([decode(network(part * 2 - 1), side) for part in pictures.split(16)])


def framings(images: Tensor, landmarks: Tensor, side: int) -> dict[str, Faces]:
    """The same faces in a tight crop and as the FFHQ alignment frames them."""
    return {
        name: (resample(images.float() / 255, views, side), place(landmarks, views, side))
        for name, views in (("tight", tight_views(landmarks)), ("ffhq", ffhq_views(landmarks)))
    }


def spoilt(pictures: Tensor, points: Tensor) -> Iterator[tuple[str, Faces]]:
    """Expressions, light and coverings that photos have and annotated ones have too rarely."""
    n, _, side, _ = pictures.shape
    one = torch.ones(n, device=points.device)
    steps = torch.arange(n, device=points.device) * 0.618 % 1  # even, in no order

    def warp(moved: Tensor) -> Tensor:
        where = sources(points, moved, side)
        return F.grid_sample(
            pictures, where / side * 2 - 1, padding_mode="reflection", align_corners=False
        )

    mouths = find_mouths((pictures * 255).to(torch.uint8), points)
    if len(mouths.images):
        ratio = (0.3 + 0.8 * steps).maximum(mouth_aspect_ratio(points))
        moved = move_mouth(points, ratio, 0.85 * one, 0.7 * one, 0 * one)
        lent = torch.arange(n, device=points.device) % len(mouths.images)
        donors, landmarks = mouths.images[lent].float() / 255, mouths.landmarks[lent]
        yield "mouths opened", (paint_mouths(warp(moved), moved, donors, landmarks)[0], moved)
    moved = move_lids(points, (0.12 + 0.3 * steps)[:, None].expand(n, 2), 0.85 * one)
    yield "eyes closed", (warp(moved), moved)

    for name, gains in (
        ("red light", (1.0, 0.25, 0.25)),
        ("green light", (0.25, 1.0, 0.25)),
        ("blue light", (0.25, 0.25, 1.0)),
        ("dark", (0.2, 0.2, 0.2)),
        ("overexposed", (2.0, 2.0, 2.0)),
    ):
        gain = pictures.new_tensor(gains)[:, None, None]
        yield name, ((pictures * gain).clamp(0, 1), points)

    unit = (points[:, OUTER_EYE_CORNERS[0]] - points[:, OUTER_EYE_CORNERS[1]]).norm(dim=1)
    at = torch.arange(side, device=points.device) + 0.5
    x, y = at[None, None, :], at[None, :, None]
    brow = points[:, 17:27, 1].amin(dim=1)[:, None, None]
    period = (0.16 * unit)[:, None, None]
    dots = ((6.283 * x / period).sin() * (6.283 * y / period).sin() > 0.4) & (y < brow)
    white = torch.ones_like(pictures)
    yield "studded hat", (torch.where(dots[:, None], white, pictures), points)

    chin, mouth = points[:, 8], points[:, 48:].mean(dim=1)
    covered = (x < mouth[:, :1, None]) & (y > mouth[:, 1:, None]) & (y < chin[:, 1:, None])
    grey = torch.full_like(pictures, 0.5)
    yield "quarter covered", (torch.where(covered[:, None], grey, pictures), points)


def read_pictures(folder: Path) -> Tensor:
    """[N, 3, R, R] in [0, 1] of every NAME.jpg in a folder.

    Raises:
        LmexpError: there is none.
    """
    paths = sorted(folder.glob("*.jpg"))
    if not paths:
        raise LmexpError(f"{folder}: no .jpg file there; scripts/render_faces.py makes some")
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def seen_by_dlib(folder: Path, keep: bool) -> Faces:
    """The pictures of a folder in which dlib's detector sees a face, and its points.

    Args:
        keep: write the points as NAME.pts; a folder with such files is read as it is.
    """
    if any(folder.glob("*.pts")):
        images, points = read_faces(folder)
        return images.float() / 255, points
    from lmexp.metrics.dlib_judge import DlibJudge  # dlib is no part of training

    pictures, judge = read_pictures(folder), DlibJudge()
    chosen, found = [], []
    for k, path in enumerate(sorted(folder.glob("*.jpg"))):
        picture = (pictures[k] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        verdict = judge.look_at(picture)
        if verdict.found:
            # Its points are indices of pixels, whose centres lie half a pixel further.
            points = torch.from_numpy(verdict.landmarks).float() + 0.5
            chosen.append(k)
            found.append(points)
            if keep:
                write_pts(path.with_suffix(".pts"), points)
    if not found:
        raise LmexpError(f"{folder}: dlib sees no face in any picture; give aligned faces")
    return pictures[chosen], torch.stack(found)


def evaluate(
    locate: Callable[[Tensor], Tensor],
    folder: Path,
    side: int,
    device: str,
    *,
    spoil: bool = False,
    generated: Path | None = None,
    keep: bool = False,
    every: int = 2,
) -> dict[str, Score]:
    """Score by set of faces: "tight" and "ffhq" first, then subsets, spoilt and generated.

    Args:
        locate: pictures [N, 3, R, R] in [0, 1] → landmarks [N, 68, 2], px.
        spoil, generated: see the module.
        keep: write dlib's points beside the generated pictures.
        every: only each so many-th face is spoilt.
    """
    images, reference = (tensor.to(device) for tensor in read_faces(folder))
    scores, framed = {}, framings(images, reference, side)
    for name, (pictures, points) in framed.items():
        found = locate(pictures)
        scores[name] = score(found, points)
    ratios = {
        "closed eyes": eye_aspect_ratio(points) < CLOSED_EYES,
        "open mouth": mouth_aspect_ratio(points) > OPEN_MOUTH,
    }
    for name, chosen in ratios.items():
        if chosen.any():
            scores[name] = score(found[chosen], points[chosen])
    if spoil:
        for name, (shown, truth) in spoilt(pictures[::every], points[::every]):
            scores[name] = score(locate(shown), truth)
    if generated is not None:
        pictures, points = (tensor.to(device) for tensor in seen_by_dlib(generated, keep))
        found = locate(pictures)
        scores["generated"] = score(found, points)
        wide = mouth_aspect_ratio(points) > WIDE_MOUTH
        shut = eye_aspect_ratio(points) < CLOSED_EYES
        for name, chosen in (("generated, wide mouth", wide), ("generated, closed eyes", shut)):
            if chosen.any():
                scores[name] = score(found[chosen], points[chosen])
    return scores


def group_table(scores: dict[str, Score]) -> str:
    """One line per group, one column per framing."""
    framed = {name: scores[name] for name in ("tight", "ffhq")}
    lines = [f"{'NME, % of outer eye distance':30}" + "".join(f"{name:>9}" for name in framed)]
    for group in GROUPS:
        lines.append(f"{group:30}" + "".join(f"{s.groups[group]:9.2f}" for s in framed.values()))
    return "\n".join(lines)


def set_table(scores: dict[str, Score]) -> str:
    """One line per set of faces."""
    columns = ("faces", "NME", "median", ">10 %", "eyes", "lips")
    columns += ("eye err", "bias", "mouth err", "bias")
    lines = [f"{'set':24}" + "".join(f"{name:>10}" for name in columns)]
    for name, s in scores.items():
        eyes = (s.groups["left_eye"] + s.groups["right_eye"]) / 2
        lips = (12 * s.groups["outer_lip"] + 8 * s.groups["inner_lip"]) / 20
        lines.append(
            f"{name:24}{s.faces:10d}{s.nme:10.2f}{s.median:10.2f}{s.failures:10d}"
            f"{eyes:10.2f}{lips:10.2f}{s.eye_error:10.3f}{s.eye_bias:+10.3f}"
            f"{s.mouth_error:10.3f}{s.mouth_bias:+10.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of NAME.jpg and NAME.pts")
    parser.add_argument("--variant", choices=("slim", "full"), default="slim")
    parser.add_argument("--weights", help="safetensors of train_landmarks.py instead")
    parser.add_argument("--side", type=int, default=INPUT_SIDE, help="px of the views shown")
    parser.add_argument("--spoilt", action="store_true", help="score spoilt pictures, too")
    parser.add_argument("--every", type=int, default=2, help="spoil each so many-th face")
    parser.add_argument("--generated", type=Path, help="folder of aligned pictures, NAME.jpg")
    parser.add_argument("--keep", action="store_true", help="write dlib's points beside them")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    try:
        network = EmbeddedFan(args.variant, args.weights).to(args.device)
        scores = evaluate(
            lambda pictures: find(network, pictures),
            *(args.data, args.side, args.device),
            spoil=args.spoilt,
            generated=args.generated,
            keep=args.keep,
            every=args.every,
        )
    except LmexpError as error:
        sys.exit(str(error))
    print(group_table(scores), "\n\n", set_table(scores), sep="", file=sys.stderr)
    report = {framing: result.as_dict() for framing, result in scores.items()}
    print(json.dumps({"weights_sha256": network.weights_sha256, **report}, indent=1))


if __name__ == "__main__":
    main()
