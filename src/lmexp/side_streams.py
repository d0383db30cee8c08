"""Parts of a computation that run side by side on a GPU."""

from __future__ import annotations

from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """What is launched within goes to a stream of its own, beside what follows, until `join`.

    Memory goes back to the stream that it was taken for, and is given away in that stream's order
    alone. Hence two rules: what is read within is held by a name until `join`, else what follows
    could be given its place; and what is made within and read after `join` is named to that, since
    PyTorch hands out the same streams again and again, and another who was given this one could
    take its place.

    Without CUDA, what is within runs where it stands.

    Args:
        index: which of the streams; works that run side by side need several.
        priority: below 0, its kernels come before those of other streams that wait, too.
    """

    def __init__(self, device: torch.device, index: int = 0, priority: int = 0) -> None:
        self._device = device
        self._stream: Any = _stream(device, index, priority) if device.type == "cuda" else None
        self._within: Any = torch.cuda.stream(self._stream)  # of None: as it is

    def __enter__(self) -> SideStream:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._within.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._within.__exit__(kind, fault, trace)

    def join(self, *made: Tensor | None) -> None:
        """Let what follows wait for it, and read what it has made."""
        if self._stream is None:
            return
        here = torch.cuda.current_stream(self._device)
        here.wait_stream(self._stream)
        for tensor in made:
            if tensor is not None:
                tensor.record_stream(here)


@cache
def _stream(device: torch.device, index: int, priority: int) -> Any:  # pragma: no cover
    return torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
