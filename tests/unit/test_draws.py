from __future__ import annotations

import torch

from lmexp.draws import Draws
from lmexp.landmarks.jitter import draw_views

CPU = torch.device("cpu")


def test_numbers_are_the_steps_and_the_tensor_stays_in_place() -> None:
    draws = Draws((3, 5), CPU, step=2)
    views = draws.views(1.0)
    assert torch.equal(views, draw_views(1.0, (3, 5), 2))
    assert draws.views(1.0) is views and draws.views(0.5) is not views
    draws.prepare(3)
    assert torch.equal(views, draw_views(1.0, (3, 5), 2))  # not before its turn
    draws.move_to(3)
    assert torch.equal(views, draw_views(1.0, (3, 5), 3))
    draws.move_to(7)  # prepared or not
    assert torch.equal(views, draw_views(1.0, (3, 5), 7))
    assert draws.views(1.0) is views


def test_preparing_another_step_than_the_next_does_no_harm() -> None:
    draws = Draws((3,), CPU)
    views = draws.views(1.0)
    draws.prepare(1)
    draws.move_to(2)
    assert torch.equal(views, draw_views(1.0, (3,), 2))


def test_what_is_asked_for_after_preparing_is_drawn_when_its_step_comes() -> None:
    draws = Draws((3,), CPU)
    draws.prepare(1)
    views = draws.views(1.0)
    draws.move_to(1)
    assert torch.equal(views, draw_views(1.0, (3,), 1))
