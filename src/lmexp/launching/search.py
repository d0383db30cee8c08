"""Search by Optuna: jobs are proposed, run as batches, and their scores told, in turns.

The study lies in the sweep's folder, so the same command again goes on with it: what was proposed
and not finished is proposed again, and its job goes on from its saved state.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock, Timeout
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig
from pydantic import Field, ValidationError

from lmexp.config import Schema, digest
from lmexp.errors import LmexpError
from lmexp.jobs import Outcome
from lmexp.launching.batch_launcher import build_engine, conclude
from lmexp.launching.index import SweepIndex
from lmexp.launching.job_configs import JobConfigs
from lmexp.launching.sweep import command_again, run_jobs
from lmexp.recording.atomic_file import make_folder, write_atomically
from lmexp.report import exit_code
from lmexp.stopping import StopRequest, listen

_AT_ONCE = 16
"""Jobs proposed at once to each worker at most: more learn too little from each other."""


class Settings(Schema):
    """What is searched, for what, and how long: the keywords of conf/hydra/sweeper/search.yaml."""

    params: dict[str, Any]
    """Keys and their ranges, in Hydra's words: interval(1,16), tag(log,interval(0.01,1)),
    range(1,5), choice(w,w_plus)."""
    objective: Annotated[tuple[str, ...], Field(min_length=1)]
    """Paths into summary.json, such as nme.all; more than one makes a search for the front."""
    direction: tuple[Literal["minimize", "maximize"], ...]
    """One for each objective."""
    trials: Annotated[int, Field(ge=1)]
    """Jobs in all, those of earlier runs of the same command among them."""
    at_once: Annotated[int, Field(ge=1)] | None
    """Jobs proposed at a time; None for as many as the devices' batches hold."""
    sampler: Literal["tpe", "random", "nsga2", "gp"]
    seed: Annotated[int, Field(ge=0)]


def search(
    config_loader: ConfigLoader,
    config: DictConfig,
    arguments: Sequence[str],
    settings: Mapping[str, Any],
    engine: Mapping[str, Any] | None,
) -> None:
    """Search to the last trial and say what was best.

    Ends the process with the sweep's exit code if a job did not finish.

    Args:
        arguments: overrides of the command line; those with a range are searched too.
        settings: see `Settings`.
        engine: the engine's component; None for this host's devices.

    Raises:
        LmexpError: a setting or a job's config is wrong, or optuna is missing.
    """
    optuna = _import_optuna()
    checked = _check(settings)
    fixed, space = _split(checked, arguments, config_loader)
    # Checked with one value of each range, so that a mistake shows before anything is run.
    configs = JobConfigs(config_loader, config)
    example = configs.request([*fixed, *_example(optuna, space)], 0)
    experiment = example.config
    what = [fixed, {key: repr(value) for key, value in space.items()}]
    identity = digest([experiment.identity({}), what, checked.objective, checked.direction])[:8]
    folder = make_folder(Path(experiment.output_dir) / f"search-{identity}")
    chosen = build_engine(engine, experiment.hardware)
    index = SweepIndex(folder, "search", command_again())
    outcomes: list[Outcome] = []
    lock = FileLock(folder / ".study.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout as error:
        raise LmexpError(f"{folder}: another process searches here; wait for it to end") from error
    with held, listen() as stop:
        study = _open(optuna, folder, checked)
        at_once = checked.at_once or chosen.width() * min(experiment.hardware.batch_limit, _AT_ONCE)
        while (left := checked.trials - _count(optuna, study)) > 0 and not stop.requested:
            trials = [study.ask(_distributions(optuna, space)) for _ in range(min(at_once, left))]
            requests = [
                configs.request(
                    [*fixed, *(f"{key}={value}" for key, value in trial.params.items())],
                    trial.number,
                )
                for trial in trials
            ]
            found = run_jobs(requests, index, chosen, stop)
            outcomes += found
            for trial, outcome in zip(trials, found, strict=True):
                _tell(optuna, study, trial, outcome, checked)
            if not study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
                _demand(checked.objective, found)
        _write(optuna, study, folder, checked)
        _conclude(optuna, study, outcomes, folder, checked, stop)
    if code := exit_code(outcomes):
        sys.exit(code)


def _check(settings: Mapping[str, Any]) -> Settings:
    try:
        checked = Settings.model_validate_json(json.dumps(dict(settings)))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(("hydra.sweeper", *map(str, fault["loc"])))
        raise LmexpError(f"{key}: {fault['msg']} (got {fault.get('input')!r})") from error
    if len(checked.direction) != len(checked.objective):
        raise LmexpError(
            f"hydra.sweeper.direction: {len(checked.direction)} for {len(checked.objective)} "
            "objectives; give minimize or maximize for each"
        )
    return checked


def _split(
    settings: Settings, arguments: Sequence[str], config_loader: ConfigLoader
) -> tuple[list[str], dict[str, Any]]:
    """Overrides that every job has, and the ranges by key; the command line wins."""
    parser = OverridesParser.create(config_loader=config_loader)
    words = [*(f"{key}={value}" for key, value in settings.params.items()), *arguments]
    fixed: dict[str, str] = {}
    space: dict[str, Any] = {}
    for override in parser.parse_overrides(words):
        key = override.get_key_element()
        fixed.pop(key, None)
        space.pop(key, None)
        if override.is_sweep_override():
            space[key] = _range(override)
        else:
            assert override.input_line is not None
            fixed[key] = override.input_line
    if not space:
        raise LmexpError(
            "hydra.sweeper.params: nothing to search; give a range, such as "
            "'loss.lpips.weight=interval(1,16)'"
        )
    return list(fixed.values()), space


def _range(override: Override) -> Any:
    value = override.value()
    if isinstance(value, IntervalSweep):
        return ("interval", value.start, value.end, "log" in value.tags)
    if isinstance(value, RangeSweep):
        return ("range", value.start, value.stop, value.step)
    assert isinstance(value, ChoiceSweep)
    return ("choice", *(str(item) for item in override.sweep_string_iterator()))


def _distributions(optuna: Any, space: Mapping[str, Any]) -> dict[str, Any]:
    made = {}
    of = optuna.distributions
    for key, (kind, *values) in space.items():
        if kind == "choice":
            made[key] = of.CategoricalDistribution(values)
            continue
        low, high, last = values
        try:
            if kind == "interval":
                made[key] = of.FloatDistribution(float(low), float(high), log=last)
            else:  # Hydra's range leaves its end out
                steps = math.ceil((high - low) / last) - 1
                both = (low, low + steps * last)
                whole = all(isinstance(value, int) for value in (low, high, last))
                kinds = of.IntDistribution if whole else of.FloatDistribution
                made[key] = kinds(*both, step=last)
        except ValueError as error:
            raise LmexpError(f"{key}: {' '.join(str(error).split())}") from error
    return made


def _example(optuna: Any, space: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}={one.choices[0] if hasattr(one, 'choices') else one.low}"
        for key, one in _distributions(optuna, space).items()
    ]


def _open(optuna: Any, folder: Path, settings: Settings) -> Any:
    """The study of this folder, with what a stopped run left unfinished put first in its queue."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{folder.absolute() / 'study.db'}",
        study_name="lmexp",
        directions=list(settings.direction),
        load_if_exists=True,
    )
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)
        study.enqueue_trial(trial.params)
    study.sampler = _sampler(optuna, settings, seed=settings.seed + len(study.trials))
    return study


def _sampler(optuna: Any, settings: Settings, seed: int) -> Any:
    """Seeded by the trials so far too: a resumed search must not draw the first ones again."""
    samplers = optuna.samplers
    if settings.sampler == "tpe":
        # Jobs of one batch are proposed before any of them has its score.
        return samplers.TPESampler(seed=seed, constant_liar=True, multivariate=True)
    kinds = {
        "random": samplers.RandomSampler,
        "nsga2": samplers.NSGAIISampler,
        "gp": samplers.GPSampler,
    }
    return kinds[settings.sampler](seed=seed)


def _count(optuna: Any, study: Any) -> int:
    return len(study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))) + sum(
        "reason" in trial.user_attrs for trial in study.trials
    )


def _tell(optuna: Any, study: Any, trial: Any, outcome: Outcome, settings: Settings) -> None:
    if outcome.state == "interrupted":
        return  # it stays RUNNING in the study, which the same command puts in its queue
    if outcome.folder is not None:
        trial.set_user_attr("folder", outcome.folder.name)
    values, reason = [], outcome.reason
    if outcome.summary is not None:
        found = [_look_up(outcome.summary, path) for path in settings.objective]
        values = [value for value in found if value is not None]
        if len(values) < len(found):
            reason = f"summary.json has no finite number at {', '.join(settings.objective)}"
    if len(values) == len(settings.objective):
        study.tell(trial, values)
    else:
        trial.set_user_attr("reason", reason)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _demand(objective: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    """Stop a search for a number that no run will ever have.

    Raises:
        LmexpError: none of the finished runs has such a path in its summary.
    """
    known = {path for o in outcomes if o.summary is not None for path in _list_paths(o.summary)}
    for path in objective if known else ():
        if path not in known:
            close = difflib.get_close_matches(path, sorted(known), n=3)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            raise LmexpError(
                f"hydra.sweeper.objective: no run has {path} in its summary.json{hint}; take a "
                "number that is there"
            )


def _list_paths(node: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _list_paths(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def _look_up(summary: Mapping[str, Any], path: str) -> float | None:
    node: Any = summary
    for part in path.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    usable = isinstance(node, (int, float)) and math.isfinite(node)
    return float(node) if usable else None


def _best(optuna: Any, study: Any) -> list[Any]:
    if not study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
        return []
    best: list[Any] = study.best_trials
    return best


def _write(optuna: Any, study: Any, folder: Path, settings: Settings) -> None:
    """search.json: every trial and which are best, for whoever has no Optuna."""
    best = {trial.number for trial in _best(optuna, study)}
    content = {
        "objective": settings.objective,
        "direction": settings.direction,
        "trials": [
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "params": trial.params,
                "values": trial.values,
                "best": trial.number in best,
                **trial.user_attrs,
            }
            for trial in study.trials
        ],
    }
    write_atomically(folder / "search.json", json.dumps(content, indent=2).encode() + b"\n")


def _conclude(
    optuna: Any,
    study: Any,
    outcomes: Sequence[Outcome],
    folder: Path,
    settings: Settings,
    stop: StopRequest,
) -> None:
    if outcomes:
        conclude(outcomes, folder)
    best = _best(optuna, study)
    finished = len(study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)))
    print(f"{finished} trials scored by {', '.join(settings.objective)}; all are in {folder}")
    if not best and not stop.requested:
        reasons = [t.user_attrs["reason"] for t in study.trials if "reason" in t.user_attrs]
        raise LmexpError(f"no trial has a score: {reasons[-1] if reasons else 'none was run'}")
    for trial in best:
        scores = ", ".join(
            f"{name} {value:.4g}"
            for name, value in zip(settings.objective, trial.values, strict=True)
        )
        words = " ".join(f"{key}={value}" for key, value in trial.params.items())
        print(f"best: {scores}\n  {words}\n  {folder / trial.user_attrs['folder']}")


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise LmexpError(
            "hydra/sweeper=search: the package optuna is not installed; pip install 'lmexp[search]'"
        ) from error
    return optuna
