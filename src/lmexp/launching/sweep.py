"""Jobs through an engine: planned, computed, each settled, whatever happens to the others."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lmexp.config import Hardware
from lmexp.jobs import Outcome, Request, plan
from lmexp.launching.devices import find_devices
from lmexp.launching.in_process import InProcess
from lmexp.launching.index import SweepIndex
from lmexp.launching.protocol import Batch, Engine
from lmexp.launching.worker_processes import WorkerProcesses
from lmexp.recording.atomic_file import DiskFullError
from lmexp.stopping import StopRequest


def engine_here(hardware: Hardware) -> Engine:
    """This host's engine: a process per device of `hardware.devices`, else this process.

    Raises:
        LmexpError: a device is not there.
    """
    devices = find_devices(hardware)
    if len(devices) > 1:
        return WorkerProcesses(devices)
    return InProcess(devices[0].name if devices else None)


def run_jobs(
    requests: Sequence[Request], index: SweepIndex, engine: Engine, stop: StopRequest
) -> list[Outcome]:
    """Run jobs to their end and keep the sweep's index up to date.

    Returns:
        One outcome per request, in their order.

    Raises:
        LmexpError: the engine cannot be had, or the index cannot be written.
    """
    folder = index.folder.absolute()
    made = plan(requests, folder, workers=engine.width())
    first = index.extend(requests, made.folders)
    outcomes: dict[int, Outcome] = {}

    def settle(place: int, outcome: Outcome) -> None:
        known = outcome.folder or made.folders.get(place)
        shown = index.folder / known.name if known is not None else None
        outcomes[place] = replace(outcome, request=requests[place], folder=shown)
        index.settle(first + place, outcomes[place])

    for place, outcome in made.settled.items():
        settle(place, outcome)
    full = ""
    try:
        engine.run(_batches(requests, made.batches, folder, len(outcomes)), settle, stop)
    except DiskFullError as error:
        full = str(error)
    for place in range(len(requests)):
        if place not in outcomes and place not in made.twins:
            if stop.requested:
                settle(
                    place, Outcome(requests[place], "interrupted", reason="stopped before its end")
                )
            else:
                reason = full or "the engine lost it"
                settle(place, Outcome(requests[place], "failed", reason=reason))
    for place, twin in made.twins.items():
        settle(place, outcomes[twin])
    return [outcomes[place] for place in range(len(requests))]


def _batches(
    requests: Sequence[Request], places: Sequence[tuple[int, ...]], folder: Path, done: int
) -> list[Batch]:
    batches = []
    for members in places:
        batches.append(
            Batch(
                places=members,
                requests=tuple(requests[place] for place in members),
                root=folder,
                sweep=folder.name,
                cwd=Path.cwd(),
                done=done,
                total=len(requests),
            )
        )
        done += len(members)
    return batches


def command_again() -> str:
    """The command that started this process, to be typed again."""
    return shlex.join(["python", "-m", "lmexp", *sys.argv[1:]])
