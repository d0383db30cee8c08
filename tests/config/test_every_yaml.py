"""Every choice in conf/ composes, validates and instantiates; none has a key its class lacks.

Weights of third parties are not fetched here. A `checkpoint` is replaced by a tiny file of our own
format, so its component is built in any case; a component that needs another file of
`lmexp.weights` is built where that file is in the cache already.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from lmexp.checkpoints import checkpoint as checkpoints
from lmexp.composition import conf_folder
from lmexp.config import Component, Experiment, validate
from lmexp.generators.stylegan2_config import (
    StyleGAN2Config,
    StyleGAN2DiscriminatorConfig,
    channel_table,
)
from lmexp.generators.stylegan2_layers import make_random_state
from lmexp.weights import files, registry
from lmexp.weights.registry import FileEntry

CONF = conf_folder()
CHOICES = sorted(
    path.relative_to(CONF)
    for path in CONF.rglob("*.yaml")
    if path.parent != CONF and path.relative_to(CONF).parts[0] != "hydra"
)
NEEDS_PHOTOS = {"photos": ["inputs.look=a.jpg", "inputs.expression=b.jpg"]}
NEEDS_CHECKPOINT = {"stylegan2": ["generator.checkpoint=my.pkl"]}


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
    # A single term need not be one that the look can be inverted with.
    extra = ["latent.start=mean"] if choice.parent.name == "loss" else []
    extra += NEEDS_PHOTOS.get(choice.stem, []) + NEEDS_CHECKPOINT.get(choice.stem, [])
    config = composed(override(choice), *extra)
    assert config.optimizer.steps >= 1


def read(choice: Path) -> dict[str, Any]:
    """A yaml, laid over the choices of its own group that it builds on."""
    own = yaml.safe_load((CONF / choice).read_text())
    body: dict[str, Any] = {}
    for base in own.get("defaults", []):
        if isinstance(base, str) and base != "_self_" and "/" not in base:
            body |= read(choice.with_name(f"{base}.yaml"))
    return body | own


def components() -> list[tuple[Path, dict[str, Any]]]:
    found = []
    for choice in CHOICES:
        body = read(choice)
        body.pop("defaults", None)
        nodes = [body, *(value for value in body.values() if isinstance(value, dict))]
        found += [(choice, node) for node in nodes if "_target_" in node]
    return found


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    channels = channel_table(8, 64, 8)
    generator = StyleGAN2Config(resolution=8, channels=channels, z_dim=8, w_dim=8)
    discriminator = StyleGAN2DiscriminatorConfig(resolution=8, channels=channels)
    tensors = make_random_state(generator, 0) | make_random_state(discriminator, 0)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    made = checkpoints.Checkpoint(generator, tensors, discriminator, "lmexp", "0" * 64)
    checkpoints.write(made, path)
    return path


class NotHereError(Exception):
    """A third party's file that would have to be fetched."""


@pytest.mark.parametrize(("choice", "node"), components(), ids=lambda value: str(value)[:40])
def test_component_instantiates(
    choice: Path,
    node: dict[str, Any],
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(entry: FileEntry, *_: object) -> Path:
        raise NotHereError(entry.name)

    monkeypatch.setattr(files, "_fetch_locked", refuse)
    if node.get("checkpoint") is not None:
        node = node | {"checkpoint": str(tiny_checkpoint)}
    component = Component.model_validate(node)
    try:
        built = component.build()
    except NotHereError as missing:
        assert str(missing) in registry.FILES
        pytest.skip(f"weights {missing} are not in the cache")
    assert type(built).__name__ == component.target.rpartition(".")[2]


@pytest.mark.parametrize(("choice", "node"), components(), ids=lambda value: str(value)[:40])
def test_yaml_shows_every_keyword(choice: Path, node: dict[str, Any]) -> None:
    """What is not in the yaml cannot be found, nor overridden without a +."""
    component = Component.model_validate(node)
    module, _, name = component.target.rpartition(".")
    built = getattr(__import__(module, fromlist=[name]), name)
    assert set(component.keywords) == set(inspect.signature(built).parameters)


def test_presets_name_checkpoints_of_the_registry() -> None:
    """NVIDIA's are called like the yaml; each face network of the registry has one."""
    named = {}
    for path in (CONF / "generator").glob("*.yaml"):
        checkpoint = read(path.relative_to(CONF)).get("checkpoint", "???")
        if checkpoint != "???":
            named[path.stem] = checkpoint
    assert named == {stem: f"nvidia_{stem}" for stem in named}
    faces = {
        name
        for name, entry in registry.FILES.items()
        if name.startswith("nvidia_") and "AFHQ" not in entry.purpose
    }
    assert set(named.values()) == faces


def test_config_yaml_is_only_the_defaults_list() -> None:
    assert list(yaml.safe_load((CONF / "config.yaml").read_text())) == ["defaults"]
