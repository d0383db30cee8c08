"""What figures know of finished runs: their folders, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lmexp.errors import LmexpError
from lmexp.recording.run_folder import RunFolder, is_number

_GENERAL_KEYS = {"weight", "name", "value", "scale", "weights", "seed"}
"""Last words of keys that say too little alone, unless they are the whole key."""


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        folder: its files.
        label: its name in the sweep's index.
        overrides: what sets it apart from the sweep's other jobs.
    """

    folder: RunFolder
    label: str
    overrides: Mapping[str, Any]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return self.folder.read_summary()

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """metrics.jsonl, a line a step."""
        return self.folder.read_metrics()

    @property
    def nme(self) -> dict[str, float]:
        """Normalised mean error in % by landmark group, and `all`; empty if not measured."""
        measured = self.summary.get("nme") or {}
        return {name: float(value) for name, value in measured.items() if value is not None}

    @property
    def scores(self) -> dict[str, Any]:
        """What independent judges say, as in docs/scores.md; empty if nothing was measured."""
        return self.summary.get("scores") or {}

    def curve(self, kind: str, term: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one term.

        Args:
            kind: raw, weighted, or loss (the total; `term` is ignored).
            term: the term's name.

        Returns:
            steps [T] and values [T]; T is 0 for a term that the run does not have.
        """
        points = [
            (line["step"], line["loss"] if kind == "loss" else line[kind].get(term))
            for line in self.metrics
        ]
        kept = [(step, value) for step, value in points if value is not None]
        steps, values = zip(*kept, strict=True) if kept else ((), ())
        return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)

    @cached_property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss's terms, in the order of the record.

        A term that was 0 at every step, such as the noise regularisation of a generator
        without noise maps, says nothing and is left out.
        """
        if not self.metrics:
            return ()
        names = tuple(self.metrics[0]["raw"])
        return tuple(name for name in names if any(line["raw"][name] != 0 for line in self.metrics))


@dataclass(frozen=True)
class Sweep:
    """The finished runs of a sweep, or of a single run.

    Attributes:
        name: the sweep's, or the run folder's.
        runs: in the order of the index; at least one.
        left_out: one line for every job that is not finished.
    """

    name: str
    runs: tuple[Run, ...]
    left_out: tuple[str, ...]

    @cached_property
    def factors(self) -> dict[str, list[Any]]:
        """What differs between the runs: override -> its values in order of appearance."""
        keys = list(dict.fromkeys(key for run in self.runs for key in run.overrides))
        values = {
            key: list(dict.fromkeys(plain(run.overrides.get(key)) for run in self.runs))
            for key in keys
        }
        return {key: found for key, found in values.items() if len(found) > 1}

    @cached_property
    def labels(self) -> list[str]:
        """A short name for every run: its differing overrides, or its label where none differ."""
        names = dict(zip(self.factors, shorten_keys(list(self.factors)), strict=True))
        if len(names) > 2 and all(name.endswith(" weight") for name in names.values()):
            # So that a table's line has room for what tells three and more of them apart.
            names = {key: name.removesuffix(" weight") for key, name in names.items()}
        labels = []
        for run in self.runs:
            parts = [
                describe_value(names[key], plain(run.overrides[key]))
                for key in self.factors
                if key in run.overrides
            ]
            labels.append(", ".join(parts) or (run.label if not self.factors else "default"))
        return labels

    @cached_property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that any run has."""
        return tuple(dict.fromkeys(term for run in self.runs for term in run.terms))

    @cached_property
    def one_pair(self) -> bool:
        """Whether all runs have the same look and the same expression."""
        return all(self.same_target(name) for name in ("target_look", "target_expression"))

    def same_target(self, name: str) -> bool:
        """Whether the target picture `name` is the same in all runs."""
        first, *others = (run.folder.read_picture(name) for run in self.runs)
        return all(np.array_equal(first, other) for other in others)


def read_sweep(folder: Path) -> Sweep:
    """Read a sweep's folder (it has an index.json) or one run's.

    Raises:
        LmexpError: there is no finished run in it, or its index is damaged.
    """
    index = folder / "index.json"
    if index.is_file():
        name, jobs = _read_index(index)
    elif (folder / "status.json").is_file():
        name, jobs = folder.name, [Run(RunFolder(folder), folder.name, {})]
    else:
        raise LmexpError(
            f"{folder}: no runs here (neither index.json nor status.json); "
            "name a run's or a sweep's folder, as its last lines printed it"
        )
    finished, left_out = [], []
    for job in jobs:
        status = job.folder.read_status()
        if status is not None and status.state == "finished":
            finished.append(job)
        else:
            said = "not started" if status is None else status.describe()
            left_out.append(f"{job.label} ({job.folder.path.name}): {said}")
    if not finished:
        raise LmexpError(
            f"{folder}: no finished run ({left_out[0] if left_out else 'its index is empty'}); "
            "run the same command again to finish it"
        )
    return Sweep(name, tuple(finished), tuple(left_out))


def shorten_keys(keys: Sequence[str]) -> list[str]:
    """Names for people: the fewest last parts of each dotted key that tell it from the others."""
    parts = [key.split(".") for key in keys]
    names = []
    for index, own in enumerate(parts):
        others = [other for place, other in enumerate(parts) if place != index]
        size = 2 if own[-1] in _GENERAL_KEYS and len(own) > 1 else 1
        while size < len(own) and any(other[-size:] == own[-size:] for other in others):
            size += 1
        names.append(" ".join(own[-size:]).replace("_", " "))
    return names


def describe_value(name: str, value: Any) -> str:
    """ "outer lip = 5" for a number; a word or a path's stem speaks for itself."""
    shown = show_value(value)
    return shown if isinstance(value, str) and not is_number(value) else f"{name} = {shown}"


def show_value(value: Any) -> str:
    """A number in its shortest form, a path by its stem, a word with its underscores opened."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) or (isinstance(value, str) and is_number(value)):
        return f"{float(value):g}"
    text = str(value)
    if "/" in text or text.lower().endswith((".jpg", ".jpeg", ".png", ".webp")):
        text = Path(text).stem
    return text.replace("_", " ")


def _read_index(path: Path) -> tuple[str, list[Run]]:
    try:
        index = json.loads(path.read_bytes())
        jobs = [
            Run(RunFolder(path.parent / job["folder"]), job["label"], dict(job["overrides"]))
            for job in index["jobs"]
            if job["folder"] is not None  # such a job failed before it had a name
        ]
        return str(index["name"]), jobs
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())
        raise LmexpError(
            f"{path}: damaged ({type(error).__name__}: {said}); run the sweep again to rewrite it"
        ) from error


def plain(value: Any) -> Any:
    """A hashable stand-in for a list or an object."""
    return json.dumps(value, sort_keys=True) if isinstance(value, (list, dict)) else value
