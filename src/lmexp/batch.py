"""A batch of jobs as tensors that stay in place, and one step of it.

Row k of every tensor is job k's: its parameters, its Adam moments, its random draws. `Batch.take`
is the same few operations at every step and waits for nothing; what changes from step to step is
written into the tensors before (`Batch.stage`), and what the host wants to know is copied behind it
(`Batch.launched`). So a step can be a CUDA graph (`lmexp.replay`), and the next one can be launched
before this one's losses are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmexp import adam
from lmexp.draws import Draws, overwrite
from lmexp.errors import LmexpError
from lmexp.landmarks import groups
from lmexp.landmarks.framing import average
from lmexp.latents import Latents, draw_normal, expand
from lmexp.losses.objective import Losses, Objective
from lmexp.losses.protocol import Candidate, Context
from lmexp.schedule import Schedule

State = dict[str, Tensor]
"""One job's parameters and Adam moments, all that a resumed run needs beside the step."""


@dataclass(frozen=True)
class Launch:
    """A step that the device takes, or has taken.

    Attributes:
        positions: per job, where in the schedule it takes the step.
        moving: per job, whether it takes it, as far as that was known.
        counts: steps that each job had taken before.
        report: one row for each raw term, each weighted term, the total, and whether that or a
            gradient was not finite; [.., N], on the CPU.
        done: when that has arrived; None: it has.
        names: of the terms, in the report's order.
    """

    step: int
    positions: Sequence[int]
    moving: Sequence[bool]
    counts: Sequence[int]
    report: Tensor
    done: torch.cuda.Event | None
    names: Sequence[str]

    def read(self) -> tuple[Losses, list[bool]]:
        """The step's losses, and per job whether one of them or a gradient was not finite."""
        if self.done is not None:
            self.done.synchronize()
        raw, weighted = self.report[:-2].chunk(2)
        losses = Losses(
            raw=dict(zip(self.names, raw, strict=True)),
            weighted=dict(zip(self.names, weighted, strict=True)),
            total=self.report[-2],
        )
        return losses, [value != 0 for value in self.report[-1].tolist()]


class Batch:
    """What a step reads and writes, in tensors that stay in place; row k is job k's.

    Attributes:
        draws: the steps' random numbers.
        counts: steps that each job has taken, or that are launched.
    """

    def __init__(
        self,
        context: Context,
        objective: Objective,
        start: Latents,
        schedule: Schedule,
        seeds: Sequence[int],
        moves: Tensor | None,
    ) -> None:
        ws = start.ws
        self._context = context
        self._objective = objective
        self._schedule = schedule
        self._moves = moves
        values = [value.detach() for value in (ws, *start.noise_bufs)]
        self._parameters = [Parameter(value, context, schedule) for value in values]
        self.draws = Draws(seeds, ws.device)
        self.counts = [0] * len(seeds)
        self._numbers = ws.new_zeros(len(Numbers._fields), len(seeds))
        self._landmark_factors = (
            ws.new_ones(groups.NUM_LANDMARKS) if schedule.group_factors else None
        )
        self._ahead: tuple[tuple[Any, ...], Tensor] = ((), self._numbers)
        # A job whose step went wrong takes no other, also one that is launched before it is known.
        self._dead = torch.zeros(len(seeds), dtype=torch.bool, device=ws.device)
        # See `Launch`.
        self._report = ws.new_zeros(2 * len(objective.names) + 2, len(seeds))
        self._average = context.acceleration.fuse(average)

    def restore(self, states: Sequence[State]) -> None:
        """Go on from each job's state."""
        for k, state in enumerate(states):
            for i, parameter in enumerate(self._parameters):
                parameter.restore(k, {name: state.get(f"{name}_{i}") for name in _SAVED})
            # A job that has never taken a step has no moments.
            self.counts[k] = int(state.get("step_0", 0))

    def state(self, k: int) -> State:
        """Job k's, as copies on the CPU."""
        state: State = {}
        for i, parameter in enumerate(self._parameters):
            for name, value in parameter.row(k).items():
                if name == "parameter" or self.counts[k]:
                    state[f"{name}_{i}"] = value.cpu().clone()
            if self.counts[k]:
                state[f"step_{i}"] = torch.tensor(float(self.counts[k]))
        return state

    def latents(self) -> Latents:
        """Where the jobs are, as copies."""
        ws, *noise_bufs = (parameter.value.clone() for parameter in self._parameters)
        return Latents(ws=ws, noise_bufs=tuple(noise_bufs))

    def prepare(self, step: int, positions: Sequence[int], moving: Sequence[bool]) -> None:
        """What the host has to compute for a step to come, while the device is at work.

        Args:
            positions: of that step, as far as can be foreseen.
            moving: the jobs that take this step; those that it breaks are not known yet.
        """
        self.draws.prepare(step)
        still = [m and p < self._schedule.steps for m, p in zip(moving, positions, strict=True)]
        self._ahead = self._compute(step, positions, still)

    def stage(self, step: int, positions: Sequence[int], moving: Sequence[bool]) -> None:
        """Bring a step's numbers to the device."""
        known, numbers = self._ahead
        if known != (step, tuple(positions), tuple(moving), tuple(self.counts)):
            _, numbers = self._compute(step, positions, moving)
        overwrite(self._numbers, numbers)
        if self._landmark_factors is not None:
            factors = dict.fromkeys(groups.GROUPS, 1.0) | self._schedule.group_factors_at(step)
            overwrite(self._landmark_factors, groups.expand(factors))
        self.draws.move_to(step)

    def _compute(
        self, step: int, positions: Sequence[int], moving: Sequence[bool]
    ) -> tuple[tuple[Any, ...], Tensor]:
        """A step's `Numbers` on the CPU, and before them what they are of."""
        schedule, w_std = self._schedule, self._context.latent_statistics.w_std
        rows = []
        for position, moves, count in zip(positions, moving, self.counts, strict=True):
            rate = schedule.learning_rate_at(position) if moves else 0.0
            size, root = adam.step_sizes(rate, count + 1, schedule.beta1, schedule.beta2)
            noise = schedule.noise_at(position) * w_std
            # A job's jump to the ramp-down comes after this ramp, so its factors are those of all.
            factor = schedule.landmark_factor_at(step)
            rows.append(Numbers(noise, size, root, float(moves), factor))
        numbers = torch.tensor(rows, dtype=torch.float64).T
        return (step, tuple(positions), tuple(moving), tuple(self.counts)), numbers

    def launched(self, step: int, positions: Sequence[int], moving: Sequence[bool]) -> Launch:
        """What the host keeps of a step that it has just staged and launched."""
        report = self._report.to("cpu", non_blocking=True, copy=True)
        done = None
        if self._report.is_cuda:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self._report.device))
        before = tuple(self.counts)
        self.counts = [count + moves for count, moves in zip(before, moving, strict=True)]
        names = self._objective.names
        return Launch(step, tuple(positions), tuple(moving), before, report, done, names)

    def take(self, step: int) -> Candidate:
        """One step on the device; nothing in here waits for it."""
        context, numbers = self._context, Numbers(*self._numbers)
        leaves = [p.value.clone().requires_grad_() for p in self._parameters]
        latents = Latents(ws=leaves[0], noise_bufs=tuple(leaves[1:]))
        rendered = latents.ws
        if self._schedule.noise_factor:
            scale = numbers.noise[:, None, None]
            scale = scale if self._moves is None else scale * self._moves
            rendered = latents.ws + scale * self.draws.get("w", self._draw_noise)
        candidate = Candidate(
            images=context.generator.synthesis(
                expand(rendered, context.generator.num_ws), latents.noise_bufs
            ),
            ws=expand(latents.ws, context.generator.num_ws),
            noise_bufs=latents.noise_bufs,
            step=step,
            heatmap_network=context.heatmap_network,
            seeds=self.draws.seeds,
            draws=self.draws,
            landmark_factors=self._landmark_factors,
            average=self._average,
        )
        staged = self._schedule.landmark_factor != 1
        losses = self._objective(candidate, numbers.landmark_factor if staged else 1.0)
        if not losses.total.requires_grad:
            raise LmexpError(
                f"loss: none of the terms ({', '.join(losses.raw)}) depends on what is optimised"
            )
        found = torch.autograd.grad(
            losses.total, leaves, torch.ones_like(losses.total), allow_unused=True
        )
        with torch.no_grad():
            gradients = [
                torch.zeros_like(leaf) if gradient is None else gradient
                for leaf, gradient in zip(leaves, found, strict=True)
            ]
            if self._moves is not None:  # Adam leaves in place whose gradient was never but 0
                gradients[0] = gradients[0] * self._moves
            broken = adam.any_not_finite([losses.total, *gradients]) | self._dead
            self._dead.copy_(broken)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.advance(gradient, numbers, broken)
            terms = (*losses.raw.values(), *losses.weighted.values())
            self._report.copy_(torch.stack([*terms, losses.total, broken.to(losses.total)]))
        return candidate

    def _draw_noise(self, step: int) -> Tensor:
        shape = self._parameters[0].value.shape
        if self._schedule.noise_at(step) == 0:  # and so it is at every later position
            return torch.zeros(shape)
        return torch.stack([draw_normal(shape[1:], seed, "w", step) for seed in self.draws.seeds])


class Numbers(NamedTuple):
    """A step's numbers, each [N]: the host computes them, the device reads them."""

    noise: Any
    """Standard deviation of the exploration noise."""
    size: Any
    root: Any
    """See `adam.step_sizes`."""
    moving: Any
    """1 for a job that takes the step, 0 for one that has died or finished."""
    landmark_factor: Any


_SAVED = ("parameter", "exp_avg", "exp_avg_sq")
"""A parameter's tensors in a `State`, by the names that torch.optim.Adam gives them."""


class Parameter:
    """One optimised tensor [N, …] and what Adam keeps beside it."""

    def __init__(self, start: Tensor, context: Context, schedule: Schedule) -> None:
        self.value = start.clone(memory_format=torch.contiguous_format)
        self._mean, self._square = torch.zeros_like(self.value), torch.zeros_like(self.value)
        # Before the last step: where a job returns to whose step went wrong.
        self._last_good = self.value.clone()
        self._betas = (schedule.beta1, schedule.beta2)
        # ws are [N, L, w_dim], noise maps [N, 1, h, w].
        self._is_noise = start.ndim == 4
        self._advance = _kernel() if start.is_cuda else context.acceleration.fuse(advance)

    def restore(self, k: int, saved: Mapping[str, Tensor | None]) -> None:
        for place, name in zip((self.value, self._mean, self._square), _SAVED, strict=True):
            value = saved[name]
            if value is not None:
                place[k] = value.to(place)
        self._last_good[k] = self.value[k]

    def row(self, k: int) -> dict[str, Tensor]:
        tensors = (self.value, self._mean, self._square)
        return {name: tensor[k] for name, tensor in zip(_SAVED, tensors, strict=True)}

    def advance(self, gradient: Tensor, numbers: Numbers, broken: Tensor) -> None:
        moments = (self._mean, self._square)
        args = (gradient, numbers.size, numbers.root, numbers.moving, broken)
        self._advance(self.value, *moments, self._last_good, *args, self._betas, self._is_noise)


def advance(
    value: Tensor,
    mean: Tensor,
    square: Tensor,
    last_good: Tensor,
    gradient: Tensor,
    size: Tensor,
    root: Tensor,
    moving: Tensor,
    broken: Tensor,
    betas: tuple[float, float],
    is_noise: bool,
) -> None:
    """Adam's step in place, for each job that moves; one with a broken gradient goes back."""
    rows = (-1,) + (1,) * (value.ndim - 1)
    moves = (moving != 0) & ~broken
    goes, returns = moves.view(rows), ((moving != 0) & broken).view(rows)
    stepped, new_mean, new_square = adam.advance(value, gradient, mean, square, size, root, betas)
    if is_noise:
        # Zero mean and unit variance, so that the noise stays noise (appendix D).
        stepped = stepped - stepped.mean((1, 2, 3), keepdim=True)
        stepped = stepped * stepped.square().mean((1, 2, 3), keepdim=True).rsqrt()
    stepped = torch.where(goes, stepped, torch.where(returns, last_good, value))
    last_good.copy_(torch.where(goes, value, last_good))
    value.copy_(stepped)
    mean.copy_(torch.where(goes, new_mean, mean))
    square.copy_(torch.where(goes, new_square, square))


def _kernel() -> Callable[..., None]:
    # Triton comes with PyTorch's CUDA builds alone.
    from lmexp.adam_triton import advance

    return advance
