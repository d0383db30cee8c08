"""The command line in this process: what it prints, leaves and answers."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lmexp import cli
from lmexp.recording.run_folder import RunFolder

TINY_FAN = Path(__file__).parents[1] / "data" / "fan_tiny.safetensors"
"""An untrained landmark network, `Fan(16, 1, 68)`, that costs a sixth of the slim one."""

TINY = (
    "experiment=debug",
    "generator.resolution=32",
    "loss=[landmarks,prior,noise]",
    "loss.noise.weight=100",
    "recording.video_frames=4",
    "figure=[]",
    "hardware.threads=1",
    f"landmarks.weights={TINY_FAN}",
    f"judge.weights={TINY_FAN}",
)
"""A projection in a second: random networks, no perceptual one."""


@dataclass(frozen=True)
class Answer:
    """What one command came to."""

    code: int
    out: str
    err: str


class CommandLine:
    """Runs `lmexp WORDS…` in the current folder, as its users do."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
    ) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.folder = folder

    def __call__(self, *words: str) -> Answer:
        self._monkeypatch.setattr(sys, "argv", ["lmexp", *words])
        self._monkeypatch.setenv("COLUMNS", "1000")  # so that no line of a table folds
        self._capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            code = stop.code
        said = self._capsys.readouterr()
        return Answer(code, said.out, said.err)

    def run_folders(self, below: str = "runs") -> list[Path]:
        """The folders of single runs (or of a sweep's jobs), by name."""
        return sorted(path.parent for path in (self.folder / below).glob("*/status.json"))

    def only_run(self) -> Path:
        (folder,) = self.run_folders()
        return folder

    def sweep_folder(self) -> Path:
        (index,) = (self.folder / "runs").glob("*/index.json")
        return index.parent


def read_index(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "index.json").read_text())
    return content


def assert_same_result(one: Path, other: Path) -> None:
    """Bit for bit: latents, noise, picture and every step's losses."""
    first, second = RunFolder(one), RunFolder(other)
    (ws, noise), (other_ws, other_noise) = first.read_projection(), second.read_projection()
    assert np.array_equal(ws, other_ws)
    assert len(noise) == len(other_noise) > 0
    for left, right in zip(noise, other_noise, strict=True):
        assert np.array_equal(left, right)
    assert np.array_equal(first.read_picture("proj"), second.read_picture("proj"))
    assert first.read_metrics() == second.read_metrics()
    assert first.read_summary()["losses"] == second.read_summary()["losses"]


def latents(folder: Path) -> NDArray[np.float32]:
    return RunFolder(folder).read_projection()[0]


def environment() -> dict[str, str]:
    """For `python -m lmexp` as a process of its own."""
    source = Path(cli.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
