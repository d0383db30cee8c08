"""The sweep's launcher, where Hydra looks for plugins: the namespace package `hydra_plugins`.

Every Hydra program of the environment imports this file, so it imports nothing heavy itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.utils import JobReturn, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, read_write


class BatchLauncher(Launcher):
    """Hands all jobs of a sweep to `lmexp.launching.batch_launcher.launch` at once.

    Args:
        engine: the component that computes batches; None for this host's devices.
    """

    def __init__(self, engine: Mapping[str, Any] | None = None) -> None:
        plain = OmegaConf.to_container(OmegaConf.create(dict(engine or {})))
        self.engine = {str(k): v for k, v in plain.items()} if isinstance(plain, dict) else {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Remember what Hydra knows of the sweep."""
        self._config_loader = hydra_context.config_loader
        self._config = config
        # Hydra's sweeper insists on saving its own config somewhere; lmexp's index says more,
        # and a mistake in a sweep must leave no files behind.
        self._scratch = tempfile.TemporaryDirectory(prefix="lmexp-")
        with read_write(config):
            config.hydra.sweep.dir = self._scratch.name

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run every job; ends the process with the sweep's exit code if one did not finish."""
        from lmexp.launching.batch_launcher import launch

        setup_globals()
        return launch(
            self._config_loader, self._config, job_overrides, initial_job_idx, self.engine or None
        )
