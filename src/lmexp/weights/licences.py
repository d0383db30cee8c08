"""Licence notes, each shown once on every machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

_said: set[str] = set()
"""What this process has shown, for caches that can't be written."""


def say_once(name: str, licence: str, cache: Path, say: Callable[[str], None]) -> None:
    """Show a licence, unless this machine's cache remembers that it was shown for that name.

    A cache that can't be written is no fault here: the note is then shown once a process.

    Args:
        name: the weights.
        licence: one line.
        cache: keeps `licences.json`.
        say: receives the line.
    """
    path = cache / "licences.json"
    note = f"{name}: {licence}"
    if note in _said or note in _shown(path):
        return
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            shown = _shown(path)
            if note in shown:
                return
            scratch = path.with_suffix(".part")
            scratch.write_text(json.dumps([*shown, note], indent=2) + "\n", encoding="utf-8")
            scratch.replace(path)
    except OSError:
        _said.add(note)
    say(f"licence of {note}")


def _shown(path: Path) -> list[str]:
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(note) for note in notes] if isinstance(notes, list) else []
