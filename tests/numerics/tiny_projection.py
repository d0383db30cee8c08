"""Three unlike jobs on a tiny generator with noise maps, in float64 and in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp.batch import State
from lmexp.generators.tiny_random import TinyRandom
from lmexp.latents import Latents, mark_moving, measure, start_at_mean
from lmexp.losses.landmarks import LandmarkHeatmaps
from lmexp.losses.noise import NoiseRegularization
from lmexp.losses.objective import Objective
from lmexp.losses.prior import LatentPrior
from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets
from lmexp.projection import Step, project
from lmexp.schedule import Schedule

CPU = torch.device("cpu")
SCHEDULE = Schedule(steps=8, learning_rate=0.05)
SEEDS = (3, 5, 8)


class StubHeatmaps(nn.Module):
    """68 heat maps from one random linear map of the colours: differentiable, and cheap."""

    weights_sha256 = "stub"
    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.register_buffer("kernel", torch.randn(68, 3, 1, 1, generator=random))

    def forward(self, images: Tensor) -> Tensor:
        return torch.sigmoid(F.conv2d(F.adaptive_avg_pool2d(images, 64), self.kernel))


class Colours:
    """Mean square difference of the pixels: the simplest term of the look."""

    weight = 1.0
    needs_expression: ClassVar[bool] = False

    def __init__(self, nan_at: dict[int, int] | None = None) -> None:
        self.bound = 0
        self.nan_at = nan_at or {}

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        del context
        self.bound += 1
        look = targets.look

        def evaluate(candidate: Candidate) -> Tensor:
            values = (candidate.images - look).square().mean((1, 2, 3))
            for job, step in self.nan_at.items():
                if candidate.step >= step and job < len(values):
                    values = values * torch.where(torch.arange(len(values)) == job, torch.nan, 1.0)
            return values

        return evaluate


TERMS = {
    "colours": Colours(),
    "landmarks": LandmarkHeatmaps(),
    "noise": NoiseRegularization(),
    "prior": LatentPrior(),
}
WEIGHTS = (
    {"colours": 1.0, "landmarks": 0.1, "noise": 1e3, "prior": 0.01},
    {"colours": 3.0, "landmarks": 0.0, "noise": 1e2, "prior": 0.0},
    {"colours": 0.0, "landmarks": 0.5, "noise": 0.0, "prior": 0.05},
)


def make_context() -> Context:
    generator = TinyRandom(resolution=32, dim=16, channels=8).double()
    statistics = measure(generator.float(), 200, 0, CPU)
    doubled = type(statistics)(
        statistics.samples.double(), statistics.w_avg.double(), statistics.w_std
    )
    return Context(generator.double(), StubHeatmaps().double(), doubled)


def make_targets() -> Targets:
    random = torch.Generator().manual_seed(2)
    images = torch.rand(2, 3, 3, 32, 32, generator=random, dtype=torch.float64) * 2 - 1
    points = torch.rand(2, 3, 68, 2, generator=random, dtype=torch.float64) * 32
    weights = torch.rand(3, 68, generator=random, dtype=torch.float64)
    return Targets(images[0], points[0], images[1], points[1], weights)


def rows(targets: Targets, jobs: Sequence[int]) -> Targets:
    chosen = list(jobs)
    assert targets.expression is not None
    assert targets.expression_landmarks is not None and targets.landmark_weights is not None
    return Targets(
        targets.look[chosen],
        targets.look_landmarks[chosen],
        targets.expression[chosen],
        targets.expression_landmarks[chosen],
        targets.landmark_weights[chosen],
    )


def run(
    context: Context,
    targets: Targets,
    jobs: Sequence[int] = (0, 1, 2),
    *,
    space: str = "w_plus",
    terms: dict[str, object] | None = None,
    schedule: Schedule = SCHEDULE,
    moving_ws: tuple[int, int] | None = None,
    first_step: int = 0,
    resume: Sequence[State] | None = None,
    callback: Callable[[Step], None] | None = None,
    looks_at: Callable[[int], bool] = lambda step: True,
) -> Latents:
    seeds = [SEEDS[job] for job in jobs]
    start = start_at_mean(
        context.generator, context.latent_statistics, space=space, seeds=seeds, device=CPU
    )
    start = Latents(start.ws.double(), tuple(noise.double() for noise in start.noise_bufs))
    objective = Objective.bind(
        terms or TERMS,  # type: ignore[arg-type]
        [WEIGHTS[job] for job in jobs],
        context,
        rows(targets, jobs),
    )
    return project(
        context,
        objective,
        start,
        schedule,
        seeds=seeds,
        moves=mark_moving(moving_ws, start.ws),
        first_step=first_step,
        resume=resume,
        callback=callback,
        looks_at=looks_at,
    )
