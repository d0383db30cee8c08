"""Pairs of annotated faces for compare_recipes.py, drawn by a seed and by their mouths alone.

    python scripts/choose_pairs.py --looks HELEN/trainset --seed 1 --out dev.yaml
    python scripts/choose_pairs.py --looks HELEN/testset --expressions HELEN/trainset \\
        --without dev.yaml --seed 1 --out unseen.yaml

Folders hold pictures with 300-W's `.pts` beside them. One half of the pairs asks a closed mouth to
open, a quarter an open one to close, the rest a closed mouth for another closed one (a smile for
none, mostly). No picture is drawn twice, and nothing else is looked at: not pose, not light, not
age, and above all no result. So the same data and seed give the same pairs anywhere, and those that
a recipe was chosen on can be kept apart from those that it is judged on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmexp.errors import LmexpError
from lmexp.landmarks.pts import read_pts
from lmexp.metrics.aspect_ratios import mouth_aspect_ratio

PICTURES = (".jpg", ".jpeg", ".png")
CLOSED, OPEN = 0.05, 0.25
"""Aspect ratios of the inner lips: at most, and at least."""


@dataclass(frozen=True)
class Face:
    """An annotated picture; `mouth` is the aspect ratio of its inner lips."""

    picture: Path
    mouth: float


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        taken = {word for path in args.without for pair in read_pairs(path) for word in pair}
        looks = read_faces(args.looks, taken)
        expressions = read_faces(args.expressions or args.looks, taken)
        pairs = draw_pairs(looks, expressions, args.count, args.seed)
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
            raise LmexpError(f"{folder}: no picture with a .pts file beside it")
        for picture in annotated:
            if str(picture) not in taken:
                landmarks = read_pts(picture.with_suffix(".pts"))
                faces.append(Face(picture, float(mouth_aspect_ratio(landmarks[None]))))
    return faces


def draw_pairs(
    looks: Sequence[Face], expressions: Sequence[Face], count: int, seed: int
) -> list[tuple[Face, Face]]:
    """(look, expression), no picture twice.

    Raises:
        LmexpError: too few faces for so many pairs.
    """
    draw = random.Random(seed)
    opening, closing = (count + 1) // 2, count // 4
    pairs: list[tuple[Face, Face]] = []
    used: set[Path] = set()

    def take(faces: Sequence[Face], is_open: bool) -> Face:
        fitting = [
            face
            for face in faces
            if face.picture not in used
            and (face.mouth >= OPEN if is_open else face.mouth <= CLOSED)
        ]
        if not fitting:
            kind = "an open" if is_open else "a closed"
            raise LmexpError(
                f"--count {count}: no face with {kind} mouth is left for pair {len(pairs) + 1}; "
                "ask for fewer, or name more folders"
            )
        used.add((face := draw.choice(fitting)).picture)
        return face

    for k in range(count):
        look_open, expression_open = opening <= k < opening + closing, k < opening
        pairs.append((take(looks, look_open), take(expressions, expression_open)))
    return pairs


if __name__ == "__main__":
    sys.exit(main())
