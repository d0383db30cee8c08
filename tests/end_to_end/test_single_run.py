"""One job through the command line: what it leaves, and what the same command does again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import TINY, CommandLine, assert_same_result, environment, read_index
from PIL import Image

from lmexp.landmarks.groups import GROUPS
from lmexp.recording.process_identity import identify_process
from lmexp.recording.recorder import Recorder
from lmexp.recording.run_folder import RunFolder


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C while `step` is recorded, once."""
    original = Recorder.record_step

    def record_step(self: Recorder, now: int, **values: object) -> None:
        original(self, now, **values)  # type: ignore[arg-type]
        if now == step:
            monkeypatch.setattr(Recorder, "record_step", original)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Recorder, "record_step", record_step)


def test_what_a_run_leaves(lmexp: CommandLine, recorded_files: frozenset[str]) -> None:
    """The files' own tests are in unit/test_recording_*.py; here, that the run fills them."""
    answer = lmexp(*TINY, "figure=[triptych]")
    assert answer.code == 0, answer
    path = lmexp.only_run()
    added = {"figures", "inversion.png", "inversion_noise.npz", "inversion_w.npz"}
    assert {entry.name for entry in path.iterdir()} - {"code.diff"} == recorded_files | added
    assert {entry.name for entry in path.parent.iterdir()} == {".inversions", path.name}

    folder = RunFolder(path)
    config = folder.read_config()
    assert config["optimizer"]["steps"] == 5
    assert config["loss"]["noise"]["weight"] == 100
    assert "${" not in (path / "config.yaml").read_text()

    for ws, noise in (folder.read_projection(), folder.read_inversion()):
        assert ws.shape == (1, 5, 16)
        assert [buf.shape for buf in noise] == [(1, side, side) for side in (4, 8, 16, 32)]

    metrics = folder.read_metrics()
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4]
    for line in metrics:
        assert set(line["raw"]) == set(line["weighted"]) == {"landmarks", "prior", "noise"}
        assert line["loss"] == pytest.approx(sum(line["weighted"].values()), rel=1e-5)

    summary = folder.read_summary()
    assert set(summary["nme"]) == {"all", *GROUPS}
    assert summary["losses"]["raw"] == metrics[-1]["raw"]
    assert summary["seconds"] > 0 and summary["device"] and summary["versions"]["torch"]
    assert set(summary["weights_sha256"]) == {"generator", "landmarks"}
    assert path.name == f"generated1+generated2-{summary['config_hash']}"

    status = folder.read_status()
    assert status is not None and (status.state, status.step) == ("finished", 5)
    for name in ("proj.png", "proj.mp4", "summary.json", "figures"):
        assert str(Path("runs") / path.name / name) in answer.out
    assert "generated1 with the expression of generated2" in answer.out


def test_the_same_command_again_computes_nothing(lmexp: CommandLine) -> None:
    lmexp(*TINY)
    before = (lmexp.only_run() / "status.json").read_bytes()
    again = lmexp(*TINY)
    assert again.code == 0
    assert "finished before" in again.out and "delete" in again.out
    assert (lmexp.only_run() / "status.json").read_bytes() == before


def test_a_finished_run_says_which_settings_came_too_late_and_draws_its_figures(
    lmexp: CommandLine,
) -> None:
    lmexp(*TINY, "optimizer.steps=2")
    assert not list(lmexp.only_run().glob("figures"))
    words = [*TINY, "optimizer.steps=2", "recording.video_frames=5"]
    again = lmexp(*words, "figure=[triptych]")
    assert again.code == 0 and "other settings of recording." in again.out
    assert (lmexp.only_run() / "figures" / "triptych.png").is_file()


def test_a_folder_that_cannot_be_written_is_found_before_any_work(lmexp: CommandLine) -> None:
    Path("taken").touch()
    answer = lmexp(*TINY, "latent.start=inversion", "output_dir=taken/runs")
    assert answer.code == 2 and "taken/runs: cannot be written" in answer.err
    assert len(answer.err.strip().splitlines()) == 1 and not answer.out


def test_a_path_needs_no_quotes_of_hydras(lmexp: CommandLine) -> None:
    name = "ein Bild (1), a=b, ü.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(name)
    answer = lmexp(*TINY, "inputs=photos", f"inputs.look={name}", f"inputs.expression={name}")
    assert answer.code == 1 and "no face" in answer.out and name in answer.out


def test_a_dollar_in_a_name_refers_to_no_key(lmexp: CommandLine) -> None:
    name = "a${b}.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(name)
    answer = lmexp(*TINY, f"inputs.look={name}", "inputs.expression=${inputs.look}")
    assert answer.code == 1 and "no face" in answer.out and name in answer.out
    answer = lmexp(*TINY, "-m", f"inputs.look={name},missing.png")
    jobs = read_index(lmexp.sweep_folder())["jobs"]
    assert jobs[0]["overrides"] == {"inputs.look": name} and "no face" in jobs[0]["reason"]
    assert "no file 'missing.png'" in jobs[1]["reason"]


def test_only_what_the_result_depends_on_names_the_run(lmexp: CommandLine) -> None:
    """Which keys count is tested in unit/test_config.py; here, that folders follow."""
    words = [*TINY, "latent.start=mean", "optimizer.steps=2"]
    lmexp(*words)
    name = lmexp.only_run().name
    same = ["hardware.batch_size=7", "tracker=wandb", "tracker.mode=disabled"]
    assert "finished before" in lmexp(*words, *same).out
    lmexp(*words, "seed=1")
    assert len(lmexp.run_folders()) == 2
    lmexp(*words, "output_dir=elsewhere")
    assert [path.name for path in lmexp.run_folders("elsewhere")] == [name]


def test_ctrl_c_and_the_same_command_again_is_bit_for_bit_an_uninterrupted_run(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 2)
    stopped = lmexp(*TINY)
    assert stopped.code == 130
    assert "run the same command again" in stopped.out and "step 3" in stopped.out
    folder = RunFolder(lmexp.only_run())
    status = folder.read_status()
    assert status is not None and (status.state, status.step) == ("interrupted", 3)
    assert folder.state_path.exists()

    resumed = lmexp(*TINY)
    assert resumed.code == 0 and "from step 3" in resumed.err
    assert not folder.state_path.exists()
    lmexp(*TINY, "output_dir=whole")
    (whole,) = lmexp.run_folders("whole")
    assert_same_result(lmexp.only_run(), whole)


def test_ctrl_c_after_the_last_step_leaves_only_the_result_to_write(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 4)
    assert lmexp(*TINY).code == 130
    assert lmexp(*TINY).code == 0
    lmexp(*TINY, "output_dir=whole")
    assert_same_result(lmexp.only_run(), lmexp.run_folders("whole")[0])


def test_ctrl_c_while_the_look_is_inverted(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmexp import inversion

    original = inversion.ProgressBar.update
    calls = 0

    def update(self: inversion.ProgressBar, step: int, losses: dict[str, float]) -> None:
        nonlocal calls
        calls += 1
        original(self, step, losses)
        if calls == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(inversion.ProgressBar, "update", update)
    stopped = lmexp(*TINY)
    assert stopped.code == 130 and "run the same command again" in stopped.out
    assert list(Path("runs/.inversions").glob("*.part.safetensors"))
    assert lmexp(*TINY).code == 0
    assert not list(Path("runs/.inversions").glob("*.part.safetensors"))
    lmexp(*TINY, "output_dir=whole")
    assert_same_result(lmexp.only_run(), lmexp.run_folders("whole")[0])


def test_a_second_ctrl_c_ends_at_once(lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Recorder.record_step

    def record_step(self: Recorder, now: int, **values: object) -> None:
        original(self, now, **values)  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Recorder, "record_step", record_step)
    answer = lmexp(*TINY)
    assert answer.code == 130 and answer.err.splitlines()[-1].startswith("lmexp: stopped")


def test_a_killed_run_goes_on_from_its_last_save(lmexp: CommandLine) -> None:
    words = [*TINY, "optimizer.steps=40", "recording.save_every_seconds=0.01"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lmexp", *words],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(3000):
            saved = list(Path("runs").glob("*/state.safetensors"))
            if saved or process.poll() is not None:
                break
            time.sleep(0.02)
        assert saved, "the run never saved its state"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    status = RunFolder(lmexp.only_run()).read_status()
    assert status is not None and status.killed and "killed" in status.describe()

    answer = lmexp(*words)
    assert answer.code == 0 and "from step" in answer.err
    lmexp(*words, "output_dir=whole")
    assert_same_result(lmexp.only_run(), lmexp.run_folders("whole")[0])


def test_a_damaged_state_starts_the_job_again_and_says_so(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    interrupt_at(monkeypatch, 2)
    lmexp(*TINY)
    state = RunFolder(lmexp.only_run()).state_path
    content = bytearray(state.read_bytes())
    content[-3] ^= 0xFF
    state.write_bytes(content)
    answer = lmexp(*TINY)
    assert answer.code == 0
    assert "starts again from its first step" in caplog.text
    assert len(RunFolder(lmexp.only_run()).read_metrics()) == 5


def test_a_loss_that_is_not_finite_fails_the_run_with_its_last_good_state(
    lmexp: CommandLine,
) -> None:
    answer = lmexp(*TINY, "loss.prior.weight=1e39", "latent.start=mean")
    assert answer.code == 1
    assert "Failed" in answer.out and "finite" in answer.out and "learning_rate" in answer.out
    folder = RunFolder(lmexp.only_run())
    status = folder.read_status()
    assert status is not None and status.state == "failed" and "finite" in status.reason
    assert folder.state_path.exists()


def test_a_run_that_another_process_is_at_work_on_is_left_alone(lmexp: CommandLine) -> None:
    lmexp(*TINY)
    path = lmexp.only_run() / "status.json"
    status = json.loads(path.read_text())
    parent = os.getppid()
    status |= {"state": "running", "pid": parent, "process": identify_process(parent)}
    path.write_text(json.dumps(status))
    answer = lmexp(*TINY)
    assert answer.code == 1 and f"process {parent}" in answer.out
    assert json.loads(path.read_text()) == status
