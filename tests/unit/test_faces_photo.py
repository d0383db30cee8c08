from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from lmexp.errors import LmexpError
from lmexp.faces import photo as photo_module
from lmexp.faces.photo import read_photo

ORIENTATION = 0x0112


def scene() -> Image.Image:
    """Left half red, right half blue, the top tenth green: every turn looks different."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30, 0] = 200
    pixels[:, 30:, 2] = 180
    pixels[:4] = (0, 220, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_the_cameras_orientation_is_undone(
    tmp_path: Path, orientation: int, turn: Image.Transpose | None
) -> None:
    stored = scene() if turn is None else scene().transpose(turn)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(read_photo(tmp_path / "photo.png"), np.asarray(scene()))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:, :20, 3] = 255
    rgba[:, 20:30, 3] = 51
    Image.fromarray(rgba).save(tmp_path / "cut_out.png")
    photo = read_photo(tmp_path / "cut_out.png")
    assert photo.shape == (40, 40, 3)
    assert photo[5, 5].tolist() == [200, 0, 0]
    assert photo[5, 25].tolist() == [244, 204, 204]
    assert photo[5, 35].tolist() == [255, 255, 255]


def test_a_palette_keeps_its_colours_and_its_hole(tmp_path: Path) -> None:
    picture = Image.new("P", (40, 40), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.paste(1, (20, 0, 40, 40))
    picture.save(tmp_path / "plain.png")
    assert read_photo(tmp_path / "plain.png")[0, [0, 39]].tolist() == [[255, 0, 0], [0, 0, 255]]
    picture.save(tmp_path / "hole.gif", transparency=0)
    assert read_photo(tmp_path / "hole.gif")[0, [0, 39]].tolist() == [[255] * 3, [0, 0, 255]]


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_becomes_three_equal_channels(tmp_path: Path, mode: str) -> None:
    scene().convert("L").convert(mode).save(tmp_path / "grey.png")
    photo = read_photo(tmp_path / "grey.png")
    assert photo.shape == (40, 60, 3)
    assert np.ptp(photo, axis=2).max() == 0
    assert np.array_equal(
        photo[..., 0], np.asarray(scene().convert("L").convert(mode).convert("L"))
    )


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    levels = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (40, 1))
    Image.fromarray(levels).save(tmp_path / "deep.png")
    photo = read_photo(tmp_path / "deep.png")
    assert np.abs(photo[0, :, 0] - np.linspace(0, 255, 64)).max() <= 0.51
    Image.fromarray(levels.astype(np.int32) * 1000).save(tmp_path / "raw.tiff")
    with pytest.raises(LmexpError, match=r"raw\.tiff: .*white is unknown; save"):
        read_photo(tmp_path / "raw.tiff")
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(LmexpError, match=r"float\.tiff: .*'F'.*save"):
        read_photo(tmp_path / "float.tiff")


def test_print_colours_are_converted(tmp_path: Path) -> None:
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    red = read_photo(tmp_path / "print.jpg")[20, 20]
    assert red[0] > 240
    assert red[1:].max() < 15


def test_colour_profiles_are_applied(tmp_path: Path) -> None:
    grey = Image.new("RGB", (40, 40), (100, 150, 200))
    lab_like = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey.save(tmp_path / "srgb.png", icc_profile=lab_like)
    assert np.abs(read_photo(tmp_path / "srgb.png")[0, 0].astype(int) - (100, 150, 200)).max() <= 1
    grey.save(tmp_path / "broken.png", icc_profile=b"not a profile")
    assert read_photo(tmp_path / "broken.png")[0, 0].tolist() == [100, 150, 200]


def test_an_unreadable_orientation_note_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene().save(tmp_path / "photo.png")

    def fail(picture: Image.Image) -> Image.Image:
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(photo_module.ImageOps, "exif_transpose", fail)
    assert np.array_equal(read_photo(tmp_path / "photo.png"), np.asarray(scene()))


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.webp", "a.avif", "a.tiff", "a.bmp", "a.ppm", "a.jp2", "a.jpg.png"]
)
def test_formats_are_read(tmp_path: Path, name: str) -> None:
    scene().save(tmp_path / name)
    photo = read_photo(tmp_path / name)
    assert photo.shape == (40, 60, 3)
    assert photo[30, 15, 0] > 150 > 60 > photo[30, 15, 2]


def test_of_several_pictures_in_a_file_the_first_is_taken(tmp_path: Path) -> None:
    flipped = [scene().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    scene().save(tmp_path / "two.jpg", "MPO", save_all=True, append_images=flipped)
    scene().save(tmp_path / "two.webp", save_all=True, append_images=flipped)
    for name in ("two.jpg", "two.webp"):
        photo = read_photo(tmp_path / name)
        assert photo[30, 15, 0] > 150 > 60 > photo[30, 15, 2]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def encoded(picture: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind)
    return stream.getvalue()


def test_what_is_no_picture_is_refused_in_one_line(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8))
    heic = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(64)
    cases = {
        tmp_path / "missing.jpg": "no such file",
        tmp_path: "a folder; give",
        write(tmp_path / "empty.jpg", b""): "the file is empty",
        write(tmp_path / "note.jpg", b"Dear diary, " * 9): "not a picture that can be read; give",
        write(tmp_path / "phone.heic", heic): "HEIC .* export it as JPEG or PNG",
        write(tmp_path / "cut.jpg", encoded(noise, "JPEG")[:3000]): "broken or cut off .*; save",
        write(tmp_path / "cut.png", encoded(noise, "PNG")[:3000]): "broken or cut off .*; save",
        write(
            tmp_path / "dot.png", encoded(noise.resize((40, 31)), "PNG")
        ): "40 × 31 px is too small",
        write(
            tmp_path / "drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"
        ): "not a picture",
        tmp_path / ("x" * 300): "name too long",
    }
    for path, reason in cases.items():
        with pytest.raises(LmexpError, match=reason) as caught:
            read_photo(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert ";" in message, "no way out is named"


def png_header(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    stream.write(b"\x89PNG\r\n\x1a\n")
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    PngImagePlugin.putchunk(stream, b"IHDR", size, b"\x08\x02\x00\x00\x00")
    PngImagePlugin.putchunk(stream, b"IDAT", b"")
    return stream.getvalue()


@pytest.mark.parametrize("side", [12_000, 30_000])
def test_a_picture_that_would_fill_the_memory_is_refused_before_it_does(
    tmp_path: Path, side: int
) -> None:
    path = write(tmp_path / "bomb.png", png_header(side, side))
    with pytest.raises(LmexpError, match=r"128 million pixels; make it smaller"):
        read_photo(path)


def test_large_cameras_are_welcome_without_a_word(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    # More than Pillow warns of by default.
    Image.new("L", (10_000, 10_000), 7).save(tmp_path / "large.png", compress_level=1)
    assert read_photo(tmp_path / "large.png").shape == (10_000, 10_000, 3)
    assert not recwarn.list


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_protected_file_is_named(tmp_path: Path) -> None:
    scene().save(tmp_path / "photo.png")
    (tmp_path / "photo.png").chmod(0)
    with pytest.raises(LmexpError, match="not permitted to read it"):
        read_photo(tmp_path / "photo.png")
