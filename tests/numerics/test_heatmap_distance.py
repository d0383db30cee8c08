"""The landmark term against a hand-computed case, NumPy, and finite differences."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from lmexp.errors import LmexpError
from lmexp.landmarks.groups import GROUPS, expand
from lmexp.losses.landmarks import LandmarkHeatmaps, heatmap_distance, stretch, widen_heatmaps
from lmexp.losses.protocol import Candidate, Context, Targets

UNUSED = cast(Any, None)


def test_hand_computed_case() -> None:
    heatmaps = torch.zeros(1, 2, 1, 2)
    target = torch.tensor([[[[3.0, 4.0]], [[0.0, 2.0]]]])
    weights = torch.tensor([[1.0, 4.0]])
    # Σ λ Δ² = 1·(9 + 16) + 4·4 = 41; Σ λ² Δ² = 25 + 16·4 = 89; Σ λ |Δ| = 7 + 4·2 = 15
    assert heatmap_distance(heatmaps, target, weights, "l2").item() == pytest.approx(41**0.5)
    squared = heatmap_distance(heatmaps, target, weights, "l2", squared_weights=True)
    assert squared.item() == pytest.approx(89**0.5)
    assert heatmap_distance(heatmaps, target, weights, "l1").item() == pytest.approx(15)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_agrees_with_numpy_job_by_job(norm: str) -> None:
    draw = np.random.default_rng(0)
    a, b = draw.random((2, 3, 68, 8, 8))
    weights = draw.random((3, 68))
    for k in range(3):
        delta = a[k] - b[k]
        lam = weights[k][:, None, None]
        expected = (
            np.sqrt((lam * delta**2).sum()) if norm == "l2" else (lam * np.sqrt(delta**2)).sum()
        )
        got = heatmap_distance(*map(torch.from_numpy, (a, b, weights)), norm)[k]
        assert got.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradient(norm: str) -> None:
    torch.manual_seed(0)
    heatmaps = torch.rand(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    target = torch.rand(2, 3, 2, 2, dtype=torch.float64)
    weights = torch.rand(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h: heatmap_distance(h, target, weights, norm), heatmaps)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_identical_maps_give_zero_and_a_zero_gradient(norm: str) -> None:
    heatmaps = torch.rand(1, 3, 2, 2, requires_grad=True)
    distance = heatmap_distance(heatmaps, heatmaps.detach(), torch.ones(1, 3), norm)
    distance.sum().backward()
    assert distance.item() == 0.0
    assert heatmaps.grad is not None
    assert torch.equal(heatmaps.grad, torch.zeros_like(heatmaps))


def test_stretch_gives_every_image_its_own_full_range() -> None:
    random = torch.Generator().manual_seed(0)
    images = (
        torch.rand(3, 3, 8, 8, generator=random) * torch.tensor([0.5, 1, 3])[:, None, None, None]
    )
    got = stretch(images)
    for k in range(3):
        # As the published code does it: colours 0 to 255, one image a batch, a range of [0, 1].
        published = (images[k] + 1) * (255 / 2)
        published = published - published.min()
        published = published / published.max()
        torch.testing.assert_close((got[k] + 1) / 2, published)
    assert stretch(torch.zeros(1, 3, 4, 4)).unique().tolist() == [-1.0]


def test_stretch_measures_the_range_at_the_side_the_network_sees() -> None:
    image = torch.zeros(1, 3, 512, 512)
    image[..., 0, 0] = 4.0  # averaged over four pixels: 1
    image[..., 256:, :] = -1.0
    got = stretch(image)
    assert got.shape == (1, 3, 256, 256)
    assert got[0, 0, 0, 0] == 1 and got[0, 0, 0, 1] == 0 and got[0, 0, 200, 0] == -1


def test_widened_peaks_are_those_of_the_wider_gaussian() -> None:
    places = torch.arange(64.0)

    def peak(x: float, y: float, width: float) -> torch.Tensor:
        squares = (places[:, None] - y) ** 2 + (places - x) ** 2
        return torch.exp(-squares / (2 * width**2))

    maps = torch.stack([peak(30, 20, 1.5), peak(12.3, 40.6, 2.0)])[None]
    got = widen_heatmaps(maps, 2.0)
    for k, (x, y, width) in enumerate(((30, 20, 1.5), (12.3, 40.6, 2.0))):
        wider = (width**2 + 2.0**2) ** 0.5
        expected = (width / wider) ** 2 * peak(x, y, wider)
        torch.testing.assert_close(got[0, k], expected, atol=1e-4, rtol=0)
    oblong = widen_heatmaps(torch.ones(1, 1, 40, 24), 1.0)
    assert oblong.shape == (1, 1, 40, 24)
    torch.testing.assert_close(oblong[..., 8:-8, 8:-8], torch.ones(1, 1, 24, 8))
    assert oblong[0, 0, 0, 12] < 0.75  # what leaves the map is lost


class Squares(torch.nn.Module):
    """Heat map k is the squared grey image times k: cheap, and it sees brightness."""

    weights_sha256 = "squares"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        grey = images.mean(1, keepdim=True).square()
        return grey * torch.arange(68.0)[:, None, None]


def evaluate(
    term: LandmarkHeatmaps,
    images: torch.Tensor,
    weights: torch.Tensor,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    expression = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4).expand(len(images), 3, 4, 4)
    points = torch.zeros(len(images), 68, 2)
    targets = Targets(expression, points, expression, points, weights)
    network = Squares()
    bound = term.bind(Context(UNUSED, network, UNUSED), targets)
    ws = torch.zeros(len(images), 1, 1)
    return bound(Candidate(images, ws, (), 0, network, (0, 1), landmark_factors=factors))


def test_stretched_term_does_not_see_brightness_and_contrast() -> None:
    image = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4).expand(1, 3, 4, 4)
    images = torch.cat([image, 0.3 * image + 0.2])
    weights = torch.ones(2, 68)
    plain = evaluate(LandmarkHeatmaps(jitter=0.0), images, weights)
    assert plain[0] == 0 and plain[1] > 1
    stretched = evaluate(LandmarkHeatmaps(stretch_contrast=True, jitter=0.0), images, weights)
    torch.testing.assert_close(stretched, torch.zeros(2), atol=1e-3, rtol=0)


def test_the_widened_term_is_the_distance_of_widened_maps() -> None:
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.linspace(0, 1, 136).view(2, 68)
    got = evaluate(LandmarkHeatmaps(jitter=0.0, widen=1.5), images, weights)
    expression = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4).expand(2, 3, 4, 4)
    maps = [widen_heatmaps(Squares()(faces), 1.5) for faces in (images, expression)]
    torch.testing.assert_close(got, heatmap_distance(maps[0], maps[1], weights, "l2"))
    with pytest.raises(LmexpError, match=r"loss\.landmarks\.widen: 0\.2"):
        LandmarkHeatmaps(widen=0.2)


def test_tip_of_the_nose_weighs_as_its_group() -> None:
    images = torch.zeros(1, 3, 4, 4)
    weights = torch.zeros(1, 68)
    weights[:, 31:36] = 1.0  # lower_nose alone
    grey = (torch.linspace(-1, 1, 16) ** 4).sum()
    for tip, members in ((False, range(31, 36)), (True, range(30, 36))):
        term = LandmarkHeatmaps(tip_in_lower_nose=tip, jitter=0.0)
        expected = (sum(k**2 for k in members) * grey) ** 0.5
        assert evaluate(term, images, weights).item() == pytest.approx(expected.item(), rel=1e-5)
    # The caller's weights are left as they were.
    assert weights[0, 30] == 0


@pytest.mark.parametrize(
    "term",
    [
        LandmarkHeatmaps(jitter=0.0),
        LandmarkHeatmaps(jitter=1.0),
        LandmarkHeatmaps(jitter=0.0, norm="l1"),
        LandmarkHeatmaps(jitter=0.0, squared_group_weights=True, tip_in_lower_nose=True),
        LandmarkHeatmaps(jitter=0.0, stretch_contrast=True),
    ],
    ids=["l2", "views", "l1", "published", "stretched"],
)
def test_factors_are_as_weights_multiplied_by_hand(term: LandmarkHeatmaps) -> None:
    draw = torch.Generator().manual_seed(3)
    images = torch.rand(2, 3, 4, 4, generator=draw) * 2 - 1
    weights = torch.rand(2, 68, generator=draw)
    factors = expand(dict.fromkeys(GROUPS, 1.0) | {"jaw": 20.0, "lower_nose": 3.0, "left_eye": 0.0})
    by_hand = weights.clone()
    by_hand[:, :17] *= 20
    by_hand[:, 31:36] *= 3
    by_hand[:, 36:42] = 0
    got = evaluate(term, images, weights, factors)
    torch.testing.assert_close(got, evaluate(term, images, by_hand))
    plain = evaluate(term, images, weights)
    assert (got - plain).abs().min() > 0.01 * plain.max()
    assert torch.equal(evaluate(term, images, weights, torch.ones(68)), plain)


def test_the_tip_of_the_nose_has_the_factor_of_its_group() -> None:
    images, weights = torch.zeros(1, 3, 4, 4), torch.zeros(1, 68)
    weights[:, 31:36] = 1.0
    factors = expand(dict.fromkeys(GROUPS, 1.0) | {"lower_nose": 2.0, "nose_bridge": 50.0})
    term = LandmarkHeatmaps(tip_in_lower_nose=True, squared_group_weights=True, jitter=0.0)
    # Squared weights square their factors, too: √(Σ (2 k)² Σ_px grey²).
    grey = (torch.linspace(-1, 1, 16) ** 4).sum()
    expected = 2 * (sum(k**2 for k in range(30, 36)) * grey) ** 0.5
    got = evaluate(term, images, weights, factors).item()
    assert got == pytest.approx(expected.item(), rel=1e-5)
    assert factors[30] == 50  # the caller's are left as they were


def test_jitter_moves_both_faces_alike() -> None:
    expression = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4).expand(2, 3, 4, 4)
    points = torch.zeros(2, 68, 2)
    targets = Targets(expression, points, expression, points, torch.ones(2, 68))
    network = Squares()
    bound = LandmarkHeatmaps(jitter=1.0).bind(Context(UNUSED, network, UNUSED), targets)
    for step in range(3):
        same = Candidate(expression, torch.zeros(2, 1, 1), (), step, network, (0, 1))
        assert bound(same).eq(0).all()
    other = Candidate(expression.roll(1, 3), torch.zeros(2, 1, 1), (), 0, network, (0, 1))
    assert (bound(other) > 1).all()


def test_jitter_and_stretching_exclude_each_other() -> None:
    with pytest.raises(LmexpError, match="jitter and stretch_contrast"):
        LandmarkHeatmaps(stretch_contrast=True, jitter=0.5)
