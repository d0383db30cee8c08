"""Which devices of this host a sweep may use."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from lmexp.config import Hardware
from lmexp.errors import LmexpError


@dataclass(frozen=True)
class Device:
    """One device, which one worker process has for itself.

    Attributes:
        name: for people: cpu, cuda:1, …
        visible: what CUDA_VISIBLE_DEVICES is in the worker, so that nothing there, not even a
            library that never heard of devices, can touch another GPU; None for the CPU.
        threads: CPU threads of the worker, None for torch's own choice.
    """

    name: str
    visible: str | None = None
    threads: int | None = None

    @property
    def inside(self) -> str:
        """What the worker itself calls it."""
        return "cpu" if self.visible is None else "cuda"


def find_devices(hardware: Hardware) -> list[Device]:
    """The devices that `hardware.devices` names; none if it is null.

    Raises:
        LmexpError: one of them is not there.
    """
    if hardware.devices is None:
        return []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if hardware.devices == "all":
        if not count:
            raise LmexpError(
                "hardware.devices: all, but torch sees no CUDA GPU here; use hardware=cpu, or "
                "name devices, such as 'hardware.devices=[cpu,cpu]'"
            )
        names = [f"cuda:{i}" for i in range(count)]
    else:
        names = list(hardware.devices)
    cpus = names.count("cpu")
    share = max(1, (os.cpu_count() or 1) // cpus) if cpus > 1 else None
    return [_find(name, count, share) for name in names]


def _find(name: str, count: int, threads: int | None) -> Device:
    if name == "cpu":
        return Device(name, threads=threads)
    index = int(name.removeprefix("cuda:"))
    if index >= count:
        there = ", ".join(f"cuda:{i}" for i in range(count)) or "none"
        raise LmexpError(f"hardware.devices: {name}, but the CUDA GPUs here are: {there}")
    # The number counts what this process sees; a scheduler may have granted GPUs 2 and 3 only.
    granted = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    return Device(name, visible=granted[index] if granted else str(index))
