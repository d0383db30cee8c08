"""Runs with scores, as the runner leaves them, made up from two numbers a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recorded_runs import record_run, write_index

from lmexp.recording.run_folder import RunFolder


def picture_scores(identity: float, mouth_error: float, nme: float = 8.0) -> dict[str, Any]:
    return {
        "face_found": True,
        "identity_cosine": identity,
        "identity_distance": 1 - identity,
        "leak_cosine": 0.1,
        "nme": {"all": nme + 1, "mouth": nme + 2},
        "nme_aligned": {"all": nme, "mouth": nme + 1},
        "mouth_error": mouth_error,
        "eye_error": 0.05,
        "lpips": 0.3,
        "lpips_outside": 0.2,
    }


def run_scores(identity: float, mouth_error: float, failure: str = "") -> dict[str, Any]:
    """Of a run whose look is 0.4 away at the mouth and whose inversion keeps 0.5."""
    return {
        "result": picture_scores(identity, mouth_error, 4.0),
        "look": picture_scores(1.0, 0.4),
        "inversion": picture_scores(0.5, 0.38),
        "expression": picture_scores(-0.05, 0.0, 0.0),
        "identity_kept": identity / 0.5,
        "failed": bool(failure),
        "failure": failure,
        "judges": {"perceptual": "stlpips_vgg"},
    }


def record_scored_sweep(
    folder: Path,
    runs: Sequence[tuple[Mapping[str, Any], dict[str, Any]]],
    label: str = "a+b",
) -> None:
    """A sweep of one pair: overrides and scores of each run."""
    jobs = []
    for number, (overrides, scores) in enumerate(runs):
        path = folder / f"{number:03d}"
        record_run(path, label=label, side=64, steps=2, video_frames=0)
        summary = RunFolder(path).read_summary()
        RunFolder(path).write_summary({**summary, "label": label, "scores": scores})
        jobs.append({"folder": path.name, "overrides": dict(overrides), "label": f"run {number}"})
    write_index(folder, jobs)
