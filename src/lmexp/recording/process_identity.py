"""Which process is meant by a number that another process may have taken over since."""

from __future__ import annotations

import os
from pathlib import Path


def identify_process(pid: int) -> str:
    """A process's start time, which tells it from a later one of the same number.

    In containers numbers start again at 1, so that a resumed run often has its dead
    predecessor's. Empty where the system does not tell (no /proc).
    """
    try:
        # The command name (field 2) may hold spaces and brackets: count after its last bracket.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return f"{_boot()}:{fields[19]}"
    except (OSError, IndexError):
        return ""


def is_running(pid: int, identity: str) -> bool:
    """Whether process `pid` of this host runs and is the one that `identity` was taken of."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    if _is_zombie(pid):
        return False
    return not identity or identify_process(pid) in ("", identity)


def _is_zombie(pid: int) -> bool:
    """Whether it is dead and nobody has asked for its exit code: containers without an init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except (OSError, IndexError):
        return False


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
