"""Several starts of one job, of which the best result is kept.

A projection ends in the minimum nearest to its start. Rows of a batch are strangers, so a job's
starts are rows of it: job k's are n·k … n·k + n − 1, the first of them the job's own start, the
others scattered around it. All of them share the job's seed, hence its random views, so their
losses can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lmexp.batch import State
from lmexp.latents import Latents, draw_normal, expand
from lmexp.losses.objective import Losses, Objective
from lmexp.losses.protocol import Candidate, Context, Targets
from lmexp.projection import Step

T = TypeVar("T")

VIEWS = 8
"""Random views over which the results are compared; terms without jitter see the same in all."""


@dataclass(frozen=True)
class Starts:
    """How many starts each job has; with one, nothing here changes anything.

    Attributes:
        count: n ≥ 1.
        spread: standard deviation of the others around the first, in units of w_std.
    """

    count: int
    spread: float

    def repeat(self, values: Sequence[T]) -> list[T]:
        """One value per job -> one per row."""
        return [value for value in values for _ in range(self.count)]

    def repeat_targets(self, targets: Targets) -> Targets:
        """Row k for job k -> a row for each of its starts."""
        rows = {
            name: None if value is None else value.repeat_interleave(self.count, 0)
            for name, value in vars(targets).items()
        }
        return Targets(**rows)  # type: ignore[arg-type]

    def scatter(
        self, start: Latents, seeds: Sequence[int], w_std: float, moves: Tensor | None
    ) -> Latents:
        """Each job's starts.

        Args:
            start: [N, …], the first of each job.
            seeds: one per job; start r's draw derives from (seed, r) alone.
            moves: as in `projection.project`: what stays there is not scattered either.

        Returns:
            [N · n, …].
        """
        ws = start.ws.repeat_interleave(self.count, 0)
        for row in range(len(ws)):
            job, r = divmod(row, self.count)
            if r:
                draw = draw_normal(ws.shape[1:], seeds[job], "start", r).to(ws)
                ws[row] += self.spread * w_std * (draw if moves is None else draw * moves)
        noise_bufs = tuple(noise.repeat_interleave(self.count, 0) for noise in start.noise_bufs)
        return Latents(ws=ws, noise_bufs=noise_bufs)

    def split(self, state: State) -> list[State]:
        """A job's saved state -> its rows' (see `follow`)."""
        if self.count == 1:
            return [state]
        return [
            {
                name.removeprefix(f"start{r}."): value
                for name, value in state.items()
                if name.startswith(f"start{r}.")
            }
            for r in range(self.count)
        ]

    def follow(self, callback: Callable[[Step], None]) -> Callable[[Step], None]:
        """A callback of rows that tells `callback` of jobs: each as its start that is ahead.

        A job is alive while one of its starts is, and finished when none takes a step; its state
        is that of all of them.
        """
        if self.count == 1:
            return callback
        return lambda step: callback(self._of_jobs(step))

    def choose(
        self,
        objective: Objective,
        context: Context,
        final: Latents,
        *,
        seeds: Sequence[int],
        first_view: int,
    ) -> tuple[Latents, list[dict[str, Any] | None]]:
        """Each job's best result: that of the least mean total over `VIEWS` views.

        Args:
            objective: of the rows.
            final: [N · n, …].
            seeds: one per row.
            first_view: a step that no row has taken; the views are those of the steps from it on.

        Returns:
            [N, …], and per job the `totals` of its starts and which was `chosen`; None with one
            start.
        """
        if self.count == 1:
            return final, [None] * len(seeds)
        ws = expand(final.ws, context.generator.num_ws)
        totals = final.ws.new_zeros(len(seeds))
        with torch.no_grad():
            images = context.generator.synthesis(ws, final.noise_bufs)
            for view in range(first_view, first_view + VIEWS):
                candidate = Candidate(
                    images=images,
                    ws=ws,
                    noise_bufs=final.noise_bufs,
                    step=view,
                    heatmap_network=context.heatmap_network,
                    seeds=tuple(seeds),
                )
                totals += objective(candidate).total / VIEWS
        values = totals.tolist()
        rows = self._leaders(values, [True] * len(values))
        chosen: list[dict[str, Any] | None] = [
            {
                "totals": values[k * self.count : (k + 1) * self.count],
                "chosen": row - k * self.count,
            }
            for k, row in enumerate(rows)
        ]
        noise_bufs = tuple(noise[rows] for noise in final.noise_bufs)
        return Latents(ws=final.ws[rows], noise_bufs=noise_bufs), chosen

    def _leaders(self, totals: Sequence[float], alive: Sequence[bool]) -> list[int]:
        """Per job, its row of least total among those alive; its first if there is none."""

        def rank(row: int) -> float:
            return totals[row] if alive[row] and math.isfinite(totals[row]) else math.inf

        return [min(self._rows(k), key=rank) for k in range(len(totals) // self.count)]

    def _rows(self, job: int) -> range:
        return range(job * self.count, (job + 1) * self.count)

    def _of_jobs(self, step: Step) -> Step:
        rows = self._leaders(step.losses.total.tolist(), step.alive)
        jobs = [self._rows(k) for k in range(len(rows))]
        losses = Losses(
            raw={name: value[rows] for name, value in step.losses.raw.items()},
            weighted={name: value[rows] for name, value in step.losses.weighted.items()},
            total=step.losses.total[rows],
        )
        candidate = step.candidate
        if candidate is not None:
            candidate = replace(
                candidate,
                images=candidate.images[rows],
                ws=candidate.ws[rows],
                noise_bufs=tuple(noise[rows] for noise in candidate.noise_bufs),
                seeds=tuple(candidate.seeds[row] for row in rows),
            )

        def states(k: int) -> State:
            joined: State = {}
            for r, row in enumerate(jobs[k]):
                joined |= {f"start{r}.{name}": t for name, t in step.states(row).items()}
                if not step.alive[row]:  # a resumed job must not revive it
                    joined[f"start{r}.dead"] = torch.tensor(True)
            return joined

        alive = [any(step.alive[row] for row in job) for job in jobs]
        still = [any(step.alive[row] and not step.finished[row] for row in job) for job in jobs]
        return Step(
            step.step,
            tuple(step.learning_rates[row] for row in rows),
            losses,
            candidate,
            tuple(alive),
            tuple(a and not s for a, s in zip(alive, still, strict=True)),
            states,
        )
