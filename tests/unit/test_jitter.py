"""Random views: each job's own, the same again for the same step, and what they do to a picture."""

from __future__ import annotations

import math

import pytest
import torch

from lmexp.landmarks.jitter import SCALE, SHIFT, TURN, draw_views, look_through
from lmexp.losses.protocol import Candidate


def test_a_jobs_view_depends_on_its_seed_and_the_step_alone() -> None:
    alone = draw_views(1.0, [7], 3)
    together = draw_views(1.0, [1, 7, 9], 3)
    assert torch.equal(alone[0], together[1])
    assert not torch.equal(alone[0], draw_views(1.0, [7], 4)[0])
    assert not torch.equal(together[0], together[1])


def test_views_keep_to_their_bounds_and_fill_them() -> None:
    views = torch.cat([draw_views(1.0, range(400), step) for step in range(3)])
    scale = views[:, 0, :2].norm(dim=1).log()
    turn = torch.atan2(views[:, 1, 0], views[:, 0, 0])
    shift = views[:, :, 2] / 2
    for values, bound in ((scale, SCALE), (turn, TURN), (shift, SHIFT)):
        assert float(values.abs().max()) <= bound + 1e-6
        assert float(values.abs().max()) > 0.95 * bound
        assert abs(float(values.mean())) < 0.1 * bound


def test_a_view_moves_a_point_to_where_it_says() -> None:
    image = torch.zeros(1, 1, 64, 64)
    image[0, 0, 20, 40] = 1.0
    quarter = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])
    seen = look_through(image, quarter)
    # View (x, y) shows the image at (-y, x): what lies at (40.5, 20.5) of 64 is seen at
    # x = its y, y = 64 - its x.
    row, column = divmod(int(seen.flatten().argmax()), 64)
    assert (row, column) == (23, 20)
    assert math.isclose(float(seen.max()), 1.0, abs_tol=1e-4)


def test_jitter_zero_shows_the_image_as_it_is() -> None:
    image = torch.rand(2, 3, 16, 16)
    assert torch.allclose(look_through(image, draw_views(0.0, [1, 2], 5)), image, atol=1e-6)


def test_terms_with_one_jitter_share_a_pass_of_the_network() -> None:
    calls: list[int] = []

    class Counting:
        weights_sha256 = ""

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            calls.append(len(images))
            return images.mean(1, keepdim=True)

    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    candidate = Candidate(images, torch.zeros(2, 1, 4), (), 0, Counting(), (0, 1))
    expression = torch.rand(2, 3, 16, 16)
    now, wanted = candidate.see(expression, 1.0)
    again, _ = candidate.see(expression, 1.0)
    assert now is again and len(calls) == 2
    assert now.requires_grad and not wanted.requires_grad
    views = draw_views(1.0, (0, 1), 0)
    assert torch.equal(wanted, look_through(expression, views).mean(1, keepdim=True))
    candidate.see(expression, 0.5)
    assert len(calls) == 4


def test_views_need_the_jobs_seeds() -> None:
    candidate = Candidate(torch.rand(2, 3, 8, 8), torch.zeros(2, 1, 4), (), 0, lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        candidate.see(torch.rand(2, 3, 8, 8), 1.0)
