"""The inner loop on a tiny generator with noise maps: jobs are strangers, stops leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import tiny_projection
import torch
from tiny_projection import SCHEDULE, TERMS, WEIGHTS, Colours, make_context, make_targets, run
from torch import Tensor

from lmexp import projection
from lmexp.batch import Batch, State
from lmexp.errors import LmexpError
from lmexp.landmarks.groups import GROUPS
from lmexp.latents import Latents
from lmexp.losses.coordinates import LandmarkCoordinates
from lmexp.losses.landmarks import LandmarkHeatmaps
from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets, Term
from lmexp.projection import Step
from lmexp.schedule import Schedule


@pytest.fixture(scope="module")
def context() -> Context:
    return make_context()


@pytest.fixture(scope="module")
def targets() -> Targets:
    return make_targets()


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


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that the device has been given so far."""
    steps: list[int] = []
    take = Batch.take

    def taken(batch: Batch, step: int) -> Candidate:
        steps.append(step)
        return take(batch, step)

    monkeypatch.setattr(Batch, "take", taken)
    return steps


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("nan_at", [None, 0, 4])
def test_steps_that_are_launched_ahead_are_the_same_steps(
    context: Context,
    targets: Targets,
    launched: list[int],
    monkeypatch: pytest.MonkeyPatch,
    nan_at: int | None,
    most: int,
) -> None:
    """Also where a job breaks, which is known only when its next steps are under way."""
    terms = {**TERMS, "colours": Colours({} if nan_at is None else {1: nan_at})}
    seen: dict[bool, list[tuple[Any, ...]]] = {False: [], True: []}
    for ahead in (False, True):
        monkeypatch.setattr(projection, "_works_aside", lambda _, ahead=ahead: ahead)
        monkeypatch.setattr(projection, "_AHEAD", most)
        launched.clear()

        def look(step: Step, ahead: bool = ahead) -> None:
            looked_at = step.step % 3 == 1 or step.step + 1 == SCHEDULE.steps
            # One of three steps is looked at, and the callback told of those before it first.
            under_way = {0: 1, 2: most}.get(step.step % 3, 0) if ahead and not looked_at else 0
            assert len(launched) == step.step + 1 + under_way
            assert step.at_rest == (not ahead or looked_at)
            read = [k for k in range(3) if looked_at or not step.alive[k]]
            images = None
            if looked_at:
                assert step.candidate is not None
                images = step.candidate.images.detach().clone()
            losses = [[row.tolist() for row in step.losses.raw.values()], step.losses.total]
            states = {k: step.states(k) for k in read}
            seen[ahead].append((step.step, step.learning_rates, step.alive, images, losses, states))

        final = run(
            context, targets, terms=terms, callback=look, looks_at=lambda step: step % 3 == 1
        )
        seen[ahead].append((final.ws, *final.noise_bufs))
    at_rest, ahead_of = seen[False], seen[True]
    assert len(ahead_of) == len(at_rest) == SCHEDULE.steps + 1
    for one, other in zip(at_rest, ahead_of, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)
    assert (ahead_of[-2][2] == (True, True, True)) == (nan_at is None)


def test_beside_a_gpu_the_host_computes_on_one_thread(
    context: Context, targets: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    counts: list[int] = []

    def count(step: Step) -> None:
        counts.append(torch.get_num_threads())
        if step.step == 2:
            raise RuntimeError("enough")

    try:
        for aside in (False, True):
            monkeypatch.setattr(projection, "_works_aside", lambda _, aside=aside: aside)
            with pytest.raises(RuntimeError, match="enough"):
                run(context, targets, callback=count)
            assert torch.get_num_threads() == 3
        assert counts == [3] * 3 + [1] * 3
    finally:
        torch.set_num_threads(before)


def test_no_step_is_launched_ahead_of_a_plateau_or_of_nothing(
    context: Context, targets: Targets, launched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "_works_aside", lambda _: True)
    rests: list[bool] = []
    told: list[int] = []

    def note(step: Step) -> None:
        rests.append(step.at_rest)
        told.append(step.step)

    # Patient jobs decide by a step's total where they take the next one.
    def compare(step: Step) -> None:
        assert launched[-1] == step.step

    run(
        context,
        targets,
        schedule=replace(SCHEDULE, patience=2),
        callback=compare,
        looks_at=lambda step: False,
    )
    # All jobs break at step 2: what was launched after it is told to nobody.
    broken = {**TERMS, "colours": Colours(dict.fromkeys(range(3), 2))}
    run(context, targets, terms=broken, callback=note, looks_at=lambda step: False)
    assert told == [0, 1, 2] and rests == [False] * 3


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


@pytest.mark.parametrize(("nan_at", "again"), [({}, 0), ({1: 3}, 1)])
def test_a_steps_numbers_are_ready_before_it_unless_a_job_dies(
    context: Context,
    targets: Targets,
    nan_at: dict[int, int],
    again: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computed: list[int] = []
    compute = Batch._compute

    def counted(batch: Any, step: int, *given: Any) -> Any:
        computed.append(step)
        return compute(batch, step, *given)

    monkeypatch.setattr(Batch, "_compute", counted)
    run(context, targets, terms=TERMS | {"colours": Colours(nan_at)})
    assert sorted(computed) == sorted([*range(SCHEDULE.steps), *[4] * again])


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


def test_only_the_moving_ws_move(context: Context, targets: Targets) -> None:
    final = run(context, targets, moving_ws=(1, 3))
    moved = (final.ws - context.latent_statistics.w_avg).abs().amax((0, 2))
    assert (moved > 1e-3).tolist() == [False, True, True, *[False] * (len(moved) - 3)]
    assert (moved[[0, *range(3, len(moved))]] == 0).all()
    everything = run(context, targets, moving_ws=(0, len(moved)))
    assert torch.equal(everything.ws, run(context, targets).ws)
    alone = run(context, targets, [2], moving_ws=(1, 3))
    torch.testing.assert_close(alone.ws[0], final.ws[2], rtol=1e-9, atol=1e-10)


def test_what_stays_is_rendered_without_exploration_noise(
    context: Context, targets: Targets
) -> None:
    rendered: list[Tensor] = []
    synthesis = context.generator.synthesis

    class Watched(type(context.generator)):  # type: ignore[misc]
        def synthesis(self, ws: Tensor, *noise: object) -> Tensor:
            rendered.append(ws.detach())
            return synthesis(ws, *noise)  # type: ignore[arg-type]

    watched = Watched(resolution=32, dim=16, channels=8)
    run(replace(context, generator=watched), targets, moving_ws=(1, 3))
    strayed = (rendered[0] - context.latent_statistics.w_avg).abs().amax((0, 2)) > 0
    assert strayed.tolist() == [False, True, True, *[False] * (len(strayed) - 3)]


PATIENT = Schedule(steps=60, learning_rate=0.05, noise_factor=0, patience=4, least_gain=0.05)
"""With it, the jobs reach a plateau, each at a step of its own."""


def followed(
    context: Context, targets: Targets, jobs: Sequence[int], schedule: Schedule
) -> tuple[Latents, list[Step], list[list[float]]]:
    steps: list[Step] = []
    totals: list[list[float]] = []

    def note(step: Step) -> None:
        steps.append(step)
        totals.append(step.losses.total.tolist())

    return run(context, targets, jobs, schedule=schedule, callback=note), steps, totals


def taken(steps: Sequence[Step], k: int) -> int:
    return sum(not step.finished[k] for step in steps)


def test_a_job_on_a_plateau_goes_down_the_ramp_and_ends_and_the_others_go_on(
    context: Context, targets: Targets
) -> None:
    together, steps, _ = followed(context, targets, [0, 1, 2], PATIENT)
    lengths = [taken(steps, k) for k in range(3)]
    assert len(set(lengths)) == 3 and min(lengths) >= 2 * PATIENT.patience + 15  # type: ignore[operator]
    assert len(steps) == max(lengths) < PATIENT.steps
    ramp = [PATIENT.learning_rate_at(step) for step in range(45, 60)]
    for k in range(3):
        # The rates are the schedule's, without the part that was skipped.
        rates = [step.learning_rates[k] for step in steps[: lengths[k]]]
        head = [PATIENT.learning_rate_at(step) for step in range(lengths[k] - 15)]
        assert rates == [*head, *ramp]
        alone, own, totals = followed(context, targets, [k], PATIENT)
        assert len(own) == lengths[k]
        torch.testing.assert_close(alone.ws[0], together.ws[k], rtol=1e-8, atol=1e-9)
        # The jump came when the means said so, and not before.
        judged = [total for (total,) in totals][PATIENT.settled_at : lengths[k] - 15]
        assert PATIENT.is_plateau(judged)
        assert not any(PATIENT.is_plateau(judged[:n]) for n in range(len(judged)))


def test_a_finished_job_stays_where_it_ended(context: Context, targets: Targets) -> None:
    states: list[State] = []
    first = min(range(3), key=lambda k: taken(followed(context, targets, [k], PATIENT)[1], 0))
    final = run(
        context,
        targets,
        schedule=PATIENT,
        callback=lambda step: states.append(step.states(first)) if step.finished[first] else None,
    )
    assert len(states) > 1
    for state in states:
        assert torch.equal(state["parameter_0"], final.ws[first])


@pytest.mark.parametrize("stop_at", [2, 14, 30])
def test_a_plateau_leaves_no_trace_of_a_stop(
    context: Context, targets: Targets, stop_at: int
) -> None:
    saved: list[State] = []

    def save(step: Step) -> None:
        if step.step + 1 == stop_at:
            saved.extend(step.states(k) for k in range(3))

    whole = run(context, targets, schedule=PATIENT, callback=save)
    steps: list[int] = []
    resumed = run(
        context,
        targets,
        schedule=PATIENT,
        first_step=stop_at,
        resume=saved,
        callback=lambda step: steps.append(step.step),
    )
    assert steps[0] == stop_at
    assert torch.equal(resumed.ws, whole.ws)


def test_a_finished_job_that_is_resumed_takes_no_step(context: Context, targets: Targets) -> None:
    saved: list[State] = []
    whole = run(
        context, targets, [1], schedule=PATIENT, callback=lambda step: saved.append(step.states(0))
    )
    resumed = run(
        context,
        targets,
        [1],
        schedule=PATIENT,
        first_step=len(saved),
        resume=saved[-1:],
        callback=lambda step: pytest.fail("it took a step"),
    )
    assert torch.equal(resumed.ws, whole.ws)


def test_patience_that_never_runs_out_changes_nothing(context: Context, targets: Targets) -> None:
    patient = replace(SCHEDULE, patience=100)
    assert torch.equal(run(context, targets, schedule=patient).ws, run(context, targets).ws)


def test_the_landmark_ramp_weighs_the_terms_of_the_expression_alone(
    context: Context, targets: Targets
) -> None:
    steps: list[Step] = []
    staged = replace(SCHEDULE, landmark_factor=0.0, landmark_ramp=0.5)
    run(context, targets, schedule=staged, callback=steps.append)
    for step, factor in zip(steps, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1], strict=True):
        raw, weighted = step.losses.raw, step.losses.weighted
        weights = torch.tensor([job["landmarks"] for job in WEIGHTS], dtype=torch.float64)
        torch.testing.assert_close(weighted["landmarks"], factor * raw["landmarks"] * weights)
        for name in ("colours", "noise", "prior"):
            weights = torch.tensor([job[name] for job in WEIGHTS]).double()
            torch.testing.assert_close(weighted[name], raw[name] * weights)


POSE_FIRST = replace(SCHEDULE, landmark_ramp=0.5, group_factors=(("inner_lip", 0.0), ("jaw", 21.0)))
RAMP = [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
"""Of `POSE_FIRST`, at each step."""
BOTH = {**TERMS, "coordinates": LandmarkCoordinates()}
"""All the terms that read the landmarks' weights; the others' are those of `WEIGHTS`."""


@pytest.fixture
def both_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tiny_projection, "WEIGHTS", tuple({**job, "coordinates": 2.0} for job in WEIGHTS)
    )


class ByHand:
    """A term bound once for each step, to landmark weights that are multiplied beforehand."""

    needs_expression: ClassVar[bool] = True
    weight = 1.0

    def __init__(self, term: Term) -> None:
        self.term = term

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        assert targets.landmark_weights is not None
        bound = []
        for done in RAMP:
            weights = targets.landmark_weights.clone()
            weights[:, GROUPS["jaw"].start : GROUPS["jaw"].stop] *= 21 - 20 * done
            weights[:, GROUPS["inner_lip"].start : GROUPS["inner_lip"].stop] *= done
            bound.append(self.term.bind(context, replace(targets, landmark_weights=weights)))
        return lambda candidate: bound[candidate.step](candidate)


@pytest.mark.usefixtures("both_weighed")
def test_group_factors_are_as_landmark_weights_multiplied_by_hand(
    context: Context, targets: Targets
) -> None:
    staged: list[Step] = []
    by_hand: list[Step] = []
    terms = {
        **BOTH,
        "landmarks": ByHand(LandmarkHeatmaps()),
        "coordinates": ByHand(LandmarkCoordinates()),
    }
    got = run(context, targets, terms=BOTH, schedule=POSE_FIRST, callback=staged.append)
    wanted = run(
        context,
        targets,
        terms=terms,
        schedule=replace(POSE_FIRST, group_factors=()),
        callback=by_hand.append,
    )
    for one, other in zip(staged, by_hand, strict=True):
        for name, value in other.losses.raw.items():
            torch.testing.assert_close(one.losses.raw[name], value, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(got.ws, wanted.ws, rtol=1e-7, atol=1e-8)
    plain = run(context, targets, terms=BOTH)
    assert (got.ws - plain.ws).abs().amax((1, 2)).min() > 1e-3


@pytest.mark.usefixtures("both_weighed")
def test_with_group_factors_jobs_are_strangers_and_stops_leave_no_trace(
    context: Context, targets: Targets
) -> None:
    saved: list[State] = []

    def save(step: Step) -> None:
        if step.step + 1 == 2:  # within the ramp
            saved.extend(step.states(k) for k in range(3))

    whole = run(context, targets, terms=BOTH, schedule=POSE_FIRST, callback=save)
    alone = run(context, targets, [2], terms=BOTH, schedule=POSE_FIRST)
    torch.testing.assert_close(alone.ws[0], whole.ws[2], rtol=1e-9, atol=1e-10)
    resumed = run(context, targets, terms=BOTH, schedule=POSE_FIRST, first_step=2, resume=saved)
    assert torch.equal(resumed.ws, whole.ws)


@pytest.mark.usefixtures("both_weighed")
def test_without_group_factors_nothing_is_multiplied(context: Context, targets: Targets) -> None:
    seen: list[Tensor | None] = []

    def note(step: Step) -> None:
        seen.append(step.candidate.landmark_factors)

    plain = run(context, targets, terms=BOTH, callback=note)
    assert seen == [None] * SCHEDULE.steps
    ones = replace(SCHEDULE, landmark_ramp=0.5, group_factors=(("jaw", 1.0),))
    same = run(context, targets, terms=BOTH, schedule=ones, callback=note)
    factors = seen[-1]
    assert factors is not None and torch.equal(factors, torch.ones(68, dtype=torch.float64))
    assert torch.equal(same.ws, plain.ws)
