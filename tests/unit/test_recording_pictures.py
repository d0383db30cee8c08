from __future__ import annotations

import hashlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from recorded_runs import face_landmarks

from lmexp.errors import LmexpError
from lmexp.recording import video
from lmexp.recording.atomic_file import DiskFullError
from lmexp.recording.images import (
    draw_landmarks,
    join_panels,
    resize,
    shrink,
    to_image,
    to_picture,
    to_pictures,
)
from lmexp.recording.video import write_video


def test_levels_are_rounded_and_clamped() -> None:
    image = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).expand(3, 1, 5)
    assert to_picture(image)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_every_level_survives_the_way_through_a_tensor() -> None:
    picture = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    picture = np.stack([picture[..., 0], picture[::-1, :, 0], picture[:, ::-1, 0]], axis=2)
    image = to_image(picture)
    assert image.shape == (3, 16, 16)
    assert float(image.min()) == -1.0 and float(image.max()) == 1.0
    assert np.array_equal(to_picture(image), picture)


def test_several_images_are_shrunk_and_converted_as_each_of_them_is() -> None:
    images = torch.rand(3, 3, 48, 48) * 2 - 1
    small = shrink(images, 20)
    assert small.shape == (3, 3, 20, 20) and shrink(images, 48) is images
    assert (small.mean((2, 3)) - images.mean((2, 3))).abs().max() < 0.02
    for picture, image in zip(to_pictures(small), small, strict=True):
        assert picture.shape == (20, 20, 3) and np.array_equal(picture, to_picture(image))
    each = torch.cat([shrink(image[None], 20) for image in images])
    torch.testing.assert_close(small, each)


def test_landmarks_are_drawn_where_they_are_and_nowhere_else() -> None:
    black = np.zeros((128, 128, 3), dtype=np.uint8)
    landmarks = face_landmarks(128).numpy()
    drawn = draw_landmarks(black, landmarks, colour=(255, 0, 0))
    assert not black.any()
    for x, y in landmarks:
        assert drawn[int(y), int(x), 0] > 120
    rows, columns = np.nonzero(drawn[..., 0])
    low, high = landmarks.min(axis=0), landmarks.max(axis=0)
    assert columns.min() >= low[0] - 3 and columns.max() <= high[0] + 3
    assert rows.min() >= low[1] - 3 and rows.max() <= high[1] + 3
    # Anti-aliased: many shades, not two.
    assert len(np.unique(drawn[..., 0])) > 8


def test_the_centre_of_a_drawn_point_is_the_landmark() -> None:
    landmarks = np.full((68, 2), np.nan)
    landmarks[30] = (40.0, 20.5)
    white = draw_landmarks(
        np.zeros((64, 64, 3), dtype=np.uint8), landmarks, colour=(255, 255, 255), point=0.05
    )[..., 0].astype(float)
    rows, columns = np.mgrid[:64, :64] + 0.5
    assert (white * columns).sum() / white.sum() == pytest.approx(40.0, abs=0.3)
    assert (white * rows).sum() / white.sum() == pytest.approx(20.5, abs=0.3)


def test_parts_have_colours_of_their_own() -> None:
    drawn = draw_landmarks(np.zeros((256, 256, 3), dtype=np.uint8), face_landmarks(256).numpy())
    bright = {tuple(pixel) for pixel in drawn.reshape(-1, 3) if pixel.max() > 230}
    assert len(bright) >= 5


@pytest.mark.parametrize("side", [33, 64])
@pytest.mark.parametrize("captions", [(), ("a", "b", "c")])
def test_panels_stand_side_by_side_with_even_sides(side: int, captions: tuple[str, ...]) -> None:
    panels = [np.full((side, side, 3), level, dtype=np.uint8) for level in (10, 100, 200)]
    sheet = join_panels(panels, captions, gap=5)
    assert sheet.shape[0] % 2 == 0 and sheet.shape[1] % 2 == 0
    for index, level in enumerate((10, 100, 200)):
        assert sheet[side // 2 + 5, index * (side + 5) + side // 2].tolist() == [level] * 3
    assert sheet[side // 2 + 5, side + 2].tolist() == [255] * 3


def test_resize_leaves_a_picture_of_that_size_alone() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert resize(picture, 8) is picture
    assert resize(picture, 4, 6).shape == (6, 4, 3)


COLOURS = [(200, 60, 40), (30, 160, 70), (50, 70, 210), (224, 172, 140)]


def test_a_video_plays_in_a_browser_and_keeps_colours_and_the_last_frame(tmp_path: Path) -> None:
    path = tmp_path / "proj.mp4"
    frames = [np.full((66, 130, 3), colour, dtype=np.uint8) for colour in COLOURS]
    assert write_video(path, iter(frames), fps=20, hold=1.5) == 4 + 30
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height) == (130, 66)
        assert float(stream.average_rate or 0) == 20
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(decoded) == 34
    for frame, colour in zip([*decoded[:4], decoded[-1]], [*COLOURS, COLOURS[-1]], strict=True):
        assert np.abs(frame[20:40, 40:90].reshape(-1, 3).mean(axis=0) - colour).max() < 4
    content = path.read_bytes()
    # The index comes before the pictures: it plays while it loads.
    assert 0 < content.index(b"moov") < content.index(b"mdat")
    assert [entry.name for entry in tmp_path.iterdir()] == ["proj.mp4"]


def test_the_same_frames_give_the_same_video_again_and_on_another_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nine blocks of 16 px a row: x264 takes eight at a time, and what it reads beyond is chance's.
    draw = np.random.default_rng(0).integers
    coarse = [draw(0, 256, (6, 24, 3), dtype=np.uint8) for _ in range(4)]
    frames = [resize(picture, 140, 36) for picture in coarse]
    films = set()

    def film() -> str:
        write_video(tmp_path / "a.mp4", frames)
        return hashlib.sha256((tmp_path / "a.mp4").read_bytes()).hexdigest()

    for _ in range(60):
        films.add(film())
        _ = [np.full(draw(100, 400_000), draw(256), dtype=np.uint8) for _ in range(30)]
    monkeypatch.setattr(video, "_SAME_ON_ANY_CPU", video._SAME_ON_ANY_CPU + ":asm=0")
    assert films == {film()}


def test_a_video_without_frames_or_with_odd_sides_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "a.mp4", [])
    with pytest.raises(ValueError, match="even"):
        write_video(tmp_path / "a.mp4", [np.zeros((3, 4, 3), dtype=np.uint8)])
    assert list(tmp_path.iterdir()) == []


def test_a_video_that_cannot_be_written_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = np.zeros((16, 16, 3), dtype=np.uint8)
    with pytest.raises(LmexpError, match="cannot be written"):
        write_video(tmp_path / "missing" / "a.mp4", [frame])

    def fill(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fill)
    with pytest.raises(DiskFullError, match="no space left"):
        write_video(tmp_path / "a.mp4", [frame])
