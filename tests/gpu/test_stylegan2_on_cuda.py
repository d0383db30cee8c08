"""StyleGAN2 in half precision on a GPU: its kernels, and inside a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lmexp.generators import stylegan2
from lmexp.generators.stylegan2 import StyleGAN2Random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(
    ("program", "figures"),
    [
        ("test_stylegan2_epilogue.py", 81),
        ("test_fan_kernels.py", 10),
        ("test_adam_kernel.py", 12),
        ("test_noise_kernels.py", 40),
        ("test_mobile_kernels.py", 48),
        ("test_identity_kernels.py", 8),
        ("test_vgg_kernels.py", 8),
    ],
)
def test_kernels_compute_what_their_formulas_do(
    program: str, figures: int, run_kernels: Callable[[str, str], tuple[int, float]]
) -> None:
    count, worst = run_kernels(program, "cuda")
    assert count == figures
    assert 0 < worst < 1e-4


@pytest.mark.parametrize("split", ["transposed", "quads", "phases"])
def test_a_graph_of_lowered_synthesis_is_near_float32(
    split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stylegan2, "choose_split", lambda side: split)
    sizes: dict[str, Any] = {"resolution": 128, "channel_base": 4096, "channel_max": 128}
    exact, lowered = (StyleGAN2Random(**sizes).cuda() for _ in range(2))
    lowered.lower_precision(torch.bfloat16)
    ws = torch.randn(3, exact.num_ws, exact.w_dim, device="cuda", requires_grad=True)
    noise = [torch.randn(3, 1, *s, device="cuda").requires_grad_() for s in exact.noise_shapes]
    outer = torch.randn(3, 3, 128, 128, device="cuda")

    def step(network: StyleGAN2Random) -> list[Tensor]:
        images = network.synthesis(ws, noise)
        return [images, *torch.autograd.grad(images, [ws, *noise], outer)]

    wanted = step(exact)
    step(lowered)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(lowered)
    graph.replay()
    torch.cuda.synchronize()
    for index, (made, reference) in enumerate(zip(found, wanted, strict=True)):
        error = float((made - reference).norm() / reference.norm())
        assert error < (0.1 if index else 0.03)
