from __future__ import annotations

import errno
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from lmexp.errors import LmexpError
from lmexp.recording import atomic_file, run_folder
from lmexp.recording.atomic_file import DiskFullError, write_atomically
from lmexp.recording.process_identity import identify_process, is_running
from lmexp.recording.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run").create()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_file.os, "fsync", fail)
    with pytest.raises(DiskFullError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LmexpError, match="cannot be written") as caught:
        RunFolder(tmp_path / "file" / "run").create()
    assert "\n" not in str(caught.value)


def test_config_comes_back_with_its_order_and_its_types(folder: RunFolder) -> None:
    config = {"zeta": 1e-5, "alpha": {"b": [1, 2.0, None], "a": "0.05"}, "flag": True, "é": "ü"}
    folder.write_config(config)
    read = folder.read_config()
    assert read == config
    assert list(read) == list(config)
    assert isinstance(read["zeta"], float)
    assert isinstance(read["alpha"]["a"], str)


TEXTS = ("1e5", "nan", "yes", "null", "~", "", "0x10", "2026-11-30", "a: b", "#x", "*x", "a\nb")


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_looks_like_something_else_stays_text(folder: RunFolder, text: str) -> None:
    shared = [1, 2]
    folder.write_config({"text": text, "one": shared, "other": shared})
    assert folder.read_config() == {"text": text, "one": [1, 2], "other": [1, 2]}
    assert "&" not in (folder.path / "config.yaml").read_text()  # no anchors for people to follow


def test_the_last_metrics_are_those_of_the_last_whole_line(folder: RunFolder) -> None:
    with pytest.raises(LmexpError, match=r"metrics\.jsonl: missing"):
        folder.read_last_metrics()
    folder.append_metrics({"step": 0, "loss": 1.5})
    folder.append_metrics({"step": 1, "loss": float("nan")})
    assert folder.read_last_metrics()["step"] == 1
    assert math.isnan(folder.read_last_metrics()["loss"])
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "lo')
    assert folder.read_last_metrics()["step"] == 1


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2\n"])
def test_a_damaged_config_is_one_line(folder: RunFolder, content: str) -> None:
    (folder.path / "config.yaml").write_text(content)
    with pytest.raises(LmexpError, match=r"config\.yaml: damaged") as caught:
        folder.read_config()
    assert "\n" not in str(caught.value)


def test_metrics_lose_only_the_line_that_a_killed_process_was_writing(folder: RunFolder) -> None:
    for step in range(4):
        folder.append_metrics({"step": step, "loss": step / 2})
    folder.flush_metrics()
    path = folder.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert [line["step"] for line in folder.read_metrics()] == [0, 1, 2]
    folder.truncate_metrics(3)
    folder.append_metrics({"step": 3, "loss": 9.0})
    assert [line["loss"] for line in folder.read_metrics()] == [0.0, 0.5, 1.0, 9.0]


def test_lines_wait_for_each_other_and_not_for_long(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now)

    def on_disk() -> list[int]:  # as another process sees it
        return [line["step"] for line in RunFolder(folder.path).read_metrics()]

    for step in range(3):
        folder.append_metrics({"step": step})
    assert on_disk() == [0]
    now += 1.01
    folder.append_metrics({"step": 3})
    assert on_disk() == [0, 1, 2, 3]
    folder.append_metrics({"step": 4})
    folder.flush_metrics(durable=True)
    assert on_disk() == [0, 1, 2, 3, 4]
    folder.append_metrics({"step": 5})
    folder.truncate_metrics(5)
    assert [line["step"] for line in folder.read_metrics()] == on_disk() == [0, 1, 2, 3, 4]


def test_nothing_follows_the_half_line_of_a_full_disk(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - 3)
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in range(3):
        folder.append_metrics({"step": step})
    monkeypatch.setattr(run_folder.os, "fsync", fill)
    with pytest.raises(DiskFullError, match=r"metrics\.jsonl: no space left"):
        folder.flush_metrics(durable=True)
    folder.flush_metrics(durable=True)  # what fails afterwards says so, and adds nothing
    assert [line["step"] for line in folder.read_metrics()] == [0, 1]


def test_a_resumed_run_makes_its_later_lines_again(folder: RunFolder) -> None:
    assert folder.read_metrics() == []
    for step in range(6):
        folder.append_metrics({"step": step, "loss": float(step)})
    folder.truncate_metrics(4)
    assert [line["step"] for line in folder.read_metrics()] == [0, 1, 2, 3]
    folder.truncate_metrics(0)
    assert folder.read_metrics() == []


@pytest.mark.parametrize("line", [b"{\x00", b"[1, 2]", b""])
def test_a_line_damaged_in_the_middle_is_refused(folder: RunFolder, line: bytes) -> None:
    (folder.path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(LmexpError, match="line 2"):
        folder.read_metrics()


def test_what_is_not_finite_is_null_on_disk_and_nan_in_metrics(folder: RunFolder) -> None:
    folder.append_metrics({"step": 0, "loss": math.inf, "raw": {"lpips": np.float32("nan")}})
    folder.flush_metrics()
    assert b"null" in (folder.path / "metrics.jsonl").read_bytes()
    (line,) = folder.read_metrics()
    assert math.isnan(line["loss"]) and math.isnan(line["raw"]["lpips"])
    folder.write_summary({"a": math.nan, "b": np.arange(2), "c": Path("x"), "d": (np.int64(3),)})
    assert folder.read_summary() == {"a": None, "b": [0, 1], "c": "x", "d": [3]}


def test_latents_lie_as_the_tools_of_stylegan_read_them(folder: RunFolder) -> None:
    random = np.random.default_rng(0)
    ws = random.standard_normal((1, 18, 512)).astype(np.float32)
    noise = [random.standard_normal((1, 2**k, 2**k)).astype(np.float32) for k in range(12)]
    folder.write_projection(ws, noise)
    stored = np.load(folder.path / "projected_w.npz")["w"]
    assert stored.shape == (1, 18, 512) and stored.dtype == np.float32
    read, read_noise = folder.read_projection()
    assert np.array_equal(read, ws)
    assert len(read_noise) == 12
    for a, b in zip(read_noise, noise, strict=True):
        assert np.array_equal(a, b)


def test_latents_of_a_generator_without_noise(folder: RunFolder) -> None:
    folder.write_projection(np.zeros((1, 4, 8), dtype=np.float32))
    assert not (folder.path / "projected_noise.npz").exists()
    assert folder.read_projection()[1] == []
    with pytest.raises(ValueError, match="num_ws"):
        folder.write_projection(np.zeros((4, 8), dtype=np.float32))


def test_missing_and_damaged_files_are_named(folder: RunFolder) -> None:
    with pytest.raises(LmexpError, match=r"landmarks\.npz: missing"):
        folder.read_landmarks()
    (folder.path / "landmarks.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(LmexpError, match=r"landmarks\.npz: damaged"):
        folder.read_landmarks()
    (folder.path / "proj.png").write_bytes(b"\x89PNG")
    with pytest.raises(LmexpError, match=r"proj\.png: damaged"):
        folder.read_picture("proj")
    (folder.path / "summary.json").write_text("[]")
    with pytest.raises(LmexpError, match=r"summary\.json: damaged"):
        folder.read_summary()
    (folder.path / "status.json").write_text('{"state": "running"}')
    with pytest.raises(LmexpError, match=r"status\.json: damaged"):
        folder.read_status()


def test_a_picture_comes_back_bit_for_bit(folder: RunFolder) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    folder.write_picture("proj", picture)
    assert np.array_equal(folder.read_picture("proj"), picture)


def test_status_tells_what_a_run_is_doing(folder: RunFolder) -> None:
    assert folder.read_status() is None
    folder.write_status("running", step=3, steps=10)
    running = folder.read_status()
    assert running is not None
    assert running.alive and not running.killed
    assert running.describe() == "running at step 3 of 10"
    folder.write_status("failed", step=4, steps=10, reason="loss is NaN\nat step 4")
    failed = folder.read_status()
    assert failed is not None
    assert failed.describe() == "failed at step 4 of 10: loss is NaN at step 4"
    assert failed.started == running.started
    assert not failed.alive and not failed.killed
    folder.write_status("finished", step=8, steps=10)
    finished = folder.read_status()
    assert finished is not None
    assert finished.describe() == "finished after 8 steps"


def test_a_run_of_another_host_is_alive_while_its_status_is_young(folder: RunFolder) -> None:
    folder.write_status("running", step=3, steps=10)
    status = folder.read_status()
    assert status is not None
    elsewhere = replace(status, host="elsewhere", pid=999999999)
    assert elsewhere.alive
    old = (datetime.now(UTC) - timedelta(minutes=10)).isoformat()
    assert replace(elsewhere, updated=old).killed


def test_a_later_process_of_the_same_number_is_another_one() -> None:
    own = os.getpid()
    assert is_running(own, identify_process(own))
    if identify_process(own):
        assert not is_running(own, "another boot:1")
    assert identify_process(999999999) == ""


_KILLED = """
import os, signal, sys
from lmexp.recording.run_folder import RunFolder
folder = RunFolder(sys.argv[1]).create()
folder.write_status("running", step=2, steps=10)
for step in range(3):
    folder.append_metrics({"step": step, "loss": 1.0})
folder.flush_metrics()
with open(folder.path / "metrics.jsonl", "ab") as file:
    file.write(b'{"step": 3, "lo')
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_killed_with_minus_9_is_known_as_killed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path / "run")], check=False)
    assert done.returncode == -signal.SIGKILL
    folder = RunFolder(tmp_path / "run")
    status = folder.read_status()
    assert status is not None
    assert status.state == "running" and status.killed and not status.alive
    assert "killed at about step 2 of 10" in status.describe()
    assert socket.gethostname() in status.describe()
    assert [line["step"] for line in folder.read_metrics()] == [0, 1, 2]


def test_the_folder_is_read_without_torch(tmp_path: Path) -> None:
    code = "import sys, lmexp.recording.run_folder; print(json.dumps('torch' in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) is False


def test_what_a_killed_process_was_writing_goes_with_the_finished_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / ".status.json.host.12.part").write_text("{")
    folder.state_path.touch()
    folder.write_status("finished", step=1, steps=1)
    folder.remove_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_zombie_is_not_at_work() -> None:
    """In a container without an init, an orphan that was killed stays as a zombie for ever."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    identity = ""
    for _ in range(500):
        if not is_running(dead.pid, identity):
            break
        time.sleep(0.01)
    assert Path(f"/proc/{dead.pid}").exists()  # nobody has asked for its exit code
    assert not is_running(dead.pid, identity)
    dead.wait()
