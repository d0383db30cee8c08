"""What is off by default, switched on through the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_line import TINY, CommandLine, assert_same_result, latents
from test_single_run import interrupt_at

from lmexp import projection
from lmexp.recording.run_folder import RunFolder

IMPATIENT = ("optimizer.steps=40", "optimizer.patience=3", "optimizer.least_gain=1.0")
"""No loss falls to nothing, so a plateau is seen as soon as there are two windows of steps."""
ENDS_AT = 2 + 6 + 10
"""Ramp-up, two windows, ramp-down."""


def test_a_plateau_ends_a_job_early(lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lmexp(*TINY, *IMPATIENT).code == 0
    folder = RunFolder(lmexp.only_run())
    metrics, summary = folder.read_metrics(), folder.read_summary()
    assert (summary["steps"], summary["steps_taken"]) == (40, ENDS_AT)
    assert [line["step"] for line in metrics] == list(range(ENDS_AT))
    status = folder.read_status()
    assert status is not None and status.describe() == f"finished after {ENDS_AT} steps"
    assert summary["losses"]["raw"] == metrics[-1]["raw"]
    assert metrics[-1]["lr"] < 0.05 * metrics[6]["lr"]  # it went down the ramp
    assert folder.video_path.exists()

    interrupt_at(monkeypatch, 11)  # in the ramp-down
    assert lmexp(*TINY, *IMPATIENT, "output_dir=stopped").code == 130
    assert lmexp(*TINY, *IMPATIENT, "output_dir=stopped").code == 0
    assert_same_result(lmexp.only_run(), lmexp.run_folders("stopped")[0])


def test_a_job_of_a_batch_that_has_ended_waits_for_the_other(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*TINY, "optimizer.steps=40", "optimizer.patience=2", "optimizer.least_gain=0.1"]
    words += ["latent.start=mean", "-m", "seed=1,2"]
    interrupt_at(monkeypatch, 18)
    assert lmexp(*words, "hardware.batch_size=2", "output_dir=both").code == 130
    assert lmexp(*words, "hardware.batch_size=2", "output_dir=both").code == 0
    assert lmexp(*words, "hardware.batch_size=2", "output_dir=whole").code == 0
    both, whole = (
        sorted(status.parent for status in Path(root).glob("*/*/status.json"))
        for root in ("both", "whole")
    )
    taken = [RunFolder(path).read_summary()["steps_taken"] for path in both]
    assert len(set(taken)) == 2
    for one, other, steps in zip(both, whole, taken, strict=True):
        assert len(RunFolder(one).read_metrics()) == steps
        statuses = [RunFolder(path).read_status() for path in (one, other)]
        assert [status.step for status in statuses if status] == [steps, steps]
        assert_same_result(one, other)


def test_the_best_of_several_starts(lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*TINY, "latent.starts=3", "latent.starts_spread=0.2"]
    interrupt_at(monkeypatch, 2)
    assert lmexp(*words).code == 130
    assert lmexp(*words).code == 0
    summary = RunFolder(lmexp.only_run()).read_summary()
    totals, chosen = summary["starts"]["totals"], summary["starts"]["chosen"]
    assert len(totals) == 3 and totals[chosen] == min(totals) < max(totals)
    assert len(RunFolder(lmexp.only_run()).read_metrics()) == 5
    lmexp(*words, "output_dir=whole")
    assert_same_result(lmexp.only_run(), lmexp.run_folders("whole")[0])
    # One inversion serves a job with one start and with several.
    assert "inverting" in lmexp(*TINY, "output_dir=one").err
    assert "inverting" not in lmexp(*words, "output_dir=one").err
    assert RunFolder(lmexp.run_folders("one")[0]).read_summary().keys() == summary.keys()


def test_steps_ahead_of_their_records_leave_the_same(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, here on a CPU, with several starts; and Ctrl-C while later steps run."""
    words = [*TINY, "latent.starts=2", "optimizer.steps=12", "recording.video_frames=4"]
    lmexp(*words, "output_dir=whole")
    (whole,) = lmexp.run_folders("whole")
    monkeypatch.setattr(projection, "_works_aside", lambda _: True)
    interrupt_at(monkeypatch, 5)
    assert lmexp(*words).code == 130
    folder = RunFolder(lmexp.only_run())
    status = folder.read_status()
    # Up to three steps had been launched, and the one that then was the next is looked at.
    assert status is not None and status.state == "interrupted" and 6 < status.step <= 9
    assert len(folder.read_metrics()) == status.step
    assert lmexp(*words).code == 0
    assert_same_result(lmexp.only_run(), whole)
    videos = [RunFolder(path).video_path.read_bytes() for path in (lmexp.only_run(), whole)]
    assert videos[0] == videos[1]


def test_only_the_moving_ws_leave_the_inversion(lmexp: CommandLine) -> None:
    assert lmexp(*TINY, "latent.truncation_psi=1", "latent.moving_ws=[1,3]").code == 0
    path = lmexp.only_run()
    with np.load(path / "inversion_w.npz") as stored:
        moved = np.abs(latents(path) - stored["w"]).max((0, 2))
    assert (moved > 1e-4).tolist() == [False, True, True, False, False]
    assert (moved[[0, 3, 4]] == 0).all()


def test_a_start_between_the_mean_and_the_inversion(lmexp: CommandLine) -> None:
    stays = [0, 3, 4]
    words = [*TINY, "latent.head_start=0", "latent.moving_ws=[1,3]"]
    starts = {}
    seen: set[Path] = set()
    for psi in (0, 0.25, 1):
        answer = lmexp(*words, f"latent.truncation_psi={psi}")
        assert answer.code == 0
        assert ("inverting" in answer.err) == (psi == 0)  # one inversion serves them all
        (path,) = set(lmexp.run_folders()) - seen
        seen.add(path)
        starts[psi] = latents(path)[:, stays]
        with np.load(path / "inversion_w.npz") as stored:
            inversion = stored["w"][:, stays]
    np.testing.assert_array_equal(starts[1], inversion)
    w_avg = starts[0]
    np.testing.assert_array_equal(w_avg, w_avg[:, :1].repeat(3, axis=1))
    assert np.abs(inversion - w_avg).max() > 1e-3
    np.testing.assert_allclose(starts[0.25], 0.75 * w_avg + 0.25 * inversion, atol=1e-6)


def test_at_psi_0_the_inversion_changes_no_bit(lmexp: CommandLine) -> None:
    for words in (["latent.start=mean", "output_dir=a"], ["output_dir=b"]):
        assert lmexp(*TINY, "latent.truncation_psi=0", *words).code == 0
    (one,), (other,) = lmexp.run_folders("a"), lmexp.run_folders("b")
    assert not (one / "inversion.png").exists() and (other / "inversion.png").exists()
    assert_same_result(one, other)


def test_ws_that_the_generator_does_not_have(lmexp: CommandLine) -> None:
    answer = lmexp(*TINY, "latent.moving_ws=[7,9]")
    assert answer.code == 1
    assert "latent.moving_ws: [7, 9] holds none of the generator's 5 ws" in answer.out
