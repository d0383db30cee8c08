"""What happens between two steps: every job's record, its saved state, a request to stop."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lmexp.jobs import Job, Outcome, Settle
from lmexp.landmarks.decoding import decode
from lmexp.projection import Step
from lmexp.recording.images import shrink, to_pictures
from lmexp.recording.progress import ProgressBar
from lmexp.recording.run_folder import Picture
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

    def looks_at(self, step: int) -> bool:
        """Whether more than the losses of a step is wanted: pictures, or every job's state."""
        # The jobs of a batch differ in nothing that decides when they want pictures.
        return self._is_due() or self._members[0][1].recorder.wants_picture(step)

    def __call__(self, step: Step) -> None:
        """Record `step`.

        Raises:
            Interrupted: a stop was asked for; every state is saved.
            DiskFullError, LmexpError: the numbers or a state cannot be written.
        """
        numbers = _read_losses(step)
        shown = self._show(step)
        for k, (index, job) in enumerate(self._members):
            if index in self._settled or step.finished[k]:
                continue
            raw, weighted, total = numbers[k]
            if not step.alive[k]:
                self._bury(index, job, step, k, raw)
                continue
            picture, landmarks = shown[k]
            job.recorder.record_step(
                step.step,
                lr=step.learning_rates[k],
                loss=total,
                raw=raw,
                weighted=weighted,
                picture=picture,
                landmarks=landmarks,
            )
        means = {
            name: sum(job[1][name] for job in numbers) / len(numbers) for name in numbers[0][1]
        }
        self._bar.update(step.step, means)
        if step.at_rest and self._is_due():
            self._save_or_stop(step)

    @torch.no_grad()
    def _show(self, step: Step) -> Sequence[tuple[Picture | None, NDArray[np.float32] | None]]:
        """Each job's picture and the landmarks on it, if they are wanted; all at once, because
        each of them alone takes as many launches."""
        recorder, candidate = self._members[0][1].recorder, step.candidate
        if candidate is None or not recorder.wants_picture(step.step):
            return [(None, None)] * len(self._members)
        side = recorder.choose_side(candidate.images.shape[-1])
        landmarks = decode(candidate.heatmaps.detach(), side).float().cpu().numpy()
        return list(zip(to_pictures(shrink(candidate.images, side)), landmarks, strict=True))

    def _bury(self, index: int, job: Job, step: Step, k: int, raw: dict[str, float]) -> None:
        bad = [name for name, value in raw.items() if value != value or abs(value) == float("inf")]
        what = f"loss term {', '.join(bad)}" if bad else "a gradient"
        reason = (
            f"{what} stopped being finite at step {step.step}; the last good state is saved; "
            "try a smaller optimizer.learning_rate or weight"
        )
        job.recorder.fail(reason, step=step.step, state=step.states(k))
        self._settle(index, Outcome(job.request, "failed", job.folder, reason))

    def _is_due(self) -> bool:
        every = self._members[0][1].config.recording.save_every_seconds
        return self._stop.requested or time.monotonic() - self._saved_at >= every

    def _save_or_stop(self, step: Step) -> None:
        stop = self._stop.requested
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
    """Per job: raw terms, weighted terms, total."""
    names = list(step.losses.raw)
    rows = [*step.losses.raw.values(), *step.losses.weighted.values(), step.losses.total]
    table = torch.stack(rows).T.tolist()
    count = len(names)
    return [
        (
            dict(zip(names, values[:count], strict=True)),
            dict(zip(names, values[count:-1], strict=True)),
            values[-1],
        )
        for values in table
    ]
