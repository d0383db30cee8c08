"""Where the configs are, and what Hydra's complaints mean in one line."""

from __future__ import annotations

import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from lmexp.config import suggest
from lmexp.errors import LmexpError


def conf_folder() -> Path:
    """The `conf` folder: inside an installed package, or at the top of a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parents[1] / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise LmexpError(f"conf: no config.yaml in {here / 'conf'} or beside src; reinstall lmexp")


def explain(error: Exception) -> str:
    """One line for an exception of Hydra or OmegaConf: the key, the reason, the choices."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _explain_unknown_key(match[1])
    if match := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"{match[1]}: exists already; write it without the +"
    if match := re.search(r"Could not find '([^']+)'", text) or re.search(
        r"In '[^']+': Could not (?:find|load) '([^']+)'", text
    ):
        group, _, choice = match[1].rpartition("/")
        choices = _choices(group)
        return f"{group}={choice}: no such choice{suggest(choice, choices)}"
    if match := re.search(r"You must specify '([^']+)'", text):
        return f"{match[1]}: missing{suggest('', _choices(match[1]))}"
    return " ".join(text.split())


def _explain_unknown_key(key: str) -> str:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(_defaults(), parent) if parent else _defaults()
    names = [str(item) for item in node if item != "hydra"] if isinstance(node, DictConfig) else []
    if not parent:
        names = sorted({*names, *(group.name for group in conf_folder().iterdir() if group.is_dir())})
    return f"{key}: no such key{suggest(name, names)}"


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def _defaults() -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return compose("config")
