"""`python -m lmexp.metrics FOLDER…`: score finished runs, again or for the first time."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from lmexp.composition import conf_folder
from lmexp.config import Component
from lmexp.errors import LmexpError
from lmexp.metrics.protocol import Scores
from lmexp.metrics.rescoring import Rescorer, find_runs


def build_scores(choice: str = "independent") -> Scores:
    """The component of conf/scores/`choice`.yaml.

    Raises:
        LmexpError: there is no such choice.
    """
    path = conf_folder() / "scores" / f"{choice}.yaml"
    if not path.is_file():
        known = sorted(path.stem for path in path.parent.glob("*.yaml"))
        raise LmexpError(f"scores {choice}: no such choice; choices: {', '.join(known)}")
    built: Scores = Component.model_validate(OmegaConf.to_container(OmegaConf.load(path))).build()
    return built


def main(arguments: Sequence[str] | None = None) -> int:
    """Write scores into summaries and print a line a run; 0, or 2 with one line of reason."""
    parser = argparse.ArgumentParser(
        prog="python -m lmexp.metrics",
        description="Score finished runs by networks that nothing optimises, and write the "
        "numbers into their summary.json (docs/scores.md).",
    )
    parser.add_argument("folder", type=Path, nargs="+", help="a run's folder, or one with runs")
    parser.add_argument("--missing", action="store_true", help="only runs without scores yet")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    failed = False
    try:
        rescorer = Rescorer(build_scores())
        runs = [run for folder in chosen.folder for run in find_runs(folder)]
    except LmexpError as error:
        print(f"lmexp: {error}", file=sys.stderr)
        return 2
    for run in runs:
        try:
            if chosen.missing and run.read_summary().get("scores"):
                continue
            row = rescorer.rescore(run)
        except LmexpError as error:
            print(f"lmexp: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"{run.path.name}: {describe(row)}")
    return 2 if failed else 0


def describe(row: dict[str, object]) -> str:
    """A run's scores in one line for people."""
    result = row.get("result")
    assert isinstance(result, dict)
    if "identity_cosine" not in result:
        return "identity and landmarks not measured"
    parts = [f"identity {result['identity_cosine']:.3f}"]
    if row.get("identity_kept") is not None:
        parts[0] += f" ({row['identity_kept']:.0%} kept)"
    parts += [
        f"leak {result['leak_cosine']:.3f}",
        f"mouth NME {result['nme_aligned']['mouth']:.2f} %",
        f"mouth error {result['mouth_error']:.3f}",
        f"eye error {result['eye_error']:.3f}",
    ]
    if row.get("failed"):
        parts.append(f"FAILED: {row['failure']}")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
