"""Batches one after another in this process: one device, no engine."""

from __future__ import annotations

from collections.abc import Sequence

from lmexp.errors import LmexpError
from lmexp.jobs import Outcome, Settle
from lmexp.launching.protocol import Batch
from lmexp.launching.worker import perform
from lmexp.recording.atomic_file import DiskFullError
from lmexp.stopping import StopRequest


class InProcess:
    """Computes batches in turn, with networks that are built once.

    Args:
        device: in place of the config's `hardware.device`.
    """

    def __init__(self, device: str | None = None) -> None:
        self._device = device

    def width(self) -> int:
        """One batch at a time."""
        return 1

    def run(self, batches: Sequence[Batch], settle: Settle, stop: StopRequest) -> None:
        """Compute all batches; one that cannot be begun fails alone."""
        for batch in batches:
            try:
                perform(batch, device=self._device, settle=settle, stop=stop)
            except DiskFullError:
                raise
            except LmexpError as error:
                for place, request in zip(batch.places, batch.requests, strict=True):
                    settle(place, Outcome(request, "failed", reason=str(error)))
