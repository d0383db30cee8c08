"""Accelerated copies: what they compute, what they leave alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmexp.acceleration import PLAIN, Acceleration, Checked
from lmexp.generators.tiny_random import TinyRandom
from lmexp.latents import LatentStatistics
from lmexp.losses.protocol import Context

LOWERED = Acceleration(half=torch.bfloat16)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x)
        return result


class OwnWay(Layer):
    def lower_precision(self, dtype: torch.dtype) -> None:
        self.linear.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x.to(self.linear.weight.dtype))
        return result.float()


def test_plain_leaves_everything_as_it_is() -> None:
    layer = Layer()
    assert PLAIN.network(layer) is layer
    assert PLAIN.fuse(torch.add) is torch.add
    context = Context(layer, layer, None)  # type: ignore[arg-type]
    assert context.accelerated(PLAIN) == context


@pytest.mark.parametrize("kind", [Layer, OwnWay])
def test_half_precision_is_a_copy_that_answers_in_float32(kind: type[Layer]) -> None:
    layer, x = kind(), torch.randn(8, 64)
    exact = layer(x)
    copied = LOWERED.network(layer)
    assert copied is not layer and LOWERED.network(layer) is copied
    answer = copied(x)
    assert answer.dtype == torch.float32
    assert 0 < float((answer - exact).norm() / exact.norm()) < 0.01
    assert torch.equal(layer(x), exact)  # the module itself is as it was


def test_of_a_generator_it_is_the_synthesis_that_is_lowered() -> None:
    generator = TinyRandom(resolution=16, dim=16, channels=8)
    copied = LOWERED.network(generator)
    z = torch.randn(2, generator.z_dim)
    assert torch.equal(copied.mapping(z), generator.mapping(z))
    ws = generator.mapping(z)[:, None].expand(-1, generator.num_ws, -1)
    images, exact = copied.synthesis(ws), generator.synthesis(ws)
    assert images.dtype == torch.float32
    assert 0 < float((images - exact).norm() / exact.norm()) < 0.05


def test_a_module_chooses_what_of_it_is_compiled() -> None:
    chosen: list[object] = []

    class Choosy(Layer):
        def compile_regions(self, fuse: object) -> None:
            chosen.append(fuse)

    compiled = Acceleration(compile=True)
    layer = Choosy()
    copied = compiled.network(layer)
    assert chosen == [compiled.fuse] and copied is not layer
    x = torch.randn(2, 64)
    assert torch.equal(copied(x), layer(x))


def test_what_is_no_module_is_left_alone() -> None:
    stub = object()
    assert LOWERED.network(stub) is stub


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_functions_and_networks_compute_the_same() -> None:
    compiled = Acceleration(compile=True)
    layer, x = Layer(), torch.randn(8, 64)
    torch.testing.assert_close(compiled.network(layer)(x), layer(x))

    def double(value: Tensor, by: Tensor) -> None:
        value.mul_(by)

    value = torch.ones(3)
    compiled.fuse(double)(value, torch.tensor(2.0))
    assert value.tolist() == [2, 2, 2]


def test_a_context_hands_on_its_accelerated_networks() -> None:
    layer = Layer()
    statistics = LatentStatistics(torch.zeros(2, 4), torch.zeros(4), 1.0)
    context = Context(TinyRandom(resolution=16, dim=16, channels=8), layer, statistics)  # type: ignore[arg-type]
    stepping = context.accelerated(LOWERED)
    assert stepping.heatmap_network is LOWERED.network(layer)  # type: ignore[comparison-overlap]
    assert stepping.acceleration is LOWERED and context.acceleration is PLAIN
    assert replace(context, acceleration=LOWERED) != context


def cube(x: Tensor, scale: Tensor) -> Tensor:
    return (x**3).sum(1) * scale


class Doubled(torch.autograd.Function):
    """The right value and twice the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


def refuse(x: Tensor, scale: Tensor) -> Tensor:
    raise RuntimeError("no image for\nthis card")


@pytest.mark.parametrize(
    ("kernels", "said"),
    [
        (lambda x, scale: cube(x * 1.001, scale), None),
        (lambda x, scale: cube(x * 1.1, scale), "other values"),
        (lambda x, scale: cube(x, scale) * torch.nan, "other values"),
        (lambda x, scale: cube(Doubled.apply(x), scale), "other gradients"),
        (lambda x, scale: cube(x, Doubled.apply(scale)), "other gradients"),
        (refuse, "RuntimeError: no image for this card"),
    ],
)
def test_kernels_serve_once_they_are_found_right(
    kernels: Any, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def fallback(x: Tensor, scale: Tensor) -> Tensor:
        calls.append(len(x))
        return cube(x, scale)

    function = Checked("CUBE", kernels, cube, fallback)
    x, scale = torch.linspace(1, 2, 12).view(4, 3), torch.linspace(-2, 3, 4)
    with torch.no_grad(), caplog.at_level("WARNING", logger="lmexp"):
        first, second = function(x, scale), function(x[:2], scale[:2])
    assert calls == ([] if said is None else [4, 2])
    torch.testing.assert_close(first, cube(x, scale), rtol=0.01, atol=0)
    torch.testing.assert_close(second, first[:2])
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (0 if said is None else 1)
    if said is not None:
        assert f"the kernels of CUBE are not right on this GPU ({said})" in lines[0]


def test_what_overflows_in_plain_operations_accuses_no_kernel() -> None:
    function = Checked("X", lambda x: x * 2, lambda x: x * torch.inf, lambda x: x * 0)
    assert torch.equal(function(torch.ones(2, 3)), torch.full((2, 3), 2.0))


def test_running_out_of_memory_is_no_fault_of_a_kernel() -> None:
    def exhaust(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Checked("X", exhaust, torch.neg, torch.neg)(torch.ones(2, 3))
