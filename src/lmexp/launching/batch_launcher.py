"""A sweep: jobs from Hydra's sweeper, run as batches, with an index and figures at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from omegaconf import DictConfig, open_dict

from lmexp.config import digest, validate
from lmexp.errors import LmexpError
from lmexp.figures.gallery import make_all
from lmexp.report import exit_code, print_outcomes
from lmexp.runner import Outcome, Request, run


def launch(
    config_loader: ConfigLoader,
    config: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
) -> list[JobReturn]:
    """Check every job's config, then run them all; see `lmexp.runner.run`.

    Ends the process with the sweep's exit code if a job did not finish.

    Raises:
        LmexpError: a job's config is wrong; no job has then been started.
    """
    requests = [
        _compose(config_loader, config, overrides, initial_job_idx + k)
        for k, overrides in enumerate(job_overrides)
    ]
    name = config.hydra.runtime.choices.get("sweep") or "multirun"
    identity = digest([request.config.identity({}) for request in requests])[:8]
    folder = Path(requests[0].config.output_dir) / f"{name}-{identity}"
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = run(requests, folder, sweep=folder.name)
    write_index(folder, name, outcomes)
    if any(outcome.state in ("finished", "skipped") for outcome in outcomes):
        make_all(folder, requests[0].config.figure)
    print_outcomes(outcomes, folder)
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


def _compose(
    config_loader: ConfigLoader, config: DictConfig, overrides: Sequence[str], number: int
) -> Request:
    composed = config_loader.load_sweep_config(config, list(overrides))
    with open_dict(composed):
        composed.hydra.job.id = composed.hydra.job.num = number
    varied = _varied(overrides, config)
    try:
        return Request(validate(composed), tuple(varied))
    except LmexpError as error:
        raise LmexpError(f"job {number + 1} ({' '.join(varied)}): {error}") from error


def _varied(overrides: Sequence[str], config: DictConfig) -> list[str]:
    """The overrides that tell this job from the others of its sweep, without Hydra's escapes."""
    fixed = set(config.hydra.overrides.task)
    varied = [item for item in filter_overrides(overrides) if item not in fixed] or list(overrides)
    parsed = OverridesParser.create().parse_overrides(varied)
    return [f"{override.get_key_element().lstrip('+')}={override.value()}" for override in parsed]


def write_index(folder: Path, name: str, outcomes: Sequence[Outcome]) -> None:
    """`index.json`: the sweep's jobs in order, their folders, overrides and states."""
    jobs = [
        {
            "folder": outcome.folder.name if outcome.folder else None,
            "overrides": dict(item.lstrip("+").split("=", 1) for item in outcome.request.overrides),
            "label": ", ".join(item.lstrip("+") for item in outcome.request.overrides),
            "state": outcome.state,
            "reason": outcome.reason,
        }
        for outcome in outcomes
    ]
    path = folder / "index.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"name": name, "jobs": jobs}, indent=2) + "\n")
    partial.replace(path)
