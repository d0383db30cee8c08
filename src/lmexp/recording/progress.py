"""How far the projection is, for the person who waits."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressBar:
    """A bar with step, losses and time left; where nobody looks, one line at start and end.

    Use it as a context manager.

    Args:
        steps: steps in all.
        first_step: steps that an earlier, interrupted run has done.
        title: which jobs these are, such as `job_title` gives.
        quiet: say nothing at all.
        stream: where to write; standard error unless told.
    """

    def __init__(
        self,
        steps: int,
        *,
        first_step: int = 0,
        title: str = "",
        quiet: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.steps = steps
        self.first_step = first_step
        self.title = title or "projection"
        self._done = first_step
        self._losses = ""
        self._quiet = quiet
        self._stream = sys.stderr if stream is None else stream
        console = Console(file=self._stream)
        self._drawn = console.is_terminal and not quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._drawn,
            refresh_per_second=4,
        )

    def __enter__(self) -> ProgressBar:
        self._began = time.monotonic()
        self._task = self._bar.add_task(
            self.title, total=self.steps, completed=self.first_step, losses=""
        )
        self._bar.start()
        if not self._drawn:
            resumed = f" from step {self.first_step}" if self.first_step else ""
            self._say(f"{self.title}: {self.steps} steps{resumed}")
        return self

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        """Show that `step` (0-based) is done and what its losses were."""
        self._done = step + 1
        self._losses = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        self._bar.update(self._task, completed=self._done, losses=self._losses)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if not self._drawn:
            seconds = time.monotonic() - self._began
            done = f"{self._done}/{self.steps} steps in {seconds:.1f} s"
            self._say(f"{self.title}: {done}  {self._losses}".rstrip())

    def _say(self, line: str) -> None:
        if not self._quiet:
            print(line, file=self._stream, flush=True)


def job_title(first: int, count: int, total: int) -> str:
    """Which jobs of a sweep run now: "job 2/6", "jobs 1–4/6"; empty for a single run.

    Args:
        first: number of the first of them, from 1.
        count: how many run side by side.
        total: how many the sweep has.
    """
    if total == 1:
        return ""
    if count == 1:
        return f"job {first}/{total}"
    return f"jobs {first}–{first + count - 1}/{total}"
