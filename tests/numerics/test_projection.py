"""The inner loop on a tiny generator with noise maps: jobs are strangers, stops leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp.errors import LmexpError
from lmexp.generators.tiny_random import TinyRandom
from lmexp.latents import Latents, measure, start_at_mean
from lmexp.losses.landmarks import LandmarkHeatmaps
from lmexp.losses.noise import NoiseRegularization
from lmexp.losses.objective import Objective
from lmexp.losses.prior import LatentPrior
from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets
from lmexp.projection import State, Step, project
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


@pytest.fixture(scope="module")
def context() -> Context:
    generator = TinyRandom(resolution=32, dim=16, channels=8).double()
    statistics = measure(generator.float(), 200, 0, CPU)
    doubled = type(statistics)(
        statistics.samples.double(), statistics.w_avg.double(), statistics.w_std
    )
    return Context(generator.double(), StubHeatmaps().double(), doubled)


@pytest.fixture(scope="module")
def targets() -> Targets:
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
    first_step: int = 0,
    resume: Sequence[State] | None = None,
    callback: Callable[[Step], None] | None = None,
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
        first_step=first_step,
        resume=resume,
        callback=callback,
    )


@pytest.mark.parametrize("space", ["w", "w_plus"])
def test_a_job_alone_is_the_job_in_a_batch(context: Context, targets: Targets, space: str) -> None:
    """Different looks, expressions, seeds, λ and landmark weights in one batch."""
    together = run(context, targets, space=space)
    for job in range(3):
        alone = run(context, targets, [job], space=space)
        torch.testing.assert_close(alone.ws[0], together.ws[job], rtol=1e-9, atol=1e-10)
        for one, many in zip(alone.noise_bufs, together.noise_bufs, strict=True):
            torch.testing.assert_close(one[0], many[job], rtol=1e-9, atol=1e-10)
    assert not torch.allclose(together.ws[0], together.ws[1], atol=1e-3)


def test_the_order_of_jobs_does_not_matter(context: Context, targets: Targets) -> None:
    forward, backward = run(context, targets), run(context, targets, [2, 1, 0])
    torch.testing.assert_close(forward.ws, backward.ws.flip(0), rtol=1e-9, atol=1e-10)


def test_the_loss_falls(context: Context, targets: Targets) -> None:
    totals: list[Tensor] = []
    schedule = Schedule(steps=40, learning_rate=0.05, noise_factor=0)
    run(
        context,
        targets,
        schedule=schedule,
        callback=lambda step: totals.append(step.losses.total.detach()),
    )
    assert (totals[-1] < 0.9 * totals[0]).all()


def test_w_keeps_one_style_and_w_plus_one_per_layer(context: Context, targets: Targets) -> None:
    num_ws = context.generator.num_ws
    assert run(context, targets, space="w").ws.shape == (3, 1, 16)
    ws = run(context, targets, space="w_plus").ws
    assert ws.shape == (3, num_ws, 16)
    assert (ws[:, 0] - ws[:, 1]).abs().max() > 1e-3

    shown: list[Tensor] = []
    run(context, targets, space="w", callback=lambda step: shown.append(step.candidate.ws))
    assert shown[-1].shape == (3, num_ws, 16)
    assert torch.equal(shown[-1][:, 0], shown[-1][:, -1])


@pytest.mark.parametrize("stop_at", [1, 5, 7])
def test_stopped_and_resumed_is_bit_for_bit_never_stopped(
    context: Context, targets: Targets, stop_at: int
) -> None:
    class EnoughError(Exception):
        pass

    saved: list[State] = []
    whole: list[State] = []

    def stop(step: Step) -> None:
        if step.step + 1 == stop_at:
            saved.extend(step.states(k) for k in range(3))
            raise EnoughError

    def note(into: list[State]) -> Callable[[Step], None]:
        def callback(step: Step) -> None:
            if step.step + 1 == SCHEDULE.steps:
                into.extend(step.states(k) for k in range(3))

        return callback

    with pytest.raises(EnoughError):
        run(context, targets, callback=stop)
    untouched = {name: value.clone() for name, value in saved[0].items()}
    resumed_states: list[State] = []
    resumed = run(context, targets, first_step=stop_at, resume=saved, callback=note(resumed_states))
    uninterrupted = run(context, targets, callback=note(whole))
    assert torch.equal(resumed.ws, uninterrupted.ws)
    for one, other in zip(resumed.noise_bufs, uninterrupted.noise_bufs, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(resumed_states, whole, strict=True):
        assert one.keys() == other.keys() and any(name.startswith("exp_avg_sq") for name in one)
        assert all(torch.equal(one[name], other[name]) for name in one)
    # A state is a copy: going on from it does not change it.
    assert all(torch.equal(saved[0][name], untouched[name]) for name in untouched)


def test_noise_maps_are_normal_after_every_step(context: Context, targets: Targets) -> None:
    seen = 0

    def check(step: Step) -> None:
        nonlocal seen
        for k in range(3):
            state = step.states(k)
            for i in range(1, 1 + len(context.generator.noise_shapes)):
                noise = state[f"parameter_{i}"]
                assert noise.mean().abs() < 1e-12
                assert noise.square().mean().item() == pytest.approx(1, rel=1e-9)
                seen += 1

    run(context, targets, callback=check)
    assert seen == SCHEDULE.steps * 3 * len(context.generator.noise_shapes)


@pytest.mark.parametrize("nan_at", [0, 1, 4])
def test_nan_stops_that_job_at_its_last_good_latents_and_no_other(
    context: Context, targets: Targets, nan_at: int
) -> None:
    states: dict[int, State] = {}
    alive: list[tuple[bool, ...]] = []

    def note(step: Step) -> None:
        alive.append(step.alive)
        states[step.step] = step.states(1)

    healthy: dict[int, State] = {}

    def remember(step: Step) -> None:
        healthy[step.step] = step.states(1)

    final = run(context, targets, terms={**TERMS, "colours": Colours({1: nan_at})}, callback=note)
    expected = run(context, targets, callback=remember)
    assert alive == [(True, step < nan_at, True) for step in range(SCHEDULE.steps)]
    for job in (0, 2):
        assert torch.equal(final.ws[job], expected.ws[job])
    # The latents of the last finite loss: those before step nan_at - 1 was taken.
    if nan_at >= 2:
        assert torch.equal(final.ws[1], healthy[nan_at - 2]["parameter_0"])
    assert torch.isfinite(final.ws[1]).all()
    assert torch.equal(states[SCHEDULE.steps - 1]["parameter_0"], final.ws[1])


def test_ends_early_when_no_job_is_left(context: Context, targets: Targets) -> None:
    steps: list[int] = []
    terms = {**TERMS, "colours": Colours({0: 2})}
    run(context, targets, [0], terms=terms, callback=lambda step: steps.append(step.step))
    assert steps == [0, 1, 2]


def test_the_state_of_a_job_that_died_at_once_can_be_resumed(
    context: Context, targets: Targets
) -> None:
    states: list[State] = []
    terms = {**TERMS, "colours": Colours({0: 0})}
    run(context, targets, [0], terms=terms, callback=lambda step: states.append(step.states(0)))
    again = run(context, targets, [0], first_step=0, resume=states[:1])
    assert torch.equal(again.ws, run(context, targets, [0]).ws)


def test_terms_that_look_at_nothing_optimised_are_refused(
    context: Context, targets: Targets
) -> None:
    class Constant(Colours):
        def bind(self, context: Context, targets: Targets) -> BoundTerm:
            return lambda candidate: torch.ones(len(candidate.images), dtype=torch.float64)

    with pytest.raises(LmexpError, match=r"colours.* depends on what is optimised"):
        run(context, targets, terms={"colours": Constant()})


def test_prior_sees_latents_without_the_exploration_noise(
    context: Context, targets: Targets
) -> None:
    seen: list[Candidate] = []
    run(context, targets, space="w", callback=lambda step: seen.append(step.candidate))
    w_avg = context.latent_statistics.w_avg
    torch.testing.assert_close(seen[0].ws, w_avg.expand_as(seen[0].ws))
    quiet = context.generator.synthesis(seen[0].ws, seen[0].noise_bufs)
    assert (seen[0].images - quiet).abs().max() > 1e-4  # the images do see it
