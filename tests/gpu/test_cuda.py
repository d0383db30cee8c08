"""The same run on a GPU: nothing but `hardware=cuda` changes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lmexp import cli
from lmexp.generators.stylegan2 import StyleGAN2Random
from lmexp.recording.run_folder import RunFolder

TINY = [
    "experiment=debug",
    "loss=[landmarks,prior,noise]",
    "loss.noise.weight=100",
    "figure=[triptych]",
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here"),
]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> Path:
    monkeypatch.setattr(sys, "argv", ["lmexp", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    root = next(word for word in words if word.startswith("output_dir=")).partition("=")[2]
    (status,) = Path(root).glob("**/status.json")
    return status.parent


def test_a_run_on_cuda_comes_to_what_it_does_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    on_cpu = run(monkeypatch, *TINY, "hardware=cpu", "output_dir=cpu")
    on_cuda = run(monkeypatch, *TINY, "hardware=cuda", "output_dir=cuda")
    assert on_cpu.name == on_cuda.name
    ws = [RunFolder(path).read_projection()[0] for path in (on_cpu, on_cuda)]
    # Adam's first steps divide tiny gradients by their own size: rounding shows in a few.
    assert np.abs(ws[0] - ws[1]).mean() < 0.02
    assert (
        "CUDA" in RunFolder(on_cuda).read_summary()["device"]
        or torch.cuda.get_device_name(0) in RunFolder(on_cuda).read_summary()["device"]
    )


def test_the_packaged_networks_run_on_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["optimizer.steps=5", "latent.inversion.steps=3", "tracker=none", "output_dir=runs"]
    folder = RunFolder(run(monkeypatch, *words, "hardware=cuda"))
    totals = [line["loss"] for line in folder.read_metrics()]
    assert np.isfinite(totals).all() and totals[-1] < totals[0]


def test_stylegan2_on_cuda_is_what_it_is_on_the_cpu() -> None:
    generator = StyleGAN2Random(resolution=128, channel_base=2048, channel_max=64, conv_clamp=256.0)
    draw = torch.Generator().manual_seed(0)
    ws = torch.randn(2, generator.num_ws, generator.w_dim, generator=draw)

    def render(
        device: str, memory_format: torch.memory_format
    ) -> tuple[torch.Tensor, torch.Tensor]:
        module = generator.to(device, memory_format=memory_format)  # type: ignore[call-overload]
        leaf = ws.to(device).requires_grad_()
        images = module.synthesis(leaf)
        (images * torch.linspace(-1, 1, 128, device=device)).mean().backward()
        assert leaf.grad is not None
        return [images.detach().cpu(), leaf.grad.cpu()]

    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        images, gradient = render("cpu", torch.contiguous_format)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            there, slope = render("cuda", memory_format)
            assert float((there - images).abs().max()) < 1e-4 * float(images.abs().max())
            assert float((slope - gradient).norm()) < 2e-3 * float(gradient.norm())
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_of_stylegan2_on_cuda_is_close_to_float32(dtype: str) -> None:
    options = {"resolution": 128, "channel_base": 2048, "channel_max": 64, "conv_clamp": 256.0}
    exact = StyleGAN2Random(**options).cuda()
    half = StyleGAN2Random(**options, half_precision=4, half_dtype=dtype).cuda()
    ws = torch.randn(2, exact.num_ws, exact.w_dim, device="cuda")
    with torch.no_grad():
        wanted, got = exact.synthesis(ws), half.synthesis(ws)
    assert got.dtype == torch.float32
    error = float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    assert error < (0.03 if dtype == "bfloat16" else 0.005)
