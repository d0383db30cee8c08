"""Ctrl-C and SIGTERM as a request that is answered between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """The user asked to stop; states are saved."""


class StopRequest:
    """Whether somebody asked the process to stop."""

    def __init__(self) -> None:
        self.requested = False

    def ask(self, signum: int = signal.SIGINT, frame: FrameType | None = None) -> None:
        """The first request waits for the step to end; the second interrupts at once."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def listen() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM (a cluster's warning before the kill) into a `StopRequest`."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may install handlers
        return
    previous = {s: signal.signal(s, request.ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
