"""Files that are either whole or not there, whenever the process dies."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from pathlib import Path

from lmexp.errors import LmexpError


class DiskFullError(LmexpError):
    """Nothing more can be recorded; unlike a failed picture it must stop the run."""


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace `path` by `data` in one step; a reader sees the old bytes or the new ones.

    Args:
        path: the file; its folder exists.
        data: the whole content.
        durable: wait until the disk has it, so that it outlives a power cut as
            well as a killed process. Off for what is cheap to make again.

    Raises:
        DiskFullError: no space (or quota) left.
        LmexpError: the file cannot be written for another reason.
    """
    # Two hosts of a cluster may write the same file, with the same process number.
    writer = f"{socket.gethostname()}.{os.getpid()}"
    unfinished = path.with_name(f".{path.name}.{writer}.part")
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise write_error(path, error) from error


def make_folder(folder: Path) -> Path:
    """Make a folder that can be written to, and those above it.

    Raises:
        LmexpError: it cannot be made, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise write_error(folder, error) from error
    return folder


def write_error(path: Path, error: OSError) -> LmexpError:
    """Say in one line why `path` could not be written and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(
            f"{path}: no space left on the disk; free some and run the same command again"
        )
    return LmexpError(
        f"{path}: cannot be written ({error.strerror or error}); check the folder's permissions "
        "or choose another with output_dir="
    )
