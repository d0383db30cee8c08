"""`python -m lmexp.figures FOLDER`: make the figures of a run or of a sweep."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from lmexp.errors import LmexpError
from lmexp.figures.gallery import list_figures, make_all


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the figures and print their paths; 0 if it worked, 2 with one line if not."""
    parser = argparse.ArgumentParser(
        prog="python -m lmexp.figures",
        description="Make paper figures (PNG and PDF) from a run's or a sweep's folder alone, "
        "into its figures folder.",
        epilog=f"Figures: {', '.join(list_figures())}.",
    )
    parser.add_argument("folder", type=Path, help="a run's folder, or a sweep's (with index.json)")
    parser.add_argument("--only", metavar="NAME", help="make this figure only")
    chosen = parser.parse_args(arguments)
    # Our lines only: the libraries that embed fonts tell a story of their own at this level.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lmexp").setLevel(logging.INFO)
    try:
        for path in make_all(chosen.folder, only=chosen.only):
            print(path)
    except LmexpError as error:
        print(f"lmexp: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
