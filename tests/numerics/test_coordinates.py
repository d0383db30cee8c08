"""The coordinates term against hand-computed places, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmexp.landmarks.groups import GROUPS, OUTER_EYE_CORNERS, expand
from lmexp.losses.coordinates import LandmarkCoordinates, expect
from lmexp.losses.protocol import Candidate, Context, Targets


def bells(places: Tensor, side: int = 32, width: float = 1.5) -> Tensor:
    """[N, K, 2] in fractions → heat maps [N, K, side, side]."""
    at = (torch.arange(side, dtype=places.dtype) + 0.5) / side
    x = torch.exp(-((at - places[..., :1]) ** 2) * (side / width) ** 2 / 2)
    y = torch.exp(-((at - places[..., 1:]) ** 2) * (side / width) ** 2 / 2)
    return y[..., :, None] * x[..., None, :]


def test_expect_finds_the_middle_of_a_bell_x_then_y() -> None:
    places = torch.rand(2, 5, 2, dtype=torch.float64) * 0.5 + 0.25
    assert torch.allclose(expect(bells(places)), places, atol=1e-3)


def test_expect_of_two_cells_is_weighted_by_their_squares() -> None:
    maps = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    maps[0, 0, 1, 0], maps[0, 0, 1, 3], maps[0, 0, 3, 3] = 1.0, 2.0, -5.0
    x, y = expect(maps)[0, 0].tolist()
    assert x == pytest.approx((1 * 0.125 + 4 * 0.875) / 5, abs=1e-5)
    assert y == pytest.approx(0.375, abs=1e-5)


class Painted:
    """Draws bells where the image's first pixels say."""

    weights_sha256 = ""

    def __call__(self, images: Tensor) -> Tensor:
        return bells(images[:, 0, 0, : 2 * 68].reshape(-1, 68, 2))


def images_of(places: Tensor) -> Tensor:
    images = torch.zeros(len(places), 3, 1, 160, dtype=places.dtype)
    images[:, 0, 0, : 2 * 68] = places.flatten(1)
    return images


def bind(expression: Tensor, weights: Tensor):  # type: ignore[no-untyped-def]
    look = torch.zeros(len(expression), 68, 2, dtype=torch.float64)
    look[:, OUTER_EYE_CORNERS[1], 0] = 0.4 * 160  # the corners' distance: 0.4 of the side
    targets = Targets(
        look=images_of(expression),
        look_landmarks=look,
        expression=images_of(expression),
        expression_landmarks=look,
        landmark_weights=weights,
    )
    context = Context(None, Painted(), None)  # type: ignore[arg-type]
    return LandmarkCoordinates(jitter=0.0).bind(context, targets)


def test_the_term_is_the_weighted_mean_distance_in_eye_distances() -> None:
    expression = torch.full((2, 68, 2), 0.5, dtype=torch.float64)
    now = expression.clone()
    now[0, 3, 0] += 0.1
    now[1, 3, 1] -= 0.2
    weights = torch.ones(2, 68, dtype=torch.float64)
    weights[1] = 0
    weights[1, 3], weights[1, 4] = 3.0, 1.0
    term = bind(expression, weights)
    got = term(Candidate(images_of(now), torch.zeros(2, 1, 1), (), 0, Painted()))
    assert got.tolist() == pytest.approx([0.1 / 0.4 / 68, 0.75 * 0.2 / 0.4], abs=1e-3)


def test_factors_are_as_weights_multiplied_by_hand() -> None:
    draw = torch.Generator().manual_seed(0)
    now, wanted = torch.rand(2, 2, 68, 2, generator=draw, dtype=torch.float64) * 0.5 + 0.25
    weights = torch.rand(2, 68, generator=draw, dtype=torch.float64)
    factors = expand(dict.fromkeys(GROUPS, 1.0) | {"jaw": 20.0, "inner_lip": 0.0}).double()
    by_hand = weights.clone()
    by_hand[:, :17] *= 20
    by_hand[:, 60:] = 0

    def evaluate(weights: Tensor, factors: Tensor | None) -> Tensor:
        ws, term = torch.zeros(2, 1, 1), bind(wanted, weights)
        value: Tensor = term(
            Candidate(images_of(now), ws, (), 0, Painted(), landmark_factors=factors)
        )
        return value

    got, plain = evaluate(weights, factors), evaluate(weights, None)
    torch.testing.assert_close(got, evaluate(by_hand, None), rtol=1e-12, atol=0)
    assert (got - plain).abs().min() > 1e-3
    assert torch.equal(evaluate(weights, torch.ones(68, dtype=torch.float64)), plain)
    # A mean: what weighs nothing at all is no division by 0.
    assert evaluate(weights, torch.zeros(68, dtype=torch.float64)).tolist() == [0, 0]


def test_it_pulls_from_afar_where_heat_maps_do_not() -> None:
    expression = torch.full((1, 68, 2), 0.2, dtype=torch.float64)
    images = images_of(torch.full((1, 68, 2), 0.8, dtype=torch.float64)).requires_grad_()
    term = bind(expression, torch.ones(1, 68, dtype=torch.float64))
    term(Candidate(images, torch.zeros(1, 1, 1), (), 0, Painted())).sum().backward()
    assert images.grad is not None
    pull = images.grad[0, 0, 0, : 2 * 68]
    assert (pull > 0.5 / 0.4 / 68).all()
    network = Painted()
    heat = torch.linalg.vector_norm(network(images) - network(images_of(expression)))
    (far,) = torch.autograd.grad(heat, images)
    assert float(far.abs().max()) < 1e-6


def test_its_gradient_at_the_goal_is_finite() -> None:
    places = torch.full((1, 68, 2), 0.5, dtype=torch.float64)
    images = images_of(places).requires_grad_()
    term = bind(places, torch.ones(1, 68, dtype=torch.float64))
    term(Candidate(images, torch.zeros(1, 1, 1), (), 0, Painted())).sum().backward()
    assert images.grad is not None and torch.isfinite(images.grad).all()
