"""Several starts a job: rows that are strangers, one of which is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tiny_projection import (
    CPU,
    SCHEDULE,
    SEEDS,
    TERMS,
    WEIGHTS,
    Colours,
    make_context,
    make_targets,
    rows,
    run,
)

from lmexp.batch import State
from lmexp.latents import Latents, mark_moving, start_at_mean
from lmexp.losses.objective import Objective
from lmexp.losses.protocol import Context, Targets
from lmexp.projection import Step, project
from lmexp.starts import Starts

THREE = Starts(3, 0.1)


@pytest.fixture(scope="module")
def context() -> Context:
    return make_context()


@pytest.fixture(scope="module")
def targets() -> Targets:
    return make_targets()


def begin(context: Context, jobs: Sequence[int]) -> Latents:
    start = start_at_mean(
        context.generator,
        context.latent_statistics,
        space="w_plus",
        seeds=[SEEDS[job] for job in jobs],
        device=CPU,
    )
    return Latents(start.ws.double(), tuple(noise.double() for noise in start.noise_bufs))


def run_starts(
    context: Context,
    targets: Targets,
    jobs: Sequence[int],
    *,
    starts: Starts = THREE,
    terms: dict[str, object] | None = None,
    first_step: int = 0,
    resume: Sequence[State] = (),
    callback: Callable[[Step], None] = lambda step: None,
) -> tuple[Latents, Latents, list[dict[str, object] | None]]:
    """All rows' latents, each job's, and what was chosen."""
    objective = Objective.bind(
        terms or TERMS,  # type: ignore[arg-type]
        starts.repeat([WEIGHTS[job] for job in jobs]),
        context,
        starts.repeat_targets(rows(targets, jobs)),
    )
    seeds = [SEEDS[job] for job in jobs]
    final = project(
        context,
        objective,
        starts.scatter(begin(context, jobs), seeds, context.latent_statistics.w_std, None),
        SCHEDULE,
        seeds=starts.repeat(seeds),
        first_step=first_step,
        resume=[state for job in resume for state in starts.split(job)] or None,
        callback=starts.follow(callback),
    )
    best, chosen = starts.choose(
        objective, context, final, seeds=starts.repeat(seeds), first_view=SCHEDULE.steps
    )
    return final, best, chosen


def test_the_first_start_is_the_jobs_own_and_the_others_lie_around_it(context: Context) -> None:
    start = begin(context, [0, 1])
    scattered = THREE.scatter(start, [3, 5], 2.0, None)
    assert scattered.ws.shape == (6, *start.ws.shape[1:])
    assert torch.equal(scattered.ws[[0, 3]], start.ws)
    away = scattered.ws - start.ws.repeat_interleave(3, 0)
    assert away[[1, 2, 4, 5]].std().item() == pytest.approx(0.1 * 2.0, rel=0.15)
    assert len({round(float(row.sum()), 9) for row in away[[1, 2, 4, 5]]}) == 4
    assert torch.equal(scattered.noise_bufs[0][4], start.noise_bufs[0][1])
    # A job's starts are its own, whatever the batch.
    alone = THREE.scatter(begin(context, [1]), [5], 2.0, None)
    assert torch.equal(alone.ws, scattered.ws[3:])
    # What the projection does not move is not scattered.
    moves = mark_moving((1, 2), start.ws)
    strayed = THREE.scatter(start, [3, 5], 2.0, moves).ws - start.ws.repeat_interleave(3, 0)
    assert (strayed.abs().amax((0, 2)) > 0).nonzero().flatten().tolist() == [1]


def test_one_start_is_as_if_there_were_none(context: Context, targets: Targets) -> None:
    one, start = Starts(1, 0.1), begin(context, [0, 1])
    assert torch.equal(one.scatter(start, [3, 5], 2.0, None).ws, start.ws)
    assert one.repeat([1, 2]) == [1, 2]
    assert torch.equal(one.repeat_targets(targets).look, targets.look)
    state = {"parameter_0": torch.ones(1)}
    assert one.split(state) == [state]

    def callback(step: Step) -> None:
        del step

    assert one.follow(callback) is callback
    objective = Objective({}, torch.zeros(0, 1))
    assert one.choose(objective, context, start, seeds=[3, 5], first_view=8) == (start, [None] * 2)


def test_the_best_of_the_starts_is_kept(context: Context, targets: Targets) -> None:
    final, best, chosen = run_starts(context, targets, [0, 1, 2])
    first = run(context, targets)  # the jobs with one start each
    torch.testing.assert_close(final.ws[::3], first.ws, rtol=1e-9, atol=1e-10)
    picks = []
    for k, choice in enumerate(chosen):
        assert choice is not None
        totals, pick = choice["totals"], choice["chosen"]
        assert isinstance(totals, list) and isinstance(pick, int)
        assert len(totals) == 3 and totals[pick] == min(totals) < max(totals)
        assert torch.equal(best.ws[k], final.ws[3 * k + pick])
        assert torch.equal(best.noise_bufs[1][k], final.noise_bufs[1][3 * k + pick])
        picks.append(pick)
        alone = run_starts(context, targets, [k])
        torch.testing.assert_close(alone[1].ws[0], best.ws[k], rtol=1e-9, atol=1e-10)
    assert set(picks) != {0}  # else the test could not tell the first from the best


def test_a_step_tells_of_each_jobs_start_that_is_ahead(context: Context, targets: Targets) -> None:
    all_rows: list[Step] = []
    of_jobs: list[Step] = []

    class Both(Starts):
        def follow(self, callback: Callable[[Step], None]) -> Callable[[Step], None]:
            told = super().follow(callback)

            def tell(step: Step) -> None:
                all_rows.append(step)
                told(step)

            return tell

    run_starts(context, targets, [0, 2], starts=Both(3, 0.1), callback=of_jobs.append)
    for step, row_step in zip(of_jobs, all_rows, strict=True):
        totals = row_step.losses.total.reshape(2, 3)
        torch.testing.assert_close(step.losses.total, totals.amin(1))
        for k, r in enumerate(totals.argmin(1).tolist()):
            row = 3 * k + r
            assert torch.equal(step.candidate.images[k], row_step.candidate.images[row])
            assert torch.equal(step.candidate.ws[k], row_step.candidate.ws[row])
            assert step.losses.raw["prior"][k] == row_step.losses.raw["prior"][row]
        assert step.candidate.seeds == (SEEDS[0], SEEDS[2])
        assert step.alive == (True, True) and step.finished == (False, False)
        assert len(step.learning_rates) == 2


@pytest.mark.parametrize("nan_rows", [{}, {1: 2}])
def test_stopped_and_resumed_is_never_stopped(
    context: Context, targets: Targets, nan_rows: dict[int, int]
) -> None:
    """A start that has died stays dead, even where the fault does not come again."""
    saved: list[State] = []

    def save(step: Step) -> None:
        assert step.alive == (True, True)  # the job lives on in its other starts
        if step.step == 4:
            saved.extend(step.states(k) for k in range(2))

    terms = {**TERMS, "colours": Colours(nan_rows)}
    whole, best, chosen = run_starts(context, targets, [0, 1], terms=terms, callback=save)
    again, best_again, _ = run_starts(context, targets, [0, 1], first_step=5, resume=saved)
    assert torch.equal(again.ws, whole.ws)
    if not nan_rows:
        assert torch.equal(best_again.ws, best.ws)
    else:
        assert chosen[0] is not None and chosen[0]["chosen"] != 1  # its total is not a number


def test_a_job_dies_with_its_last_start(context: Context, targets: Targets) -> None:
    alive: list[tuple[bool, ...]] = []
    terms = {**TERMS, "colours": Colours({0: 1, 1: 3, 2: 2})}
    run_starts(
        context, targets, [0, 1], terms=terms, callback=lambda step: alive.append(step.alive)
    )
    assert alive == [(step < 3, True) for step in range(SCHEDULE.steps)]
