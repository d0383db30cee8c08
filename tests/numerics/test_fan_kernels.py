"""A lowered FAN against the network as it was trained, and its kernels against plain operations.

Run as a program, this file compares the Triton kernels with the same computation in plain tensor
operations, on the device it is given; `TRITON_INTERPRET=1` runs them on a CPU.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmexp.landmarks.fan import CEILING, Fan, HierarchicalBlock
from lmexp.landmarks.frozen_fan import FrozenBlock, FrozenFan, FrozenHourglass


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stir(module: nn.Module) -> None:
    """Give frozen normalisations something to do."""
    for index, norm in enumerate(m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(draw(norm.num_features, seed=index) * 0.3)
        norm.running_var.copy_(draw(norm.num_features, seed=index).abs() + 0.5)
        norm.weight.data.copy_(draw(norm.num_features, seed=index + 1) * 0.3 + 1)
        norm.bias.data.copy_(draw(norm.num_features, seed=index + 2) * 0.3)


@pytest.mark.parametrize("width", [16, 48])
def test_a_lowered_fan_is_the_fan(width: int) -> None:
    """In float32, where nothing is rounded that was not before; the gradient, too."""
    torch.manual_seed(0)
    fan = Fan(width, depth=2, landmarks=5).eval().requires_grad_(False)
    stir(fan)
    lowered = FrozenFan.of_embedded(fan, torch.float32)
    images = draw(2, 3, 32, 32).requires_grad_()
    wanted, found = fan(images), lowered(images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    outer = draw(*wanted.shape, seed=1)
    slopes = [torch.autograd.grad(maps, images, outer)[0] for maps in (wanted, found)]
    assert slopes[0].norm() > 0
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-3, atol=1e-4)


def build(width: int, depth: int, stacks: int, ceiling: float) -> FrozenFan:
    """A lowered network of random weights, in float32, whose skips are of both kinds."""
    torch.manual_seed(width)

    def block(inputs: int, outputs: int) -> FrozenBlock:
        module = HierarchicalBlock(inputs, outputs)
        stir(module)
        layers = [(getattr(module, f"norm{i}"), getattr(module, f"conv{i}")) for i in (1, 2, 3)]
        way: Any = module.skip
        skip = None if isinstance(way, nn.Identity) else (way[0], way[2])
        return FrozenBlock(layers, skip, ceiling, torch.float32)

    def normalised(*sizes: int, **choices: Any) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        norm = nn.BatchNorm2d(sizes[1])
        stir(norm)
        return nn.Conv2d(*sizes, **choices), norm.eval()

    def stack() -> tuple[FrozenHourglass, FrozenBlock, tuple[nn.Conv2d, nn.BatchNorm2d]]:
        levels = [
            (block(width, width), block(width, width), block(width, width)) for _ in range(depth)
        ]
        hourglass = FrozenHourglass(levels, block(width, width))
        return hourglass, block(width, width), normalised(width, width, 1)

    return FrozenFan(
        stem=normalised(3, width // 4, 7, stride=2, padding=3),
        blocks=[
            block(width // 4, width // 2),
            block(width // 2, width // 2),
            block(width // 2, width),
        ],
        stacks=[stack() for _ in range(stacks)],
        heatmaps=nn.Conv2d(width, 5, 1),
        feedback=[
            (draw(width, width, 1, 1, seed=k) / width**0.5, draw(width, seed=k))
            for k in range(stacks - 1)
        ],
        ceiling=ceiling,
        dtype=torch.float32,
    )


def compare_kernels(device: str) -> list[float]:
    """Relative errors of maps and the images' gradients, the worst last."""
    from lmexp.landmarks import fan_triton

    errors: list[float] = []
    for width, stacks, ceiling, n, side in (
        (16, 1, CEILING, 2, 32),
        (16, 3, 0.7, 1, 32),
        (24, 1, math.inf, 1, 48),
        (48, 2, CEILING, 1, 16),
        (64, 2, math.inf, 3, 16),
    ):
        network = build(width, 2, stacks, ceiling)
        images = draw(n, 3, side, side)
        found: list[tuple[Tensor, Tensor]] = []
        for there, function in (("cpu", FrozenFan.draw_plainly), (device, fan_triton.draw)):
            network.to(there)
            leaf = images.to(there).requires_grad_()
            maps = function(network, network.arrange(leaf))
            assert maps.is_contiguous()
            outer = draw(*maps.shape, seed=7).to(there)
            (slope,) = torch.autograd.grad(maps, leaf, outer)
            found.append((maps.detach().cpu(), slope.cpu()))
        for wanted, got in zip(*found, strict=True):
            assert got.shape == wanted.shape and got.dtype == wanted.dtype and wanted.norm() > 0
            errors.append(float((got - wanted).norm() / wanted.norm()))
    # Without a gradient nothing is kept, and the same is drawn.
    same = fan_triton.draw(network, network.arrange(images.to(device)))
    assert torch.equal(same, maps)
    return sorted(errors)


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.mark.slow
@needs_triton
def test_kernels_compute_the_same(run_kernels: Callable[[str, str], tuple[int, float]]) -> None:
    count, worst = run_kernels(Path(__file__).name, "cpu")
    assert count == 10
    assert 0 < worst < 1e-5


@needs_triton
@pytest.mark.parametrize(("stacks", "forward", "backward"), [(1, 50, 49), (2, 90, 89)])
def test_kernels_stay_few(
    stacks: int, forward: int, backward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs its waiting, too. A gap between two convolutions has one, whatever lies in it."""
    from lmexp.landmarks import fan_triton

    launched: list[Any] = []
    monkeypatch.setattr(
        fan_triton, "launch", lambda kernel, grid, **arguments: launched.append(kernel)
    )
    # As deep as the embedded and the published networks.
    network = build(16, 4, stacks, CEILING)
    maps = fan_triton.draw(network, network.arrange(draw(1, 3, 64, 64).requires_grad_()))
    assert len(launched) == forward
    maps.sum().backward()
    assert len(launched) == forward + backward
    with pytest.raises(RuntimeError):
        maps.sum().backward()


@needs_triton
def test_maps_are_freed_as_the_backward_pass_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmexp.landmarks import fan_triton

    monkeypatch.setattr(fan_triton, "launch", lambda kernel, grid, **arguments: None)
    network = build(16, 1, 1, CEILING)
    arranged = network.arrange(draw(1, 3, 16, 16)).requires_grad_()
    maps: Any = fan_triton.draw(network, arranged)
    tape = maps.grad_fn.tape
    # The stem, eight blocks, and what follows the top.
    assert len(tape) == 10
    torch.autograd.grad(maps.sum(), arranged, retain_graph=True)
    assert not tape
    with pytest.raises(RuntimeError, match="second"):
        torch.autograd.grad(maps.sum(), arranged)


@needs_triton
@pytest.mark.parametrize("wrong", [False, True])
def test_kernels_are_held_against_plain_operations_before_their_first_use(
    wrong: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lmexp.landmarks import fan_triton

    calls: list[int] = []

    def kernels(network: FrozenFan, arranged: Tensor) -> Tensor:
        calls.append(len(arranged))
        maps = network.draw_plainly(arranged)
        return maps.flip(1) if wrong else maps

    monkeypatch.setattr(FrozenFan, "has_kernels", True)
    monkeypatch.setattr(fan_triton, "draw", kernels)
    network = build(16, 1, 1, CEILING)
    arranged = network.arrange(draw(3, 3, 16, 16))
    for _ in range(2):
        assert torch.equal(network.draw(arranged), network.draw_plainly(arranged))
    assert calls == ([1] if wrong else [1, 3, 3])
    assert ("the landmark network" in caplog.text) == wrong


JOINED = ("half", "quarter", "last")
FIRST = ("first", "first_scale", "first_shift")
AROUND = ("around", "around_scale", "around_shift")
BACK = ("back", "back_level", "back_scale")
BACK_AROUND = ("around", "around_level", "around_scale")


def prefix(text: str, *names: str) -> tuple[str, ...]:
    return tuple(text + name for name in names)


@needs_triton
@pytest.mark.parametrize("channels", [256, 48])
@pytest.mark.parametrize(
    ("name", "corners", "given"),
    [
        ("_make_kernel", 1, ("x", *FIRST)),
        ("_make_kernel", 1, ("x", "shift", "whole", *FIRST, *AROUND)),
        ("_make_kernel", 1, ("x", *JOINED, *FIRST, *AROUND)),
        (
            "_make_kernel",
            4,
            ("x", *JOINED, *prefix("halved_", *FIRST, *AROUND)),
        ),
        (
            "_make_kernel",
            4,
            ("x", "more", "shift", "whole", *FIRST, "halved", *prefix("halved_", *FIRST)),
        ),
        (
            "_make_kernel",
            4,
            ("x", *JOINED, *prefix("coarse_", "x", *JOINED), "whole", *FIRST),
        ),
        ("_collect_kernel", 1, ("base", "whole")),
        ("_collect_kernel", 1, ("base", *BACK, "whole", "tail")),
        ("_collect_kernel", 1, (*BACK, *BACK_AROUND, "through", "whole")),
        ("_collect_kernel", 4, (*prefix("coarse_", "base", *BACK), "whole", "tail")),
        (
            "_collect_kernel",
            4,
            ("base", *BACK, *prefix("coarse_", "base", *BACK), "more", "whole", "tail"),
        ),
        ("_collect_kernel", 4, ("base", *BACK, "whole", "tail", "halved", "halved_tail")),
        ("_draw_kernel", 1, ("x", "bias", "maps")),
    ],
)
def test_kernels_compile_for_a_gpu(
    name: str,
    corners: int,
    given: tuple[str, ...],
    channels: int,
    compile_kernel: Callable[..., Any],
) -> None:
    from lmexp.landmarks import fan_triton

    kernel = getattr(fan_triton, name)
    sizes = {"C": channels, "BASE_C": channels, "FIRST": 0, "CORNERS": corners, "BLOCK": 512}
    sizes |= {"CLAMPED": "shift" in given, "BOUNDED": True}
    sizes |= {"K": 68, "PLACES": 32, "CHANNELS": 128}
    numbers = {"width": "i32", "places": "i32", "ceiling": "fp32"}
    absent = set(kernel.arg_names) - {*sizes, *numbers, *given}
    constants = {key: sizes.get(key) for key in kernel.arg_names if key in {*sizes, *absent}}
    whole = ("scale", "shift", "bias", "maps")
    halves = {key: "*bf16" for key in kernel.arg_names if not key.endswith(whole)}
    made = compile_kernel(kernel, halves | numbers, constants)
    assert made.asm["cubin"]


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = False
    if sys.argv[1] == "cpu":
        from lmexp.landmarks import fan_triton

        # Several programs a row, though the networks are small.
        fan_triton.QUAD_BLOCK = 128
    found = compare_kernels(sys.argv[1])
    print(len(found), found[-1])
