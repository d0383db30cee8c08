"""Run folders such as a projection leaves, made in a second: for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageEnhance, ImageFilter

from lmexp.landmarks.groups import GROUPS
from lmexp.recording.images import to_image
from lmexp.recording.recorder import Recorder
from lmexp.recording.tracker import Job, NoTracker, Tracker

STEPS = 12

# Where the 68 landmarks of the astronaut's face lie, roughly: shares of the crop's side.
_ARCS: dict[str, tuple[float, float, float, float, float, float]] = {
    # centre x, centre y, radius x, radius y, first and last angle in turns (clockwise from east)
    "jaw": (0.505, 0.46, 0.18, 0.34, 0.5, 0.0),
    "left_eyebrow": (0.41, 0.405, 0.06, 0.025, 0.5, 1.0),
    "right_eyebrow": (0.6, 0.405, 0.06, 0.025, 0.5, 1.0),
    "left_eye": (0.41, 0.44, 0.035, 0.014, 0.5, 1.33),
    "right_eye": (0.6, 0.44, 0.035, 0.014, 0.5, 1.33),
    "outer_lip": (0.505, 0.64, 0.085, 0.035, 0.5, 1.42),
    "inner_lip": (0.505, 0.64, 0.065, 0.015, 0.5, 1.37),
}
_CROP = (110, 0, 230)
"""Left, top and side of the face in the portrait, px."""


def astronaut(
    side: int, *, turn: float = 0.0, blur: float = 0.0, light: float = 1.0
) -> Image.Image:
    """The face of scikit-image's public-domain portrait, turned by degrees, blurred, lit."""
    photo = Image.fromarray(skimage.data.astronaut()).rotate(turn, Image.Resampling.BICUBIC)
    left, top, size = _CROP
    face = photo.crop((left, top, left + size, top + size)).resize(
        (side, side), Image.Resampling.LANCZOS
    )
    blurred = face.filter(ImageFilter.GaussianBlur(blur * side / 256))
    return ImageEnhance.Brightness(blurred).enhance(light)


def face_landmarks(side: int, smile: float = 0.0, turn: float = 0.0) -> torch.Tensor:
    """[68, 2], x then y, px: on the face of `astronaut(side, turn=turn)`."""
    points = np.zeros((68, 2), dtype=np.float32)
    for name, members in GROUPS.items():
        if name == "nose_bridge":
            points[members.start : members.stop] = [(0.505, 0.44 + 0.04 * i) for i in range(4)]
        elif name == "lower_nose":
            points[members.start : members.stop] = [(0.46 + 0.0225 * i, 0.585) for i in range(5)]
        else:
            x, y, wide, high, first, last = _ARCS[name]
            angles = 2 * np.pi * np.linspace(first, last, len(members))
            points[members.start : members.stop, 0] = x + wide * np.cos(angles)
            points[members.start : members.stop, 1] = y + high * (1 + smile) * np.sin(angles)
    left, top, size = _CROP
    # Turned about the portrait's centre, as the photo is; y points down.
    angle = np.deg2rad(turn)
    offset = np.array([left, top]) + points * size - 256
    turned = offset @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return torch.from_numpy((turned + 256 - np.array([left, top])) * side / size).float()


def image_tensor(image: Image.Image) -> torch.Tensor:
    return to_image(np.asarray(image))


def record_run(
    folder: Path,
    *,
    label: str = "a run",
    tracker: Tracker | None = None,
    strength: float = 1.0,
    side: int = 64,
    steps: int = STEPS,
    config: Mapping[str, Any] | None = None,
    turns: tuple[float, float] = (0.0, 12.0),
    stop_after: int | None = None,
    **options: Any,
) -> Recorder:
    """Record a whole job (or its first `stop_after` steps) as the runner does."""
    job = Job(
        folder=folder,
        run_id=folder.name,
        label=label,
        group="a sweep",
        config=config or {"optimizer": {"steps": steps}, "loss": {"lpips": {"weight": 1.0}}},
    )
    recorder = Recorder(job, tracker or NoTracker(), steps=steps, **options)
    look, expression = (astronaut(side, turn=turn) for turn in turns)
    recorder.start(
        look=image_tensor(look),
        expression=image_tensor(expression),
        look_landmarks=face_landmarks(side, turn=turns[0]),
        expression_landmarks=face_landmarks(side, smile=0.3, turn=turns[1]),
    )
    random = np.random.default_rng(round(strength * 1000))
    for step in range(steps if stop_after is None else stop_after):
        share = (step + 1) / steps
        noise = 1 + 0.05 * random.standard_normal(3)
        raw = {
            "lpips": float(0.15 + 0.5 * np.exp(-4 * share) * noise[0]) * (1 + 0.1 * strength),
            "landmarks": float(8 * np.exp(-5 * share * strength) + 0.6 / strength) * noise[1],
            "prior": float(40 * np.exp(-3 * share) + 2) * noise[2],
        }
        weights = {"lpips": 1.0, "landmarks": 0.05 * strength, "prior": 0.005}
        weighted = {name: weights[name] * value for name, value in raw.items()}
        picture = points = None
        if recorder.wants_picture(step):
            small, turn = recorder.choose_side(side), turns[0] + 6 * share
            picture = np.asarray(astronaut(small, turn=turn, blur=3 * (1 - share)))
            points = face_landmarks(small, 0.3 * share, turn).numpy()
        recorder.record_step(
            step,
            lr=0.1 * min(1.0, 4 * (1 - share)),
            loss=sum(weighted.values()),
            raw=raw,
            weighted=weighted,
            picture=picture,
            landmarks=points,
        )
    if stop_after is None:
        nme = {name: round(float(2 + 4 * random.random() / strength), 3) for name in GROUPS}
        recorder.finish(
            image=image_tensor(
                astronaut(side, turn=turns[0] + 6, light=0.85 + 0.1 * min(strength, 3))
            ),
            landmarks=face_landmarks(side, smile=0.3, turn=turns[0] + 6),
            ws=torch.linspace(-1, 1, 4 * 8).reshape(4, 8),
            noise_bufs=[torch.ones(1, 4, 4), torch.full((1, 8, 8), 2.0)],
            summary={
                "label": label,
                "steps": steps,
                "seconds": 1.5,
                "nme": {**nme, "all": sum(nme.values()) / len(nme)},
                "terms": {"raw": raw, "weighted": weighted},
            },
        )
    return recorder


def write_index(folder: Path, jobs: list[dict[str, Any]], name: str = "weights") -> None:
    (folder / "index.json").write_text(json.dumps({"name": name, "jobs": jobs}))


def record_sweep(
    folder: Path, overrides: list[dict[str, Any]], *, name: str = "weights", **options: Any
) -> None:
    """A sweep's folder: one run for each of the overrides, and the index."""
    jobs = []
    for number, differing in enumerate(overrides):
        strength = 0.5 + 0.5 * number
        turns = (
            {"ann": 0.0, "bo": 8.0, "cy": -8.0}.get(str(differing.get("inputs.look")), 0.0),
            {"joy": 14.0, "rage": -14.0}.get(str(differing.get("inputs.expression")), 10.0),
        )
        label = ",".join(f"{key}={value}" for key, value in differing.items())
        record_run(folder / f"{number:03d}", label=label, strength=strength, turns=turns, **options)
        jobs.append({"folder": f"{number:03d}", "overrides": differing, "label": label})
    write_index(folder, jobs, name)
