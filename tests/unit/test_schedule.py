"""The ramps against the published projector's formulas, written out by hand."""

import math

import pytest

from lmexp.schedule import Schedule


@pytest.fixture
def published() -> Schedule:
    return Schedule(steps=1000)


def test_learning_rate_rises_linearly_over_the_first_twentieth(published: Schedule) -> None:
    assert published.learning_rate_at(0) == 0.0
    assert published.learning_rate_at(25) == pytest.approx(0.05)
    assert published.learning_rate_at(50) == pytest.approx(0.1)


def test_learning_rate_falls_along_a_cosine_over_the_last_quarter(published: Schedule) -> None:
    assert published.learning_rate_at(750) == pytest.approx(0.1)
    assert published.learning_rate_at(875) == pytest.approx(0.05)
    expected = 0.1 * (0.5 - 0.5 * math.cos(math.pi * 0.001 / 0.25))
    assert published.learning_rate_at(999) == pytest.approx(expected)


def test_noise_falls_as_a_square_to_zero_at_three_quarters(published: Schedule) -> None:
    assert published.noise_at(0) == pytest.approx(0.05)
    assert published.noise_at(375) == pytest.approx(0.05 / 4)
    assert published.noise_at(750) == 0.0
    assert published.noise_at(900) == 0.0


def test_ramps_of_length_zero_are_off() -> None:
    flat = Schedule(steps=10, rampup=0, rampdown=0, noise_ramp=0)
    assert [flat.learning_rate_at(step) for step in range(10)] == pytest.approx([0.1] * 10)
    assert flat.noise_at(0) == 0.0


def test_the_factor_of_the_landmark_terms_goes_linearly_to_one() -> None:
    look_first = Schedule(steps=10, landmark_factor=0.0, landmark_ramp=0.4)
    factors = [look_first.landmark_factor_at(step) for step in range(6)]
    assert factors == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])
    expression_first = Schedule(steps=10, landmark_factor=3.0, landmark_ramp=1.0)
    assert expression_first.landmark_factor_at(5) == pytest.approx(2)
    off = Schedule(steps=10, landmark_factor=0.0, landmark_ramp=0.0)
    assert [off.landmark_factor_at(step) for step in range(10)] == [1.0] * 10
    assert [Schedule(steps=10).landmark_factor_at(step) for step in range(10)] == [1.0] * 10


def test_the_factors_of_the_groups_go_linearly_to_one() -> None:
    pose_first = Schedule(
        steps=10, landmark_ramp=0.4, group_factors=(("inner_lip", 0.0), ("jaw", 21.0))
    )
    assert pose_first.group_factors_at(0) == {"inner_lip": 0, "jaw": 21}
    assert pose_first.group_factors_at(1) == pytest.approx({"inner_lip": 0.25, "jaw": 16})
    assert pose_first.group_factors_at(3) == pytest.approx({"inner_lip": 0.75, "jaw": 6})
    for step in range(4, 10):
        assert pose_first.group_factors_at(step) == {"inner_lip": 1, "jaw": 1}
    assert pose_first.landmark_factor_at(0) == 1  # that of all terms is another one
    assert Schedule(steps=10).group_factors_at(0) == {}
    # However large, it ends at exactly 1.
    steep = Schedule(steps=4, landmark_ramp=0.5, group_factors=(("jaw", 1e20),))
    assert steep.group_factors_at(2) == {"jaw": 1}


def test_a_schedule_is_read_from_keys_and_can_be_hashed() -> None:
    keys = {"steps": 10, "landmark_ramp": 0.4, "group_factors": {"jaw": 20.0, "inner_lip": 0.2}}
    read = Schedule.read(keys)
    assert read.group_factors == (("inner_lip", 0.2), ("jaw", 20.0))
    assert hash(read) == hash(Schedule.read({**keys, "group_factors": dict(read.group_factors)}))
    assert Schedule.read({"steps": 10, "group_factors": None}) == Schedule(steps=10)
    assert Schedule.read({"steps": 10}) == Schedule(steps=10)


def test_where_nothing_rises_any_more_and_where_the_ramp_down_begins(published: Schedule) -> None:
    assert (published.settled_at, published.rampdown_at) == (50, 750)
    assert published.learning_rate_at(749) == published.learning_rate_at(750) == 0.1
    assert published.learning_rate_at(751) < 0.1
    assert Schedule(steps=1000, landmark_ramp=0.5).settled_at == 500
    assert Schedule(steps=10, rampdown=0).rampdown_at == 10


def test_a_plateau_is_two_windows_whose_means_hardly_differ() -> None:
    schedule = Schedule(steps=100, patience=2, least_gain=0.1)
    assert not schedule.is_plateau([5, 5, 5])  # too few to say
    assert schedule.is_plateau([5, 5, 5, 5])
    assert not schedule.is_plateau([6, 4, 5, 4])  # 5 -> 4.5 is a tenth
    assert schedule.is_plateau([6, 4, 5, 4.1])
    assert schedule.is_plateau([1, 1, 9, 9])  # it rises: no gain either
    assert not schedule.is_plateau([1, 1, 6, 4, 5, 4])  # only the last ones count
    assert not schedule.is_plateau([-4, -4, -5, -5])  # below zero, lower is lower all the same
    assert not Schedule(steps=100).is_plateau([5] * 50)  # no patience: never
