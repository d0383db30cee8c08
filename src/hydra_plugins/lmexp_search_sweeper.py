"""The searching sweeper, where Hydra looks for plugins: the namespace package `hydra_plugins`.

Every Hydra program of the environment imports this file, so it imports nothing heavy itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import setup_globals
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class SearchSweeper(Sweeper):
    """Hands a search by Optuna to `lmexp.launching.search.search`, which explains the keywords."""

    def __init__(self, **settings: Any) -> None:
        self.settings = OmegaConf.to_container(OmegaConf.create(dict(settings)))
        self.config_loader: ConfigLoader | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Remember what Hydra knows of the sweep."""
        self.config_loader = hydra_context.config_loader
        self.config = config

    def sweep(self, arguments: Sequence[str]) -> None:
        """Search; ends the process with its exit code if a job did not finish."""
        from lmexp.launching.search import search

        setup_globals()
        assert self.config_loader is not None
        assert self.config is not None and isinstance(self.settings, Mapping)
        launcher = OmegaConf.to_container(self.config.hydra.launcher)
        engine = launcher.get("engine") if isinstance(launcher, dict) else None
        settings = {str(key): value for key, value in self.settings.items()}
        search(self.config_loader, self.config, arguments, settings, engine)
