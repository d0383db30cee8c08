"""Configs of a sweep's jobs: what Hydra composes of their words, and its files read once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lmexp.composition import conf_folder
from lmexp.errors import LmexpError
from lmexp.launching.job_configs import JobConfigs


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What Hydra is asked to compose."""
    asked: list[list[str]] = []
    original = ConfigLoaderImpl.load_sweep_config

    def load(self: ConfigLoaderImpl, master: DictConfig, overrides: list[str]) -> DictConfig:
        asked.append(list(overrides))
        return original(self, master, overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", load)
    return asked


@pytest.fixture
def configs(loads: list[list[str]]) -> Iterator[JobConfigs]:
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        words = ["experiment=debug", "seed=1,2"]
        config = hydra.compose_config("config", words, run_mode=RunMode.MULTIRUN)
        yield JobConfigs(hydra.config_loader, config)


def plain(config: DictConfig) -> dict[str, Any]:
    content = OmegaConf.to_container(config, resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items() if key != "hydra"}


@pytest.mark.parametrize(
    ("words", "shared"),
    [
        (["seed=3"], True),
        (["experiment=debug", "optimizer.steps=7", "seed=2"], True),
        (["loss.landmarks.weight=2", "landmark_weights=lips"], True),
        (["loss=[lpips,noise]", "loss.noise.weight=1e-3", "landmarks@judge=fan_slim"], True),
        (["+sweep=weights", "landmark_weights.jaw=0.5"], True),
        (["landmark_weights={jaw:2,nose_bridge:3}"], True),
        (["inputs.look='a,b ${x}.png'", "inputs.expression=generated:4"], True),
        (["latent.moving_ws=[0,1,5]", "optimizer.patience=null"], True),
        (["hydra.job.name=other", "seed=${optimizer.steps}"], True),
        (["~loss.noise", "seed=4"], False),
        (["++loss.prior.weight=3", "seed=5"], False),
        (["+loss.prior.new={a:1}"], False),
    ],
)
def test_a_job_gets_what_hydra_composes(
    configs: JobConfigs, loads: list[list[str]], words: list[str], shared: bool
) -> None:
    whole = plain(configs._config_loader.load_sweep_config(configs._config, words))
    loads.clear()
    for _ in range(2):  # what one job was given is no other's
        composed = configs.compose(words)
        assert plain(composed) == whole
        OmegaConf.update(composed, "seed", 1000)
    assert len(loads) == (1 if shared else 2)


def test_files_are_read_once_for_each_choice_of_them(
    configs: JobConfigs, loads: list[list[str]]
) -> None:
    requests = [
        configs.request(["experiment=debug", f"landmark_weights={part}", f"seed={seed}"], seed)
        for part in ("lips", "eyes")
        for seed in range(10)
    ]
    assert [request.config.seed for request in requests] == [*range(10), *range(10)]
    assert [words[1] for words in loads] == ["landmark_weights=lips", "landmark_weights=eyes"]
    assert requests[3].overrides == ("landmark_weights=lips", "seed=3")


@pytest.mark.parametrize(
    ("words", "fault", "said"),
    [
        (["optimizer.steqs=3"], HydraException, "steqs"),
        (["seed=x"], LmexpError, r"job 3 \(seed=x\): seed"),
        (["experiment=none_such"], HydraException, "none_such"),
        (["seed@here=3"], HydraException, "seed"),
    ],
)
def test_a_wrong_word_is_refused_as_hydra_refuses_it(
    configs: JobConfigs, words: list[str], fault: type[Exception], said: str
) -> None:
    with pytest.raises(fault, match=said):
        configs.request(words, 2)
