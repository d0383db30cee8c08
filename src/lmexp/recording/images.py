"""Pictures: from and to tensors, landmarks drawn on them, panels side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lmexp.landmarks.groups import GROUPS
from lmexp.recording.run_folder import Picture

Colour = tuple[int, int, int]

GROUP_COLOURS: dict[str, Colour] = {
    "jaw": (86, 180, 233),
    "left_eyebrow": (0, 200, 150),
    "right_eyebrow": (0, 200, 150),
    "nose_bridge": (240, 228, 66),
    "lower_nose": (240, 228, 66),
    "left_eye": (255, 255, 255),
    "right_eye": (255, 255, 255),
    "outer_lip": (255, 110, 40),
    "inner_lip": (255, 150, 210),
}
"""A colour a facial part: Okabe and Ito's palette, which colour-blind readers tell apart,
brightened for skin."""

_CLOSED = {"left_eye", "right_eye", "outer_lip", "inner_lip"}


def to_picture(image: Tensor) -> Picture:
    """image: [3, H, W], RGB in [-1, 1] (clamped) -> [H, W, 3], 0–255, rounded to nearest."""
    return to_pictures(image[None])[0]


def to_pictures(images: Tensor) -> list[Picture]:
    """images: [N, 3, H, W] -> `to_picture` of each, in one transfer from their device."""
    # byte() cuts off: half a level more makes it round.
    levels = (images.detach().float() * 127.5).add_(128).clamp_(0, 255).byte()
    return list(levels.permute(0, 2, 3, 1).contiguous().cpu().numpy())


def shrink(images: Tensor, side: int) -> Tensor:
    """images: [N, 3, R, R] -> [N, 3, side, side], anti-aliased, on their own device.

    Shrunk before it is converted and copied, a large image costs a tenth.
    """
    if images.shape[-1] == side:
        return images
    return torch.nn.functional.interpolate(
        images.detach().float(), (side, side), mode="bicubic", antialias=True
    )


def to_image(picture: Picture) -> Tensor:
    """picture: [H, W, 3], RGB, 0–255 -> [3, H, W], float32 in [-1, 1]."""
    return torch.tensor(picture).permute(2, 0, 1).float() / 127.5 - 1


def to_images(pictures: Sequence[Picture], device: torch.device) -> Tensor:
    """The same of several of one size -> [N, 3, H, W], scaled where they are wanted."""
    pixels = torch.from_numpy(np.stack(pictures)).to(device)
    return pixels.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def resize(picture: Picture, width: int, height: int | None = None) -> Picture:
    """Resample to `width` × `height` px (square if no height is given), Lanczos."""
    size = (width, width if height is None else height)
    if picture.shape[1::-1] == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def draw_landmarks(
    picture: Picture,
    landmarks: NDArray[np.floating],
    *,
    colour: Colour | None = None,
    line: float = 0.004,
    point: float = 0.0065,
) -> Picture:
    """Draw 68 landmarks and the lines of their groups, anti-aliased.

    Args:
        picture: [H, W, 3], RGB, 0–255; it is left as it is.
        landmarks: [68, 2], x then y, px from the picture's upper left corner (the first
            pixel's centre is 0.5, 0.5); what is not finite is left out.
        colour: one colour for all; by default each part has its own.
        line: width of the lines as a share of the picture's height.
        point: radius of the points as a share of the picture's height.

    Returns:
        [H, W, 3], RGB, 0–255.
    """
    height, width = picture.shape[:2]
    points = np.asarray(landmarks, dtype=np.float64)
    seen = points[np.isfinite(points).all(1)]
    if not len(seen):
        return picture.copy()
    scale = max(1, min(3, 4096 // max(height, width)))
    thickness = max(1.0, line * height * scale)
    radius = max(1.0, point * height * scale)
    rim = max(1.0, 0.35 * radius)
    # Only where the face is: the rest of a picture takes as long, and shows nothing.
    reach = (radius + rim) / scale + 1
    left, top = np.clip(np.floor(seen.min(0) - reach), 0, (width, height)).astype(int).tolist()
    right, bottom = np.clip(np.ceil(seen.max(0) + reach), 0, (width, height)).astype(int).tolist()
    if left >= right or top >= bottom:
        return picture.copy()
    overlay = Image.new("RGBA", ((right - left) * scale, (bottom - top) * scale), (0, 0, 0, 0))
    canvas = ImageDraw.Draw(overlay)
    placed = ((points - (left, top)) * scale).tolist()
    known = [math.isfinite(x) and math.isfinite(y) for x, y in placed]

    def draw(grow: float, paint: dict[str, tuple[int, int, int, int]]) -> None:
        for name, members in GROUPS.items():
            path = [*members, members[0]] if name in _CLOSED else members
            for start, end in pairwise(path):
                if known[start] and known[end]:
                    canvas.line(
                        [*placed[start], *placed[end]],
                        fill=paint[name],
                        width=max(1, round(thickness + 2 * grow)),
                    )
        for name, members in GROUPS.items():
            for x, y in (placed[i] for i in members if known[i]):
                size = radius + grow
                canvas.ellipse((x - size, y - size, x + size, y + size), fill=paint[name])

    draw(rim, dict.fromkeys(GROUPS, (0, 0, 0, 150)))  # a dark rim: legible on any skin
    draw(0.0, {name: (*(colour or GROUP_COLOURS[name]), 255) for name in GROUPS})
    small = overlay.reduce(scale)
    drawn = Image.fromarray(picture)
    drawn.paste(small, (left, top), mask=small)
    return np.asarray(drawn)


def join_panels(
    pictures: Sequence[Picture], captions: Sequence[str] = (), *, gap: int = 4
) -> Picture:
    """Pictures of one size side by side on white, each under its caption.

    Args:
        pictures: [H, W, 3] each, RGB, 0–255.
        captions: one a picture, or none at all.
        gap: space between pictures, px.

    Returns:
        [H', W', 3], RGB, 0–255; both sides even, as video codecs want them.
    """
    height, width = pictures[0].shape[:2]
    strip = round(height * 0.09) if captions else 0
    total = len(pictures) * (width + gap) - gap
    shape = (height + strip + (height + strip) % 2, total + total % 2, 3)
    sheet = np.full(shape, 255, dtype=np.uint8)
    if captions:
        sheet[:strip] = _draw_captions(captions, shape[1], strip, width, gap)
    for index, picture in enumerate(pictures):
        left = index * (width + gap)
        sheet[strip : strip + height, left : left + width] = picture
    return sheet


def _draw_captions(
    captions: Sequence[str], total: int, strip: int, width: int, gap: int
) -> Picture:
    """The captions' strip, [strip, total, 3]: each over the middle of its panel."""
    sheet = Image.new("RGB", (total, strip), (255, 255, 255))
    canvas = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=max(9.0, strip * 0.55))
    for index, caption in enumerate(captions):
        middle = (index * (width + gap) + width / 2, strip * 0.52)
        canvas.text(middle, caption, font=font, fill=(30, 30, 30), anchor="mm")
    return np.asarray(sheet)
