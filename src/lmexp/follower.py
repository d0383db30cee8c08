"""What happens between two steps: every job's record, its saved state, a request to stop."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence

import torch

from lmexp.jobs import Job, Outcome, Settle
from lmexp.landmarks.decoding import decode
from lmexp.projection import Step
from lmexp.recording.progress import ProgressBar
from lmexp.stopping import Interrupted, StopRequest


class Follower:
    """Hands every step of a batch to its recorders, saves states, answers a request to stop.

    Args:
        members: the batch's jobs, row by row, and their places among the requests.
        bar: shows the steps and the batch's mean losses.
        settled: places that have their outcome already; `settle` adds to them.
        settle: told what became of a job that fails or is stopped here.
        stop: asked after every step.
    """

    def __init__(
        self,
        members: Sequence[tuple[int, Job]],
        bar: ProgressBar,
        settled: Container[int],
        settle: Settle,
        stop: StopRequest,
    ) -> None:
        self._members = members
        self._bar = bar
        self._settled = settled
        self._settle = settle
        self._stop = stop
        self._saved_at = time.monotonic()

    def __call__(self, step: Step) -> None:
        """Record `step`.

        Raises:
            Interrupted: a stop was asked for; every state is saved.
            DiskFullError, LmexpError: the numbers or a state cannot be written.
        """
        numbers = _read_losses(step)
        for k, (index, job) in enumerate(self._members):
            if index in self._settled or step.finished[k]:
                continue
            raw, weighted, total = numbers[k]
            if not step.alive[k]:
                self._bury(index, job, step, k, raw)
                continue
            self._record(job, step, k, raw, weighted, total)
        means = {
            name: sum(job[1][name] for job in numbers) / len(numbers) for name in numbers[0][1]
        }
        self._bar.update(step.step, means)
        self._save_or_stop(step)

    def _record(
        self,
        job: Job,
        step: Step,
        k: int,
        raw: dict[str, float],
        weighted: dict[str, float],
        total: float,
    ) -> None:
        image = landmarks = None
        if job.recorder.wants_image(step.step):
            image = step.candidate.images[k].detach()
            with torch.no_grad():
                heatmaps = step.candidate.heatmaps[k : k + 1].detach()
                landmarks = decode(heatmaps, image.shape[-1])[0]
        job.recorder.record_step(
            step.step,
            lr=step.learning_rates[k],
            loss=total,
            raw=raw,
            weighted=weighted,
            image=image,
            landmarks=landmarks,
        )

    def _bury(self, index: int, job: Job, step: Step, k: int, raw: dict[str, float]) -> None:
        bad = [name for name, value in raw.items() if value != value or abs(value) == float("inf")]
        what = f"loss term {', '.join(bad)}" if bad else "a gradient"
        reason = (
            f"{what} stopped being finite at step {step.step}; the last good state is saved; "
            "try a smaller optimizer.learning_rate or weight"
        )
        job.recorder.fail(reason, step=step.step, state=step.states(k))
        self._settle(index, Outcome(job.request, "failed", job.folder, reason))

    def _save_or_stop(self, step: Step) -> None:
        stop = self._stop.requested
        every = self._members[0][1].config.recording.save_every_seconds
        if not stop and time.monotonic() - self._saved_at < every:
            return
        for k, (index, job) in enumerate(self._members):
            if index in self._settled:
                continue
            if stop:
                job.recorder.interrupt(step=step.step + 1, state=step.states(k))
                reason = f"stopped after step {step.step + 1}; its state is saved"
                self._settle(index, Outcome(job.request, "interrupted", job.folder, reason))
            else:
                job.recorder.save_state(step.step + 1, step.states(k))
        self._saved_at = time.monotonic()
        if stop:
            raise Interrupted


def _read_losses(step: Step) -> list[tuple[dict[str, float], dict[str, float], float]]:
    """Per job: raw terms, weighted terms, total; one transfer from the device."""
    names = list(step.losses.raw)
    rows = [*step.losses.raw.values(), *step.losses.weighted.values(), step.losses.total]
    table = torch.stack([row.detach() for row in rows]).T.tolist()
    count = len(names)
    return [
        (
            dict(zip(names, values[:count], strict=True)),
            dict(zip(names, values[count:-1], strict=True)),
            values[-1],
        )
        for values in table
    ]
