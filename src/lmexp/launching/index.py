"""index.json: a sweep's jobs in order, their folders, overrides and states; always whole."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmexp.errors import LmexpError
from lmexp.jobs import Outcome, Request
from lmexp.recording.atomic_file import write_atomically

log = logging.getLogger("lmexp")


class SweepIndex:
    """Written when the sweep starts, and again whenever a job's outcome is known.

    So a sweep that was killed can be read too: what is not settled is "waiting" there, and
    each job's own status.json says more.

    Args:
        folder: the sweep's; made when the index is first written.
        name: the sweep's, for people.
        command: what starts it again.
    """

    def __init__(self, folder: Path, name: str, command: str) -> None:
        self.folder = folder
        self._name = name
        self._command = command
        self._jobs: list[dict[str, Any]] = []

    def extend(self, requests: Sequence[Request], folders: dict[int, Path]) -> int:
        """Add jobs and write; gives the place of the first.

        Raises:
            DiskFullError, LmexpError: it cannot be written.
        """
        first = len(self._jobs)
        for k, request in enumerate(requests):
            overrides = [item.lstrip("+") for item in request.overrides]
            self._jobs.append(
                {
                    "folder": folders[k].name if k in folders else None,
                    "overrides": dict(item.split("=", 1) for item in overrides),
                    "label": ", ".join(overrides),
                    "state": "waiting",
                    "reason": "",
                }
            )
        self._write()
        return first

    def settle(self, place: int, outcome: Outcome) -> None:
        """Set a job's state and write; a fault of the disk is a warning."""
        job = self._jobs[place]
        job |= {"state": outcome.state, "reason": outcome.reason}
        if outcome.folder is not None:
            job["folder"] = outcome.folder.name
        try:
            self._write()
        except LmexpError as error:
            log.warning("%s", error)

    def _write(self) -> None:
        content = {"name": self._name, "command": self._command, "jobs": self._jobs}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.folder / "index.json", text.encode())
