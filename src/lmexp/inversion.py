"""The look's inversion: latents whose image is the look, where a projection then starts.

An inversion depends on less than a job does, so the jobs of a sweep share it: its latents are
kept in a folder, named by a hash of what they depend on, and so is a half-done inversion's state.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lmexp.batch import State
from lmexp.errors import LmexpError
from lmexp.latents import Latents
from lmexp.losses.objective import Objective
from lmexp.losses.protocol import Context
from lmexp.projection import Step, project
from lmexp.recording.progress import ProgressBar
from lmexp.recording.state import load_state, save_state
from lmexp.schedule import Schedule
from lmexp.stopping import Interrupted, StopRequest

log = logging.getLogger("lmexp")


class InversionStore:
    """Inversions on disk, finished and half-done.

    Args:
        folder: where they are kept; made when something is to be kept.
        save_every: seconds between saves of a running inversion.
    """

    def __init__(self, folder: Path, save_every: float) -> None:
        self.folder = folder
        self.save_every = save_every

    def read(self, key: str) -> tuple[int | None, State] | None:
        """An inversion's latents, (None, state), or a half-done one's (next step, state)."""
        for path, done in ((self._path(key), True), (self._path(key, "part"), False)):
            if not path.exists():
                continue
            try:
                loaded = load_state(path)
            except LmexpError as error:
                log.warning("%s; the look is inverted anew", error)
                continue
            state = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
            return (None if done else int(loaded["next_step"])), state
        return None

    def write(self, key: str, state: State, next_step: int | None = None) -> None:
        """Keep a finished inversion, or with `next_step` a half-done one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if next_step is not None:
            save_state(self._path(key, "part"), {**state, "next_step": next_step})
            return
        save_state(self._path(key), state)
        self._path(key, "part").unlink(missing_ok=True)

    def _path(self, key: str, kind: str = "done") -> Path:
        return self.folder / f"{key}.{kind}.safetensors"


def invert(
    keys: Sequence[str],
    mean: Latents,
    schedule: Schedule,
    *,
    seeds: Sequence[int],
    context: Context,
    bind: Callable[[Sequence[int]], Objective],
    store: InversionStore,
    stop: StopRequest,
) -> Latents:
    """Invert the looks that are not yet in the store, as batches, and return all of them.

    Args:
        keys: one per job; jobs with the same key share one inversion.
        mean: where row k starts; its shape is the result's.
        seeds: one per job.
        bind: gives the objective of some rows' looks, in the order of the rows.

    Raises:
        LmexpError: an inversion's loss stopped being finite.
        Interrupted: somebody asked to stop; the states are in the store.
    """
    found = {key: store.read(key) for key in dict.fromkeys(keys)}
    waiting: dict[int, list[int]] = defaultdict(list)
    for key, kept in found.items():
        if kept is None:
            waiting[0].append(keys.index(key))
        elif kept[0] is not None:
            waiting[kept[0]].append(keys.index(key))
    for first_step, rows in waiting.items():
        part = [found[keys[row]] for row in rows]
        start = Latents(ws=mean.ws[rows], noise_bufs=tuple(n[rows] for n in mean.noise_bufs))
        with ProgressBar(schedule.steps, first_step=first_step, title="inverting the look") as bar:
            keep = _Keeper([keys[row] for row in rows], schedule.steps, store, stop, bar)
            project(
                context,
                bind(rows),
                start,
                schedule,
                seeds=[seeds[row] for row in rows],
                first_step=first_step,
                resume=[kept[1] for kept in part if kept] if first_step else None,
                callback=keep,
                looks_at=keep.looks_at,
            )
    states = [kept[1] for key in keys if (kept := store.read(key)) is not None]
    columns = zip(
        *([state[f"parameter_{i}"] for i in range(1 + len(mean.noise_bufs))] for state in states),
        strict=True,
    )
    ws, *noise_bufs = (torch.stack(column).to(mean.ws) for column in columns)
    return Latents(ws=ws, noise_bufs=tuple(noise_bufs))


class _Keeper:
    """Writes a batch of inversions to the store: at times, when stopped, and at the end."""

    def __init__(
        self,
        keys: Sequence[str],
        steps: int,
        store: InversionStore,
        stop: StopRequest,
        bar: ProgressBar,
    ) -> None:
        self._keys = keys
        self._steps = steps
        self._store = store
        self._stop = stop
        self._bar = bar
        self._saved_at = time.monotonic()

    def looks_at(self, _: int) -> bool:
        """Whether the states are to be kept now, whichever step it is."""
        due = time.monotonic() - self._saved_at >= self._store.save_every
        return due or self._stop.requested

    def __call__(self, step: Step) -> None:
        losses = {name: float(value.mean()) for name, value in step.losses.raw.items()}
        self._bar.update(step.step, losses)
        if not all(step.alive):
            raise LmexpError(
                f"inversion: a loss stopped being finite at step {step.step}; "
                "try a smaller latent.inversion.learning_rate"
            )
        if not step.at_rest:
            return
        done = step.step + 1 == self._steps
        if done or self.looks_at(step.step):
            for k, key in enumerate(self._keys):
                self._store.write(key, step.states(k), None if done else step.step + 1)
            self._saved_at = time.monotonic()
        if self._stop.requested:
            raise Interrupted
