"""Parts of a computation that run side by side on a GPU."""

from __future__ import annotations

from functools import cache
from types import TracebackType
from typing import Any

import torch

_PRIORITY = -2
"""Of these streams, and of nobody else's: PyTorch hands out the same 32 streams of each priority in
turn, and see `SideStream` for what would happen to a stream that somebody else was given, too."""


class SideStream:
    """What is launched within goes to a stream of its own, beside what follows, until `join`.

    Both streams take their memory from the same allocator, which knows of no other order than each
    stream's own. Hence two rules. What is read within has to be held by a name until `join`, else
    what follows could be given its place. What is made within may be let go at any time, since
    nothing but the work within takes memory for that stream, and it begins by waiting for all that
    was launched before it. Within a process, whoever enters has to wait for all that those before
    him have launched; one thread whose streams wait for each other does.

    Without CUDA, what is within runs where it stands.

    Args:
        index: which of the streams; works that run side by side need several.
    """

    def __init__(self, device: torch.device, index: int = 0) -> None:
        self._device = device
        self._stream: Any = _stream(device, index) if device.type == "cuda" else None
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

    def join(self) -> None:
        """Let what follows wait for it."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


@cache
def _stream(device: torch.device, index: int) -> Any:  # pragma: no cover
    return torch.cuda.Stream(device, priority=_PRIORITY)  # type: ignore[no-untyped-call]
