"""Where the configs are, and what Hydra's complaints mean in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import InterpolationKeyError

from lmexp.config import explain_interpolation, suggest
from lmexp.errors import LmexpError


def conf_folder() -> Path:
    """The `conf` folder: inside an installed package, or at the top of a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parents[1] / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise LmexpError(f"conf: no config.yaml in {here / 'conf'} or beside src; reinstall lmexp")


_TAKE_A_VALUE = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn")
"""Hydra's flags whose value is the next word."""


def arrange(words: Sequence[str]) -> list[str]:
    """A command's words as Hydra reads them.

    Its parser takes flags before the overrides only, and its grammar refuses in a bare value what
    names of files may hold; people write flags anywhere, and paths as they are.
    """
    flags: list[str] = []
    overrides: list[str] = []
    several = not {"-m", "--multirun"}.isdisjoint(words)
    remaining = iter(words)
    for word in remaining:
        if not word.startswith("-"):
            overrides.append(_quote(word, several))
            continue
        flags.append(word)
        if word in _TAKE_A_VALUE:
            flags += [value for value in [next(remaining, None)] if value is not None]
    return [*flags, *overrides]


def _quote(word: str, several: bool) -> str:
    """An override whose value Hydra can't read, or would split where a file is meant, in quotes."""
    key, equals, value = word.partition("=")
    if not equals or value[:1] in ("'", '"', "[", "{", ""):
        return word
    read = OverridesParser.create()
    try:
        override = read.parse_override(word)
        # Of several values and one file of that very name, the file is meant, and so it is of a
        # reference (${key}) and a file.
        if not (override.is_sweep_override() or "${" in value) or not _is_file(value):
            return f"{key}={_quote_files(value)}" if override.is_sweep_override() else word
    except HydraException:
        if several and "," in value:
            return word  # values of a sweep, of which Hydra names the wrong one
    quoted = f"{key}={_as_text(value)}"
    try:
        read.parse_override(quoted)
    except HydraException:
        return word
    return quoted


def _quote_files(values: str) -> str:
    """A sweep's values, those in quotes that are files with a ${ in their names."""
    return ",".join(
        _as_text(value) if "${" in value and _is_file(value) else value
        for value in values.split(",")
    )


def _as_text(value: str) -> str:
    """A value in quotes; a ${ in it refers to a key unless it is a file's."""
    if _is_file(value):
        value = value.replace("${", r"\${")
    return '"{}"'.format(value.replace('"', '\\"'))


def _is_file(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except (OSError, RuntimeError):  # too long for a name; nobody's home
        return False


def explain(error: Exception) -> str:
    """One line for an exception of Hydra or OmegaConf: the key, the reason, the choices."""
    text = " ".join(str(error).split("\nSee https://")[0].split())
    if isinstance(error, OverrideParseException):
        word = error.override
        if "missing EQUAL" in text:
            return f"{word}: no value; write {word}=VALUE (for one more key, +{word}=VALUE)"
        key, _, value = word.partition("=")
        return (
            f"{key}: {value} cannot be read; quote a list, 'KEY=[a,b]', a mapping, 'KEY={{a: 1}}', "
            "or what is neither, 'KEY=\"…\"'"
        )
    if isinstance(error, InterpolationKeyError):
        return explain_interpolation(error)
    if match := re.search(r"Ambiguous value for argument '([^=']+)=([^']*)'", text):
        key, values = match.groups()
        return (
            f"{key}: {values} is several values; add -m to run each of them, or write "
            f"'{key}=[{values}]' for one list or '{key}=\"{values}\"' for one text"
        )
    if match := re.search(r"Could not override '([^']+)'", text):
        return _explain_unknown_key(match[1])
    if match := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"{match[1]}: exists already; write it without the +"
    if match := re.search(r"Multiple values for (\S+)\.", text):
        return f"{match[1]}: chosen already; write {match[1]}=… without the +"
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        group, _, choice = match[1].rpartition("/")
        known = error.options if isinstance(error, MissingConfigException) else None
        return f"{group}={choice}: no such choice{suggest(choice, list(known or _choices(group)))}"
    if match := re.search(r"You must specify '([^']+)'", text):
        return f"{match[1]}: missing{suggest('', _choices(match[1]))}"
    return text


def _explain_unknown_key(key: str) -> str:
    """The first part of `key` that the default config lacks, and what stands there instead.

    Hydra complains of the config as it was composed; what it lacks the default one may have.
    """
    node = _defaults()
    parts = key.replace("/", ".").split(".")
    if key not in node and _choices(key):
        return f"{key}: not part of the default config; write +{key}=…"
    for part in parts[:-1]:
        below = node.get(part)
        if part in node and below is None:
            path, _, rest = key.rpartition(".")
            return f"{key}: {path} is null; if it takes a mapping, write '{path}={{{rest}: VALUE}}'"
        if not isinstance(below, DictConfig):
            return f"{key}: no such key{suggest(part, _names(node))}"
        node = below
    if parts[-1] in node:
        return f"{key}: the choices made leave this key out; choose its file too ({parts[0]}=…)"
    return f"{key}: no such key{suggest(parts[-1], _names(node))}"


def _names(node: DictConfig) -> list[str]:
    return [str(name) for name in node if name not in ("hydra", "_target_")]


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def _defaults() -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return compose("config")
