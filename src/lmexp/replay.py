"""Steps of a batch as replays of one CUDA graph."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace

import torch

from lmexp.batch import Batch
from lmexp.losses.protocol import Candidate

log = logging.getLogger("lmexp")

WARM_UP = 3
"""Steps taken one operation at a time before a CUDA graph is captured: what they compile, choose
and allocate must not happen within it."""


class Replay:
    """Takes steps by replaying a CUDA graph of one.

    Terms that a graph cannot hold (they read numbers back, or draw on the CPU) are computed one
    operation after the other, with a warning.
    """

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self._batch = batch
        self._device = device
        self._left = WARM_UP
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._captured: tuple[torch.cuda.CUDAGraph, Candidate] | None = None

    def __call__(self, step: int) -> Candidate:
        with torch.cuda.device(self._device):
            if self._left > 0:
                self._left -= 1
                return self._aside(step)
            if self._captured is None and not self._capture(step):
                return self._aside(step)
            assert self._captured is not None
            graph, candidate = self._captured
            graph.replay()
            # Not the captured one itself: what it remembers of its images is the capture's.
            return replace(candidate, step=step)

    def _aside(self, step: int) -> Candidate:
        """A step on another stream, as before a capture."""
        here, aside = torch.cuda.current_stream(), self._stream
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            taken = self._batch.take(step)
        here.wait_stream(aside)
        return taken

    def _capture(self, step: int) -> bool:
        torch.cuda.empty_cache()  # the graph has a memory pool of its own
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                candidate = self._batch.take(step)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            said = str(error).strip().partition("\n")[0]
            log.warning("hardware.graphs: a step does not fit into one (%s); going without", said)
            torch.cuda.synchronize()
            self._left = sys.maxsize
            return False
        self._captured = (graph, candidate)
        return True
