"""The blocks of a FAN that run side by side read what they should, whatever else the GPU does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lmexp.landmarks.fan import Fan
from lmexp.landmarks.frozen_fan import FrozenFan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here"),
]


class InTurn:
    """In the place of `SideStream`: one after the other."""

    def __init__(self, *of: object) -> None:
        pass

    def __enter__(self) -> InTurn:
        return self

    def __exit__(self, *fault: object) -> None:
        pass

    def join(self, *made: object) -> None:
        pass


@pytest.fixture
def network() -> FrozenFan:
    torch.manual_seed(0)
    fan = Fan(128, depth=4, landmarks=68).eval().requires_grad_(False)
    return FrozenFan.of_embedded(fan, torch.bfloat16).cuda()


@pytest.fixture
def streams() -> list[Any]:
    """All that PyTorch hands out of two priorities: among them are those of the blocks."""
    stream: Any = torch.cuda.Stream
    return [stream(priority=k) for k in (0, -1) for _ in range(32)]


@contextmanager
def crowd(streams: list[Any]) -> Iterator[None]:
    """Others take memory, spoil it, give it back, and keep the GPU busy."""
    for index, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            for size in (2**18, 2**20, 2**21, 2**22):
                torch.full((size >> index % 3,), torch.nan, device="cuda", dtype=torch.bfloat16)
    yield
    for stream in streams[::8]:
        with torch.cuda.stream(stream):
            a = torch.ones(1024, 1024, device="cuda", dtype=torch.bfloat16)
            a @ a


def draw(network: FrozenFan, arranged: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    from lmexp.landmarks import fan_triton

    leaf = arranged.detach().requires_grad_()
    maps = fan_triton.draw(network, leaf)
    (slope,) = torch.autograd.grad(maps, leaf, outer)
    return maps.detach(), slope


@pytest.fixture
def inputs(network: FrozenFan) -> tuple[Tensor, Tensor]:
    images = torch.rand(4, 3, 256, 256, device="cuda") * 2 - 1
    arranged = network.arrange(images)
    return arranged, torch.randn(4, 68, 64, 64, device="cuda")


@pytest.fixture
def wanted(
    network: FrozenFan, inputs: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    from lmexp.landmarks import fan_triton

    with monkeypatch.context() as patch:
        patch.setattr(fan_triton, "SideStream", InTurn)
        found = draw(network, *inputs)
    torch.cuda.synchronize()
    assert all(bool(torch.isfinite(x).all()) and x.norm() > 0 for x in found)
    return found


def test_operation_by_operation(
    network: FrozenFan,
    inputs: tuple[Tensor, Tensor],
    wanted: tuple[Tensor, Tensor],
    streams: list[Any],
) -> None:
    found = []
    for _ in range(20):
        with crowd(streams):
            found.append(draw(network, *inputs))
    torch.cuda.synchronize()
    for one in found:
        assert torch.equal(one[0], wanted[0]) and torch.equal(one[1], wanted[1])


def spoil() -> None:
    """Take memory of the maps' sizes for the stream at hand, fill it, give it back."""
    for side in (64, 32, 16, 8):
        for channels in (128, 64, 32, 32):
            shape = (4, channels, side, side)
            torch.full(shape, torch.nan, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("shared", [False, True])
def test_within_a_graph(
    shared: bool,
    network: FrozenFan,
    inputs: tuple[Tensor, Tensor],
    wanted: tuple[Tensor, Tensor],
    streams: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the blocks were given the stream of what stands beside them in the graph."""
    from lmexp import side_streams
    from lmexp.landmarks import fan_triton

    arranged, outer = inputs
    aside = streams[33]
    draw(network, *inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        here = torch.cuda.current_stream()
        if shared:
            monkeypatch.setattr(side_streams, "_stream", lambda *of: here)
        leaf = arranged.detach().requires_grad_()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            maps = fan_triton.draw(network, leaf)
        spoil()
        with torch.cuda.stream(aside):
            (slope,) = torch.autograd.grad(maps, leaf, outer)
        spoil()
        here.wait_stream(aside)
        made = maps.detach(), slope
    for _ in range(50):
        for one in made:
            one.fill_(torch.nan)
        with crowd(streams):
            graph.replay()
        assert torch.equal(made[0], wanted[0]) and torch.equal(made[1], wanted[1])
