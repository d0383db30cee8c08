"""The random numbers of a step, in tensors that stay in place while the steps go on.

Drawn on the CPU, each job's from its own seed, so they depend neither on the device nor on the
batch. A CUDA graph reads the same memory at every replay: moving on means writing into it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from lmexp.landmarks.jitter import draw_views

Draw = Callable[[int], Tensor]
"""The numbers of a step, by its index; on the CPU, always of one shape."""


class Draws:
    """What has been asked for once is drawn again for every step that follows.

    Args:
        seeds: one per job.
        device: where the numbers are needed.
        step: 0-based index of the first step.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device, step: int = 0) -> None:
        self.seeds = tuple(seeds)
        self._device = device
        self._step = step
        self._kept: dict[Hashable, tuple[Draw, Tensor]] = {}
        self._ahead: tuple[int, dict[Hashable, Tensor]] = (step, {})

    def views(self, jitter: float) -> Tensor:
        """[N, 2, 3], each job's random view of this step (see `lmexp.landmarks.jitter`)."""
        return self.get(jitter, lambda step: draw_views(jitter, self.seeds, step))

    def get(self, key: Hashable, draw: Draw) -> Tensor:
        """This step's numbers for one purpose; the tensor is the same one at every step."""
        if key not in self._kept:
            self._kept[key] = (draw, draw(self._step).to(self._device, copy=True))
        return self._kept[key][1]

    def prepare(self, step: int) -> None:
        """Draw for a step to come, without touching this one's numbers."""
        self._ahead = (step, {key: draw(step) for key, (draw, _) in self._kept.items()})

    def move_to(self, step: int) -> None:
        """Make `step` this step."""
        if step == self._step:
            return
        ahead = self._ahead[1] if self._ahead[0] == step else {}
        for key, (draw, kept) in self._kept.items():
            overwrite(kept, ahead[key] if key in ahead else draw(step))
        self._step = step


def overwrite(kept: Tensor, value: Tensor) -> None:
    """Write a CPU tensor into one that stays in place; on a GPU, after what is under way there."""
    if kept.is_cuda:
        # From pinned memory the host need not wait; PyTorch gives it to nobody else until then.
        value = value.to(kept.dtype).contiguous().pin_memory()
    kept.copy_(value, non_blocking=True)
