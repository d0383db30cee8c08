"""A sweep: jobs from Hydra's sweeper, run as batches, with an index and figures at the end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig
from pydantic import ValidationError

from lmexp.config import Component, Hardware, digest
from lmexp.errors import LmexpError
from lmexp.figures.gallery import make_all
from lmexp.jobs import Outcome
from lmexp.launching.index import SweepIndex
from lmexp.launching.job_configs import JobConfigs
from lmexp.launching.protocol import Engine
from lmexp.launching.sweep import command_again, engine_here, run_jobs
from lmexp.recording.atomic_file import make_folder
from lmexp.report import exit_code, print_outcomes
from lmexp.stopping import listen

log = logging.getLogger("lmexp")


def launch(
    config_loader: ConfigLoader,
    config: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
    engine: Mapping[str, Any] | None = None,
) -> list[JobReturn]:
    """Check every job's config, then run them all; see `lmexp.runner.run`.

    Ends the process with the sweep's exit code if a job did not finish.

    Args:
        engine: the engine's component; None for this host's devices.

    Raises:
        LmexpError: a job's config is wrong; no job has then been started.
    """
    configs = JobConfigs(config_loader, config)
    requests = [
        configs.request(overrides, initial_job_idx + k) for k, overrides in enumerate(job_overrides)
    ]
    name = config.hydra.runtime.choices.get("sweep") or "multirun"
    identity = digest([request.config.identity({}) for request in requests])[:8]
    folder = make_folder(Path(requests[0].config.output_dir) / f"{name}-{identity}")
    index = SweepIndex(folder, name, command_again())
    chosen = build_engine(engine, requests[0].config.hardware)
    with listen() as stop:
        outcomes = run_jobs(requests, index, chosen, stop)
    conclude(outcomes, folder)
    if code := exit_code(outcomes):
        sys.exit(code)
    return [
        JobReturn(
            overrides=list(overrides),
            status=JobStatus.COMPLETED,
            _return_value=outcome.summary,
        )
        for overrides, outcome in zip(job_overrides, outcomes, strict=True)
    ]


def build_engine(engine: Mapping[str, Any] | None, hardware: Hardware) -> Engine:
    """The engine that the launcher's yaml names, or this host's.

    Raises:
        LmexpError: a key of it is wrong, a device is not there, or a package is missing.
    """
    if engine is None:
        return engine_here(hardware)
    try:
        built: Engine = Component.model_validate(dict(engine)).build()
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(("hydra.launcher.engine", *map(str, fault["loc"])))
        raise LmexpError(f"{key}: {fault['msg']}") from error
    return built


def conclude(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Make the sweep's figures and print its table."""
    if any(outcome.state in ("finished", "skipped") for outcome in outcomes):
        try:
            make_all(folder, outcomes[0].request.config.figure)
        except LmexpError as error:  # the table says what there is, whatever becomes of figures
            log.warning("figures: %s", error)
    print_outcomes(outcomes, folder, command=command_again())
