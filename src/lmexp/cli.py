"""The command line: compose a config with Hydra and hand it to the runner."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lmexp.composition import arrange, conf_folder, explain
from lmexp.config import validate
from lmexp.errors import LmexpError
from lmexp.figures.gallery import make_all
from lmexp.jobs import Request
from lmexp.report import exit_code, print_outcomes
from lmexp.runner import run


def main() -> None:
    """Entry point; ends the process with 0, 1 (a job failed), 2 (bad input) or 130 (stopped)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lmexp").setLevel(logging.INFO)
    # That a single run has no sweep's figures is no news here; `python -m lmexp.figures` says it.
    logging.getLogger("lmexp.figures").setLevel(logging.WARNING)
    sys.argv[1:] = arrange(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the line is ours to write
    decorate = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
    try:
        decorate(_run_one)()
    except LmexpError as error:
        _stop(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _stop(explain(error))
    except KeyboardInterrupt:  # before the first step, or asked twice
        print("lmexp: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def _run_one(composed: DictConfig) -> None:
    # Ends by SystemExit: Hydra writes lines of its own about any other exception.
    try:
        config = validate(composed)
        outcome = run([Request(config)], Path(config.output_dir))[0]
        if outcome.folder is None:  # an input that could not even be named
            _stop(outcome.reason)
        if outcome.state in ("finished", "skipped"):
            make_all(outcome.folder, config.figure)
    except LmexpError as error:
        _stop(str(error))
    print_outcomes([outcome])
    sys.exit(exit_code([outcome]))


def _stop(line: str) -> NoReturn:
    print(f"lmexp: {line}", file=sys.stderr)
    sys.exit(2)
