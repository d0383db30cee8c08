"""The inner loop: optimise latents until their images have the look and the expression.

Batch-first: N jobs run at once and are strangers to each other, each with its own place in the
schedule. So job k alone gives what job k gives in a batch (`lmexp.batch`), and a step is the same
few operations whatever N: on a GPU one CUDA graph (`lmexp.replay`). The GPU does not wait for the
host: later steps are launched before a step's losses are read, and what must be decided at once is
decided on the device.
Source: the projector of StyleGAN2 (arXiv 1912.04958, appendix D) with the landmark term
of L. Uzolas, "Facial landmark projection without training" (2021).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lmexp.batch import Batch, Launch, State
from lmexp.latents import Latents
from lmexp.losses.objective import Losses, Objective
from lmexp.losses.protocol import Candidate, Context
from lmexp.replay import Replay
from lmexp.schedule import Schedule

_AHEAD = 3
"""Steps that a GPU may be ahead of the host: it goes on while that writes records, or is kept from
its work for some milliseconds, as on machines that are shared."""


@dataclass(frozen=True)
class Step:
    """What the callback is told after each optimisation step.

    Attributes:
        step: 0-based index of the step that was just taken.
        learning_rates: per job, the one it was taken with.
        losses: of the images before the step was taken, on the CPU.
        candidate: those images and latents; the next step may overwrite them. None: it is under
            way, see `looks_at` of `project`.
        alive: per job, False once its losses or gradients have stopped being finite. A
            dead job stays at its last good latents and takes no further step.
        finished: per job, True if it had taken its last step before this one, after a plateau.
        states: gives job k's `State` after the step, on demand, as copies; while the next step is
            under way, a dead job's alone.
    """

    step: int
    learning_rates: tuple[float, ...]
    losses: Losses
    candidate: Candidate | None
    alive: tuple[bool, ...]
    finished: tuple[bool, ...]
    states: Callable[[int], State]

    @property
    def at_rest(self) -> bool:
        """Whether the next step is not under way yet."""
        return self.candidate is not None


def project(
    context: Context,
    objective: Objective,
    start: Latents,
    schedule: Schedule,
    *,
    seeds: Sequence[int],
    moves: Tensor | None = None,
    first_step: int = 0,
    resume: Sequence[State] | None = None,
    callback: Callable[[Step], None] | None = None,
    looks_at: Callable[[int], bool] = lambda step: True,
) -> Latents:
    """Minimise `objective` over the latents and the generator's noise maps.

    Args:
        start: where row k starts; ws [N, 1, w_dim] searches W, [N, num_ws, w_dim] W+.
        seeds: one per job; step t's exploration noise derives from (seed, t) alone.
        moves: [L, 1], 0 for each of ws that stays as it started, 1 for each that is optimised;
            None: all are.
        first_step: the step to go on from, with `resume` holding each job's state. One that
            has `dead` in it takes no further step.
        callback: called after every step; an exception it raises ends the projection.
        looks_at: whether the callback will read a step's candidate and states, and not its losses
            alone; asked when the step has been launched, and before the callback is told of it. On
            a GPU the steps after one that it does not look at are under way then.

    Returns:
        The latents after the last step, [N, ...] as `start`.
    """
    jobs = [_Job(schedule, resume[k] if resume else None) for k in range(len(seeds))]
    batch = Batch(context, objective, start, schedule, seeds, moves)
    if resume is not None:
        batch.restore(resume)
    take = Replay(batch, start.ws.device) if context.acceleration.graphs else batch.take
    # A plateau decides where in the schedule a job takes its next step.
    runs_ahead = _works_aside(start.ws.device) and schedule.patience is None

    def settle(launch: Launch, candidate: Candidate | None) -> None:
        losses, broken = launch.read()
        totals = losses.total.tolist()
        took = [k for k, job in enumerate(jobs) if launch.moving[k] and job.alive]
        for k in took:
            if broken[k]:
                jobs[k].alive = False
                batch.counts[k] = launch.counts[k]
            else:
                jobs[k].watch_for_plateau(launch.step, totals[k])
        if callback is None or not took:
            return
        callback(
            Step(
                launch.step,
                tuple(schedule.learning_rate_at(position) for position in launch.positions),
                losses,
                candidate,
                tuple(job.alive for job in jobs),
                tuple(position >= schedule.steps for position in launch.positions),
                lambda k: batch.state(k) | jobs[k].state(),
            )
        )

    under_way: deque[Launch] = deque()
    with _beside(start.ws.device):
        for step in range(first_step, schedule.steps):
            positions = [job.position(step) for job in jobs]
            moving = [
                job.alive and position < schedule.steps
                for job, position in zip(jobs, positions, strict=True)
            ]
            if not any(moving):
                break
            batch.stage(step, positions, moving)
            candidate = take(step)
            launch = batch.launched(step, positions, moving)
            if step + 1 < schedule.steps:
                batch.prepare(step + 1, [job.position(step + 1) for job in jobs], moving)
            rests = step + 1 == schedule.steps or not runs_ahead or looks_at(step)
            while len(under_way) > (0 if rests else _AHEAD - 1):
                settle(under_way.popleft(), None)
            if rests:
                settle(launch, candidate)
            else:
                under_way.append(launch)
        for launch in under_way:
            settle(launch, None)
    return batch.latents()


def _works_aside(device: torch.device) -> bool:
    """Whether the host is free while the device takes a step."""
    return device.type == "cuda"


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """What holds while a GPU takes steps: the host computes on one thread, and at the end, however
    it comes, waits for what is under way, which must not outlive what it works on.

    The host has little to do, and PyTorch shares a copy of 300 kB among all cores. Beside an H200
    whose host others used, too, waiting for the last of 16 threads took 6.6 ms a step, longer than
    the GPU needed for 8 jobs; alone it took 0.07 ms.
    """
    if not _works_aside(device):
        yield
        return
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class _Job:
    """One job's place in the schedule."""

    def __init__(self, schedule: Schedule, resume: State | None) -> None:
        self.alive = not (resume and "dead" in resume)
        self._schedule = schedule
        watched = resume if schedule.patience is not None else None
        self._totals: list[float] = watched["totals"].tolist() if watched else []
        self._skipped = int(watched["skipped"]) if watched else 0

    def position(self, step: int) -> int:
        """Where in the schedule the job takes `step`: a plateau lets it skip some."""
        return step + self._skipped

    def watch_for_plateau(self, step: int, total: float) -> None:
        """After a step: on a plateau, what is left is the ramp-down."""
        schedule, coming = self._schedule, step + 1
        if schedule.patience is None or self._skipped or step < schedule.settled_at:
            return
        self._totals = [*self._totals, total][-2 * schedule.patience :]
        if coming < schedule.rampdown_at and schedule.is_plateau(self._totals):
            self._skipped = schedule.rampdown_at - coming

    def state(self) -> State:
        if self._schedule.patience is None:
            return {}
        return {
            "totals": torch.tensor(self._totals, dtype=torch.float64),
            "skipped": torch.tensor(self._skipped),
        }
