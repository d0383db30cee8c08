"""Everything that one job leaves, in the order that loses least.

Numbers come first and must not be lost: if they cannot be written, the run stops. Pictures,
video and tracker come second: if one of them fails, a warning says so once, and the run goes on.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lmexp.recording.atomic_file import DiskFullError
from lmexp.recording.images import draw_landmarks, join_panels, resize, to_picture
from lmexp.recording.run_folder import Picture, RunFolder
from lmexp.recording.state import State, load_state, save_state
from lmexp.recording.tracker import Job, TrackedRun, Tracker
from lmexp.recording.video import write_video

_log = logging.getLogger("lmexp.recording")

_HEARTBEAT_SECONDS = 30.0

_WRITERS, _MOST_WAITING = 4, 8
"""Threads that write the frames of all jobs, and frames of one job that may wait for them."""


def _draw_once(picture: Picture, points: NDArray[np.float32]) -> Picture:
    """`draw_landmarks`, once for all jobs of a sweep that show the same photo."""
    return _draw(picture.tobytes(), picture.shape, points.tobytes())


@lru_cache(maxsize=4)
def _draw(pixels: bytes, shape: tuple[int, ...], points: bytes) -> Picture:
    picture = np.frombuffer(pixels, np.uint8).reshape(shape)
    return draw_landmarks(picture, np.frombuffer(points, np.float32).reshape(-1, 2))


@cache
def _writers() -> ThreadPoolExecutor:
    # A frame takes 1.5 ms, a sweep's jobs want theirs at the same steps, and a GPU would wait.
    return ThreadPoolExecutor(_WRITERS, thread_name_prefix="frames")


def _write_frame(frame: Path, picture: Picture, landmarks: NDArray[np.float32]) -> None:
    frame.parent.mkdir(exist_ok=True)
    np.save(frame.with_suffix(".npy"), landmarks, allow_pickle=False)
    # 4:4:4 and high quality: the video encodes it once more.
    Image.fromarray(picture).save(frame.with_suffix(".jpg"), quality=95, subsampling="4:4:4")


class Recorder:
    """Records one job: `start`, `record_step` for every step, then `finish`, `fail` or `interrupt`.

    Args:
        job: what is recorded, and where.
        tracker: mirror of the record.
        steps: steps that the job takes.
        image_every: steps between the pictures that the tracker gets; 0 for the last ones only.
        video_frames: most frames of the projection's video, spread evenly over the steps;
            0 for no video.
        panel: most side of one panel of the video, px.
    """

    def __init__(
        self,
        job: Job,
        tracker: Tracker,
        *,
        steps: int,
        image_every: int = 50,
        video_frames: int = 120,
        panel: int = 384,
    ) -> None:
        self.job = job
        self.folder = RunFolder(job.folder)
        self.steps = steps
        self.panel = panel
        self._tracker = tracker
        self._tracked: TrackedRun | None = None
        self._warned: set[str] = set()
        self._last_heartbeat = 0.0
        self._taken = 0
        self._writing: deque[Future[None]] = deque()
        frames = min(video_frames, steps)
        self._frame_steps = set(np.linspace(0, steps - 1, frames).round().astype(int).tolist())
        self._picture_steps = set(range(0, steps, image_every)) if image_every else set()

    def load_state(self) -> tuple[int, dict[str, Tensor | bool | int | float | str]] | None:
        """What an earlier, unfinished run of this job saved.

        Returns:
            The step to go on with and the state; None if nothing was saved.

        Raises:
            LmexpError: it is damaged.
        """
        if not self.folder.state_path.exists():
            return None
        state = load_state(self.folder.state_path)
        return int(state.pop("next_step")), state

    def start(
        self,
        *,
        look: Tensor,
        expression: Tensor,
        look_landmarks: Tensor,
        expression_landmarks: Tensor,
        first_step: int = 0,
        diff: str = "",
    ) -> None:
        """Write what is known before the first step; forget what a resumed run makes again.

        Args:
            look: [3, R, R], RGB in [-1, 1], the aligned photo whose person is wanted.
            expression: [3, R, R], RGB in [-1, 1], the aligned photo whose expression is wanted.
            look_landmarks: [68, 2], x then y, px.
            expression_landmarks: [68, 2], x then y, px.
            first_step: 0, or the step that a resumed run goes on with.
            diff: what the code differs in from its git revision.

        Raises:
            DiskFullError, LmexpError: the folder cannot be written.
        """
        self._finish_frames()
        folder = self.folder.create()
        folder.write_status("running", step=first_step, steps=self.steps)
        self._last_heartbeat = time.monotonic()
        folder.write_config(self.job.config)
        if diff:
            folder.write_diff(diff)
        # Fewer than first_step, if a plateau had ended the job and its batch went on.
        self._taken = folder.truncate_metrics(first_step)
        self._look_landmarks = look_landmarks.detach().float().cpu().numpy()
        self._expression_landmarks = expression_landmarks.detach().float().cpu().numpy()
        folder.write_landmarks(look=self._look_landmarks, expression=self._expression_landmarks)
        with self._optional("pictures"):
            for name, image, points in (
                ("target_look", to_picture(look), self._look_landmarks),
                ("target_expression", to_picture(expression), self._expression_landmarks),
            ):
                folder.write_picture(name, image)
                folder.write_picture(f"{name}_landmarks", _draw_once(image, points))
        with self._optional("video"):
            self._discard_frames(first_step)
        if self._tracked is None:  # a job that starts again in a smaller batch has its run open
            with self._optional("tracker"):
                self._tracked = self._tracker.open(self.job)
        self._mirror(lambda run: run.log_pictures(first_step, self._pictures("target")))

    def wants_picture(self, step: int) -> bool:
        """Whether `record_step` has a use for the picture of this step (0-based)."""
        return step in self._frame_steps or step in self._picture_steps

    def choose_side(self, resolution: int) -> int:
        """Side of the pictures for `record_step`, px, of images of such a side."""
        side = min(self.panel, resolution)
        return max(2, side - side % 2)  # even, as video codecs want it

    def record_step(
        self,
        step: int,
        *,
        lr: float,
        loss: float,
        raw: Mapping[str, float],
        weighted: Mapping[str, float],
        picture: Picture | None = None,
        landmarks: NDArray[np.float32] | None = None,
    ) -> None:
        """Record one step.

        Args:
            step: 0-based.
            lr: learning rate.
            loss: the sum that is minimised.
            raw: every term's value by name.
            weighted: every term's share of the loss by name.
            picture: of the side that `choose_side` gives; used only where `wants_picture` says so.
            landmarks: [68, 2], x then y, px of the picture.

        Raises:
            DiskFullError, LmexpError: numbers cannot be written, this step's or those that
                waited with it.
        """
        self.folder.append_metrics(
            {"step": step, "lr": lr, "loss": loss, "raw": dict(raw), "weighted": dict(weighted)}
        )
        self._taken = step + 1
        now = time.monotonic()
        if now - self._last_heartbeat > _HEARTBEAT_SECONDS:
            self._last_heartbeat = now
            self.folder.write_status("running", step=step + 1, steps=self.steps)
        if self._tracked is not None:
            values = {
                "loss": loss,
                "lr": lr,
                **{f"raw/{name}": value for name, value in raw.items()},
                **{f"weighted/{name}": value for name, value in weighted.items()},
            }
            self._mirror(lambda run: run.log(step, values))
        if picture is not None and self.wants_picture(step):
            points = np.full((68, 2), np.nan, dtype=np.float32) if landmarks is None else landmarks
            self._record_picture(step, picture, points)

    def save_state(self, next_step: int, state: State) -> None:
        """Save what a resumed run needs to go on with `next_step`.

        Raises:
            DiskFullError, LmexpError: it cannot be written.
        """
        # The steps before `next_step` are not taken again: their lines and frames must be there.
        self.folder.flush_metrics(durable=True)
        self._finish_frames()
        save_state(self.folder.state_path, {**state, "next_step": next_step})

    def finish(
        self,
        *,
        image: Tensor,
        landmarks: Tensor,
        ws: Tensor,
        noise_bufs: Sequence[Tensor] = (),
        summary: Mapping[str, Any],
    ) -> None:
        """Write the result: first the numbers, then pictures and video, then the tracker.

        Args:
            image: [3, R, R], RGB in [-1, 1], the projection.
            landmarks: [68, 2], x then y, px of the image.
            ws: [num_ws, w_dim].
            noise_bufs: [1, h, w] each, in synthesis order; empty for a generator without noise.
            summary: the run in numbers, for summary.json.

        Raises:
            DiskFullError, LmexpError: the numbers cannot be written.
        """
        points = landmarks.detach().float().cpu().numpy()
        self.folder.flush_metrics(durable=True)
        self.folder.write_projection(
            ws.detach().float().cpu().numpy()[None],
            [buf.detach().float().cpu().numpy() for buf in noise_bufs],
        )
        self.folder.write_landmarks(
            look=self._look_landmarks, expression=self._expression_landmarks, projection=points
        )
        self.folder.write_summary(summary)
        with self._optional("pictures"):
            picture = to_picture(image)
            self.folder.write_picture("proj", picture)
            self.folder.write_picture("proj_landmarks", draw_landmarks(picture, points))
        self._finish_frames()
        with self._optional("video"):
            self._write_video()
        self.folder.write_status("finished", step=self._taken, steps=self.steps)
        self.folder.remove_unfinished()
        last = self._taken - 1
        self._mirror(lambda run: run.log_pictures(last, self._pictures("proj")))
        if self.folder.video_path.exists():
            self._mirror(lambda run: run.log_video(last, self.folder.video_path))
        self._mirror(lambda run: run.finish(summary, ok=True))
        self._tracked = None

    def fail(self, reason: str, *, step: int, state: State | None = None) -> None:
        """Record why the job stopped for good.

        Args:
            reason: one line.
            step: steps that were done.
            state: the last good state (before a NaN, for instance), kept for inspection.
        """
        self._stop("failed", reason, step, state)

    def interrupt(self, *, step: int, state: State | None = None) -> None:
        """Record that the job was stopped from outside and goes on when it is run again.

        Args:
            step: steps that were done; a resumed run begins with this one.
            state: what it needs for that.
        """
        self._stop("interrupted", "", step, state)

    def _stop(self, how: str, reason: str, step: int, state: State | None) -> None:
        self.folder.create()  # a job may fail before it starts
        self.folder.flush_metrics()
        self._finish_frames()
        if state is not None:
            self.save_state(step, state)
        if how == "failed":
            self.folder.write_status("failed", step=step, steps=self.steps, reason=reason)
        else:
            self.folder.write_status("interrupted", step=step, steps=self.steps)
        summary = {"state": how, "reason": reason, "step": step}
        self._mirror(lambda run: run.finish(summary, ok=False))
        self._tracked = None

    def _record_picture(self, step: int, picture: Picture, landmarks: NDArray[np.float32]) -> None:
        with self._optional("pictures"):
            if step in self._frame_steps:
                frame = self.folder.frames_path / f"{step:06d}"
                self._writing.append(_writers().submit(_write_frame, frame, picture, landmarks))
            if step in self._picture_steps and self._tracked is not None:
                both = join_panels([picture, draw_landmarks(picture, landmarks)])
                self._mirror(lambda run: run.log_pictures(step, {"progress": both}))
        self._finish_frames(_MOST_WAITING)

    def _finish_frames(self, waiting: int = 0) -> None:
        """Wait until no more than so many frames are to be written."""
        while len(self._writing) > waiting:
            with self._optional("pictures"):
                self._writing.popleft().result()

    def _frames(self) -> list[Path]:
        return sorted(self.folder.frames_path.glob("*.jpg"))

    def _discard_frames(self, first_step: int) -> None:
        for frame in self._frames():
            if int(frame.stem) >= first_step:
                frame.unlink()
                frame.with_suffix(".npy").unlink(missing_ok=True)

    def _write_video(self) -> None:
        frames = self._frames()
        if frames:
            write_video(self.folder.video_path, self._video_panels(frames))

    def _video_panels(self, frames: Sequence[Path]) -> Iterator[Picture]:
        with Image.open(frames[0]) as first:
            side = first.width
        look = resize(self.folder.read_picture("target_look"), side)
        expression = resize(self.folder.read_picture("target_expression"), side)
        for frame in frames:
            with Image.open(frame) as image:
                picture = np.asarray(image.convert("RGB"))
            marked = draw_landmarks(picture, np.load(frame.with_suffix(".npy"), allow_pickle=False))
            captions = (
                "look",
                f"projection, step {int(frame.stem) + 1}",
                "landmarks",
                "expression",
            )
            yield join_panels([look, picture, marked, expression], captions)

    def _pictures(self, prefix: str) -> dict[str, Path]:
        return {path.stem: path for path in sorted(self.folder.path.glob(f"{prefix}*.png"))}

    def _mirror(self, action: Callable[[TrackedRun], None]) -> None:
        if self._tracked is None:
            return
        try:
            action(self._tracked)
        except Exception as error:
            self._tracked = None  # a mirror that failed once would fail at every step
            self._warn("tracker", error)

    @contextmanager
    def _optional(self, part: str) -> Iterator[None]:
        try:
            yield
        except DiskFullError:
            raise
        except Exception as error:
            self._warn(part, error)

    def _warn(self, part: str, error: Exception) -> None:
        if part not in self._warned:
            self._warned.add(part)
            said = " ".join(str(error).split()) or type(error).__name__
            _log.warning("%s: %s left out (%s); the run goes on", self.job.label, part, said)
