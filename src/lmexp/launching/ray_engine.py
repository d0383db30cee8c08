"""A sweep on Ray: each batch is a task, which Ray places, and starts again if its node is lost."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from lmexp.errors import LmexpError
from lmexp.jobs import Outcome, Settle
from lmexp.launching.protocol import Batch
from lmexp.launching.worker import perform_on_cluster
from lmexp.recording.atomic_file import DiskFullError
from lmexp.stopping import StopRequest

log = logging.getLogger("lmexp")


class RayEngine:
    """Computes batches as tasks of a Ray cluster. `output_dir` has to be on a shared file system.

    Args:
        address: the cluster's, such as `auto` or `ray://HOST:10001`; None takes RAY_ADDRESS, or
            starts Ray on this host.
        cpus_per_batch: CPU cores that Ray keeps for a batch.
        gpus_per_batch: GPUs that Ray keeps for a batch; 0 to compute on CPUs.
        retries: how often Ray starts a batch again whose worker or node died; it then goes on
            from its saved states.
    """

    def __init__(
        self,
        address: str | None,
        cpus_per_batch: Annotated[float, Field(gt=0)],
        gpus_per_batch: Annotated[float, Field(ge=0)],
        retries: Annotated[int, Field(ge=0)],
    ) -> None:
        self._ray = _import_ray()
        self._address = address
        self._cpus, self._gpus = cpus_per_batch, gpus_per_batch
        self._retries = retries

    def width(self) -> int:
        """How many batches the cluster has room for now.

        Raises:
            LmexpError: there is no cluster at the address, or none of its nodes has the resources.
        """
        self._connect()
        # A batch runs on one node: what two nodes have left over does not add up to one.
        rooms = [
            min(
                int(node["Resources"].get(name, 0) // wanted)
                for name, wanted in (("CPU", self._cpus), ("GPU", self._gpus))
                if wanted
            )
            for node in self._ray.nodes()
            if node["Alive"]
        ]
        if not sum(rooms):
            raise LmexpError(
                f"hydra/launcher=ray: no node of the cluster has {self._cpus:g} CPUs and "
                f"{self._gpus:g} GPUs; lower hydra.launcher.engine.cpus_per_batch or gpus_per_batch"
            )
        return sum(rooms)

    def run(self, batches: Sequence[Batch], settle: Settle, stop: StopRequest) -> None:
        """Compute all batches; see `lmexp.launching.protocol.Engine`."""
        ray = self._ray
        self._connect()
        perform = ray.remote(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            max_retries=self._retries,
            runtime_env={"env_vars": _own_variables()},
        )(perform_on_cluster)
        waiting = {perform.remote(batch): batch for batch in batches}
        full: DiskFullError | None = None
        asked = False
        while waiting:
            if (stop.requested or full) and not asked:
                asked = True
                for task in waiting:
                    ray.cancel(task)  # a running one gets KeyboardInterrupt's signal and saves
            ready, _ = ray.wait(list(waiting), timeout=0.5)
            for task in ready:
                batch = waiting.pop(task)
                try:
                    outcomes = ray.get(task)
                except ray.exceptions.TaskCancelledError:
                    continue
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, DiskFullError):
                        full = error.cause
                    else:
                        _fail(batch, " ".join(str(error.cause).split()), settle)
                except ray.exceptions.RayError as error:
                    if stop.requested:
                        continue
                    said = str(error).strip().splitlines()
                    kind = type(error).__name__
                    _fail(batch, f"Ray lost its worker ({kind}: {said[0] if said else ''})", settle)
                else:
                    for place, outcome in zip(batch.places, outcomes, strict=True):
                        settle(place, outcome)
        if full is not None:
            raise full

    def _connect(self) -> None:
        if self._ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent unless asked for
        try:
            self._ray.init(address=self._address, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise LmexpError(
                f"hydra.launcher.engine.address: no Ray cluster at {self._address} ({said}); start "
                "one with `ray start --head`, or leave the address null"
            ) from error


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise LmexpError(
            "hydra/launcher=ray: the package ray is not installed; pip install 'lmexp[cluster]'"
        ) from error
    return ray


def _own_variables() -> dict[str, str]:
    """What this process was told by LMEXP_… variables, the tasks are told too."""
    return {key: value for key, value in os.environ.items() if key.startswith("LMEXP_")}


def _fail(batch: Batch, reason: str, settle: Settle) -> None:
    for place, request in zip(batch.places, batch.requests, strict=True):
        settle(place, Outcome(request, "failed", reason=reason))
