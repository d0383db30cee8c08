"""Runs detection and alignment over a folder of photos, and shows what came of it.

    python scripts/check_photos.py DIR [--sheet photos.png] [--network full]

Prints a line per photo: the number of faces, the box, the landmarks' NME where NAME.pts lies
beside the photo, and what the user would be told. The sheet shows every photo with its box and
landmarks, and the aligned image next to it. Exits with status 1 if a photo failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from lmexp.errors import LmexpError
from lmexp.faces.dlib_detector import DlibDetector
from lmexp.faces.photo import read_photo
from lmexp.faces.targets import AlignedFace, align_photo
from lmexp.landmarks.embedded import EmbeddedFan
from lmexp.landmarks.pts import read_pts
from lmexp.metrics.nme import nme
from lmexp.recording.images import draw_landmarks

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".heic"}
CELL = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sheet", type=Path, help="contact sheet to write, PNG")
    parser.add_argument("--network", choices=("slim", "full"), default="slim")
    parser.add_argument("--side", type=int, default=256, help="side of the aligned images, px")
    args = parser.parse_args()

    if not args.folder.is_dir():
        sys.exit(f"{args.folder}: no such folder; give one with photos")
    paths = sorted(p for p in args.folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not paths:
        sys.exit(f"{args.folder}: no photo in it; known endings: {', '.join(sorted(SUFFIXES))}")
    detector, network = DlibDetector(), EmbeddedFan(args.network)
    cells, errors, failures = [], [], 0
    print(f"{'photo':<16} {'size':>11} {'box':>21} {'NME %':>6} {'s':>5}  told to the user")
    for path in paths:
        began = time.monotonic()
        try:
            face = align_photo(path, detector, network, args.side)
        except LmexpError as error:
            failures += 1
            print(f"{path.name:<16} {'–':>11} {'–':>21} {'–':>6} {'–':>5}  ERROR {error}")
            continue
        seconds = time.monotonic() - began
        error = compare(face, path.with_suffix(".pts"))
        if error is not None:
            errors.append(error)
        assert face.box is not None
        assert face.photo_size is not None
        x, y = face.box.centre
        told = "; ".join(warning.removeprefix(f"{path}: ") for warning in face.warnings)
        print(
            f"{path.name:<16} {'{}×{}'.format(*face.photo_size):>11} "
            f"{f'{face.box.side:.0f} at ({x:.0f}, {y:.0f})':>21} "
            f"{'–' if error is None else f'{error:.2f}':>6} {seconds:>5.1f}  {told}"
        )
        if args.sheet:
            cells.append(cell(path.stem, read_photo(path), face))
    print(f"{len(paths) - failures} of {len(paths)} photos aligned", end="")
    if errors:
        print(f"; NME {np.mean(errors):.2f} % mean, {np.max(errors):.2f} % worst", end="")
    print()
    if cells:
        write_sheet(cells, args.sheet)
        print(f"contact sheet: {args.sheet}")
    sys.exit(1 if failures else 0)


def compare(face: AlignedFace, annotation: Path) -> float | None:
    """NME in per cent of the outer eye corners' distance; None without an annotation."""
    if not annotation.exists():
        return None
    found = torch.from_numpy(face.photo_landmarks)
    return float(nme(found[None], read_pts(annotation)[None])["all"])


def cell(name: str, photo: np.ndarray, face: AlignedFace) -> Image.Image:
    """The photo with box and landmarks, and the aligned image, plain and with landmarks."""
    assert face.box is not None
    whole = Image.fromarray(draw_landmarks(photo, face.photo_landmarks))
    box = face.box
    ImageDraw.Draw(whole).rectangle(
        (box.left, box.top, box.right, box.bottom), outline="yellow", width=5
    )
    whole.thumbnail((CELL, CELL))
    aligned = Image.fromarray(face.image).resize((CELL, CELL))
    drawn = Image.fromarray(
        draw_landmarks(np.asarray(aligned), face.landmarks * CELL / face.image.shape[0])
    )
    row = Image.new("RGB", (3 * CELL, CELL + 14), "white")
    for k, picture in enumerate((whole, aligned, drawn)):
        row.paste(picture, (k * CELL, 14))
    ImageDraw.Draw(row).text((4, 1), name, fill="black")
    return row


def write_sheet(cells: list[Image.Image], path: Path, columns: int = 3) -> None:
    width, height = cells[0].size
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (width + 6), rows * height), "white")
    for k, picture in enumerate(cells):
        sheet.paste(picture, (k % columns * (width + 6), k // columns * height))
    sheet.save(path)


if __name__ == "__main__":
    main()
