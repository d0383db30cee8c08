"""The published landmark networks, 2DFAN-4 and 3DFAN-4, shown the crop that they expect.

They were trained on faces cropped by a detector's box, and so the crop is taken of the image
differentiably, by area averaging and one resampling, and the heat maps are brought back onto the
whole image's grid in the same way. All images of a generator that was trained on aligned faces have
the face in one place, so that one fixed box serves every image: a box of each image's own would
move with it, and the target's maps and the candidate's would not be comparable.

Of the four stacks' maps only the last are used, as the packages that publish the networks and the
published projector do; the first three exist to train the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmexp.errors import LmexpError
from lmexp.landmarks.framing import average
from lmexp.landmarks.frozen_fan import FrozenFan
from lmexp.weights import store
from lmexp.weights.converters import first_line, read_state_dict

CROP_SIDE = 256
HEATMAP_SIDE = 64
REFERENCE = 195 / 200
"""Mean side of the box, width and height added, in sides of the crop."""

RAISE = 0.12
"""By how much of the box's height the crop's centre lies above the box's."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in sides of the image."""

FFHQ_BOX: Box = (0.2, 0.3, 0.8, 0.9)
"""Where a detector sees the face of an FFHQ-aligned image.

The mean of 24 generated faces by `DlibDetector` is (0.196, 0.297, 0.792, 0.892), each edge
within 0.04. The crop is 1.23 images wide: 24 px of black left and right of the image.
"""


class FaceAlignmentNetwork(nn.Module):
    """A frozen four-stack FAN of the package face-alignment; a `HeatmapNetwork`.

    Args:
        points: `2d`, the visible outline (2DFAN-4), or `3d`, the points of a 3D face as they
            fall on the image, hidden ones too (3DFAN-4).
        box: the face's box, which decides the crop, see `frame`. None: no crop, the whole image
            is shown, as the published projector does.
        weights: a state dict of that network, used instead of the published one.

    Raises:
        LmexpError: the weights can't be had, or are not such a network's.

    Source: Bulat & Tzimiropoulos, "How far are we from solving the 2D & 3D face alignment
    problem?", ICCV 2017 (arXiv 1703.07332).
    """

    def __init__(
        self,
        points: Literal["2d", "3d"] = "2d",
        box: Box | None = FFHQ_BOX,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if box is not None and not (box[0] < box[2] and box[1] < box[3]):
            raise LmexpError(
                f"landmarks.box: {list(box)} has no area; give left, top, right, bottom in sides "
                "of the image"
            )
        self.frame = None if box is None else frame(box)
        if weights is None:
            stored = store.load(f"face_alignment_{points}fan4")
            tensors, self.weights_sha256, source = stored.tensors, stored.sha256, stored.path
        else:
            source = Path(weights).expanduser()
            if not source.is_file():
                raise LmexpError(f"landmarks.weights: {source}: no such file; give a state dict")
            tensors = read_state_dict(source)
            self.weights_sha256 = store.digest(tensors)
        self.network = build_fan(tensors, source)

    @property
    def side(self) -> int | None:
        """See `HeatmapNetwork`; a crop has a density of its own."""
        return CROP_SIDE if self.frame is None else None

    def forward(self, images: Tensor) -> Tensor:
        """Draw the heat maps; see `HeatmapNetwork.__call__`."""
        levels = (images + 1) / 2
        if self.frame is None:
            return self.draw(show_whole(levels))
        return put_back(self.draw(take_crop(levels, *self.frame)), *self.frame)

    def draw(self, crops: Tensor) -> Tensor:
        """The last stack's maps.

        Args:
            crops: [N, 3, 256, 256], RGB in [0, 1].

        Returns:
            heatmaps: [N, 68, 64, 64], over the crop.
        """
        maps: Tensor | list[Tensor] = self.network(crops)
        return maps if isinstance(maps, Tensor) else maps[-1]

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Compute in half precision from here on; maps stay float32, there is no way back."""
        self.network = FrozenFan.of_published(self.network, dtype)

    def compile_regions(
        self, fuse: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
    ) -> None:
        """Compile the whole but where a `FrozenFan` has kernels of its own, which take no time."""
        if not (isinstance(self.network, FrozenFan) and self.network.has_kernels):
            self.forward = fuse(self.forward)  # type: ignore[method-assign]


def frame(box: Box) -> tuple[float, float, float]:
    """The square crop that belongs to a detector's box: x and y of its centre, and its side.

    In the unit that the box is in. Source: the package face-alignment, which centres its crop
    0.12 heights above the box's middle and makes it 200/195 (width + height) wide.
    """
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    return (left + right) / 2, (top + bottom) / 2 - RAISE * height, (width + height) / REFERENCE


def take_crop(images: Tensor, x: float, y: float, side: float) -> Tensor:
    """Cut a square out of each image; beyond the image it is black, as the networks know it.

    Args:
        images: [N, 3, R, R] in [0, 1].
        x, y: its centre, in sides of the image.
        side: its side, in sides of the image.

    Returns:
        crops: [N, 3, 256, 256].
    """
    # Averaging down to the crop's density first lets every pixel take part and get a gradient.
    density = max(round(CROP_SIDE / side), 1)
    if density < images.shape[-1]:
        images = average(images, density)
    return _resample(images, side, 2 * x - 1, 2 * y - 1, CROP_SIDE)


def put_back(heatmaps: Tensor, x: float, y: float, side: float) -> Tensor:
    """Bring maps of a crop onto the whole image's grid; 0 where the crop does not reach.

    Args:
        heatmaps: [N, K, 64, 64] over the crop.
        x, y, side: the crop, see `take_crop`.

    Returns:
        heatmaps: [N, K, 64, 64] over the image.
    """
    return _resample(heatmaps, 1 / side, (1 - 2 * x) / side, (1 - 2 * y) / side, HEATMAP_SIDE)


def show_whole(images: Tensor) -> Tensor:
    """[N, 3, R, R] → [N, 3, 256, 256]: larger images averaged, smaller ones' pixels repeated."""
    if images.shape[-1] > CROP_SIDE:
        return average(images, CROP_SIDE)
    return F.interpolate(images, size=(CROP_SIDE, CROP_SIDE), mode="nearest")


def _resample(images: Tensor, scale: float, right: float, down: float, side: int) -> Tensor:
    """Bilinear, v = scale · u + shift in frames of [-1, 1] from the result u to the input v."""
    at = (torch.arange(side, device=images.device, dtype=images.dtype) * 2 + 1) * (scale / side)
    x, y = at + (right - scale), at + (down - scale)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2)
    grid = grid.expand(len(images), side, side, 2)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def build_fan(tensors: Mapping[str, Tensor], source: Path) -> nn.Module:
    """A frozen `face_alignment.models.FAN` in evaluation mode, its stacks counted in the tensors.

    Args:
        tensors: its state dict.
        source: where they come from, for the error's line.

    Raises:
        LmexpError: they are not a FAN's.
    """
    # Here, since the package imports OpenCV and numba, seconds that other networks need not.
    from face_alignment.models import FAN

    stacks = 0
    while f"l{stacks}.weight" in tensors:
        stacks += 1
    network: nn.Module = FAN(max(stacks, 1))
    try:
        missing, unexpected = network.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip() or first_line(error)
        raise LmexpError(
            f"{source}: not a FAN of face-alignment ({reason}); give its state dict"
        ) from error
    # How many batches the statistics were taken over changes no output.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise LmexpError(
            f"{source}: not a FAN of face-alignment (misfit at {(missing + unexpected)[0]}); give "
            "its state dict"
        )
    return network.eval().requires_grad_(False)
