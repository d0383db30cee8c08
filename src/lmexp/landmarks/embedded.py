"""The landmark networks that come with this package, ready for the landmark term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lmexp.errors import LmexpError
from lmexp.landmarks.fan import INPUT_SIDE, Fan
from lmexp.landmarks.framing import average
from lmexp.landmarks.frozen_fan import FrozenFan
from lmexp.weights import store


class EmbeddedFan(nn.Module):
    """A frozen one-stack FAN, trained by `scripts/train_landmarks.py`; a `HeatmapNetwork`.

    Args:
        variant: `slim` (hourglass of 128 channels, a third of the time) or `full` (the
            paper's 256); docs/models/fan_68.md has their scores.
        weights: a file that `scripts/train_landmarks.py` wrote, used instead of the
            packaged ones.

    Raises:
        LmexpError: the file is missing, damaged or not a FAN of 68 landmarks.
    """

    side = INPUT_SIDE

    def __init__(
        self, variant: Literal["slim", "full"] = "slim", weights: str | None = None
    ) -> None:
        super().__init__()
        if weights is None:
            stored = store.load(f"fan_68_{variant}")
            tensors, self.weights_sha256, source = stored.tensors, stored.sha256, stored.path
        else:
            source = Path(weights).expanduser()
            tensors = _read(source)
            self.weights_sha256 = store.digest(tensors)
        self.network: Fan | FrozenFan = build_fan(tensors, source)

    def lower_precision(self, dtype: torch.dtype) -> None:
        """Compute in half precision from here on; maps stay float32, there is no way back."""
        assert isinstance(self.network, Fan)
        self.network = FrozenFan.of_embedded(self.network, dtype)

    def compile_regions(
        self, fuse: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
    ) -> None:
        """Compile the whole, or what is before a `FrozenFan` that has kernels of its own."""
        if isinstance(self.network, FrozenFan) and self.network.has_kernels:
            self.arrange = fuse(self.arrange)  # type: ignore[method-assign]
        else:
            self.forward = fuse(self.forward)  # type: ignore[method-assign]

    def forward(self, images: Tensor) -> Tensor:
        """Draw the heat maps; see `HeatmapNetwork.__call__`."""
        arranged = self.arrange(images)
        if isinstance(self.network, FrozenFan):
            return self.network.draw(arranged)
        heatmaps: Tensor = self.network(arranged)
        return heatmaps.contiguous()

    def arrange(self, images: Tensor) -> Tensor:
        """Images [N, 3, R, R] as the network reads them.

        Bringing 1024 px down to 256 by a mean took an eighth of the network's time, uncompiled.
        """
        images = resize(images, INPUT_SIDE)
        if isinstance(self.network, FrozenFan):
            return self.network.arrange(images)
        return images.contiguous(memory_format=torch.channels_last)


def resize(images: Tensor, side: int) -> Tensor:
    """Bring square images [N, 3, R, R] to [N, 3, side, side].

    Larger images are averaged over areas, so that every pixel of theirs takes part and gets
    a gradient; smaller ones are interpolated.
    """
    if images.shape[2:] == (side, side):
        return images
    if min(images.shape[2:]) >= side:
        return average(images, side)
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def build_fan(tensors: Mapping[str, Tensor], source: Path) -> Fan:
    """A frozen FAN in evaluation mode, its width and depth read from the tensors' shapes.

    Args:
        tensors: convolutions in any float type, batch statistics.
        source: where they come from, for the error's line.

    Raises:
        LmexpError: they are not a FAN's.
    """
    try:
        landmarks, width = tensors["heatmaps.weight"].shape[:2]
        depth = 1
        while f"hourglass.{'inner.' * depth}down.conv1.weight" in tensors:
            depth += 1
        network = Fan(width, depth, landmarks)
        missing, unexpected = network.load_state_dict(
            {name: tensor.float() for name, tensor in tensors.items()}, strict=False
        )
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LmexpError(
            f"{source}: not a FAN ({reason}); train one with scripts/train_landmarks.py"
        ) from error
    # How many batches the statistics were taken over is not stored: it changes no output.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise LmexpError(
            f"{source}: not a FAN (misfit at {(missing + unexpected)[0]}); "
            "train one with scripts/train_landmarks.py"
        )
    network.eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        reason = reason or str(error).splitlines()[0]
        raise LmexpError(
            f"landmarks.weights: {path} can't be read ({reason}); give a safetensors file"
        ) from error
