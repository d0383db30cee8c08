"""What a sweep costs beside its steps, on this machine's processors: configs, records, results.

    python scripts/benchmark_records.py --out docs/benchmarks/records_MACHINE.json

Three comparisons, each within one run, alternating:

- **configs**: a job's config as Hydra composes it twice (to check, then to run), and as lmexp does.
- **records**: a job's step with six terms, in the run's folder alone, with every step sent to
  W&B (offline), and with every tenth.
- **results**: jobs' results with their videos, one after the other and side by side.

Medians; a ratio above 1 says how many times longer the first takes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))

import recorded_runs

from lmexp.composition import conf_folder
from lmexp.config import validate
from lmexp.launching.job_configs import JobConfigs
from lmexp.recording import provenance
from lmexp.recording.finishing import Finishing
from lmexp.recording.recorder import Recorder
from lmexp.recording.tracker import Job, NoTracker, Tracker
from lmexp.recording.wandb_tracker import WandbTracker

TERMS = ("lpips", "landmarks", "coordinates", "identity", "noise", "prior")


def take(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def alternate(rounds: int, actions: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Seconds by name, a round of all after the other."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            times[name].append(action())
    return times


def time_configs(jobs: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a job."""
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        config = hydra.compose_config("config", ["seed=1,2"], run_mode=RunMode.MULTIRUN)
        words = [[f"loss.lpips.weight={number}", f"seed={number}"] for number in range(1, jobs + 1)]

        def as_hydra_does() -> None:
            for job in words:
                hydra.config_loader.load_sweep_config(config, job)
                validate(hydra.config_loader.load_sweep_config(config, job))

        def as_lmexp_does() -> None:
            configs = JobConfigs(hydra.config_loader, config)
            for number, job in enumerate(words):
                configs.request(job, number)

        as_lmexp_does()  # imports
        return alternate(
            rounds,
            {
                "hydra": lambda: take(as_hydra_does) / jobs,
                "lmexp": lambda: take(as_lmexp_does) / jobs,
            },
        )


def open_recorder(folder: Path, tracker: Tracker, side: int, steps: int, frames: int) -> Recorder:
    photo = recorded_runs.image_tensor(recorded_runs.astronaut(side))
    points = recorded_runs.face_landmarks(side)
    job = Job(folder, folder.name, folder.name, None, {})
    recorder = Recorder(job, tracker, steps=steps, image_every=0, video_frames=frames)
    recorder.start(look=photo, expression=photo, look_landmarks=points, expression_landmarks=points)
    return recorder


def time_records(root: Path, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step."""
    raw = {name: 1.23456789 / (place + 1) for place, name in enumerate(TERMS)}
    number = iter(range(1000))

    def record(tracker: Tracker) -> float:
        recorder = open_recorder(root / f"r{next(number)}", tracker, 64, steps, 0)

        def take_all() -> None:
            for step in range(steps):
                recorder.record_step(step, lr=0.1, loss=1.0, raw=raw, weighted=raw)

        spent = take(take_all) / steps
        recorder.interrupt(step=steps)
        return spent

    return alternate(
        rounds,
        {
            "folder alone": lambda: record(NoTracker()),
            "W&B, every step": lambda: record(WandbTracker(every=1)),
            "W&B, every tenth": lambda: record(WandbTracker(every=10)),
        },
    )


def time_results(
    root: Path, jobs: int, side: int, frames: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds a job."""
    number = iter(range(1000))
    image = recorded_runs.image_tensor(recorded_runs.astronaut(side))
    points = recorded_runs.face_landmarks(side)
    noise = [torch.randn(1, 2 ** (k // 2 + 2), 2 ** (k // 2 + 2)) for k in range(1, 18)]

    def project(folder: Path) -> Recorder:
        """Frames of a face that slowly turns and smiles."""
        recorder = open_recorder(folder, NoTracker(), side, frames, frames)
        shown = recorder.choose_side(side)
        for step in range(frames):
            turn, smile = 8 * step / frames, step / frames
            recorder.record_step(
                step,
                lr=0.1,
                loss=1.0,
                raw={},
                weighted={},
                picture=np.asarray(recorded_runs.astronaut(shown, turn=turn)),
                landmarks=recorded_runs.face_landmarks(shown, smile, turn).numpy(),
            )
        return recorder

    def finish(recorder: Recorder) -> None:
        recorder.finish(
            image=image, landmarks=points, ws=torch.zeros(18, 512), noise_bufs=noise, summary={}
        )

    def in_turn() -> float:
        recorders = [project(root / f"f{next(number)}") for _ in range(jobs)]
        return take(lambda: [finish(recorder) for recorder in recorders]) / jobs

    def side_by_side() -> float:
        recorders = [project(root / f"f{next(number)}") for _ in range(jobs)]

        def finish_all() -> None:
            with Finishing() as finishing:
                for recorder in recorders:
                    finishing.add(lambda recorder=recorder: finish(recorder), lambda: None)

        return take(finish_all) / jobs

    return alternate(rounds, {"one after the other": in_turn, "side by side": side_by_side})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=8, help="whose results are written")
    parser.add_argument("--configs", type=int, default=40, help="jobs whose configs are composed")
    parser.add_argument("--steps", type=int, default=1000, help="that are recorded")
    parser.add_argument("--side", type=int, default=1024, help="of the images, px")
    parser.add_argument("--frames", type=int, default=120, help="of a video")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        found = {
            "configs": time_configs(arguments.configs, arguments.rounds),
            "records": time_records(root, arguments.steps, arguments.rounds),
            "results": time_results(
                root, arguments.jobs, arguments.side, arguments.frames, arguments.rounds
            ),
        }
    for what, times in found.items():
        first = statistics.median(next(iter(times.values())))
        for name, seconds in times.items():
            middle = statistics.median(seconds)
            spread = f"{1e3 * min(seconds):.3g}–{1e3 * max(seconds):.3g}"
            print(f"{what:9}{name:22}{1e3 * middle:8.3g} ms ({spread}){first / middle:8.2f} ×")
    if arguments.out is not None:
        git = provenance.describe_git()
        about: dict[str, Any] = {
            "command": " ".join(["python", *sys.argv]),
            "machine": f"{platform.machine()}, {os.cpu_count()} processors",
            "versions": provenance.describe_versions(),
            "git": git.as_dict() if git else None,
            "seconds": found,
        }
        arguments.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
