"""Weights & Biases as a mirror of the run folder."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lmexp.recording.tracker import Job, TrackedRun

_log = logging.getLogger(__name__)


class WandbTracker:
    """One W&B run a job, grouped by sweep, under the id of the job's configuration.

    Offline runs lie in the job's folder; `wandb sync` sends them whenever wanted.

    Args:
        mode: offline (nothing leaves the machine), online, or disabled.
        project: W&B project.
        entity: W&B user or team; None for the account's own.
        every: steps between those whose numbers W&B gets, the last one always; metrics.jsonl in
            the run's folder has every step. W&B takes as long for a step's as a GPU for an image.
        timeout: seconds that starting or closing a run may take before it is given up.
    """

    def __init__(
        self,
        mode: Literal["offline", "online", "disabled"] = "offline",
        project: str = "lmexp",
        entity: str | None = None,
        every: Annotated[int, Field(gt=0)] = 10,
        timeout: Annotated[float, Field(gt=0)] = 60.0,
    ) -> None:
        self.mode = mode
        self.project = project
        self.entity = entity
        self.every = every
        self.timeout = timeout

    def open(self, job: Job) -> TrackedRun | None:
        """Begin the job's W&B run; one that cannot be online is kept offline, and says so.

        Raises:
            Exception: W&B is not installed or cannot start.
        """
        if self.mode == "disabled":
            return None
        if self.mode == "online":
            try:
                return self._begin(job, "online")
            except Exception as error:
                _log.warning(
                    "W&B cannot be reached (%s): %s is recorded offline; `wandb sync %s` sends it",
                    _first_line(error),
                    job.label,
                    job.folder / "wandb" / "offline-run-*",
                )
        return self._begin(job, "offline")

    def _begin(self, job: Job, mode: Literal["offline", "online"]) -> WandbRun:
        import wandb  # half a second that only its users pay

        def begin() -> Any:
            # Without this, init would ask for a key on the terminal and wait.
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                raise RuntimeError("no W&B account on this machine: run `wandb login` first")
            return wandb.init(
                project=self.project,
                entity=self.entity,
                id=job.run_id,
                name=job.label,
                group=job.group,
                config=dict(job.config),
                dir=str(job.folder),
                mode=mode,
                resume="allow",
                reinit="create_new",  # the jobs of a batch run side by side
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    disable_git=True,
                    disable_code=True,
                    x_disable_stats=True,  # else every job of a batch polls the same machine
                    init_timeout=self.timeout,
                    finish_timeout=self.timeout,
                ),
            )

        run = _within(self.timeout, "starting W&B", begin)
        return WandbRun(run, every=self.every, timeout=self.timeout)


class WandbRun:
    """One job's W&B run.

    Args:
        run: what `wandb.init` returned.
        every: steps between those whose numbers it gets.
        timeout: seconds that closing it may take.
    """

    def __init__(self, run: Any, *, every: int, timeout: float) -> None:
        self._run = run
        self._every = every
        self._timeout = timeout
        self._left: tuple[int, dict[str, float]] | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add numbers to the history at `step`, or keep them until it is known whether they are
        the last."""
        self._left = (step, dict(values))
        if step % self._every == 0:
            self._log_left()

    def _log_left(self) -> None:
        if self._left is not None:
            step, values = self._left
            self._run.log(values, step=step)
            self._left = None

    def log_pictures(self, step: int, pictures: Mapping[str, NDArray[np.uint8] | Path]) -> None:
        """Add pictures at `step`: [H, W, 3], RGB, 0–255, or PNG files."""
        import wandb

        made = {
            name: wandb.Image(str(picture) if isinstance(picture, Path) else picture)
            for name, picture in pictures.items()
        }
        self._run.log(made, step=step)

    def log_video(self, step: int, path: Path) -> None:
        """Add the video file at `path`, as it is, at `step`."""
        import wandb

        self._run.log({path.stem + "_video": wandb.Video(str(path), format="mp4")}, step=step)

    def finish(self, summary: Mapping[str, Any], *, ok: bool) -> None:
        """Write the summary and close the run.

        Raises:
            TimeoutError: W&B did not close in time; what it has written stays on the disk.
        """

        def finish() -> None:
            self._log_left()
            self._run.summary.update(dict(summary))
            self._run.finish(exit_code=0 if ok else 1)

        _within(self._timeout, "closing W&B", finish)


def _within(seconds: float, what: str, action: Callable[[], Any]) -> Any:
    """Run `action` and give up waiting for it after `seconds`.

    W&B's own timeouts do not cover a service process that hangs; a daemon thread does, and
    it does not keep the interpreter from ending.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(action())
        except BaseException as error:  # handed to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"{what} took more than {seconds:g} s")
    if failure:
        raise RuntimeError(_first_line(failure[0])) from failure[0]
    return outcome[0]


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
