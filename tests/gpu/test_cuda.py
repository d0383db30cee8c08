"""The same run on a GPU: nothing but `hardware=cuda` changes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lmexp import cli
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
