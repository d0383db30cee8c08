"""Parts that fail on purpose, as components for the command line: `_target_: faulty_parts.…`."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from torch import Tensor

from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets
from lmexp.recording.tracker import Job, NoTracker, TrackedRun


class LostTracker(NoTracker):
    """A tracker whose service is gone after the first job's first steps."""

    def open(self, job: Job) -> TrackedRun | None:
        """A run that breaks at its third step."""
        return _LostRun()


class _LostRun:
    def log(self, step: int, values: object) -> None:
        if step == 2:
            raise ConnectionError("the tracker's host is gone")

    def log_pictures(self, step: int, pictures: object) -> None: ...
    def log_video(self, step: int, path: Path) -> None: ...
    def finish(self, summary: object, *, ok: bool) -> None: ...


class Deadly:
    """A loss term that kills its process (SIGKILL) at one step of the jobs of one seed.

    Args:
        weight: as for every term.
        seed: whose jobs die.
        step: when.
        times: how often, counted by files in `folder`; later attempts live.
        folder: where deaths are counted.
        error: raise an exception of nobody's making instead.
    """

    needs_expression = True  # so it is left alone while the look is inverted

    def __init__(
        self, weight: float, seed: int, step: int, times: int, folder: str, error: bool
    ) -> None:
        self.weight = weight
        self.seed, self.step, self.times = seed, step, times
        self.folder, self.error = Path(folder), error

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        """Nothing to prepare."""
        return self._measure

    def _measure(self, candidate: Candidate) -> Tensor:
        if self.seed in candidate.seeds and candidate.step == self.step:
            if self.error:
                raise RuntimeError("a kernel nobody has seen")
            self.folder.mkdir(exist_ok=True)
            deaths = len(list(self.folder.iterdir()))
            if deaths < self.times:
                (self.folder / str(deaths)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(candidate.images.shape[0]) + 0 * candidate.ws.flatten(1).sum(1)
