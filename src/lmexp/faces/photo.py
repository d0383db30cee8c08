"""Reads photos as people take them."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lmexp.errors import LmexpError
from lmexp.faces.protocol import Photo

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "PPM", "JPEG2000")
"""What is opened; Pillow knows more, of which some start another program."""

NAMES = "JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF"

MAX_PIXELS = 128_000_000
"""Beyond what nearly all cameras take; each pixel costs 3 bytes several times over."""

MIN_SIDE = 32
"""No face that is worth projecting fits into less, px."""

_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}


def read_photo(path: Path) -> Photo:
    """Read a photo as it is meant to be seen.

    The camera's orientation is applied, colours are converted to sRGB where a profile says
    what they are, 16 bits become 8, what is transparent is laid on white, and of an animation
    the first picture is taken.

    Args:
        path: file in one of `FORMATS`.

    Returns:
        photo: [H, W, 3], RGB.

    Raises:
        LmexpError: the file is missing, empty, no picture, broken, too large or too small, or
            its pixels can't be understood; the line names the file, the reason, the way out.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(32)
            if not head:
                raise LmexpError(f"{path}: the file is empty; save or copy the picture again")
            stream.seek(0)
            return _decode(path, stream, head)
    except FileNotFoundError as error:
        raise LmexpError(f"{path}: no such file; give the path of a picture") from error
    except IsADirectoryError as error:
        raise LmexpError(f"{path}: a folder; give the path of one picture in it") from error
    except PermissionError as error:
        raise LmexpError(f"{path}: not permitted to read it; change its permissions") from error
    except OSError as error:
        raise LmexpError(f"{path}: {error.strerror}; give the path of a picture") from error


def _decode(path: Path, stream: io.BufferedReader, head: bytes) -> Photo:
    try:
        with warnings.catch_warnings():
            # Pillow's own limit is lower than some cameras; ours is checked below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture: Image.Image = Image.open(stream, formats=FORMATS)
            _check_size(path, *picture.size)
            picture.load()
            return np.asarray(_to_rgb(path, _orient(picture)))
    except Image.DecompressionBombError as error:
        raise LmexpError(
            f"{path}: more than {MAX_PIXELS // 10**6} million pixels; make it smaller first"
        ) from error
    except UnidentifiedImageError as error:
        if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
            reason = "a HEIC picture, which can't be read here; export it as JPEG or PNG"
        else:
            reason = f"not a picture that can be read; give a {NAMES} file"
        raise LmexpError(f"{path}: {reason}") from error
    except LmexpError:
        raise
    # Decoders raise what they please on broken files: OSError, SyntaxError, ValueError, ...
    except Exception as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise LmexpError(
            f"{path}: the picture is broken or cut off ({detail}); save or copy it again"
        ) from error


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise LmexpError(
            f"{path}: {width} × {height} px, more than {MAX_PIXELS // 10**6} million pixels; "
            "make it smaller first"
        )
    if min(width, height) < MIN_SIDE:
        raise LmexpError(
            f"{path}: {width} × {height} px is too small to hold a face; give a picture of at "
            f"least {MIN_SIDE} px a side"
        )


def _orient(picture: Image.Image) -> Image.Image:
    """Turn the picture as its EXIF note says; a note that can't be read is none."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:
        return picture


def _to_rgb(path: Path, picture: Image.Image) -> Image.Image:
    """Any mode → RGB, 8 bits, sRGB."""
    if picture.mode.startswith("I;16") or picture.mode == "I":
        levels = np.asarray(picture).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise _unusual(path, picture)
        return Image.fromarray(np.round(levels / 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise _unusual(path, picture)
    transparent = picture.has_transparency_data
    if picture.mode in ("1", "P", "PA", "LA", "La", "RGBa", "RGBX"):
        picture = picture.convert("RGBA" if transparent else "RGB")
    picture = _to_srgb(picture)
    if not transparent:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _unusual(path: Path, picture: Image.Image) -> LmexpError:
    return LmexpError(
        f"{path}: its pixels are numbers of kind '{picture.mode}' whose white is unknown; save "
        "it as a PNG with 8 or 16 bits"
    )


def _to_srgb(picture: Image.Image) -> Image.Image:
    """Apply the embedded colour profile; without one, or with a broken one, sRGB is meant."""
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    mode = "RGBA" if picture.mode == "RGBA" else "RGB"
    try:
        converted = ImageCms.profileToProfile(
            picture,
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode=mode,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return picture
    assert converted is not None
    return converted
