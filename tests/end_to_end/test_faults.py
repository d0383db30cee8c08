"""Sweeps in which something breaks: what is lost, what is said, what the same command does."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import TINY_FAN, CommandLine, environment, latents, read_index

from lmexp.recording import atomic_file
from lmexp.recording.recorder import Recorder
from lmexp.recording.run_folder import RunFolder
from lmexp.runner import _Session

HERE = Path(__file__).parent
SMALL = (
    "experiment=debug",
    "generator.resolution=32",
    "loss=[prior,noise]",
    "loss.noise.weight=100",
    "latent.start=mean",
    "recording.video_frames=0",
    "recording.image_every=0",
    "recording.save_every_seconds=0.0001",
    "figure=[]",
    "hardware.threads=1",
    f"landmarks.weights={TINY_FAN}",
    f"judge.weights={TINY_FAN}",
)
"""A job in half a second."""


def deadly(name: str, **values: object) -> str:
    keywords = {
        "_target_": "faulty_parts.Deadly",
        "weight": 1.0,
        "step": 3,
        "times": 1,
        "folder": f"deaths_{name}",
        "error": False,
        **values,
    }
    inner = ",".join(
        f"{key}:{str(value).lower() if isinstance(value, bool) else value}"
        for key, value in keywords.items()
    )
    return f"+loss.{name}={{{inner}}}"


def states(lmexp: CommandLine) -> list[str]:
    return [job["state"] for job in read_index(lmexp.sweep_folder())["jobs"]]


@pytest.mark.slow
def test_twice_the_device_twice_the_workers_and_a_death_costs_one_job_at_most(
    lmexp: CommandLine,
) -> None:
    """Four jobs on two workers; the second job kills its worker once, the fourth always."""
    words = [*SMALL, "-m", "seed=1,2,3,4"]
    terms = [deadly("once", seed=2), deadly("always", seed=4, times=9)]
    answer = lmexp(*words, *terms, "hardware.devices=[cpu,cpu]")
    assert answer.code == 1, answer
    assert states(lmexp) == ["finished", "finished", "finished", "failed"]
    jobs = read_index(lmexp.sweep_folder())["jobs"]
    assert jobs[3]["reason"] == "its worker process died 2 times (SIGKILL on cpu)"
    assert len(list(Path("deaths_once").iterdir())) == 1
    assert len(list(Path("deaths_always").iterdir())) == 2
    pids = {
        status.pid
        for job in jobs
        if (status := RunFolder(lmexp.sweep_folder() / job["folder"]).read_status())
    }
    assert len(pids) >= 2 and os.getpid() not in pids

    # The one that died went on from its state: bit for bit what a job gives that lives.
    whole = lmexp(*words, deadly("once", seed=9), deadly("always", seed=9), "output_dir=whole")
    assert whole.code == 0
    (other,) = Path("whole").glob("*/index.json")
    for job, twin in zip(jobs[:3], read_index(other.parent)["jobs"], strict=False):
        assert np.array_equal(
            latents(lmexp.sweep_folder() / job["folder"]), latents(other.parent / twin["folder"])
        )


def test_a_killed_sweep_leaves_an_index_and_no_worker_behind(lmexp: CommandLine) -> None:
    words = [*SMALL, "optimizer.steps=3000", "-m", "seed=1,2,3", "hardware.devices=[cpu,cpu]"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lmexp", *words],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(1500):
            saved = list(Path("runs").glob("*/*/state.safetensors"))
            if len(saved) == 2 or process.poll() is not None:
                break
            time.sleep(0.02)
        assert len(saved) == 2, "the two workers never saved a state"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(1)
    assert states(lmexp) == ["waiting"] * 3
    for path in saved:
        status = RunFolder(path.parent).read_status()
        assert status is not None and status.killed, "a worker outlives its parent"


def test_an_error_that_nobody_foresaw_fails_one_job_of_its_batch(lmexp: CommandLine) -> None:
    words = [*SMALL, "hardware.batch_size=3", "-m", "seed=1,2,3"]
    answer = lmexp(*words, deadly("odd", seed=2, error=True))
    assert answer.code == 1
    assert states(lmexp) == ["finished", "failed", "finished"]
    job = read_index(lmexp.sweep_folder())["jobs"][1]
    assert "RuntimeError: a kernel nobody has seen" in job["reason"]
    assert "Traceback" in (lmexp.sweep_folder() / job["folder"] / "fault.txt").read_text()
    # The command to retry is the one that was typed, and it retries that job alone.
    command = f"python -m lmexp -m {' '.join(SMALL)}".split()[:4]
    assert " ".join(command) in answer.out
    again = lmexp(*words, deadly("odd", seed=2, error=True))
    assert again.code == 1 and states(lmexp) == ["skipped", "failed", "skipped"]
    assert "2 skipped, 1 failed" in again.out
    assert "an error of lmexp's own" in again.out
    reasons = [job["reason"] for job in read_index(lmexp.sweep_folder())["jobs"]]
    assert reasons[0] == reasons[2] == "an earlier run finished it"


def test_a_full_disk_ends_the_sweep_with_its_table_and_the_same_command_goes_on(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = atomic_file.os.fsync
    written = 0

    def fsync(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written > 25:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    words = [*SMALL, "-m", "seed=1,2,3"]
    monkeypatch.setattr(atomic_file.os, "fsync", fsync)
    full = lmexp(*words)
    monkeypatch.setattr(atomic_file.os, "fsync", original)
    assert full.code == 1
    assert "no space left on the disk" in full.out
    assert "un the same command again" in full.out
    assert lmexp(*words).code == 0
    assert set(states(lmexp)) <= {"finished", "skipped"}
    lmexp(*words, "output_dir=whole")
    (whole,) = Path("whole").glob("*/index.json")
    for job in read_index(lmexp.sweep_folder())["jobs"]:
        folders = [root / job["folder"] for root in (lmexp.sweep_folder(), whole.parent)]
        assert np.array_equal(*map(latents, folders))
        assert RunFolder(folders[0]).read_metrics() == RunFolder(folders[1]).read_metrics()


def test_a_lost_tracker_and_a_damaged_state_cost_nothing_but_a_warning(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = Recorder.record_step

    def record_step(self: Recorder, now: int, **values: object) -> None:
        original(self, now, **values)  # type: ignore[arg-type]
        if now == 3:
            signal.raise_signal(signal.SIGINT)

    words = [*SMALL, "tracker._target_=faulty_parts.LostTracker", "-m", "seed=1,2"]
    monkeypatch.setattr(Recorder, "record_step", record_step)
    assert lmexp(*words).code == 130
    assert "tracker left out (the tracker's host is gone); the run goes on" in caplog.text
    monkeypatch.setattr(Recorder, "record_step", original)
    job = read_index(lmexp.sweep_folder())["jobs"][0]
    state = RunFolder(lmexp.sweep_folder() / job["folder"]).state_path
    state.write_bytes(state.read_bytes()[:-7])
    assert lmexp(*words).code == 0
    assert "the job starts again from its first step" in caplog.text
    assert states(lmexp) == ["finished", "finished"]


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_no_bit() -> None:
    """Three kills; `python scripts/torture_resume.py --kills 20 --disk-full` takes more."""
    script = HERE.parents[1] / "scripts" / "torture_resume.py"
    words = ["--kills", "3", "--longest", "0.5", "loss=[prior,noise]", "latent.start=mean"]
    answer = subprocess.run(
        [sys.executable, str(script), *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "3 kills" in answer.stdout and "every bit as the reference" in answer.stdout
    assert " 0 states compared" not in answer.stdout


def test_the_index_keeps_the_command(lmexp: CommandLine) -> None:
    words = [*SMALL, "optimizer.steps=1", "-m", "seed=1"]
    assert lmexp(*words).code == 0
    kept = json.loads((lmexp.sweep_folder() / "index.json").read_text())["command"]
    assert kept.startswith("python -m lmexp -m experiment=debug") and "'loss=[prior,noise]'" in kept


class Held:
    """What a batch holds on to, as tensors of a GPU."""


@pytest.mark.parametrize("fault", [torch.cuda.OutOfMemoryError, RuntimeError])
def test_what_a_failed_batch_held_is_free_before_its_halves_begin(
    fault: type[Exception], lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _Session._project
    sizes, held, still_held = [], [], []

    def project(session: _Session, members: Any, context: Any) -> None:
        sizes.append(len(members))
        still_held.append(sum(one() is not None for one in held))
        if len(members) > 1:
            tensors = Held()
            held.append(weakref.ref(tensors))
            raise fault("no memory")
        whole(session, members, context)

    monkeypatch.setattr(_Session, "_project", project)
    answer = lmexp(*SMALL, "-m", "seed=1,2,3,4", "hardware.batch_size=4")
    assert answer.code == 0, answer
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    assert still_held == [0] * 7
    assert states(lmexp) == ["finished"] * 4


def test_memory_that_ends_while_faces_are_aligned_halves_the_batch_too(
    lmexp: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _Session._face
    calls = []

    def face(session: _Session, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise torch.cuda.OutOfMemoryError("no memory")
        return whole(session, *args)

    monkeypatch.setattr(_Session, "_face", face)
    answer = lmexp(*SMALL, "-m", "seed=1,2", "hardware.batch_size=2")
    assert answer.code == 0, answer
    assert len(calls) > 4
    assert states(lmexp) == ["finished"] * 2
