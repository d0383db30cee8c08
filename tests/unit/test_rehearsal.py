from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lmexp import rehearsal
from lmexp.generators.tiny_random import TinyRandom
from lmexp.latents import measure
from lmexp.losses.coordinates import LandmarkCoordinates
from lmexp.losses.protocol import Context

GIB = 2**30


class Heatmaps(nn.Module):
    weights_sha256 = "stub"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 64).expand(
            -1, 68, -1, -1
        )


def test_a_step_is_taken_on_generated_faces() -> None:
    generator: Any = TinyRandom(resolution=32, dim=16, channels=8)
    statistics = measure(generator, 64, 0, torch.device("cpu"))
    context = Context(generator, Heatmaps(), statistics)
    targets = rehearsal.make_targets(context, 2, torch.ones(68))
    assert targets.look.shape == (2, 3, 32, 32) and targets.landmark_weights is not None
    assert targets.expression is not None
    assert not torch.allclose(targets.look, targets.expression)
    rehearsal.take_a_step(context, {"coordinates": LandmarkCoordinates()}, targets, "w_plus")


@pytest.mark.parametrize(
    ("free", "expected"),
    [(80 * GIB, 64), (20 * GIB, 16), (3 * GIB, 1), (GIB // 2, 1)],
)
def test_rows_that_fit(free: int, expected: int) -> None:
    # 1 GiB in use, 1 GiB shared by all rows, 1 GiB for each.
    peaks = [3 * GIB, 5 * GIB]
    assert rehearsal.share_out(free, peaks, GIB, 64) == expected


def test_steps_that_take_no_memory_are_taken_at_once() -> None:
    assert rehearsal.share_out(GIB, [GIB, GIB], GIB, 16) == 16
