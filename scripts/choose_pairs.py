"""Pairs of annotated faces for compare_recipes.py, drawn by a seed and by their landmarks alone.

    python scripts/choose_pairs.py --looks HELEN/trainset --seed 1 --out dev.yaml
    python scripts/choose_pairs.py --looks HELEN/testset --expressions HELEN/trainset \\
        --without dev.yaml --seed 1 --out unseen.yaml

Folders hold pictures with 300-W's `.pts` beside them. One half of the pairs asks a closed mouth to
open, a quarter an open one to close, the rest a closed mouth for another closed one (a smile for
none, mostly); heads are turned alike (`--turn 1`: however they are). No picture is drawn twice, and
nothing but annotations is looked at: not light, not age, and above all no result. So the same data
and seed give the same pairs anywhere, and those that a recipe was chosen on can be kept apart from
those that it is judged on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.landmarks.groups import GROUPS
from lmexp.landmarks.pts import read_pts
from lmexp.metrics.aspect_ratios import mouth_aspect_ratio

PICTURES = (".jpg", ".jpeg", ".png")
NOSE_TIP = 30
CLOSED, OPEN = 0.05, 0.25
"""Aspect ratios of the inner lips: at most, and at least."""


@dataclass(frozen=True)
class Face:
    """An annotated picture.

    Attributes:
        mouth: aspect ratio of the inner lips.
        turn: where the tip of the nose is between the ends of the jaw, along the line through the
            eyes: 0.5 from the front.
    """

    picture: Path
    mouth: float
    turn: float


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        taken = {word for path in args.without for pair in read_pairs(path) for word in pair}
        looks = read_faces(args.looks, taken)
        expressions = read_faces(args.expressions or args.looks, taken)
        pairs = draw_pairs(looks, expressions, args.count, args.seed, args.turn)
    except LmexpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # JSON is YAML, with every path quoted as it must be.
    lines = [json.dumps([str(look.picture), str(expression.picture)]) for look, expression in pairs]
    args.out.write_text("".join(f"- {line}\n" for line in lines))
    print(f"{args.out}: {len(pairs)} pairs")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--looks", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--expressions", type=Path, nargs="+", metavar="DIR", help="default: looks")
    parser.add_argument("--without", type=Path, nargs="+", default=[], metavar="YAML")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--turn", type=float, default=0.15, help="difference at most; 0.5 is front against profile"
    )
    parser.add_argument("--out", type=Path, required=True, help="for --pairs")
    return parser.parse_args(arguments)


def read_pairs(path: Path) -> list[list[str]]:
    """The pairs of another file.

    Raises:
        LmexpError: it is none.
    """
    try:
        pairs = [json.loads(line.removeprefix("- ")) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise LmexpError(f"{path}: not a list of pairs that this script wrote ({error})") from error
    return pairs


def read_faces(folders: Sequence[Path], taken: Collection[str]) -> list[Face]:
    """The annotated pictures of folders, by name, without those that are taken.

    Raises:
        LmexpError: a folder has none, or an annotation is damaged.
    """
    faces = []
    for folder in folders:
        pictures = sorted(p for p in folder.glob("*") if p.suffix.lower() in PICTURES)
        annotated = [picture for picture in pictures if picture.with_suffix(".pts").exists()]
        if not annotated:
            raise LmexpError(
                f"{folder}: no picture with a .pts file beside it; name a folder of 300-W's form"
            )
        for picture in annotated:
            if str(picture) not in taken:
                landmarks = read_pts(picture.with_suffix(".pts"))
                mouth = float(mouth_aspect_ratio(landmarks[None]))
                faces.append(Face(picture, mouth, measure_turn(landmarks)))
    return faces


def measure_turn(landmarks: Tensor) -> float:
    """`Face.turn` of landmarks [68, 2], px."""
    left, right = landmarks[GROUPS["left_eye"]].mean(0), landmarks[GROUPS["right_eye"]].mean(0)
    along = landmarks @ (right - left)
    return float((along[NOSE_TIP] - along[0]) / (along[16] - along[0]))


def draw_pairs(
    looks: Sequence[Face], expressions: Sequence[Face], count: int, seed: int, turn: float
) -> list[tuple[Face, Face]]:
    """(look, expression), no picture twice.

    Raises:
        LmexpError: too few faces for so many pairs.
    """
    draw = random.Random(seed)
    opening, closing = (count + 1) // 2, count // 4
    pairs: list[tuple[Face, Face]] = []
    used: set[Path] = set()

    def take(faces: Sequence[Face], is_open: bool, like: Face | None = None) -> Face:
        fitting = [
            face
            for face in faces
            if face.picture not in used
            and (face.mouth >= OPEN if is_open else face.mouth <= CLOSED)
            and (like is None or abs(face.turn - like.turn) <= turn)
        ]
        if not fitting:
            kind = "an open" if is_open else "a closed"
            raise LmexpError(
                f"--count {count}: no face with {kind} mouth is left for pair {len(pairs) + 1}; "
                "ask for fewer, allow a larger --turn, or name more folders"
            )
        used.add((face := draw.choice(fitting)).picture)
        return face

    for k in range(count):
        look = take(looks, opening <= k < opening + closing)
        pairs.append((look, take(expressions, k < opening, look)))
    return pairs


if __name__ == "__main__":
    sys.exit(main())
