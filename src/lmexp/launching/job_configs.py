"""The configs of a sweep's jobs: files are read once for all that choose the same ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.utils import filter_overrides
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lmexp.config import validate
from lmexp.errors import LmexpError
from lmexp.jobs import Request


class JobConfigs:
    """Composes jobs' configs as Hydra does.

    Hydra reads thirty files a job, 0.15 s, which a sweep of short projections would wait for. Jobs
    that differ in values alone share what comes before these.

    Args:
        config_loader: Hydra's.
        config: what it composed of the command line.
    """

    def __init__(self, config_loader: ConfigLoader, config: DictConfig) -> None:
        self._config_loader = config_loader
        self._config = config
        self._fixed = set(config.hydra.overrides.task)
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._is_group: dict[str, bool] = {}
        self._parsed: dict[str, Override] = {}

    def request(self, overrides: Sequence[str], number: int) -> Request:
        """One job's checked config.

        Args:
            overrides: all of the job's, those of the command line that have no range too.
            number: 0-based, for the message.

        Raises:
            LmexpError: it is wrong; the line names the job.
            HydraException, OmegaConfBaseException: Hydra cannot compose it.
        """
        composed = self.compose(overrides)
        varied = self._varied(overrides)
        try:
            return Request(validate(composed), tuple(varied))
        except LmexpError as error:
            raise LmexpError(f"job {number + 1} ({' '.join(varied)}): {error}") from error

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """What Hydra composes of `overrides`, without its own key."""
        parsed = [self._parse(word) for word in overrides]
        values = [override for override in parsed if not self._chooses_files(override)]
        if any(one.type is not OverrideType.CHANGE or one.package for one in values):
            return self._load(overrides)  # keys that come or go, in Hydra's order
        composed = copy.deepcopy(
            self._choose([one.input_line or "" for one in parsed if one not in values])
        )
        try:
            for override in values:
                OmegaConf.update(composed, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return self._load(overrides)  # Hydra says what is wrong
        return composed

    def _choose(self, overrides: Sequence[str]) -> DictConfig:
        chosen = tuple(overrides)
        if chosen not in self._composed:
            self._composed[chosen] = self._load(chosen)
        return self._composed[chosen]

    def _load(self, overrides: Sequence[str]) -> DictConfig:
        composed = self._config_loader.load_sweep_config(self._config, list(overrides))
        own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        OmegaConf.set_struct(own, True)  # as Hydra's: keys that are not there are mistakes
        return own

    def _parse(self, word: str) -> Override:
        if word not in self._parsed:
            parser = OverridesParser.create(config_loader=self._config_loader)
            self._parsed[word] = parser.parse_override(word)
        return self._parsed[word]

    def _chooses_files(self, override: Override) -> bool:
        key = override.key_or_group
        if key.startswith("hydra."):  # where files are looked for, among others
            return True
        if key not in self._is_group:
            self._is_group[key] = bool(self._config_loader.get_group_options(key))
        return self._is_group[key] and not isinstance(override.value(), dict)

    def _varied(self, overrides: Sequence[str]) -> list[str]:
        """The overrides that tell a job from the others of its sweep, without Hydra's escapes."""
        told = filter_overrides(overrides)
        varied = [item for item in told if item not in self._fixed] or list(overrides)
        parsed = [self._parse(word) for word in varied]
        return [
            f"{override.get_key_element().lstrip('+')}={override.value()}".replace(r"\${", "${")
            for override in parsed
        ]
