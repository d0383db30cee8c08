"""Terms whose functions are compiled and whose networks are copies: the same values, one graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp import acceleration
from lmexp.acceleration import Acceleration
from lmexp.landmarks.framing import affine_grid, average
from lmexp.latents import LatentStatistics
from lmexp.losses import identity_network
from lmexp.losses.autocorrelation import autocorrelation, autocorrelations
from lmexp.losses.coordinates import LandmarkCoordinates
from lmexp.losses.identity import IdentityDistance
from lmexp.losses.landmarks import LandmarkHeatmaps
from lmexp.losses.lpips import Lpips
from lmexp.losses.noise import NoiseRegularization
from lmexp.losses.prior import LatentPrior
from lmexp.losses.protocol import Candidate, Context, Targets, Term

SIDE = 64


class Network(nn.Module):
    """In place of every network: two layers of features, maps or an answer."""

    weights_sha256 = "none"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.requires_grad_(False).eval()

    @property
    def channel_weights(self) -> list[Tensor]:
        return [torch.ones(3), torch.arange(6.0)]

    def features(self, images: Tensor) -> list[Tensor]:
        return [images, F.relu(self.conv(images))]

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.conv(images)
        if images.shape[-1] == identity_network.SIDE:
            return F.avg_pool2d(maps, 14).flatten(1)
        return F.avg_pool2d(maps, images.shape[-1] // 16).repeat(1, 12, 1, 1)[:, :68]


TERMS: dict[str, Callable[[], Term]] = {
    "lpips": lambda: Lpips(resolution=32),
    "landmarks": lambda: LandmarkHeatmaps(jitter=0.0),
    "landmarks, stretched": lambda: LandmarkHeatmaps(jitter=0.0, stretch_contrast=True),
    "landmarks, views": lambda: LandmarkHeatmaps(jitter=1.0),
    "landmarks, widened": lambda: LandmarkHeatmaps(jitter=0.0, widen=2.0),
    "coordinates": lambda: LandmarkCoordinates(jitter=0.0),
    "coordinates, views": lambda: LandmarkCoordinates(jitter=1.0),
    "identity": IdentityDistance,
    "noise": NoiseRegularization,
    "prior": LatentPrior,
}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Whole graphs instead of kernels: what the compiler would be given."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def trace(function: Callable[..., Any]) -> Any:
        return torch.compile(function, backend=keep, fullgraph=True, dynamic=False)

    torch.compiler.reset()
    monkeypatch.setattr(acceleration, "_compile", trace)
    monkeypatch.setattr("lmexp.losses.lpips.load_network", lambda name: Network())
    monkeypatch.setattr(identity_network, "load", Network)
    return graphs


def draw_targets() -> Targets:
    draw = torch.Generator().manual_seed(1)
    look, expression = torch.rand(2, 2, 3, SIDE, SIDE, generator=draw) * 2 - 1
    landmarks = torch.rand(2, 2, 68, 2, generator=draw) * SIDE
    return Targets(look, landmarks[0], expression, landmarks[1], torch.ones(2, 68))


def draw_candidate(network: Network, requires_grad: bool = True) -> Candidate:
    draw = torch.Generator().manual_seed(2)
    images = torch.rand(2, 3, SIDE, SIDE, generator=draw) * 2 - 1
    noise = (torch.randn(2, 1, 16, 16, generator=draw), torch.randn(2, 1, 16, 16, generator=draw))
    return Candidate(
        images=images.requires_grad_(requires_grad),
        ws=torch.randn(2, 3, 8, generator=draw).requires_grad_(requires_grad),
        noise_bufs=tuple(each.requires_grad_(requires_grad) for each in noise),
        step=3,
        heatmap_network=network,
        seeds=(1, 2),
    )


def value_and_gradients(term: Term, context: Context) -> tuple[Tensor, list[Tensor]]:
    evaluate = term.bind(context, draw_targets())
    candidate = draw_candidate(cast(Network, context.heatmap_network))
    value = evaluate(candidate)
    sources = [candidate.images, candidate.ws, *candidate.noise_bufs]
    slopes = torch.autograd.grad(value.sum(), sources, allow_unused=True)
    return value.detach(), [slope for slope in slopes if slope is not None]


@pytest.mark.parametrize("name", TERMS)
def test_fused_terms_have_the_same_values_and_slopes(
    name: str, compiled: list[torch.fx.GraphModule]
) -> None:
    samples = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
    statistics = LatentStatistics(samples, samples.mean(0), 1.0)
    plain = Context(cast(Any, None), Network(), statistics)
    wanted, slopes = value_and_gradients(TERMS[name](), plain)
    assert not compiled and wanted.shape == (2,) and slopes
    fast = replace(plain, acceleration=Acceleration(compile=True))
    got, found = value_and_gradients(TERMS[name](), fast)
    assert compiled, "the term's function was not compiled"
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(found, slopes)
    # A second binding finds what the first one compiled.
    count = len(compiled)
    value_and_gradients(TERMS[name](), fast)
    assert len(compiled) == count


@pytest.mark.parametrize(
    "term",
    [LandmarkHeatmaps(), LandmarkHeatmaps(tip_in_lower_nose=True), LandmarkCoordinates()],
    ids=["landmarks", "landmarks, tip", "coordinates"],
)
def test_fused_terms_read_the_landmark_factors_of_each_step(
    term: Term, compiled: list[torch.fx.GraphModule]
) -> None:
    """As a CUDA graph does: from the same tensor, whose values change from step to step."""
    plain = Context(cast(Any, None), Network(), cast(Any, None))
    fast = replace(plain, acceleration=Acceleration(compile=True))
    factors = torch.ones(68)
    candidate = replace(draw_candidate(Network()), landmark_factors=factors)
    values = []
    with torch.no_grad():
        fused, wanted = (term.bind(context, draw_targets()) for context in (fast, plain))
        for jaw in (20.0, 3.0, 1.0):
            factors[:17] = jaw
            values.append(fused(candidate))
            torch.testing.assert_close(values[-1], wanted(candidate))
    assert len(compiled) == 1
    for one, other in pairwise(values):
        assert not torch.isclose(one, other, rtol=1e-5).any()


def test_half_precision_targets_are_compared_with_half_precision_features(
    compiled: list[torch.fx.GraphModule],
) -> None:
    """The look itself has no distance, although its features are rounded."""

    class Lowered(Network):
        def lower_precision(self, dtype: torch.dtype) -> None:
            self.to(dtype)

        def features(self, images: Tensor) -> list[Tensor]:
            return [F.relu(self.conv(images.to(self.conv.weight.dtype)))]

        @property
        def channel_weights(self) -> list[Tensor]:
            return [torch.ones(6)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmexp.losses.lpips.load_network", lambda name: Lowered())
        context = Context(
            cast(Any, None), Network(), cast(Any, None), Acceleration(half=torch.bfloat16)
        )
        targets = draw_targets()
        evaluate = Lpips(mask=(), face_emphasis=0.0, resolution=None).bind(context, targets)
        same = evaluate(replace(draw_candidate(Network()), images=targets.look))
        other = evaluate(replace(draw_candidate(Network()), images=targets.look.flip(0)))
    assert same.dtype == other.dtype == torch.float32
    assert same.max() < 1e-5 < 0.01 < other.min()


def test_grid_is_that_of_torch() -> None:
    maps = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    wanted = F.affine_grid(maps, [3, 1, 5, 8], align_corners=False)
    torch.testing.assert_close(affine_grid(maps, 5, 8), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("side", [12, 10])
def test_average_is_the_mean_over_areas(side: int) -> None:
    images = torch.rand(2, 3, side, side)
    wanted = F.interpolate(images, size=(4, 4), mode="area")
    torch.testing.assert_close(average(images, 4), wanted)


def test_maps_of_all_sizes_together_are_the_sum_of_each() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 1, side, side).double() for side in (4, 8, 8, 16, 16, 32, 64)]
    maps.append(torch.randn(2, 1, 16, 32).double())
    wanted = torch.stack([autocorrelation(noise) for noise in maps]).sum(0)
    torch.testing.assert_close(autocorrelations(maps), wanted, rtol=1e-12, atol=1e-12)
