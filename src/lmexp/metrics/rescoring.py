"""Scores of runs that are already there, from their folders alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmexp.config import Component, Hardware
from lmexp.errors import LmexpError
from lmexp.latents import measure
from lmexp.metrics.protocol import Exhibits, Scores
from lmexp.recording.images import to_image
from lmexp.recording.run_folder import RunFolder
from lmexp.workbench import Workbench


class Rescorer:
    """Measures finished runs again, or for the first time (made where no judge could be had).

    Args:
        scores: what measures.
    """

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self._bench = Workbench(
            Hardware(device="cpu", batch_size=1, threads=None, channels_last=True)
        )
        self._samples: dict[str, Tensor] = {}

    def rescore(self, folder: RunFolder) -> dict[str, Any]:
        """Measure one finished run and put its scores into its summary.json.

        The run's 8-bit pictures are what is judged, as people see them.

        Raises:
            LmexpError: the run is not finished, or a file of it is missing or damaged.
        """
        status = folder.read_status()
        if status is None or status.state != "finished":
            said = "no run here" if status is None else status.describe()
            raise LmexpError(f"{folder.path}: {said}; only finished runs can be scored")
        summary = folder.read_summary()
        optimised = set((summary.get("weights_sha256") or {}).values())
        (row,) = self.scores.score(self._exhibits(folder), optimised)
        summary["scores"] = row
        folder.write_summary(summary)
        return row

    def _exhibits(self, folder: RunFolder) -> Exhibits:
        landmarks = folder.read_landmarks()
        inverted = (folder.path / "inversion.png").exists()
        has_latents = (folder.path / "inversion_w.npz").exists()
        return Exhibits(
            result=_picture(folder, "proj"),
            look=_picture(folder, "target_look"),
            expression=_picture(folder, "target_expression"),
            look_landmarks=torch.from_numpy(landmarks["look"])[None],
            expression_landmarks=torch.from_numpy(landmarks["expression"])[None],
            inversion=_picture(folder, "inversion") if inverted else None,
            ws=torch.from_numpy(folder.read_projection()[0]),
            inversion_ws=torch.from_numpy(folder.read_inversion()[0]) if has_latents else None,
            samples=self._read_samples(folder.read_config()),
        )

    def _read_samples(self, config: Mapping[str, Any]) -> Tensor:
        """The samples of W that the run itself drew."""
        generator, latent = config["generator"], config["latent"]
        key = json.dumps([generator, latent["samples"], latent["samples_seed"]], sort_keys=True)
        if key not in self._samples:
            # Not by the schema of today's configs: the run may be older than it.
            built = self._bench.module(Component.model_validate(generator))
            statistics = measure(
                built, latent["samples"], latent["samples_seed"], self._bench.device
            )
            self._samples[key] = statistics.samples
        return self._samples[key]


def find_runs(folder: Path) -> list[RunFolder]:
    """The runs in a folder: itself, or those of a sweep, or all below it, in the paths' order.

    Raises:
        LmexpError: there is none.
    """
    runs = [RunFolder(path.parent) for path in sorted(folder.rglob("status.json"))]
    if not runs:
        raise LmexpError(
            f"{folder}: no runs here (no status.json); name a run's folder or a sweep's"
        )
    return runs


def _picture(folder: RunFolder, name: str) -> Tensor:
    return to_image(folder.read_picture(name))[None]
