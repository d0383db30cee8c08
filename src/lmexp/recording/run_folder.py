"""One run's folder: where everything lies and how it is written and read.

Reading needs neither torch nor the configuration's schema, so that figures can be made
from folders alone, on any machine.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image

from lmexp.errors import LmexpError
from lmexp.recording.atomic_file import write_atomically, write_error
from lmexp.recording.process_identity import identify_process, is_running

RunState = Literal["running", "finished", "failed", "interrupted"]
Picture = NDArray[np.uint8]

_HEARTBEAT_SECONDS = 120.0
"""A run of another host counts as alive if its status is younger than this."""
_FLUSH_SECONDS = 1.0
"""Most that lines of metrics wait for a later one: opening a file takes longer than a line does."""


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """YAML that OmegaConf reads back as it was: it takes more words for numbers than YAML does."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = "'" if is_number(text) else None
        node: yaml.ScalarNode = self.represent_scalar("tag:yaml.org,2002:str", text, style)
        return node


_Dumper.add_representer(str, _Dumper.represent_text)


def is_number(text: str) -> bool:
    """Whether a text reads as a number: "1e5", "nan"."""
    try:
        float(text)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=8)
def _encode(pixels: bytes, shape: tuple[int, ...]) -> bytes:
    """A picture as PNG. The jobs of a sweep show the same photos: theirs are encoded once."""
    picture = np.frombuffer(pixels, np.uint8).reshape(shape)
    encoded = io.BytesIO()
    # Level 6, the default, takes four times as long for a sixth of the size.
    Image.fromarray(picture).save(encoded, format="png", compress_level=1)
    return encoded.getvalue()


@dataclass(frozen=True)
class Status:
    """What a run's status.json says.

    Attributes:
        state: running, finished, failed or interrupted.
        reason: why it failed, in one line; empty otherwise.
        step: steps that are done.
        steps: steps that were asked for; a plateau can end a run earlier.
        pid: the process that wrote it.
        process: that process's start, which tells it from a later one of the same number.
        host: the machine that it ran on.
        started: when this folder's run first began, ISO 8601, UTC.
        updated: when the status was written, ISO 8601, UTC.
    """

    state: RunState
    reason: str
    step: int
    steps: int
    pid: int
    process: str
    host: str
    started: str
    updated: str

    @property
    def alive(self) -> bool:
        """Whether the process that wrote it still works on this run."""
        if self.state != "running":
            return False
        if self.host == socket.gethostname():
            return is_running(self.pid, self.process)
        age = datetime.now(UTC) - datetime.fromisoformat(self.updated)
        return age.total_seconds() < _HEARTBEAT_SECONDS

    @property
    def killed(self) -> bool:
        """Whether the run stopped without a chance to say so (kill -9, power, memory)."""
        return self.state == "running" and not self.alive

    def describe(self) -> str:
        """One line for people."""
        if self.state == "finished":
            return f"finished after {self.step} steps"
        where = f"step {self.step} of {self.steps}"
        if self.state == "failed":
            return f"failed at {where}: {self.reason}"
        if self.killed:
            return f"killed at about {where} (process {self.pid} on {self.host} is gone)"
        return f"{self.state} at {where}"


class RunFolder:
    """The files of one run (one job).

    Every file is replaced in one step, except metrics.jsonl, which grows by whole lines, some
    steps at a time; a last line that a killed process left unfinished is dropped by whoever
    reads it.

    Args:
        path: the folder; `create` makes it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lines: list[bytes] = []
        self._flushed_at = -math.inf

    def create(self) -> RunFolder:
        """Make the folder and its parents.

        Raises:
            LmexpError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.path, error) from error
        return self

    @property
    def state_path(self) -> Path:
        """What a resumed run starts from; gone once the run is finished."""
        return self.path / "state.safetensors"

    @property
    def frames_path(self) -> Path:
        """Folder of the video's frames while the run goes on; gone afterwards."""
        return self.path / "frames"

    @property
    def video_path(self) -> Path:
        """The projection over the steps, H.264."""
        return self.path / "proj.mp4"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml, the resolved configuration, in its own order."""
        # libyaml: OmegaConf's own writer takes longer than all of a run's pictures.
        text = yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        write_atomically(self.path / "config.yaml", text.encode())

    def read_config(self) -> dict[str, Any]:
        """Read config.yaml.

        Raises:
            LmexpError: it is missing or damaged.
        """
        path = self.path / "config.yaml"
        try:
            config = OmegaConf.to_container(OmegaConf.load(path))
        except Exception as error:  # YAML's own kinds, OmegaConf's and the file system's
            raise _unreadable(path, error) from error
        if not isinstance(config, dict):
            raise _unreadable(path, "no keys in it")
        return {str(key): value for key, value in config.items()}

    def write_diff(self, diff: str) -> None:
        """Write code.diff, what the code differed in from its git revision."""
        write_atomically(self.path / "code.diff", diff.encode())

    def write_fault(self, trace: str) -> None:
        """Write fault.txt, the traceback of an exception that nobody foresaw."""
        write_atomically(self.path / "fault.txt", trace.encode())

    def write_status(self, state: RunState, *, step: int, steps: int, reason: str = "") -> None:
        """Write status.json in this process's name; the first start time is kept.

        Args:
            state: what the run is doing from now on.
            step: steps that are done.
            steps: steps that were asked for.
            reason: one line, for a failed run.
        """
        before = self.read_status()
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        status = Status(
            state=state,
            reason=" ".join(reason.split()),
            step=step,
            steps=steps,
            pid=os.getpid(),
            process=identify_process(os.getpid()),
            host=socket.gethostname(),
            started=before.started if before else now,
            updated=now,
        )
        self._write_json("status.json", asdict(status))

    def read_status(self) -> Status | None:
        """Read status.json; None if no run ever started here.

        Raises:
            LmexpError: it is damaged.
        """
        path = self.path / "status.json"
        if not path.exists():
            return None
        try:
            return Status(**self._read_json("status.json"))
        except TypeError as error:
            raise _unreadable(path, error) from error

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, the run in numbers. Values that are not finite become null."""
        self._write_json("summary.json", summary)

    def read_summary(self) -> dict[str, Any]:
        """Read summary.json.

        Raises:
            LmexpError: it is missing or damaged.
        """
        return self._read_json("summary.json")

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one step's line to metrics.jsonl; a killed process loses those of a second.

        Raises:
            DiskFullError, LmexpError: lines cannot be written.
        """
        try:
            text = _PLAIN.encode(line)
        except (TypeError, ValueError):  # an array, NaN or infinity
            text = _PLAIN.encode(_jsonable(line))
        self._lines.append(text.encode() + b"\n")
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self.flush_metrics()

    def flush_metrics(self, *, durable: bool = False) -> None:
        """Write the lines that wait; after that they outlive a killed process.

        Args:
            durable: wait until the disk has them, so that they outlive a power cut too.

        Raises:
            DiskFullError, LmexpError: they cannot be written.
        """
        self._flushed_at = time.monotonic()
        if not self._lines:
            return
        # Taken before they are written: after half a line nothing may follow.
        lines, self._lines = self._lines, []
        path = self.path / "metrics.jsonl"
        try:
            with path.open("ab") as file:
                file.write(b"".join(lines))
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise write_error(path, error) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the whole lines of metrics.jsonl, oldest first; null becomes NaN.

        Raises:
            LmexpError: a line before the last is damaged, or this object's own that waited
                cannot be written.
        """
        self.flush_metrics()
        return [_with_nan(json.loads(line)) for line in self._metric_lines()]

    def read_last_metrics(self) -> dict[str, Any]:
        """Read the last whole line of metrics.jsonl; null becomes NaN.

        Raises:
            LmexpError: there is none, or it is damaged.
        """
        self.flush_metrics()
        path = self.path / "metrics.jsonl"
        try:
            return dict(_with_nan(json.loads(path.read_bytes().split(b"\n")[-2])))
        except (OSError, ValueError, TypeError, IndexError) as error:
            raise _unreadable(path, error) from error

    def truncate_metrics(self, first_step: int) -> int:
        """Forget the lines of step `first_step` and later, which a resumed run makes again.

        Returns:
            How many lines are left, one for every step that is done.
        """
        self.flush_metrics()
        lines = list(self._metric_lines())
        kept = [line for line in lines if json.loads(line)["step"] < first_step]
        write_atomically(self.path / "metrics.jsonl", b"".join(line + b"\n" for line in kept))
        return len(kept)

    def write_projection(
        self, ws: NDArray[np.float32], noise_bufs: Sequence[NDArray[np.float32]] = ()
    ) -> None:
        """Write projected_w.npz and, for a generator with noise, projected_noise.npz.

        Args:
            ws: [1, num_ws, w_dim]; stored under `w`, as the tools of StyleGAN2 and 3 read it.
            noise_bufs: [1, h, w] each; stored as noise_0, noise_1, … in synthesis order.
        """
        self._write_latents("projected", ws, noise_bufs)

    def read_projection(self) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """Read ws [1, num_ws, w_dim] and the noise maps, in synthesis order.

        Raises:
            LmexpError: a file is missing or damaged.
        """
        return self._read_latents("projected")

    def write_inversion(
        self, ws: NDArray[np.float32], noise_bufs: Sequence[NDArray[np.float32]] = ()
    ) -> None:
        """Write inversion_w.npz and inversion_noise.npz, where the projection began."""
        self._write_latents("inversion", ws, noise_bufs)

    def read_inversion(self) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """Read what `write_inversion` wrote, as `read_projection` does."""
        return self._read_latents("inversion")

    def _write_latents(
        self, stem: str, ws: NDArray[np.float32], noise_bufs: Sequence[NDArray[np.float32]]
    ) -> None:
        if ws.ndim != 3 or ws.shape[0] != 1:
            raise ValueError(f"ws: [1, num_ws, w_dim] expected, got {list(ws.shape)}")
        self._write_arrays(f"{stem}_w.npz", {"w": ws.astype(np.float32)})
        if noise_bufs:
            named = {f"noise_{i}": buf.astype(np.float32) for i, buf in enumerate(noise_bufs)}
            self._write_arrays(f"{stem}_noise.npz", named)

    def _read_latents(self, stem: str) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        ws = self._read_arrays(f"{stem}_w.npz")["w"]
        if not (self.path / f"{stem}_noise.npz").exists():
            return ws, []
        named = self._read_arrays(f"{stem}_noise.npz")
        return ws, [named[f"noise_{i}"] for i in range(len(named))]

    def write_landmarks(self, **landmarks: NDArray[np.float32]) -> None:
        """Write landmarks.npz: look, expression, projection; [68, 2] each, x then y, px."""
        self._write_arrays("landmarks.npz", landmarks)

    def read_landmarks(self) -> dict[str, NDArray[np.float32]]:
        """Read landmarks.npz.

        Raises:
            LmexpError: it is missing or damaged.
        """
        return self._read_arrays("landmarks.npz")

    def write_picture(self, name: str, picture: Picture) -> Path:
        """Write `name`.png.

        Args:
            name: the file's stem: proj, target_look, …
            picture: [H, W, 3], RGB, 0–255.
        """
        path = self.path / f"{name}.png"
        write_atomically(path, _encode(picture.tobytes(), picture.shape), durable=False)
        return path

    def read_picture(self, name: str) -> Picture:
        """Read `name`.png as [H, W, 3], RGB, 0–255.

        Raises:
            LmexpError: it is missing or damaged.
        """
        path = self.path / f"{name}.png"
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise _unreadable(path, error) from error

    def remove_unfinished(self) -> None:
        """Remove what only a running job needs, and what a killed one was writing."""
        shutil.rmtree(self.frames_path, ignore_errors=True)
        for path in (self.state_path, *self.path.glob(".*.part")):
            path.unlink(missing_ok=True)

    def _metric_lines(self) -> Iterator[bytes]:
        path = self.path / "metrics.jsonl"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unreadable(path, error) from error
        # What follows the last line break is the line that a killed process was writing.
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                if not isinstance(json.loads(line), dict):
                    raise ValueError("not an object")
            except ValueError as error:
                raise _unreadable(path, f"line {number}: {error}") from error
            yield line

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(_jsonable(content), indent=2, allow_nan=False, ensure_ascii=False)
        write_atomically(self.path / name, text.encode() + b"\n")

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        if not isinstance(content, dict):
            raise _unreadable(path, "not an object")
        return content

    def _write_arrays(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        encoded = io.BytesIO()
        np.savez(encoded, allow_pickle=False, **arrays)
        write_atomically(self.path / name, encoded.getvalue())

    def _read_arrays(self, name: str) -> dict[str, NDArray[Any]]:
        path = self.path / name
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files}
        except Exception as error:  # numpy and zipfile raise a dozen kinds on damaged files
            raise _unreadable(path, error) from error


def _unreadable(path: Path, reason: object) -> LmexpError:
    if isinstance(reason, FileNotFoundError):
        return LmexpError(f"{path}: missing; run the job again to make it")
    said = " ".join(str(reason).split())
    return LmexpError(f"{path}: damaged ({said}); remove it and run the job again")


_PLAIN = json.JSONEncoder(allow_nan=False)


def _jsonable(value: Any) -> Any:
    """Plain JSON: NaN and infinity have no place in it and become null."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.ndarray):
        return _jsonable(value.tolist())
    if isinstance(value, np.generic):
        return _jsonable(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nan(item) for key, item in value.items()}
    return math.nan if value is None else value
