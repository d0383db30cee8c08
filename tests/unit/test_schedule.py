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
