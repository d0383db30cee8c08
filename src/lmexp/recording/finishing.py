"""Results of several jobs, written side by side."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from lmexp.recording.atomic_file import DiskFullError

_MOST = 8
"""Results that are written at a time: a video of 120 frames holds a few megabytes."""


class Finishing:
    """Writes one job's result while the next one's is computed, and others are written.

    A video takes seconds of a core, longer than a GPU takes for the job. To be used as a context:
    at its end all that was added is written, whatever else has failed.
    """

    def __init__(self) -> None:
        self._at_once = min(_MOST, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._at_once, thread_name_prefix="results")
        self._under_way: deque[tuple[Future[None], Callable[[], None]]] = deque()
        self._faults: list[Exception] = []

    def add(self, write: Callable[[], None], then: Callable[[], None]) -> None:
        """Have a result written.

        Args:
            write: called in another thread.
            then: called in this one, in the order of `add`, once that is done; not if it failed.
        """
        self._under_way.append((self._pool.submit(write), then))
        while len(self._under_way) > 2 * self._at_once:  # each holds its job's image and noise
            self._conclude()

    def __enter__(self) -> Finishing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for all.

        Raises:
            DiskFullError: a result found no room.
            Exception: the first fault of another kind, if nothing failed outside.
        """
        with self._pool:
            while self._under_way:
                self._conclude()
        full = [fault for fault in self._faults if isinstance(fault, DiskFullError)]
        for fault in full or (self._faults if error is None else ()):
            raise fault

    def _conclude(self) -> None:
        writing, then = self._under_way.popleft()
        try:
            writing.result()
        except Exception as fault:  # the other results must not be lost
            self._faults.append(fault)
            return
        then()
