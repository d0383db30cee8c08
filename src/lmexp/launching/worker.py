"""One batch's work in whatever process an engine has it done."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from lmexp.config import Hardware
from lmexp.jobs import Outcome, Request, Settle
from lmexp.launching.protocol import Batch
from lmexp.runner import run
from lmexp.stopping import StopRequest
from lmexp.workbench import Workbench


def perform(
    batch: Batch,
    *,
    device: str | None = None,
    threads: int | None = None,
    settle: Settle | None = None,
    stop: StopRequest | None = None,
    take_over: bool = False,
) -> list[Outcome]:
    """Project a batch; see `lmexp.runner.run`.

    What one call has built, later calls in the same process use again.

    Args:
        device: in place of the config's `hardware.device`, and `threads` in place of its threads.
        settle: told each outcome by the job's place in the sweep.

    Raises:
        LmexpError: the hardware or a component that all jobs need cannot be had.
    """
    requests = [_place(request, device, threads) for request in batch.requests]
    originals = dict(zip(batch.places, batch.requests, strict=True))

    def tell(k: int, outcome: Outcome) -> None:
        if settle is not None:
            place = batch.places[k]
            settle(place, replace(outcome, request=originals[place]))

    with _working_in(batch.cwd):
        outcomes = run(
            requests,
            batch.root,
            batch.sweep,
            bench=_bench(requests[0].config.hardware),
            stop=stop,
            settle=tell,
            take_over=take_over,
            done=batch.done,
            total=batch.total,
        )
    return [
        replace(outcome, request=request)
        for outcome, request in zip(outcomes, batch.requests, strict=True)
    ]


def perform_on_cluster(batch: Batch) -> list[Outcome]:
    """Project a batch on a host where a scheduler grants the GPU, which is then the only visible.

    Jobs are taken over: the scheduler starts a batch again only if the one before is dead.
    """
    device = batch.requests[0].config.hardware.device
    return perform(batch, device="cuda" if device.startswith("cuda") else None, take_over=True)


def _place(request: Request, device: str | None, threads: int | None) -> Request:
    changes: dict[str, object] = {"devices": None}
    if device is not None:
        changes["device"] = device
    if threads is not None and request.config.hardware.threads is None:
        changes["threads"] = threads
    hardware = request.config.hardware.model_copy(update=changes)
    return replace(request, config=request.config.model_copy(update={"hardware": hardware}))


@lru_cache(maxsize=1)
def _bench(hardware: Hardware) -> Workbench:
    return Workbench(hardware)


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    if Path.cwd() == folder:
        yield
        return
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
