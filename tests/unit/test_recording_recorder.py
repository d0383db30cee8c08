from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from recorded_runs import STEPS, astronaut, face_landmarks, image_tensor, record_run

from lmexp.recording import recorder as recorder_module
from lmexp.recording.atomic_file import DiskFullError
from lmexp.recording.images import to_picture
from lmexp.recording.recorder import Recorder
from lmexp.recording.run_folder import RunFolder
from lmexp.recording.tracker import Job, NoTracker


class NotingTracker:
    """Notes what it gets; fails at the method it is told to."""

    def __init__(self, fail_at: str = "") -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fail_at = fail_at

    def _note(self, method: str, content: Any) -> None:
        self.calls.append((method, content))
        if method == self.fail_at:
            raise ConnectionError(f"{method} broke\nin two lines")

    def named(self, method: str) -> list[Any]:
        return [content for name, content in self.calls if name == method]

    def open(self, job: Job) -> NotingTracker:
        self._note("open", job)
        return self

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._note("log", (step, dict(values)))

    def log_pictures(self, step: int, pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        self._note("log_pictures", (step, dict(pictures)))

    def log_video(self, step: int, path: Path) -> None:
        self._note("log_video", (step, path))

    def finish(self, summary: Mapping[str, Any], *, ok: bool) -> None:
        self._note("finish", (dict(summary), ok))


def test_a_finished_job_leaves_everything_and_nothing_else(
    tmp_path: Path, recorded_files: frozenset[str]
) -> None:
    tracker = NotingTracker()
    record_run(tmp_path / "run", tracker=tracker, image_every=5, label="mouth")
    folder = RunFolder(tmp_path / "run")
    assert {entry.name for entry in folder.path.iterdir()} == recorded_files
    status = folder.read_status()
    assert status is not None and status.state == "finished" and status.step == STEPS
    metrics = folder.read_metrics()
    assert [line["step"] for line in metrics] == list(range(STEPS))
    assert set(metrics[0]) == {"step", "lr", "loss", "raw", "weighted"}
    landmarks = folder.read_landmarks()
    assert set(landmarks) == {"look", "expression", "projection"}
    assert np.array_equal(landmarks["look"], face_landmarks(64).numpy())
    assert np.array_equal(folder.read_picture("target_look"), np.asarray(astronaut(64)))
    assert folder.read_projection()[0].shape == (1, 4, 8)
    assert len(folder.read_projection()[1]) == 2
    assert folder.read_summary()["label"] == "mouth"

    assert [step for step, _ in tracker.named("log")] == list(range(STEPS))
    assert set(tracker.named("log")[0][1]) == {
        "loss",
        "lr",
        *(
            f"{kind}/{term}"
            for kind in ("raw", "weighted")
            for term in ("lpips", "landmarks", "prior")
        ),
    }
    pictures = [(step, sorted(named)) for step, named in tracker.named("log_pictures")]
    assert pictures[0][1][0] == "target_expression"
    assert pictures[1:-1] == [(0, ["progress"]), (5, ["progress"]), (10, ["progress"])]
    assert pictures[-1] == (STEPS - 1, ["proj", "proj_landmarks"])
    assert tracker.named("log_video") == [(STEPS - 1, folder.video_path)]
    ((summary, ok),) = tracker.named("finish")
    assert ok and summary["label"] == "mouth"


def test_the_video_has_the_four_panels_over_the_steps(tmp_path: Path) -> None:
    record_run(tmp_path / "run", side=96, panel=64, video_frames=5)
    with av.open(str(tmp_path / "run" / "proj.mp4")) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 5 + 45
    height, width = frames[0].shape[:2]
    assert width == 4 * 64 + 3 * 4 and 64 < height < 76
    look = np.asarray(astronaut(64)).astype(float)
    panels = [frames[-1][height - 64 :, left : left + 64] for left in (0, 68, 136, 204)]
    errors = [np.abs(panel - look).mean() for panel in panels]
    assert errors[0] < 8 and min(errors[1:]) > 10
    assert np.abs(panels[1] - panels[2].astype(float)).mean() > 3  # landmarks are drawn on one
    assert np.abs(frames[0][:, 68:132] - frames[-1][:, 68:132].astype(float)).mean() > 3


def test_images_are_wanted_for_the_video_and_for_the_tracker(tmp_path: Path) -> None:
    def wanted(**options: int) -> list[int]:
        recorder = Recorder(Job(tmp_path, "id", "label", None, {}), NoTracker(), **options)
        return [step for step in range(options["steps"]) if recorder.wants_picture(step)]

    assert wanted(steps=100, image_every=0, video_frames=3) == [0, 50, 99]
    assert wanted(steps=10, image_every=4, video_frames=0) == [0, 4, 8]
    assert wanted(steps=3, image_every=0, video_frames=120) == [0, 1, 2]
    assert wanted(steps=1, image_every=50, video_frames=120) == [0]


def test_pictures_have_the_side_of_a_panel(tmp_path: Path) -> None:
    recorder = Recorder(Job(tmp_path, "id", "label", None, {}), NoTracker(), steps=1, panel=97)
    assert [recorder.choose_side(side) for side in (1024, 97, 64, 33, 1)] == [96, 96, 64, 32, 2]


def test_a_frame_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Frames are written beside everything else; the job ends as if nothing had been."""
    written: list[str] = []

    def fail(frame: Path, *_: object) -> None:
        written.append(frame.name)
        raise OSError("no room")

    monkeypatch.setattr(recorder_module, "_write_frame", fail)
    with caplog.at_level("WARNING", logger="lmexp.recording"):
        recorder = record_run(tmp_path / "run")
    assert len(written) == STEPS
    assert [record.message for record in caplog.records] == [
        "a run: pictures left out (no room); the run goes on"
    ]
    status = recorder.folder.read_status()
    assert status is not None and status.state == "finished"


@pytest.mark.parametrize("end", ["save_state", "interrupt", "start", "finish"])
def test_frames_are_written_before_what_follows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    original, slow = recorder_module._write_frame, threading.Event()

    def write(*args: Any) -> None:
        slow.wait(0.2)
        original(*args)

    monkeypatch.setattr(recorder_module, "_write_frame", write)
    recorder = record_run(tmp_path / "run", stop_after=4)
    kept = lambda: len(list(recorder.folder.frames_path.glob("*.jpg")))  # noqa: E731
    assert kept() < 4
    photo, points = image_tensor(astronaut(64)), face_landmarks(64)
    if end == "save_state":
        recorder.save_state(4, {})
    elif end == "interrupt":
        recorder.interrupt(step=4, state={})
    elif end == "start":
        recorder.start(
            look=photo,
            expression=photo,
            look_landmarks=points,
            expression_landmarks=points,
            first_step=4,
        )
    else:
        recorder.finish(image=photo, landmarks=points, ws=torch.zeros(4, 8), summary={})
        with av.open(str(recorder.folder.video_path)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 4 + 45
        return
    assert kept() == 4


def test_no_video_frames_no_video(tmp_path: Path, recorded_files: frozenset[str]) -> None:
    tracker = NotingTracker()
    record_run(tmp_path / "run", video_frames=0, image_every=0, tracker=tracker)
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == recorded_files - {"proj.mp4"}
    assert tracker.named("log_video") == []


def test_an_interrupted_job_goes_on_where_it_stopped(tmp_path: Path) -> None:
    recorder = record_run(tmp_path / "run", stop_after=7)
    recorder.interrupt(step=5, state={"ws": torch.ones(3), "seed": 4})
    status = recorder.folder.read_status()
    assert status is not None and status.describe() == f"interrupted at step 5 of {STEPS}"

    again = Recorder(recorder.job, NoTracker(), steps=STEPS)
    loaded = again.load_state()
    assert loaded is not None
    step, state = loaded
    assert step == 5 and set(state) == {"ws", "seed"} and state["seed"] == 4
    photo = image_tensor(astronaut(64))
    again.start(
        look=photo,
        expression=photo,
        look_landmarks=face_landmarks(64),
        expression_landmarks=face_landmarks(64),
        first_step=step,
        diff="- old\n+ new\n",
    )
    assert (again.folder.path / "code.diff").read_text() == "- old\n+ new\n"
    assert [line["step"] for line in again.folder.read_metrics()] == list(range(5))
    assert sorted(int(f.stem) for f in again.folder.frames_path.glob("*.jpg")) == list(range(5))
    for later in range(step, STEPS):
        again.record_step(
            later,
            lr=0.1,
            loss=1.0,
            raw={"lpips": 1.0},
            weighted={"lpips": 1.0},
            picture=to_picture(photo),
        )
    again.finish(
        image=photo, landmarks=face_landmarks(64), ws=torch.zeros(4, 8), summary={"steps": STEPS}
    )
    assert [line["step"] for line in again.folder.read_metrics()] == list(range(STEPS))
    with av.open(str(again.folder.video_path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == STEPS + 45
    assert again.load_state() is None


@pytest.mark.parametrize("end", ["save_state", "interrupt", "fail", "finish"])
def test_no_end_of_a_job_comes_before_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """The next file fails; the lines that waited are there, as another process sees them."""

    def fill(*_: Any, **__: Any) -> None:
        raise DiskFullError("no space left")

    recorder = record_run(tmp_path / "run", stop_after=7, video_frames=0)
    monkeypatch.setattr(recorder_module, "save_state", fill)
    monkeypatch.setattr(RunFolder, "write_status", fill)
    monkeypatch.setattr(RunFolder, "write_projection", fill)
    with pytest.raises(DiskFullError):
        if end == "save_state":
            recorder.save_state(7, {})
        elif end == "interrupt":
            recorder.interrupt(step=7)
        elif end == "fail":
            recorder.fail("loss is NaN", step=7)
        else:
            photo, points = image_tensor(astronaut(64)), face_landmarks(64)
            recorder.finish(image=photo, landmarks=points, ws=torch.zeros(4, 8), summary={})
    lines = RunFolder(tmp_path / "run").read_metrics()
    assert [line["step"] for line in lines] == list(range(7))


def test_a_failed_job_keeps_its_last_good_state_and_its_reason(tmp_path: Path) -> None:
    tracker = NotingTracker()
    recorder = record_run(tmp_path / "run", stop_after=3, tracker=tracker)
    recorder.fail("loss is NaN", step=3, state={"ws": torch.ones(2)})
    status = recorder.folder.read_status()
    assert status is not None and status.reason == "loss is NaN" and status.step == 3
    loaded = recorder.load_state()
    assert loaded is not None and loaded[0] == 3
    ((summary, ok),) = tracker.named("finish")
    assert not ok and summary["reason"] == "loss is NaN"


def test_a_job_that_starts_again_goes_on_with_its_tracked_run(tmp_path: Path) -> None:
    tracker = NotingTracker()
    recorder = record_run(tmp_path / "run", stop_after=4, tracker=tracker)
    photo = image_tensor(astronaut(64))
    recorder.start(
        look=photo,
        expression=photo,
        look_landmarks=face_landmarks(64),
        expression_landmarks=face_landmarks(64),
    )
    assert len(tracker.named("open")) == 1
    assert recorder.folder.read_metrics() == []
    assert list(recorder.folder.frames_path.iterdir()) == []


def test_a_job_may_fail_before_it_starts(tmp_path: Path) -> None:
    job = Job(tmp_path / "sweep" / "run", "id", "label", None, {})
    Recorder(job, NoTracker(), steps=5).fail("no face in look.jpg", step=0)
    status = RunFolder(job.folder).read_status()
    assert status is not None
    assert status.describe() == "failed at step 0 of 5: no face in look.jpg"


@pytest.mark.parametrize("method", ["open", "log", "log_pictures", "log_video", "finish"])
def test_a_tracker_that_fails_is_named_once_and_costs_nothing_else(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    recorded_files: frozenset[str],
    method: str,
) -> None:
    tracker = NotingTracker(fail_at=method)
    record_run(tmp_path / "run", tracker=tracker, label="mouth")
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == recorded_files
    assert len(tracker.named(method)) == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"mouth: tracker left out ({method} broke in two lines); the run goes on"


@pytest.mark.parametrize(
    ("function", "part", "lost"),
    [
        ("draw_landmarks", "pictures", {"proj_landmarks.png", "target_look_landmarks.png"}),
        ("write_video", "video", {"proj.mp4"}),
    ],
)
def test_pictures_that_fail_cost_no_number(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    part: str,
    lost: set[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    recorder_module._draw.cache_clear()
    monkeypatch.setattr(recorder_module, function, fail)
    with caplog.at_level(logging.WARNING):
        record_run(tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert not lost & {entry.name for entry in folder.path.iterdir()}
    assert f"{part} left out (broken)" in caplog.text
    assert len(folder.read_metrics()) == STEPS
    assert folder.read_projection()[0].shape == (1, 4, 8)
    status = folder.read_status()
    assert status is not None and status.state == "finished"


def test_a_full_disk_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: Any, **__: Any) -> None:
        raise DiskFullError("no space left")

    monkeypatch.setattr(recorder_module, "write_video", fill)
    with pytest.raises(DiskFullError):
        record_run(tmp_path / "run")
    assert RunFolder(tmp_path / "run").read_projection()[0].shape == (1, 4, 8)
