"""MP4 files that every browser plays.

PyAV rather than imageio-ffmpeg: its wheel carries x264 in a third of the size, and it reads
as well as writes, in this process, so that a video is checked without another program.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from lmexp.recording.atomic_file import write_error

_BT709 = 1

_PRESET = "veryfast"
"""x264's; at crf 16 half the time of its usual preset at 18, a tenth more bytes, 0.4 dB less."""

_SAME_ON_ANY_CPU = "cpu-independent=1"
"""x264's choice of how much each block matters to later frames (mbtree) depends on the CPU, and
its AVX-512 form on memory that nobody wrote: two encodings of the same frames differed."""


def write_video(
    path: Path,
    frames: Iterable[NDArray[np.uint8]],
    *,
    fps: int = 30,
    hold: float = 1.5,
    crf: int = 16,
) -> int:
    """Write H.264, yuv420p, its index in front (it plays while it loads).

    The same frames give the same file, byte for byte, again and on another CPU.

    Args:
        path: the .mp4, replaced in one step.
        frames: [H, W, 3] each, RGB, 0–255, of one size with even sides; taken one by one.
        fps: frames a second.
        hold: how long the last frame stands, s.
        crf: x264's constant quality; 16 looks lossless.

    Returns:
        The number of frames in the file.

    Raises:
        ValueError: no frame, or one with an odd side.
        DiskFullError, LmexpError: the file cannot be written.
    """
    # Its ending is not .mp4, so that nobody takes an unfinished file for the video; and a
    # real file, because moving the index to the front reads the file again.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        count = _encode(unfinished, frames, fps=fps, hold=hold, crf=crf)
        unfinished.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def _encode(
    path: Path, frames: Iterable[NDArray[np.uint8]], *, fps: int, hold: float, crf: int
) -> int:
    options = {"movflags": "faststart"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream(
            "libx264",
            rate=fps,
            options={"crf": str(crf), "preset": _PRESET, "x264-params": _SAME_ON_ANY_CPU},
        )
        stream.pix_fmt = "yuv420p"
        # Untagged files are shown with another matrix than they were made with, depending on
        # the player and the size: faces change their colour.
        stream.codec_context.colorspace = _BT709
        stream.codec_context.color_primaries = _BT709
        stream.codec_context.color_trc = _BT709

        count = 0
        last: av.VideoFrame | None = None
        for picture in frames:
            if last is None:
                stream.height, stream.width = picture.shape[:2]
                if stream.height % 2 or stream.width % 2:
                    raise ValueError(f"video: sides must be even, got {picture.shape[:2]}")
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            # Colours are averaged over 2 × 2 pixels: nearest to the picture, and the fastest way.
            last = frame.reformat(format="yuv420p", dst_colorspace="ITU709", interpolation="AREA")
            container.mux(stream.encode(last))
            count += 1
        if last is None:
            raise ValueError("video: no frames to write")
        for _ in range(round(hold * fps)):
            last.pts = None  # else the time of its first showing
            container.mux(stream.encode(last))
            count += 1
        container.mux(stream.encode(None))
    return count
