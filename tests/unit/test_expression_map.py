"""The map from landmarks to latents: against a generator whose answer is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmexp import expression_map
from lmexp.errors import LmexpError
from lmexp.expression_map import ExpressionMap, lay_over_points
from lmexp.faces.agreement import STEADY
from lmexp.latents import LatentStatistics
from lmexp.losses.prior import GaussianSpace

DIMENSIONS = 6


class Linear:
    """Draws landmarks, and nothing else, as a linear function of the Gaussian space of its ws."""

    z_dim = w_dim = DIMENSIONS
    num_ws = 3
    resolution = 64
    noise_shapes = ()
    weights_sha256 = "f" * 64

    def __init__(self, samples: Tensor) -> None:
        self.space = GaussianSpace.measure(samples, expression_map.VARIANCE_FLOOR)
        draw = torch.Generator().manual_seed(1)
        self.base = 0.3 + 0.4 * torch.rand(68, 2, generator=draw)
        slope = 0.01 * torch.randn(DIMENSIONS, 68, 2, generator=draw)
        slope[:, STEADY] = 0
        self.slope = slope

    def synthesis(self, ws: Tensor, noise_bufs: object = ()) -> Tensor:
        return self.base + torch.einsum(
            "nd,dkc->nkc", self.space.standardise(ws.mean(1)), self.slope
        )


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> tuple[Linear, LatentStatistics]:
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(DIMENSIONS, DIMENSIONS, generator=draw)
    w = torch.nn.functional.leaky_relu(torch.randn(4000, DIMENSIONS, generator=draw) @ mix, 0.2)
    monkeypatch.setattr(expression_map, "decode", lambda maps, side: maps)
    return Linear(w), LatentStatistics(samples=w, w_avg=w.mean(0), w_std=1.0)


def nothing(images: Tensor) -> Tensor:
    return images


def test_a_head_start_of_one_arrives_where_latents_rule_landmarks(
    linear: tuple[Linear, LatentStatistics],
) -> None:
    generator, statistics = linear
    made = expression_map.measure(generator, nothing, statistics, 4000)  # type: ignore[arg-type]
    ws = statistics.samples[:2, None].expand(-1, 3, -1)
    now, goal = generator.synthesis(ws), generator.synthesis(statistics.samples[5:7, None])
    moved = expression_map.head_start(
        ws,
        made,
        generator,  # type: ignore[arg-type]
        nothing,  # type: ignore[arg-type]
        statistics,
        look_landmarks=now * 64,
        expression_landmarks=goal * 64,
        weights=torch.ones(2, 68),
        share=1.0,
        rows=(0, 3),
    )
    left = (generator.synthesis(moved) - goal).norm()
    assert float(left) < 0.12 * float((now - goal).norm())


def test_only_the_named_ws_move_and_no_share_moves_none(
    linear: tuple[Linear, LatentStatistics],
) -> None:
    generator, statistics = linear
    made = expression_map.measure(generator, nothing, statistics, 500)  # type: ignore[arg-type]
    ws = statistics.samples[:1, None].expand(-1, 3, -1).contiguous()

    def move(share: float, rows: tuple[int, int]) -> Tensor:
        return expression_map.head_start(
            ws,
            made,
            generator,  # type: ignore[arg-type]
            nothing,  # type: ignore[arg-type]
            statistics,
            look_landmarks=generator.synthesis(ws) * 64,
            expression_landmarks=generator.synthesis(statistics.samples[9:10, None]) * 64,
            weights=torch.ones(1, 68),
            share=share,
            rows=rows,
        )

    changed = (move(0.5, (1, 9)) - ws).abs().amax(2)[0]
    assert float(changed[0]) < 1e-4 and (changed[1:] > 1e-2).all()
    assert torch.allclose(move(0.0, (0, 3)), ws, atol=1e-4)


def test_landmarks_of_no_weight_do_not_pull() -> None:
    generator = torch.Generator().manual_seed(2)
    gain = torch.randn(4, 136, generator=generator)
    explained = gain.T @ gain * 1e-4
    made = ExpressionMap(gain * 1e-2, explained, 1e-8 * torch.eye(136))
    change = torch.zeros(1, 68, 2)
    change[0, 50, 1] = 0.05
    weighed, ignored = torch.ones(1, 68), torch.ones(1, 68)
    ignored[0, 50] = 0
    assert float(made.step(change, ignored).norm()) < float(made.step(change, weighed).norm())


def test_laying_over_undoes_a_similarity() -> None:
    points = torch.rand(2, 68, 2)
    turn = torch.tensor([[0.8, -0.5], [0.5, 0.8]])
    moved = points @ turn.T + torch.tensor([0.3, -0.1])
    assert torch.allclose(lay_over_points(moved, points), points, atol=1e-5)


def test_a_measured_map_is_kept_and_found(
    linear: tuple[Linear, LatentStatistics],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("LMEXP_CACHE", str(tmp_path))
    generator, statistics = linear
    nothing.weights_sha256 = "e" * 64  # type: ignore[attr-defined]
    find = lambda: expression_map.find(generator, nothing, statistics, 64)  # type: ignore[arg-type]  # noqa: E731
    assert find() is None
    made = expression_map.measure(generator, nothing, statistics, 64)  # type: ignore[arg-type]
    path = expression_map.keep(made, generator, nothing, 64)  # type: ignore[arg-type]
    found = find()
    assert found is not None and torch.equal(found.gain, made.gain)
    path.write_bytes(b"broken")
    assert find() is None
    assert "unreadable" in caplog.text


def test_samples_without_a_face_are_told_of(
    linear: tuple[Linear, LatentStatistics], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, statistics = linear
    monkeypatch.setattr(expression_map, "OUTLIER", 0.0)
    with pytest.raises(LmexpError, match=r"none of the generator's 64 samples .*head_start=0"):
        expression_map.measure(generator, nothing, statistics, 64)  # type: ignore[arg-type]


def test_a_jobs_head_start_does_not_depend_on_its_batch(
    linear: tuple[Linear, LatentStatistics],
) -> None:
    generator, statistics = linear
    made = expression_map.measure(generator, nothing, statistics, 500)  # type: ignore[arg-type]
    ws = statistics.samples[:3, None].expand(-1, 3, -1).contiguous()
    now, goal = generator.synthesis(ws), generator.synthesis(statistics.samples[5:8, None])
    weights = torch.rand(3, 68, generator=torch.Generator().manual_seed(4))

    def move(jobs: slice) -> Tensor:
        return expression_map.head_start(
            ws[jobs],
            made,
            generator,  # type: ignore[arg-type]
            nothing,  # type: ignore[arg-type]
            statistics,
            look_landmarks=now[jobs] * 64,
            expression_landmarks=goal[jobs] * 64,
            weights=weights[jobs],
            share=0.5,
            rows=(0, 2),
        )

    together = move(slice(0, 3))
    for job in range(3):
        alone = move(slice(job, job + 1))
        assert torch.allclose(alone[0], together[job], atol=1e-4)
        assert float((together[job] - ws[job]).abs().max()) > 1e-2
