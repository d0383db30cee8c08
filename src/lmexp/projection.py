"""The inner loop: optimise latents until their images have the look and the expression.

Batch-first: N jobs run at once and are strangers to each other. Each owns its parameters,
its Adam moments and its random draws, so job k alone gives what job k gives in a batch.
Source: the projector of StyleGAN2 (arXiv 1912.04958, appendix D) with the landmark term
of L. Uzolas, "Facial landmark projection without training" (2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.latents import Latents, draw_normal, expand
from lmexp.losses.objective import Losses, Objective
from lmexp.losses.protocol import Candidate, Context
from lmexp.schedule import Schedule

State = dict[str, Tensor]
"""One job's parameters and Adam moments, all that a resumed run needs beside the step."""


@dataclass(frozen=True)
class Step:
    """What the callback is told after each optimisation step.

    Attributes:
        step: 0-based index of the step that was just taken.
        learning_rates: per job, the one it was taken with.
        losses: of the images before the step was taken.
        candidate: those images and latents, detached from nothing: do not keep it.
        alive: per job, False once its losses or gradients have stopped being finite. A
            dead job stays at its last good latents and takes no further step.
        finished: per job, True if it had taken its last step before this one, after a plateau.
        states: gives job k's `State` after the step, on demand, as copies.
    """

    step: int
    learning_rates: tuple[float, ...]
    losses: Losses
    candidate: Candidate
    alive: tuple[bool, ...]
    finished: tuple[bool, ...]
    states: Callable[[int], State]


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

    Returns:
        The latents after the last step, [N, ...] as `start`.
    """
    jobs = [
        _Job(start, k, schedule, moves, resume[k] if resume else None) for k in range(len(seeds))
    ]
    optimizer = torch.optim.Adam(
        [{"params": job.parameters} for job in jobs],
        lr=schedule.learning_rate,
        betas=(schedule.beta1, schedule.beta2),
        foreach=True,
    )
    for job in jobs:
        job.restore_moments(optimizer)
    alive = [not (resume and "dead" in resume[k]) for k in range(len(jobs))]

    for step in range(first_step, schedule.steps):
        finished = [job.position(step) >= schedule.steps for job in jobs]
        if all(done or not lives for done, lives in zip(finished, alive, strict=True)):
            break
        rates = [schedule.learning_rate_at(job.position(step)) for job in jobs]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

        latents = _stack(jobs)
        noise = torch.stack(
            [
                draw_normal(job.ws.shape, seed, "w", step)
                for job, seed in zip(jobs, seeds, strict=True)
            ]
        )
        scale = latents.ws.new_tensor(
            [
                [[schedule.noise_at(job.position(step)) * context.latent_statistics.w_std]]
                for job in jobs
            ]
        )
        if moves is not None:
            scale = scale * moves
        ws = expand(latents.ws + scale * noise.to(latents.ws), context.generator.num_ws)
        candidate = Candidate(
            images=context.generator.synthesis(ws, latents.noise_bufs),
            ws=expand(latents.ws, context.generator.num_ws),
            noise_bufs=latents.noise_bufs,
            step=step,
            heatmap_network=context.heatmap_network,
            seeds=tuple(seeds),
        )
        # A job's jump to the ramp-down comes after this ramp, so the factor is that of all.
        losses = objective(candidate, schedule.landmark_factor_at(step))
        if not losses.total.requires_grad:
            raise LmexpError(
                f"loss: none of the terms ({', '.join(losses.raw)}) depends on what is optimised"
            )
        optimizer.zero_grad(set_to_none=True)
        losses.total.sum().backward()  # type: ignore[no-untyped-call]

        totals, finite = _read(losses.total, jobs)
        for k, job in enumerate(jobs):
            if alive[k] and not finished[k] and not finite[k]:
                alive[k] = False
                job.return_to_last_good()
            if alive[k] and not finished[k]:
                job.remember()
            else:
                job.forget_gradients()  # Adam passes over parameters without a gradient
        optimizer.step()
        for k, job in enumerate(jobs):
            if alive[k] and not finished[k]:
                job.normalise_noise()
                job.watch_for_plateau(step, totals[k])
        if callback is not None:
            callback(
                Step(
                    step,
                    tuple(rates),
                    losses,
                    candidate,
                    tuple(alive),
                    tuple(finished),
                    lambda k: jobs[k].state(optimizer),
                )
            )

    with torch.no_grad():
        return _stack(jobs)


class _Job:
    """One job's own: its latents, its noise maps, its place in the schedule."""

    def __init__(
        self,
        start: Latents,
        k: int,
        schedule: Schedule,
        moves: Tensor | None,
        resume: State | None,
    ) -> None:
        values = [start.ws[k], *(noise[k] for noise in start.noise_bufs)]
        if resume is not None:
            values = [resume[f"parameter_{i}"].to(value) for i, value in enumerate(values)]
        self.parameters = [value.detach().clone().requires_grad_() for value in values]
        self._resume = resume
        self._last_good = [parameter.detach().clone() for parameter in self.parameters]
        if moves is not None:  # Adam leaves in place whatever has never had a gradient but 0
            self.ws.register_hook(lambda gradient: gradient * moves)  # type: ignore[no-untyped-call]
        self._schedule = schedule
        watched = resume if schedule.patience is not None else None
        self._totals: list[float] = watched["totals"].tolist() if watched else []
        self._skipped = int(watched["skipped"]) if watched else 0

    @property
    def ws(self) -> Tensor:
        return self.parameters[0]

    @property
    def noise_maps(self) -> list[Tensor]:
        return self.parameters[1:]

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

    def restore_moments(self, optimizer: torch.optim.Adam) -> None:
        if self._resume is None:
            return
        for i, parameter in enumerate(self.parameters):
            names = ("exp_avg", "exp_avg_sq", "step")
            if f"step_{i}" not in self._resume:  # it has never taken a step
                continue
            moments = {name: self._resume[f"{name}_{i}"].clone() for name in names}
            optimizer.state[parameter] = {
                name: value if name == "step" else value.to(parameter)
                for name, value in moments.items()
            }
        self._resume = None

    def state(self, optimizer: torch.optim.Adam) -> State:
        state: State = {}
        for i, parameter in enumerate(self.parameters):
            state[f"parameter_{i}"] = parameter.detach().cpu().clone()
            for name, value in optimizer.state[parameter].items():
                state[f"{name}_{i}"] = value.detach().cpu().clone()
        if self._schedule.patience is not None:
            state["totals"] = torch.tensor(self._totals, dtype=torch.float64)
            state["skipped"] = torch.tensor(self._skipped)
        return state

    def remember(self) -> None:
        with torch.no_grad():
            for kept, parameter in zip(self._last_good, self.parameters, strict=True):
                kept.copy_(parameter)

    def return_to_last_good(self) -> None:
        with torch.no_grad():
            for kept, parameter in zip(self._last_good, self.parameters, strict=True):
                parameter.copy_(kept)

    def forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def normalise_noise(self) -> None:
        """Zero mean and unit variance, so that the noise stays noise (appendix D)."""
        with torch.no_grad():
            for noise in self.noise_maps:
                noise -= noise.mean()
                noise *= noise.square().mean().rsqrt()


def _stack(jobs: Sequence[_Job]) -> Latents:
    """The jobs' parameters as one batch."""
    rows = list(zip(*(job.parameters for job in jobs), strict=True))
    ws, *noise_bufs = (torch.stack(parameters) for parameters in rows)
    return Latents(ws=ws, noise_bufs=tuple(noise_bufs))


def _read(total: Tensor, jobs: Sequence[_Job]) -> tuple[list[float], list[bool]]:
    """Per job: its loss, and whether that and all gradients are finite; one transfer."""
    gradients = torch.stack(
        [
            torch.stack([p.grad.sum() for p in job.parameters if p.grad is not None]).sum()
            for job in jobs
        ]
    )
    totals, sums = torch.stack([total.detach().to(gradients), gradients]).tolist()
    finite = [math.isfinite(a) and math.isfinite(b) for a, b in zip(totals, sums, strict=True)]
    return totals, finite
