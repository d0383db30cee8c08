"""What a tracker (W&B and its kin) has to offer, and the one that does nothing.

A tracker mirrors what the run folder already holds; so it may fail, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Job:
    """One job of a sweep, as trackers and recorders know it.

    Attributes:
        folder: its run folder.
        run_id: hash of its resolved configuration; the same command has the same id.
        label: its name for people, such as "outer_lip=5".
        group: the sweep it belongs to; None for a single run.
        config: its resolved configuration.
    """

    folder: Path
    run_id: str
    label: str
    group: str | None
    config: Mapping[str, Any]


class TrackedRun(Protocol):
    """One job's run in a tracker; any method may raise, which ends the mirroring only."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add numbers to the history at `step`."""
        ...

    def log_pictures(self, step: int, pictures: Mapping[str, NDArray[np.uint8] | Path]) -> None:
        """Add pictures at `step`: [H, W, 3], RGB, 0–255, or PNG files."""
        ...

    def log_video(self, step: int, path: Path) -> None:
        """Add the video file at `path` at `step`."""
        ...

    def finish(self, summary: Mapping[str, Any], *, ok: bool) -> None:
        """Write the summary and close the run, as a success or not."""
        ...


class Tracker(Protocol):
    """What conf/tracker/*.yaml builds: one object a sweep, which opens one run a job."""

    def open(self, job: Job) -> TrackedRun | None:
        """Begin or continue the job's run; None if nothing is to be mirrored.

        Raises:
            Exception: the tracker cannot start; the caller warns and goes on without it.
        """
        ...


class NoTracker:
    """Mirrors nothing; the run folder alone holds the results."""

    def open(self, job: Job) -> TrackedRun | None:
        """Nothing to open."""
        del job
        return None
