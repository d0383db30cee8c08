"""A sweep on Slurm by submitit: each batch is a job of the scheduler."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from lmexp.errors import LmexpError
from lmexp.jobs import Outcome, Settle
from lmexp.launching.protocol import Batch
from lmexp.launching.worker import perform_on_cluster
from lmexp.recording.atomic_file import DiskFullError
from lmexp.stopping import StopRequest

_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 60.0
"""How long a stopped sweep waits for its jobs to save their states and end."""


class BatchJob:
    """What submitit pickles and runs; after a time limit or a preemption Slurm runs it again."""

    def __call__(self, batch: Batch) -> list[Outcome]:
        """Project the batch."""
        return perform_on_cluster(batch)

    def checkpoint(self, batch: Batch) -> Any:
        """The same again: it goes on from the states that were saved."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, batch)


class SubmititEngine:
    """Computes batches as jobs of a scheduler. `output_dir` has to be on a shared file system.

    Args:
        cluster: slurm, or local (processes of this host, to try it out).
        parallel: most batches at a time.
        retries: how often a batch whose job died is submitted again; it then goes on from its
            saved states. A preempted job is put back into the queue in any case.
        timeout_minutes: the time limit of a batch.
        cpus_per_batch: CPU cores of a batch.
        gpus_per_batch: GPUs of a batch; 0 to compute on CPUs.
        memory_gb: memory of a batch; None for the cluster's default. Slurm alone heeds it.
        parameters: more of submitit's parameters, such as `slurm_partition: gpu`.
    """

    def __init__(
        self,
        cluster: Literal["slurm", "local"],
        parallel: Annotated[int, Field(ge=1)],
        retries: Annotated[int, Field(ge=0)],
        timeout_minutes: Annotated[int, Field(ge=1)],
        cpus_per_batch: Annotated[int, Field(ge=1)],
        gpus_per_batch: Annotated[int, Field(ge=0)],
        memory_gb: Annotated[float, Field(gt=0)] | None,
        parameters: dict[str, Any],
    ) -> None:
        self._submitit = _import_submitit()
        self._cluster = cluster
        self._parallel = parallel
        self._retries = retries
        self._parameters = {
            "timeout_min": timeout_minutes,
            "cpus_per_task": cpus_per_batch,
            "gpus_per_node": gpus_per_batch,
            **({} if memory_gb is None else {"mem_gb": memory_gb}),
            **parameters,
        }

    def width(self) -> int:
        """As many batches at a time as `parallel` allows."""
        return self._parallel

    def run(self, batches: Sequence[Batch], settle: Settle, stop: StopRequest) -> None:
        """Compute all batches; see `lmexp.launching.protocol.Engine`."""
        if not batches:
            return
        executor = self._executor(batches[0])
        waiting = [(batch, 0) for batch in batches]
        running: dict[Any, tuple[Batch, int]] = {}
        full: DiskFullError | None = None
        while (waiting or running) and not (stop.requested or full):
            starting = waiting[: self._parallel - len(running)]
            waiting = waiting[len(starting) :]
            running |= self._submit(executor, starting)
            time.sleep(_POLL_SECONDS)
            # Slurm is asked as seldom as submitit finds polite.
            at_once = self._cluster == "local"
            for job in [job for job in running if job.done(force_check=at_once)]:
                batch, deaths = running.pop(job)
                try:
                    outcomes = job.result()
                except self._submitit.core.utils.FailedJobError as error:  # it raised
                    said = str(error)
                    if DiskFullError.__name__ in said:
                        full = DiskFullError(_last_line(said))
                    else:
                        _fail(batch, _last_line(said), settle)
                except self._submitit.core.utils.UncompletedJobError as error:  # it died
                    if deaths < self._retries:
                        waiting.append((batch, deaths + 1))
                    else:
                        how = f"its job died {deaths + 1} times ({_first_line(str(error))})"
                        _fail(batch, how, settle)
                else:
                    for place, outcome in zip(batch.places, outcomes, strict=True):
                        settle(place, outcome)
        self._cancel(list(running))
        if full is not None:
            raise full

    def _executor(self, batch: Batch) -> Any:
        try:
            executor = self._submitit.AutoExecutor(
                folder=batch.root / "submitit" / "%j", cluster=self._cluster
            )
            executor.update_parameters(name=batch.sweep, **self._parameters)
        except (RuntimeError, ValueError, NameError) as error:
            said = " ".join(str(error).split())
            raise LmexpError(
                f"hydra/launcher=submitit: {said}; see hydra.launcher.engine.cluster and parameters"
            ) from error
        return executor

    def _submit(
        self, executor: Any, starting: Sequence[tuple[Batch, int]]
    ) -> dict[Any, tuple[Batch, int]]:
        """Hand batches over; several at once are one array of jobs."""
        if not starting:
            return {}
        with executor.batch() if len(starting) > 1 else contextlib.nullcontext():
            jobs = [executor.submit(BatchJob(), batch) for batch, _ in starting]
        return dict(zip(jobs, starting, strict=True))

    def _cancel(self, jobs: Sequence[Any]) -> None:
        """Ask jobs to end, by the signal on which they save their states, and wait for them."""
        for job in jobs:
            job.cancel(check=False)
        for _ in _patience():
            if all(job.done(force_check=True) for job in jobs):
                return


def _patience() -> Iterator[None]:
    until = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < until:
        yield
        time.sleep(_POLL_SECONDS)


def _import_submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise LmexpError(
            "hydra/launcher=submitit: the package submitit is not installed; "
            "pip install 'lmexp[cluster]'"
        ) from error
    return submitit


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason given"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" -=")]
    return lines[-1] if lines else "no reason given"


def _fail(batch: Batch, reason: str, settle: Settle) -> None:
    for place, request in zip(batch.places, batch.requests, strict=True):
        settle(place, Outcome(request, "failed", reason=reason))
