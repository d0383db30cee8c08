"""What a sweep hands to an engine: batches of jobs; and what an engine gives back: outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lmexp.jobs import Request, Settle
from lmexp.stopping import StopRequest


@dataclass(frozen=True)
class Batch:
    """Jobs that are projected together, in one process on one device. Can be pickled.

    Attributes:
        places: the jobs' places in the sweep.
        requests: the jobs, in the same order.
        root: where the run folders are made; absolute, so that every host means the same.
        sweep: name that groups the jobs in the tracker.
        cwd: the folder that relative paths of photos and checkpoints start from.
        done: how many jobs come before these, for people.
        total: how many jobs the sweep has.
    """

    places: tuple[int, ...]
    requests: tuple[Request, ...]
    root: Path
    sweep: str
    cwd: Path
    done: int
    total: int

    def without(self, settled: set[int]) -> Batch:
        """The jobs whose places are not in `settled`."""
        kept = [k for k, place in enumerate(self.places) if place not in settled]
        return Batch(
            tuple(self.places[k] for k in kept),
            tuple(self.requests[k] for k in kept),
            self.root,
            self.sweep,
            self.cwd,
            self.done,
            self.total,
        )


class Engine(Protocol):
    """Where batches are computed: here, in worker processes, on a cluster."""

    def width(self) -> int:
        """How many batches are computed at a time; jobs are shared out among so many.

        Raises:
            LmexpError: the engine cannot be reached, or a package that it needs is missing.
        """
        ...

    def run(self, batches: Sequence[Batch], settle: Settle, stop: StopRequest) -> None:
        """Compute all batches.

        A job that nothing is told of counts as interrupted if `stop` was asked, else as failed.

        Args:
            settle: to be told each job's outcome, by its place in the sweep, once it is known.
            stop: asked by Ctrl-C and SIGTERM; jobs are then to save their states and end.

        Raises:
            DiskFullError: no more results can be written.
        """
        ...
