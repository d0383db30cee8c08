"""Jobs: what was asked for, what an earlier run left of it, and what is left to do together."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lmexp import inputs
from lmexp.batch import State
from lmexp.config import Experiment
from lmexp.errors import LmexpError
from lmexp.faces.targets import AlignedFace
from lmexp.inputs import Source
from lmexp.recording.recorder import Recorder
from lmexp.recording.tracker import Job as TrackedJob
from lmexp.recording.tracker import NoTracker, Tracker

log = logging.getLogger("lmexp")


@dataclass(frozen=True)
class Request:
    """One job as it was asked for: its config, and the overrides that tell it from others."""

    config: Experiment
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of one job.

    Attributes:
        state: "skipped" if an earlier run had finished it.
        reason: why it failed or was interrupted, else empty.
        folder: None if the job could not even be named (a missing photo, say).
    """

    request: Request
    state: Literal["finished", "skipped", "failed", "interrupted"]
    folder: Path | None = None
    reason: str = ""
    summary: dict[str, Any] | None = None


Settle = Callable[[int, Outcome], None]
"""Told what became of a request, by its place among the requests, as soon as it is known."""


@dataclass(frozen=True)
class Plan:
    """What is left to do of some requests, and what is done together.

    Attributes:
        settled: what needs no work: finished by an earlier run, or impossible; by place.
        batches: places of the requests that are projected together.
        twins: place of a request -> place of the earlier request that is the same job.
        folders: where each request's results are or will be, by place.
    """

    settled: dict[int, Outcome]
    batches: list[tuple[int, ...]]
    twins: dict[int, int]
    folders: dict[int, Path]


@dataclass
class Job:
    """A job on its way.

    Attributes:
        run_id: hash of its config and of its photos' content; the folder's last part.
        faces: look and expression, once they are aligned.
        first_step: the step that it begins with, 0 or where an earlier run was stopped.
        state: what that run left for it.
    """

    request: Request
    look: Source
    expression: Source
    run_id: str
    folder: Path
    recorder: Recorder
    faces: tuple[AlignedFace, AlignedFace] | None = None
    first_step: int = 0
    state: State | None = None

    @classmethod
    def open(cls, request: Request, root: Path, sweep: str | None, tracker: Tracker) -> Job:
        """Name a job and find where an earlier, unfinished run of it was; nothing is written.

        Args:
            root: where the run folders are.
            sweep: name that groups the jobs in the tracker; None for a single run.

        Raises:
            LmexpError: an input cannot be had.
        """
        config = request.config
        look = inputs.find(config.inputs.look, "inputs.look")
        expression = inputs.find(config.inputs.expression, "inputs.expression")
        run_id = config.identity({"look": look.digest, "expression": expression.digest})
        folder = root / f"{look.label}+{expression.label}-{run_id}"
        recorder = Recorder(
            TrackedJob(
                folder=folder,
                run_id=run_id,
                # In a sweep, what tells this job from the others; it names the tracked run.
                label=" ".join((f"{look.label}+{expression.label}", *request.overrides)),
                group=sweep,
                config=config.plain(),
            ),
            tracker,
            steps=config.optimizer.steps,
            image_every=config.recording.image_every,
            video_frames=config.recording.video_frames,
        )
        job = cls(request, look, expression, run_id, folder, recorder)
        job.read_state()
        return job

    @property
    def config(self) -> Experiment:
        """What was asked for."""
        return self.request.config

    @property
    def label(self) -> str:
        """LOOK+EXPRESSION."""
        return f"{self.look.label}+{self.expression.label}"

    def read_state(self) -> None:
        """Find where an earlier, unfinished run was; the first step if it left nothing of use."""
        self.first_step, self.state = 0, None
        try:
            saved = self.recorder.load_state()
        except LmexpError as error:
            log.warning("%s; the job starts again from its first step", error)
            return
        if saved is not None:
            self.first_step, state = saved
            self.state = {k: value for k, value in state.items() if isinstance(value, Tensor)}

    def settled(self, take_over: bool) -> Outcome | None:
        """What became of the job in an earlier run, or in another process; None: to be run."""
        folder = self.recorder.folder
        try:
            status = folder.read_status()
            if status is not None and status.state == "finished":
                summary = folder.read_summary()
                reason = "an earlier run finished it"
                return Outcome(self.request, "skipped", self.folder, reason, summary)
        except LmexpError as error:
            return Outcome(self.request, "failed", self.folder, str(error))
        if status is None or take_over:
            return None
        if status.alive and status.pid != os.getpid():
            reason = f"process {status.pid} on {status.host} is at work on it; wait for it to end"
            return Outcome(self.request, "failed", self.folder, reason)
        return None


def plan(
    requests: Sequence[Request], root: Path, *, workers: int = 1, take_over: bool = False
) -> Plan:
    """What `runner.run` would do, without doing it; nothing is written.

    Args:
        workers: how many batches can run at a time; jobs are shared out among them.
    """
    return open_jobs(requests, root, None, NoTracker(), workers, take_over)[0]


def open_jobs(
    requests: Sequence[Request],
    root: Path,
    sweep: str | None,
    tracker: Tracker,
    workers: int,
    take_over: bool,
) -> tuple[Plan, dict[int, Job]]:
    """`plan`, and the jobs that are left to do, by place.

    Args:
        sweep: name that groups the jobs in the tracker; None for a single run.
        tracker: what their recorders mirror to.
    """
    made = Plan({}, [], {}, {})
    jobs: dict[int, Job] = {}
    groups: dict[str, list[int]] = defaultdict(list)
    seen: dict[str, int] = {}
    for index, request in enumerate(requests):
        try:
            job = Job.open(request, root, sweep, tracker)
        except LmexpError as error:
            made.settled[index] = Outcome(request, "failed", reason=str(error))
            continue
        made.folders[index] = job.folder
        if job.run_id in seen:
            made.twins[index] = seen[job.run_id]
            continue
        seen[job.run_id] = index
        if outcome := job.settled(take_over):
            made.settled[index] = outcome
            continue
        jobs[index] = job
        groups[f"{job.config.batch_key()}@{job.first_step}"].append(index)
    for members in groups.values():
        # No worker is idle while another has two jobs of a kind.
        share = -(-len(members) // workers)
        config = jobs[members[0]].config
        size = max(1, min(config.hardware.batch_limit // config.latent.starts, share))
        made.batches.extend(
            tuple(members[start : start + size]) for start in range(0, len(members), size)
        )
    return made, jobs
