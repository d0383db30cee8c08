"""Networks in the form that is made fast: the same numbers, one graph, weights cast once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_identity_network import random_tensors as identity_tensors
from test_lpips import draw_images, random_hed_tensors, random_stlpips
from test_mobile_stylegan import random_tensors as mobile_tensors
from torch import Tensor, nn

from lmexp.acceleration import Acceleration
from lmexp.convolutions import (
    LoweredConv,
    UnshuffledConv,
    depthwise,
    lower_convolutions,
    taps_of,
)
from lmexp.generators import mobile_lowered
from lmexp.generators.mobile_head import ImageHead, merge_bands
from lmexp.generators.mobile_stylegan import MobileNetwork
from lmexp.landmarks.embedded import EmbeddedFan
from lmexp.landmarks.face_alignment_network import FaceAlignmentNetwork
from lmexp.landmarks.fan import Fan
from lmexp.landmarks.frozen_fan import FrozenFan
from lmexp.losses.identity_network import IdentityNetwork
from lmexp.losses.lpips import feature_distance, normalise
from lmexp.losses.perceptual import hed
from lmexp.losses.perceptual import lpips as lpips_family

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lpips
    from face_alignment.models import FAN

HALF = torch.bfloat16
Built = tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], Tensor]


def freeze(network: nn.Module) -> nn.Module:
    """Evaluation mode, with batch statistics that are not the trivial ones."""
    draw = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.2, generator=draw)
            module.running_var.uniform_(0.5, 1.5, generator=draw)
    return network.eval().requires_grad_(False)


def call(network: nn.Module, x: Tensor) -> Tensor:
    answer: Tensor = network(x)
    return answer


def draw(network: nn.Module, crops: Tensor) -> Tensor:
    maps: Tensor = network.draw(crops)  # type: ignore[operator]
    return maps


def synthesise(network: nn.Module, ws: Tensor) -> Tensor:
    images: Tensor = network.synthesis(ws)  # type: ignore[operator]
    return images


def perceive(network: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        target = [normalise(layer) for layer in network.features(images.detach().flip(0))]
    return feature_distance(network.features(images), target, network.channel_weights)


def build(name: str) -> Built:
    """A small network of random weights, how it is asked, and an input."""
    torch.manual_seed(0)
    if name.startswith("mobile"):
        tensors = mobile_tensors()
        head = None
        if name == "mobile with head":
            head = ImageHead(channels=16, width=8, side=8, w_dim=6)
            for layer in (head.layer1, head.layer2):
                nn.init.normal_(layer.noise)
            head.freeze()
        network: nn.Module = MobileNetwork(tensors, "", head, None if head is None else 1)
        return network, synthesise, torch.randn(2, network.num_ws, 6)  # type: ignore[call-overload]
    if name == "fan":
        embedded = EmbeddedFan.__new__(EmbeddedFan)
        nn.Module.__init__(embedded)
        embedded.network = freeze(Fan(16, 2, 5))  # type: ignore[assignment]
        return embedded, call, draw_images(1, 256, 256)[:1]
    if name.startswith("published fan"):
        published = FaceAlignmentNetwork.__new__(FaceAlignmentNetwork)
        nn.Module.__init__(published)
        published.frame = (0.5, 0.48, 1.23)
        published.network = freeze(FAN(2 if name == "published fan" else 1))
        if name == "published fan":
            return published, draw, draw_images(1, 64, 64)[:1]
        return published, call, draw_images(1, 256, 256)[:1]
    if name == "identity":
        network = IdentityNetwork(identity_tensors(8), "none").eval().requires_grad_(False)
        return network, call, draw_images(1, 112, 112)
    if name == "hed":
        network = hed.HedVgg16(random_hed_tensors(), "none")
    elif name == "lpips":
        theirs = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
        heads = [torch.rand(width) for width in theirs.chns]
        network = lpips_family.LpipsPackage(theirs.net, heads)
    else:
        network = random_stlpips(name.partition(" ")[2])
    return network.eval().requires_grad_(False), perceive, draw_images(1, 64, 64)


NETWORKS = (
    "mobile",
    "mobile with head",
    "fan",
    "published fan",
    "identity",
    "hed",
    "lpips",
    "stlpips alex",
)


def value_and_gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = f(x)
    cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value)
    (gradient,) = torch.autograd.grad((value * cotangent).sum(), x)
    return value.detach(), gradient


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(
    ("name", "dense_side"), [*((name, 0) for name in NETWORKS), ("mobile", 64)]
)
def test_the_other_form_computes_the_same(
    name: str, dense_side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mobile_lowered, "DENSE_SIDE", dense_side)
    network, ask, x = build(name)
    network, x = network.double(), x.double()
    wanted, slope = value_and_gradient(lambda x: ask(network, x), x)
    # float64 on both sides, but for the factors and biases that are float32 by design.
    network.lower_precision(torch.float64)  # type: ignore[operator]
    got, gradient = value_and_gradient(lambda x: ask(network, x), x)
    assert relative(got, wanted) < 1e-6
    assert relative(gradient, slope) < 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_is_near_and_answers_in_single(name: str) -> None:
    network, ask, x = build(name)
    wanted, slope = value_and_gradient(lambda x: ask(network, x), x)
    accelerated = Acceleration(half=HALF).network(network)
    assert accelerated is not network
    got, gradient = value_and_gradient(lambda x: ask(accelerated, x), x)
    assert got.dtype == gradient.dtype == torch.float32
    assert 0 < relative(got, wanted) < 0.03
    # Random networks amplify what rounding changes at their kinks.
    assert relative(gradient, slope) < 0.35
    # The original still is what it was.
    assert torch.equal(ask(network, x), wanted)


# One stack of the published network, with its crop: four take a minute to trace.
GRAPHS = [name for name in NETWORKS if name != "published fan"] + ["published fan, crop"]


@pytest.mark.parametrize("name", GRAPHS)
def test_one_graph_without_casts_of_weights(name: str) -> None:
    network, ask, x = build(name)
    network = copy.deepcopy(network)
    network.lower_precision(HALF)  # type: ignore[operator]
    wanted, slope = value_and_gradient(lambda x: ask(network, x), x)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda x: ask(network, x), backend=keep, fullgraph=True, dynamic=False)
    got, gradient = value_and_gradient(compiled, x)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradient, slope)
    (graph,) = graphs
    casts = [
        (node.args[0].name, node)
        for node in graph.graph.nodes
        if node.target in ("to", "float") and node.args[0].op == "placeholder"
    ]
    kinds = {
        name: (node.args[0].meta["example_value"].dtype, node.meta["example_value"].dtype)
        for name, node in casts
    }
    # Of all inputs of the graph the image alone may change its type, never a weight.
    assert all(a == b for name, (a, b) in kinds.items() if name != "l_x_"), kinds


@pytest.mark.parametrize("stride", [1, 2])
def test_sum_of_shifts_is_a_depthwise_convolution(stride: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 1, 3, 3)
    x = torch.randn(2, 7, 6, 5, dtype=torch.double, requires_grad=True)
    taps = taps_of(weight).double()
    wanted = F.conv2d(x.permute(0, 3, 1, 2), weight.double(), None, stride, 1, groups=5)
    got = depthwise(x, taps, stride)
    torch.testing.assert_close(got, wanted.permute(0, 2, 3, 1), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: depthwise(x, taps, stride), (x,))


def test_unshuffled_convolution_is_the_strided_one() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 3, 7, 7), torch.randn(4)
    x = torch.randn(2, 3, 12, 16)
    wanted = F.conv2d(x, weight, bias, stride=2, padding=3)
    got = UnshuffledConv(weight, bias, torch.float32)(x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [256, 512])
def test_what_comes_before_the_landmark_networks_kernels_is_compiled(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrozenFan, "has_kernels", True)
    network = EmbeddedFan()
    network.lower_precision(HALF)
    images = draw_images(1, side, side).requires_grad_()
    wanted = network(images)
    (slope,) = torch.autograd.grad(wanted.square().sum(), images)
    shapes = []

    def fuse(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        torch.compiler.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)

        def call(images: Tensor) -> Tensor:
            shapes.append(images.shape)
            made: Tensor = compiled(images)
            return made

        return call

    network.compile_regions(fuse)
    got = network(images)
    (gradient,) = torch.autograd.grad(got.square().sum(), images)
    assert shapes == [(2, 3, side, side)]
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradient, slope)


def test_haar_by_indices_is_that_by_shuffling() -> None:
    x = torch.randn(2, 12, 3, 5)
    merged = mobile_lowered.merge_last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(merged, merge_bands(x))


def test_only_dense_convolutions_are_replaced() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Sequential(nn.Conv2d(4, 2, 1)))
    lower_convolutions(network, HALF)
    grouped, (dense,) = network[0], network[1].children()  # type: ignore[operator]
    assert isinstance(grouped, nn.Conv2d) and isinstance(dense, LoweredConv)
    assert dense.weight.dtype == HALF and dense.bias is not None
    assert dense.bias.dtype == torch.float32
