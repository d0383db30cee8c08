"""The packaged networks on a real photo: detection, alignment, LPIPS, landmarks, video, tracker."""

from __future__ import annotations

import numpy as np
import pytest
from command_line import CommandLine

from lmexp.recording.run_folder import RunFolder


@pytest.mark.slow
def test_the_default_experiment_on_a_photo_in_a_few_steps(lmexp: CommandLine) -> None:
    answer = lmexp("optimizer.steps=5", "latent.inversion.steps=3", "figure=[triptych]")
    assert answer.code == 0, answer
    path = lmexp.only_run()
    folder = RunFolder(path)
    assert path.name.startswith("generated20+astronaut-")
    summary = folder.read_summary()
    assert set(summary["losses"]["raw"]) == {
        "lpips",
        "landmarks",
        "coordinates",
        "identity",
        "noise",
        "prior",
    }
    assert {"generator", "landmarks", "loss.lpips"} <= set(summary["weights_sha256"])
    assert summary["nme_judge_independent"]
    # A face all along: started from the look's inversion, five small steps stay near it.
    assert summary["nme"]["all"] < 60
    proj = folder.read_picture("proj").astype(float)
    assert proj.shape == (256, 256, 3) and proj.std() > 20
    # The photo's face was found and aligned: eyes above the mouth, and in the middle.
    points = folder.read_landmarks()["expression"]
    eyes, mouth = points[36:48].mean(0), points[48:68].mean(0)
    assert abs(eyes[0] - 128) < 30 and eyes[1] < mouth[1]
    totals = [line["loss"] for line in folder.read_metrics()]
    assert np.isfinite(totals).all() and totals[-1] < totals[0]
    assert list(path.glob("wandb/offline-run-*/run-*.wandb"))
    assert (path / "proj.mp4").stat().st_size > 0
    assert (path / "figures" / "triptych.pdf").exists()
