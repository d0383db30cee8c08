"""Several devices of one host: a process each, and one queue of batches for all of them."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

from lmexp.errors import LmexpError
from lmexp.jobs import Outcome, Settle
from lmexp.launching.devices import Device
from lmexp.launching.protocol import Batch
from lmexp.recording.atomic_file import DiskFullError
from lmexp.stopping import StopRequest

log = logging.getLogger("lmexp")

_POLL_SECONDS = 0.2
"""How soon a request to stop is passed on."""


@dataclass
class _Task:
    """A batch in the queue: how often it was begun, and on which device its worker died."""

    batch: Batch
    deaths: int = 0
    died_on: int | None = None


class WorkerProcesses:
    """One worker process per device; the next batch goes to whoever is free.

    A worker that dies (killed, out of memory, a driver's fault) loses its batch once: what is
    not finished of it goes back into the queue, to another device if there is one, and goes on
    from its saved states. A second death fails those jobs, and never any other.

    Args:
        devices: at least one; the same one may be named twice.
        retries: how often a batch may lose its worker and go on.
    """

    def __init__(self, devices: Sequence[Device], retries: int = 1) -> None:
        self._devices = list(devices)
        self._retries = retries

    def width(self) -> int:
        """As many batches at a time as there are devices."""
        return len(self._devices)

    def run(self, batches: Sequence[Batch], settle: Settle, stop: StopRequest) -> None:
        """Compute all batches; see `lmexp.launching.protocol.Engine`."""
        queue = _Queue(batches, settle, self._retries)
        workers = [
            _Worker(number, device)
            for number, device in enumerate(self._devices[: max(1, len(batches))])
        ]
        try:
            while queue.waiting or any(worker.task for worker in workers):
                if stop.requested:
                    queue.waiting.clear()
                    for worker in workers:
                        worker.ask_to_stop()
                for worker in workers:
                    if not worker.task and (task := queue.take(worker.number, len(workers))):
                        worker.begin(task)
                busy = [worker for worker in workers if worker.task]
                ends = {worker.connection: worker for worker in busy}
                for ready in connection.wait(list(ends), timeout=_POLL_SECONDS):
                    worker = ends[ready]  # type: ignore[index]
                    try:
                        queue.hear(worker, worker.connection.recv())
                    except (EOFError, OSError):
                        queue.mourn(worker, worker.end(), stopped=stop.requested)
        finally:
            for worker in workers:
                worker.end()
        if queue.disk_full:
            raise DiskFullError(queue.disk_full)


class _Queue:
    """The batches that wait, and what becomes of those that do not."""

    def __init__(self, batches: Sequence[Batch], settle: Settle, retries: int) -> None:
        self.waiting = deque(_Task(batch) for batch in batches)
        self.disk_full = ""
        self._settle = settle
        self._retries = retries

    def take(self, number: int, workers: int) -> _Task | None:
        """The next batch for a worker: not one that died on its device if others may have it."""
        for task in self.waiting:
            if workers == 1 or task.died_on != number:
                self.waiting.remove(task)
                return task
        return None

    def hear(self, worker: _Worker, message: tuple[Any, ...]) -> None:
        """What a worker says: an outcome, the end of its batch, or a fault of the batch."""
        assert worker.task is not None
        kind, *rest = message
        if kind == "outcome":
            place, outcome = rest
            worker.settled.add(place)
            self._settle(place, outcome)
            return
        left = worker.task.batch.without(worker.settled)
        worker.task = None
        if kind == "disk full":
            self.disk_full = rest[0]
            self.waiting.clear()
        elif kind == "fault":
            self._fail(left, rest[0])

    def mourn(self, worker: _Worker, exit_code: int | None, *, stopped: bool) -> None:
        """A worker died in the middle of a batch."""
        assert worker.task is not None
        task, worker.task = worker.task, None
        left = task.batch.without(worker.settled)
        if stopped or not left.places:
            return
        how = _describe_exit(exit_code)
        if task.deaths >= self._retries:
            times = "" if not task.deaths else f" {task.deaths + 1} times"
            self._fail(left, f"its worker process died{times} ({how} on {worker.device.name})")
            return
        log.warning(
            "%s: the worker process died (%s); its %d jobs go on from their saved states",
            worker.device.name,
            how,
            len(left.places),
        )
        self.waiting.appendleft(_Task(left, task.deaths + 1, worker.number))

    def _fail(self, batch: Batch, reason: str) -> None:
        for place, request in zip(batch.places, batch.requests, strict=True):
            self._settle(place, Outcome(request, "failed", reason=reason))


@dataclass
class _Worker:
    """A process, started when it first gets a batch and again after its death."""

    number: int
    device: Device
    task: _Task | None = None
    settled: set[int] = field(default_factory=set)
    _process: Any = None
    _asked: bool = False

    connection: Connection[Any, Any] = field(init=False)

    def begin(self, task: _Task) -> None:
        if self._process is None or not self._process.is_alive():
            self.end()
            self._start()
        self.task, self.settled = task, set()
        first = task.batch.done + 1
        log.info(
            "%s: jobs %d–%d/%d",
            self.device.name,
            first,
            first + len(task.batch.places) - 1,
            task.batch.total,
        )
        # A dead worker's end of the connection says so in a moment.
        with contextlib.suppress(OSError):
            self.connection.send((task.batch, task.deaths > 0))

    def ask_to_stop(self) -> None:
        """Once: a second request would interrupt it before it has saved its states."""
        if self.task and not self._asked and self._process.is_alive():
            self._asked = True
            self._process.terminate()

    def end(self) -> int | None:
        """End the process, whatever it does; gives its exit code."""
        if self._process is None:
            return None
        self.connection.close()
        self._process.join(timeout=0.5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        code: int | None = self._process.exitcode
        self._process = None
        return code

    def _start(self) -> None:
        # Spawned, not forked: CUDA and OpenMP do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, self.device), name=f"lmexp {self.device.name}", daemon=True
        )
        self._process.start()
        theirs.close()
        self._asked = False


def serve(orders: Connection[Any, Any], device: Device) -> None:
    """A worker process's life: batches come in, outcomes go out, until the connection closes."""
    if device.visible is not None:  # before anything asks CUDA for its devices
        os.environ["CUDA_VISIBLE_DEVICES"] = device.visible
    os.environ["TTY_COMPATIBLE"] = "0"  # several processes cannot draw bars on one terminal
    threading.Thread(target=_die_with_parent, daemon=True).start()
    stop = StopRequest()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes through the parent
    signal.signal(signal.SIGTERM, stop.ask)
    logging.basicConfig(
        level=logging.WARNING, format=f"{device.name}: %(message)s", stream=sys.stderr
    )
    logging.getLogger("lmexp").setLevel(logging.INFO)

    from lmexp.launching.worker import perform

    def settle(place: int, outcome: Outcome) -> None:
        orders.send(("outcome", place, outcome))

    while True:
        try:
            batch, take_over = orders.recv()
        except EOFError:
            return
        try:
            perform(
                batch,
                device=device.inside,
                threads=device.threads,
                settle=settle,
                stop=stop,
                take_over=take_over,
            )
        except DiskFullError as error:
            orders.send(("disk full", str(error)))
        except LmexpError as error:
            orders.send(("fault", str(error)))
        else:
            orders.send(("end",))


def _die_with_parent() -> None:
    """A killed sweep leaves no worker behind: the same command again finds nobody at work."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"
