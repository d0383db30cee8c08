"""The identity term: its crop, its gradient, jobs as strangers, weights only when they are used."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lmexp.config import Component
from lmexp.errors import LmexpError
from lmexp.landmarks.framing import place, resample
from lmexp.losses import identity_network
from lmexp.losses.identity import IdentityDistance, fit_views
from lmexp.losses.identity_network import SIDE
from lmexp.losses.objective import Objective
from lmexp.losses.protocol import Candidate, Context, Targets, Term
from lmexp.metrics.similarity import align_by_similarity
from lmexp.weights import store

UNUSED = cast(Any, None)
CONTEXT = Context(generator=UNUSED, heatmap_network=UNUSED, latent_statistics=UNUSED)
TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366]], dtype=torch.float64
)


class Recogniser(torch.nn.Module):
    """Linear in 7 × 7 means of the crop, so that every pixel of it counts."""

    weights_sha256 = "ab12"

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("matrix", torch.randn(9, 3 * 49, generator=draw))

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, SIDE, SIDE)
        return F.adaptive_avg_pool2d(images, 7).flatten(1) @ cast(Tensor, self.matrix).T


@pytest.fixture
def recogniser(monkeypatch: pytest.MonkeyPatch) -> Recogniser:
    network = Recogniser()
    monkeypatch.setattr(identity_network, "load", lambda: network)
    return network


def five_points(landmarks: Tensor) -> Tensor:
    """Eyes and nose tip, [N, 3, 2]."""
    eyes = [landmarks[:, 36:42].mean(1), landmarks[:, 42:48].mean(1)]
    return torch.stack((*eyes, landmarks[:, 30]), 1)


def draw_landmarks(n: int, side: int, spread: float = 0.02) -> Tensor:
    """Faces framed about as FFHQ frames them, with noise on every point."""
    draw = torch.Generator().manual_seed(5)
    landmarks = torch.full((n, 68, 2), 0.5)
    landmarks[:, 36:42] = torch.tensor([0.39, 0.48])
    landmarks[:, 42:48] = torch.tensor([0.61, 0.48])
    landmarks[:, 30] = torch.tensor([0.5, 0.61])
    return (landmarks + spread * torch.randn(landmarks.shape, generator=draw)) * side


def draw_targets(n: int, side: int, dtype: torch.dtype = torch.float32) -> Targets:
    draw = torch.Generator().manual_seed(1)
    look = torch.rand(n, 3, side, side, generator=draw, dtype=dtype) * 2 - 1
    return Targets(look=look, look_landmarks=draw_landmarks(n, side))


def candidate(images: Tensor) -> Candidate:
    return Candidate(
        images,
        ws=images.new_zeros(len(images), 1, 4),
        noise_bufs=(),
        step=0,
        heatmap_network=UNUSED,
    )


def test_a_turned_template_is_put_upright() -> None:
    """Landmarks that are the template turned, scaled and moved come to lie on it exactly."""
    angle, scale = 0.4, 1.7
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]],
        dtype=torch.float64,
    )
    # Half a pixel: the template counts from centres of pixels, landmarks from their edges.
    points = scale * (TEMPLATE + 0.5) @ turn.T + torch.tensor([30.0, -8.0])
    landmarks = torch.zeros(1, 68, 2, dtype=torch.float64)
    landmarks[0, 36:42], landmarks[0, 42:48], landmarks[0, 30] = points
    views = fit_views(landmarks)
    found = place(points[None], views, SIDE)[0]
    torch.testing.assert_close(found, TEMPLATE + 0.5, atol=1e-9, rtol=0)
    # A square without a mirror: its lower edge is its upper one turned by 90°.
    axis, lower = views[0, :, 0], views[0, :, 1]
    torch.testing.assert_close(lower, torch.stack((-axis[1], axis[0])))
    torch.testing.assert_close(axis.norm().item(), scale * SIDE)


def test_crop_is_umeyamas_similarity() -> None:
    landmarks = draw_landmarks(4, 256).double()
    points = five_points(landmarks)
    wanted = align_by_similarity(points, (TEMPLATE + 0.5).expand(4, 3, 2))
    found = place(points, fit_views(landmarks), SIDE)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_mouth_does_not_move_the_crop() -> None:
    landmarks = draw_landmarks(1, 256)
    moved = landmarks.clone()
    moved[:, 48:] += 20
    moved[:, :17] -= 9
    assert torch.equal(fit_views(landmarks), fit_views(moved))


def test_points_in_one_place_give_finite_views() -> None:
    assert fit_views(torch.full((1, 68, 2), 7.0)).isfinite().all()


@pytest.mark.parametrize("side", [64, 256, 320, 1024])
def test_crop_averages_over_areas(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fine checkerboard is grey in the crop whatever the size; a ramp stays a ramp."""
    seen: list[Tensor] = []

    class Eye(torch.nn.Module):
        weights_sha256 = "-"

        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.flatten(1)

    monkeypatch.setattr(identity_network, "load", Eye)
    landmarks = draw_landmarks(1, side, spread=0.0)
    ramp = torch.linspace(-1, 1, side).expand(1, 3, side, side).contiguous()
    term = IdentityDistance().bind(CONTEXT, Targets(ramp, landmarks))
    board = (torch.arange(side)[:, None] + torch.arange(side)) % 2 * 2.0 - 1
    term(candidate(board.expand(1, 3, side, side)))
    ramps, boards = seen
    # Eyes 0.22 sides apart, 35 px in the crop: it is about 0.7 sides wide.
    steps = (ramps[0, 0, :, 1:] - ramps[0, 0, :, :-1])[:, 4:-4]
    width = 2 * 0.7 / SIDE * side / (side - 1)
    assert steps.mean() == pytest.approx(width, rel=0.05)
    if side >= 256:
        assert steps.std() < 0.1 * width
        assert boards.square().mean() < 0.12


def test_the_look_itself_has_no_distance(recogniser: Recogniser) -> None:
    targets = draw_targets(3, 96)
    values = IdentityDistance().bind(CONTEXT, targets)(candidate(targets.look))
    assert values.shape == (3,)
    torch.testing.assert_close(values, torch.zeros(3), atol=1e-6, rtol=0)


def test_values_by_numpy(recogniser: Recogniser) -> None:
    targets = draw_targets(3, 112)
    images = targets.look.roll(1, 0)
    values = IdentityDistance().bind(CONTEXT, targets)(candidate(images))
    views = fit_views(targets.look_landmarks)
    ends = [
        recogniser(F.avg_pool2d(resample(each, views, 2 * SIDE), 2)).numpy()
        for each in (images, targets.look)
    ]
    cosines = (ends[0] * ends[1]).sum(1) / np.prod([np.linalg.norm(e, axis=1) for e in ends], 0)
    np.testing.assert_allclose(values, 1 - cosines, atol=1e-5)
    assert values.min() > 0.01 and values.max() < 2


def test_gradient(recogniser: Recogniser) -> None:
    recogniser.double()
    targets = draw_targets(2, 12, torch.float64)
    evaluate = IdentityDistance().bind(CONTEXT, targets)
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(2)).double()
    images.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: evaluate(candidate(x)), (images,))


def test_a_job_alone_has_what_it_has_in_a_batch(recogniser: Recogniser) -> None:
    targets = draw_targets(3, 300)
    images = (targets.look.flip(0) * 0.5).requires_grad_()
    together = IdentityDistance().bind(CONTEXT, targets)(candidate(images))
    (gradient,) = torch.autograd.grad(together.sum(), images)
    for k in range(3):
        row = slice(k, k + 1)
        alone = Targets(targets.look[row], targets.look_landmarks[row])
        image = images.detach()[row].requires_grad_()
        value = IdentityDistance().bind(CONTEXT, alone)(candidate(image))
        torch.testing.assert_close(value, together[row])
        (of_one,) = torch.autograd.grad(value.sum(), image)
        torch.testing.assert_close(of_one, gradient[row], atol=1e-8, rtol=1e-4)


def test_also_used_while_the_look_is_inverted_and_off_at_weight_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads: list[Recogniser] = []

    def load() -> Recogniser:
        loads.append(Recogniser())
        return loads[-1]

    monkeypatch.setattr(identity_network, "load", load)
    term = IdentityDistance()
    assert isinstance(term, Term) and not loads
    look = draw_targets(1, 64)
    assert Objective.bind({"identity": term}, [{"identity": 0.0}], CONTEXT, look).names == ()
    assert not loads
    assert Objective.bind({"identity": term}, [{"identity": 0.3}], CONTEXT, look).names == (
        "identity",
    )
    assert term.weights_sha256 == "ab12" and len(loads) == 1


def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> store.StoredWeights:
        raise LmexpError(f"weights {name}: no network")

    monkeypatch.setattr(store, "load", fail)
    with pytest.raises(LmexpError, match="weights sface"):
        IdentityDistance().bind(CONTEXT, draw_targets(1, 64))


def test_negative_weight_is_refused() -> None:
    node = {"_target_": "lmexp.losses.identity.IdentityDistance", "weight": -1}
    with pytest.raises(ValueError, match="weight"):
        Component.model_validate(node)
