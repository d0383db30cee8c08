"""Every choice in conf/ composes, validates and instantiates; none has a key its class lacks."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from lmexp.composition import conf_folder
from lmexp.config import Component, Experiment, validate

CONF = conf_folder()
CHOICES = sorted(
    path.relative_to(CONF)
    for path in CONF.rglob("*.yaml")
    if path.parent != CONF and path.relative_to(CONF).parts[0] != "hydra"
)
NEEDS_PHOTOS = {"photos": ["inputs.look=a.jpg", "inputs.expression=b.jpg"]}


def override(choice: Path) -> str:
    group, name = choice.parent.as_posix(), choice.stem
    if group in ("loss", "figure"):
        return f"{group}=[{name}]"
    return f"{'+' if group == 'sweep' else ''}{group}={name}"


def composed(*overrides: str) -> Experiment:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return validate(compose("config", overrides=list(overrides)))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_choice_composes_and_validates(choice: Path) -> None:
    extra = ["latent.start=mean"] if override(choice) == "loss=[landmarks]" else []
    config = composed(override(choice), *NEEDS_PHOTOS.get(choice.stem, []), *extra)
    assert config.optimizer.steps >= 1


def components() -> list[tuple[Path, dict[str, object]]]:
    found = []
    for choice in CHOICES:
        body = yaml.safe_load((CONF / choice).read_text())
        nodes = [body, *(value for value in body.values() if isinstance(value, dict))]
        found += [(choice, node) for node in nodes if "_target_" in node]
    return found


@pytest.mark.parametrize(("choice", "node"), components(), ids=lambda value: str(value)[:40])
def test_component_instantiates(choice: Path, node: dict[str, object]) -> None:
    component = Component.model_validate(node)
    built = component.build()
    assert type(built).__name__ == component.target.rpartition(".")[2]


@pytest.mark.parametrize(("choice", "node"), components(), ids=lambda value: str(value)[:40])
def test_yaml_shows_every_keyword(choice: Path, node: dict[str, object]) -> None:
    """What is not in the yaml cannot be found, nor overridden without a +."""
    component = Component.model_validate(node)
    module, _, name = component.target.rpartition(".")
    built = getattr(__import__(module, fromlist=[name]), name)
    assert set(component.keywords) == set(inspect.signature(built).parameters)


def test_config_yaml_is_only_the_defaults_list() -> None:
    assert list(yaml.safe_load((CONF / "config.yaml").read_text())) == ["defaults"]
