"""How a sweep's batches are shared out among devices, without any GPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lmexp.config import Hardware
from lmexp.errors import LmexpError
from lmexp.jobs import Outcome, Request
from lmexp.launching import worker, worker_processes
from lmexp.launching.batch_launcher import build_engine
from lmexp.launching.devices import Device, find_devices
from lmexp.launching.in_process import InProcess
from lmexp.launching.protocol import Batch
from lmexp.launching.sweep import engine_here
from lmexp.launching.worker_processes import WorkerProcesses, _Queue, _Worker, serve
from lmexp.recording.atomic_file import DiskFullError
from lmexp.stopping import StopRequest

CONFIG: Any = None  # nothing here reads it


def hardware(devices: Any) -> Hardware:
    return Hardware(device="cpu", devices=devices, batch_size=2, threads=None, channels_last=True)


def batch(*places: int) -> Batch:
    requests = tuple(Request(CONFIG, (f"seed={place}",)) for place in places)
    return Batch(places, requests, Path("/runs"), "sweep", Path.cwd(), 0, 9)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("four_gpus")
def test_every_worker_sees_one_gpu_and_no_two_the_same() -> None:
    found = find_devices(hardware("all"))
    assert [device.name for device in found] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert [device.visible for device in found] == ["0", "1", "2", "3"]
    assert {device.inside for device in found} == {"cuda"}
    chosen = find_devices(hardware(("cuda:3", "cuda:1")))
    assert [device.visible for device in chosen] == ["3", "1"]


def test_what_a_scheduler_granted_is_what_a_worker_sees(
    four_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,GPU-8932f937,2,7")
    assert [device.visible for device in find_devices(hardware("all"))] == [
        "6",
        "GPU-8932f937",
        "2",
        "7",
    ]


def test_devices_that_are_not_there_are_refused(
    four_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LmexpError, match=r"cuda:4, but the CUDA GPUs here are: cuda:0, cuda:1"):
        find_devices(hardware(("cuda:4",)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LmexpError, match="are: none"):
        find_devices(hardware(("cuda:0",)))
    with pytest.raises(LmexpError, match="all, but torch sees no CUDA GPU"):
        find_devices(hardware("all"))


def test_one_device_needs_no_process_and_cpu_workers_share_the_cores() -> None:
    assert isinstance(engine_here(hardware(None)), InProcess)
    assert isinstance(engine_here(hardware(("cpu",))), InProcess)
    several = engine_here(hardware(("cpu", "cpu")))
    assert isinstance(several, WorkerProcesses) and several.width() == 2
    share = find_devices(hardware(("cpu", "cpu")))[0].threads
    assert share == max(1, (os.cpu_count() or 1) // 2)


def test_an_engine_that_does_not_exist_is_one_line() -> None:
    with pytest.raises(LmexpError, match=r"hydra\.launcher\.engine.*cannot be imported"):
        build_engine({"_target_": "lmexp.launching.none.Engine"}, hardware(None))


class Settled(dict[int, Outcome]):
    def __call__(self, place: int, outcome: Outcome) -> None:
        self[place] = outcome


def test_a_batch_that_lost_its_worker_goes_to_another_device_once() -> None:
    settled = Settled()
    queue = _Queue([batch(0, 1), batch(2)], settled, retries=1)
    first, second = _Worker(0, Device("cuda:0", "0")), _Worker(1, Device("cuda:1", "1"))
    first.task = queue.take(0, 2)
    queue.hear(first, ("outcome", 0, Outcome(Request(CONFIG), "finished")))
    queue.mourn(first, -signal.SIGKILL, stopped=False)
    # Not to the device that it died on; that one takes the next batch.
    assert queue.waiting[0].batch.places == (1,)
    taken = queue.take(0, 2)
    assert taken is not None and taken.batch.places == (2,)
    second.task = queue.take(1, 2)
    assert second.task is not None and second.task.batch.places == (1,)
    queue.mourn(second, 1, stopped=False)
    assert not queue.waiting and settled[0].state == "finished" and settled[1].state == "failed"
    assert settled[1].reason == "its worker process died 2 times (exit code 1 on cuda:1)"


def test_the_only_worker_takes_what_died_on_it_and_a_stop_is_no_failure() -> None:
    settled = Settled()
    queue = _Queue([batch(0)], settled, retries=1)
    only = _Worker(0, Device("cpu"))
    only.task = queue.take(0, 1)
    queue.mourn(only, -signal.SIGSEGV, stopped=False)
    only.task = queue.take(0, 1)
    assert only.task is not None and only.task.deaths == 1
    queue.mourn(only, -signal.SIGTERM, stopped=True)
    assert not settled and not queue.waiting


def test_a_fault_fails_what_is_left_and_a_full_disk_ends_the_queue() -> None:
    settled = Settled()
    queue = _Queue([batch(0, 1), batch(2), batch(3)], settled, retries=1)
    only = _Worker(0, Device("cpu"))
    only.task = queue.take(0, 1)
    queue.hear(only, ("fault", "no such GPU"))
    assert only.task is None and settled[0].reason == settled[1].reason == "no such GPU"
    only.task = queue.take(0, 1)
    queue.hear(only, ("disk full", "no space left"))
    assert queue.disk_full == "no space left" and not queue.waiting


class Orders:
    """A worker's end of its connection: some batches, then nobody."""

    def __init__(self, *batches: Batch) -> None:
        self.batches = list(batches)
        self.said: list[Any] = []

    def recv(self) -> tuple[Batch, bool]:
        if not self.batches:
            raise EOFError
        return self.batches.pop(0), False

    def send(self, message: Any) -> None:
        self.said.append(message)


@pytest.fixture
def as_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `serve` changes in its process is put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "before")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr(worker_processes, "_die_with_parent", lambda: None)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_worker_hides_the_other_gpus_and_says_what_became_of_its_batches(
    as_worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Any]] = []

    def perform(given: Batch, *, settle: Any, stop: StopRequest, **settings: Any) -> None:
        seen.append((os.environ["CUDA_VISIBLE_DEVICES"], settings["device"]))
        if given.places == (1,):
            raise LmexpError("no such GPU")
        if given.places == (2,):
            raise DiskFullError("no space left")
        settle(0, "outcome of job 0")
        signal.raise_signal(signal.SIGINT)  # a terminal's Ctrl-C: the parent's matter
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested

    monkeypatch.setattr(worker, "perform", perform)
    orders = Orders(batch(0), batch(1), batch(2))
    serve(orders, Device("cuda:1", visible="5"))  # type: ignore[arg-type]
    assert seen == [("5", "cuda")] * 3
    assert orders.said == [
        ("outcome", 0, "outcome of job 0"),
        ("end",),
        ("fault", "no such GPU"),
        ("disk full", "no space left"),
    ]
