from __future__ import annotations

import json
import logging
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded_runs import STEPS, astronaut, face_landmarks, image_tensor, record_run

from lmexp.recording.finishing import Finishing
from lmexp.recording.run_folder import RunFolder
from lmexp.recording.tracker import Job, NoTracker
from lmexp.recording.wandb_tracker import WandbTracker

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No account, no settings and no cache of the person who runs the tests."""
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


def read_records(path: Path) -> Iterator[Any]:
    """The protobuf records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    place, record = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def item_key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def wait_for_records(folder: Path) -> tuple[Path, list[Any]]:
    """The run's file and its records, once W&B's own process has written the last one."""
    from google.protobuf.message import DecodeError

    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    for _ in range(100):
        try:
            records = list(read_records(path))
        except DecodeError:  # half of one is written
            records = []
        if records and records[-1].WhichOneof("record_type") == "exit":
            return path, records
        time.sleep(0.1)
    raise AssertionError(f"{path}: no exit record after 10 s")


def read_run(folder: Path) -> tuple[Any, list[dict[str, Any]], dict[str, Any], Path, int]:
    path, records = wait_for_records(folder)
    run, rows, summary = None, [], {}
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
        elif kind == "history":
            items = {item_key(item): json.loads(item.value_json) for item in record.history.item}
            rows.append(items)
        elif kind == "summary":
            summary.update(
                {item_key(item): json.loads(item.value_json) for item in record.summary.update}
            )
    return run, rows, summary, path.parent / "files", records[-1].exit.exit_code


def test_an_offline_run_holds_all_that_was_recorded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = {"optimizer": {"steps": STEPS, "learning_rate": 0.1}, "seed": 3}
    record_run(
        tmp_path / "0a1b2c",
        tracker=WandbTracker(project="faces", every=1),
        label="outer_lip=5",
        config=config,
        image_every=5,
    )
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""

    run, rows, summary, files, code = read_run(tmp_path / "0a1b2c")
    assert (run.run_id, run.project) == ("0a1b2c", "faces")
    assert (run.display_name, run.run_group) == ("outer_lip=5", "a sweep")
    stored = {item_key(item): json.loads(item.value_json) for item in run.config.update}
    assert {key: stored[key] for key in config} == config
    assert code == 0

    by_step = {row["_step"]: row for row in rows}
    assert sorted(by_step) == list(range(STEPS))
    metrics = RunFolder(tmp_path / "0a1b2c").read_metrics()
    for line in metrics:
        row = by_step[line["step"]]
        assert row["loss"] == pytest.approx(line["loss"])
        assert row["lr"] == pytest.approx(line["lr"])
        for kind in ("raw", "weighted"):
            for term, value in line[kind].items():
                assert row[f"{kind}/{term}"] == pytest.approx(value)
    last = by_step[STEPS - 1]
    assert by_step[0]["target_look/_type"] == "image-file"
    assert by_step[5]["progress/_type"] == "image-file"
    assert last["proj/_type"] == last["proj_landmarks/_type"] == "image-file"
    assert last["proj_video/_type"] == "video-file"
    for path in (by_step[0]["target_look/path"], by_step[5]["progress/path"], last["proj/path"]):
        assert (files / path).is_file()
    video = (files / last["proj_video/path"]).read_bytes()
    assert video == (tmp_path / "0a1b2c" / "proj.mp4").read_bytes()
    assert summary["nme"] == RunFolder(tmp_path / "0a1b2c").read_summary()["nme"]


def test_jobs_of_a_batch_are_runs_of_their_own_and_a_failed_one_is_marked(tmp_path: Path) -> None:
    tracker = WandbTracker(every=1)
    runs = {}
    for name in ("aaa", "bbb"):
        job = Job(tmp_path / name, name, name, "batch", {"name": name})
        job.folder.mkdir()
        runs[name] = tracker.open(job)
    for step in range(3):
        for index, run in enumerate(runs.values()):
            assert run is not None
            run.log(step, {"loss": float(index + step)})
    for name, run in runs.items():
        assert run is not None
        run.finish({"name": name}, ok=name == "aaa")
    for index, name in enumerate(("aaa", "bbb")):
        stored, rows, summary, _, code = read_run(tmp_path / name)
        assert (stored.run_id, stored.run_group) == (name, "batch")
        assert [row["loss"] for row in rows] == [index, index + 1, index + 2]
        assert summary["name"] == name
        assert code == index


def test_every_tenth_step_and_the_last_one(tmp_path: Path) -> None:
    run = WandbTracker(every=4).open(Job(tmp_path, "abc", "mouth", None, {}))
    assert run is not None
    for step in range(11):
        run.log(step, {"loss": 1.0 * step})
        if step == 6:
            run.log_pictures(step, {"progress": np.zeros((8, 8, 3), np.uint8)})
    run.log_pictures(10, {"proj": np.zeros((8, 8, 3), np.uint8)})
    run.finish({}, ok=True)
    _, rows, _, _, _ = read_run(tmp_path)
    assert [(row["_step"], row.get("loss")) for row in rows] == [
        (0, 0.0),
        (4, 4.0),
        (6, None),
        (8, 8.0),
        (10, 10.0),
    ]
    assert "proj/path" in rows[-1]


def test_jobs_that_finish_side_by_side_are_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"job{number}" for number in range(4)]
    tracker, photo, points = WandbTracker(), image_tensor(astronaut(64)), face_landmarks(64)
    with Finishing() as finishing:
        for name in names:
            recorder = record_run(tmp_path / name, tracker=tracker, stop_after=STEPS, label=name)
            finishing.add(
                partial(
                    recorder.finish,
                    image=photo,
                    landmarks=points,
                    ws=torch.zeros(4, 8),
                    summary={"name": name},
                ),
                lambda: None,
            )
    assert not [record for record in caplog.records if record.name.startswith("lmexp")]
    for name in names:
        run, rows, summary, files, code = read_run(tmp_path / name)
        assert (run.run_id, summary["name"], code) == (name, name, 0)
        assert [row["_step"] for row in rows if "loss" in row] == [0, 10, STEPS - 1]
        assert rows[-1]["proj_video/_type"] == "video-file"
        shown = (files / rows[-1]["proj/path"]).read_bytes()
        assert shown == (tmp_path / name / "proj.png").read_bytes()


_AT_ONCE = """
import sys
from pathlib import Path
from lmexp.recording.tracker import Job
from lmexp.recording.wandb_tracker import WandbTracker
run = WandbTracker(every=1).open(Job(Path(sys.argv[1]), "abc", "mouth", None, {}))
for step in range(50):
    run.log(step, {"loss": 1.0 * step})
run.finish({}, ok=True)
"""


def test_a_program_that_ends_at_once_loses_nothing_and_says_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _AT_ONCE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    _, rows, _, _, code = read_run(tmp_path)
    assert [row["loss"] for row in rows] == list(range(50))
    assert code == 0


def test_online_without_an_account_goes_offline_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object, **__: object) -> str:
        raise AssertionError("nobody may be asked for a key")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("getpass.getpass", ask)
    monkeypatch.setattr(wandb, "login", lambda **options: options["prompt"])  # no account
    job = Job(tmp_path, "abc", "mouth", None, {})
    with caplog.at_level(logging.WARNING):
        run = WandbTracker(mode="online").open(job)
    assert run is not None
    run.log(0, {"loss": 1.0})
    run.finish({}, ok=True)
    assert "no W&B account" in caplog.text and "wandb sync" in caplog.text
    assert read_run(tmp_path)[1][0]["loss"] == 1.0


def test_a_start_that_hangs_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: time.sleep(30))
    began = time.monotonic()
    record_run(tmp_path / "run", tracker=WandbTracker(timeout=0.2), label="mouth", video_frames=0)
    assert time.monotonic() - began < 15
    assert "mouth: tracker left out (starting W&B took more than 0.2 s)" in caplog.text
    status = RunFolder(tmp_path / "run").read_status()
    assert status is not None and status.state == "finished"


def test_an_end_that_hangs_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hanging:
        def __init__(self) -> None:
            self.summary: dict[str, Any] = {}

        def log(self, *_: object, **__: object) -> None:
            pass

        def finish(self, **_: object) -> None:
            time.sleep(30)

    monkeypatch.setattr(wandb, "init", lambda **_: Hanging())
    record_run(tmp_path / "run", tracker=WandbTracker(timeout=0.2), video_frames=0)
    assert "closing W&B took more than 0.2 s" in caplog.text


def test_without_wandb_installed_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    record_run(tmp_path / "run", tracker=WandbTracker(), video_frames=0)
    assert "tracker left out" in caplog.text
    assert RunFolder(tmp_path / "run").read_summary()["steps"] == STEPS


def test_disabled_and_none_open_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path, "abc", "mouth", None, {})
    assert WandbTracker(mode="disabled").open(job) is None
    assert NoTracker().open(job) is None
    assert list(tmp_path.iterdir()) == []
