from __future__ import annotations

import numpy as np
import pytest
from recorded_runs import astronaut, face_landmarks

from lmexp.faces.agreement import STEADY, fit_similarity, lay_over
from lmexp.faces.alignment import transform
from lmexp.faces.targets import AlignedFace


def test_recovers_a_similarity() -> None:
    points = np.random.default_rng(0).random((15, 2)) * 100
    angle, scale, shift = 0.3, 1.7, np.array([5.0, -3.0])
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    affine = fit_similarity(points, points @ turn.T + shift)
    np.testing.assert_allclose(affine, np.column_stack((turn, shift)), atol=1e-9)


def test_is_the_least_squares_solution_among_similarities() -> None:
    draw = np.random.default_rng(1)
    points, onto = draw.random((2, 15, 2))
    affine = fit_similarity(points, onto)
    # The same problem as four unknowns, solved by numpy.
    x, y = points.T
    one, zero = np.ones(15), np.zeros(15)
    system = np.vstack((np.column_stack((x, -y, one, zero)), np.column_stack((y, x, zero, one))))
    a, b, tx, ty = np.linalg.lstsq(system, np.concatenate(onto.T), rcond=None)[0]
    np.testing.assert_allclose(affine, [[a, -b, tx], [b, a, ty]], atol=1e-9)


def face(turn: float, smile: float = 0.0) -> AlignedFace:
    return AlignedFace.of_aligned(
        np.asarray(astronaut(128, turn=turn)), face_landmarks(128, smile, turn).numpy()
    )


def test_steady_landmarks_come_to_lie_on_the_looks() -> None:
    look, expression = face(0), face(15, smile=0.4)
    before = np.abs(expression.landmarks[STEADY] - look.landmarks[STEADY]).mean()
    moved = lay_over(expression, look)
    after = np.abs(moved.landmarks[STEADY] - look.landmarks[STEADY]).mean()
    assert before > 5 and after < 0.3
    # The mouth keeps what makes the expression.
    assert np.abs(moved.landmarks[48:] - look.landmarks[48:]).max() > 1
    # The picture went along: turned back, it is the look's own portrait again.
    middle = slice(40, 88)
    error = np.abs(moved.image[middle, middle].astype(float) - look.image[middle, middle]).mean()
    assert error < 6
    assert moved.image.shape == expression.image.shape


def test_the_way_from_the_photo_is_kept() -> None:
    look, expression = face(0), face(15)
    moved = lay_over(expression, look)
    inverse = np.linalg.inv(np.vstack((expression.affine, [0, 0, 1])))[:2]
    in_photo = transform(inverse, expression.landmarks)
    np.testing.assert_allclose(transform(moved.affine, in_photo), moved.landmarks, atol=1e-3)


def test_a_face_laid_over_itself_stays() -> None:
    look = face(0)
    moved = lay_over(look, look)
    assert moved.landmarks == pytest.approx(look.landmarks, abs=1e-3)
    assert np.abs(moved.image.astype(int) - look.image).max() <= 2
