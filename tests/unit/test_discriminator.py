"""The discriminator term: its formula, whose network it takes, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from lmexp.checkpoints.checkpoint import Checkpoint, write
from lmexp.errors import LmexpError
from lmexp.generators.protocol import Generator
from lmexp.generators.stylegan2 import StyleGAN2, StyleGAN2Random
from lmexp.generators.stylegan2_config import StyleGAN2DiscriminatorConfig, channel_table
from lmexp.generators.stylegan2_discriminator import StyleGAN2Discriminator
from lmexp.generators.stylegan2_layers import make_random_state
from lmexp.generators.tiny_random import TinyRandom
from lmexp.losses.discriminator import DiscriminatorLoss
from lmexp.losses.objective import Objective
from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets
from lmexp.weights import store

UNUSED = cast(Any, None)
SIDE = 16


def make_generator(side: int = SIDE, seed: int = 0) -> StyleGAN2Random:
    return StyleGAN2Random(
        resolution=side, channel_base=128, channel_max=8, latent_dim=8, mapping_layers=1, seed=seed
    )


def write_checkpoint(path: Path, side: int = SIDE, classes: int = 0, judge: bool = True) -> Path:
    """A small random checkpoint; the discriminator's seed is 5."""
    config = make_generator(side).config
    if classes:
        config = type(config)(**{**vars(config), "c_dim": classes})
    tensors = make_random_state(config, 0)
    channels = channel_table(side, 128, 8)
    discriminator = StyleGAN2DiscriminatorConfig(
        resolution=side, channels=channels, c_dim=classes, mapping_layers=1
    )
    if judge:
        tensors |= make_random_state(discriminator, 5)
    found = discriminator if judge else None
    write(Checkpoint(config, tensors, found, "rosinality", "0" * 64), path)
    return path


def bind(term: DiscriminatorLoss, generator: Generator) -> BoundTerm:
    look = torch.zeros(1, 3, generator.resolution, generator.resolution)
    return term.bind(Context(generator, UNUSED, UNUSED), Targets(look, look.new_zeros(1, 68, 2)))


def candidate(images: Tensor) -> Candidate:
    return Candidate(images, images.new_zeros(len(images), 1, 8), (), 0, UNUSED)


def draw_images(count: int, side: int = SIDE) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_is_the_non_saturating_loss_of_the_generator_s_own_discriminator() -> None:
    generator = make_generator(seed=3)
    images = 5 * draw_images(6)
    logits = generator.discriminator()(images).double().numpy()
    assert logits.min() < 0 < logits.max()
    values = bind(DiscriminatorLoss(), generator)(candidate(images))
    assert values.shape == (6,)
    np.testing.assert_allclose(values, np.log1p(np.exp(-logits)), rtol=1e-5)


def test_a_job_alone_has_what_it_has_in_a_batch() -> None:
    term = bind(DiscriminatorLoss(), make_generator())
    images = draw_images(4)
    together = term(candidate(images))
    for k in range(4):
        torch.testing.assert_close(together[k : k + 1], term(candidate(images[k : k + 1])))


def test_following_its_gradient_makes_images_look_more_real() -> None:
    term = bind(DiscriminatorLoss(), make_generator())
    images = draw_images(2).requires_grad_()
    before = term(candidate(images))
    (gradient,) = torch.autograd.grad(before.sum(), images)
    assert torch.isfinite(gradient).all() and gradient.abs().amax((1, 2, 3)).min() > 0
    after = term(candidate(images - 0.1 * gradient / gradient.std()))
    assert (after < before).all()


def test_takes_the_discriminator_of_a_checkpoint(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "d.safetensors")
    images = draw_images(2)
    generator = TinyRandom(resolution=SIDE)  # it has none of its own
    term = DiscriminatorLoss(checkpoint=str(path))
    values = bind(term, generator)(candidate(images))
    config = StyleGAN2DiscriminatorConfig(
        resolution=SIDE, channels=channel_table(SIDE, 128, 8), mapping_layers=1
    )
    network = StyleGAN2Discriminator(config, make_random_state(config, 5))
    torch.testing.assert_close(values, torch.log1p(torch.exp(-network(images))))
    assert term.weights_sha256 == store.digest(network.state_dict())


def test_a_real_generator_brings_the_one_of_its_file(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "d.safetensors")
    images = draw_images(2)
    own = bind(DiscriminatorLoss(), StyleGAN2(str(path)))(candidate(images))
    given = bind(DiscriminatorLoss(checkpoint=str(path)), TinyRandom(resolution=SIDE))
    torch.testing.assert_close(own, given(candidate(images)))


def test_a_conditional_one_judges_the_generator_s_class(tmp_path: Path) -> None:
    path = str(write_checkpoint(tmp_path / "d.safetensors", classes=3))
    images = draw_images(2)
    verdicts = []
    for label in (0, 2):
        generator = StyleGAN2(path, class_index=label)
        verdicts.append(bind(DiscriminatorLoss(checkpoint=path), generator)(candidate(images)))
        own = bind(DiscriminatorLoss(), generator)(candidate(images))
        torch.testing.assert_close(own, verdicts[-1])
    assert not torch.allclose(*verdicts)
    with pytest.raises(LmexpError, match="class"):
        bind(DiscriminatorLoss(checkpoint=path), TinyRandom(resolution=SIDE))


def test_is_read_once_a_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = make_generator(), make_generator(seed=1)
    reads: list[StyleGAN2Random] = []
    make = StyleGAN2Random.discriminator

    def count(generator: StyleGAN2Random) -> StyleGAN2Discriminator:
        reads.append(generator)
        return make(generator)

    monkeypatch.setattr(StyleGAN2Random, "discriminator", count)
    term = DiscriminatorLoss()
    assert term.weights_sha256 is None
    term.check(one)
    bind(term, one)
    bind(term, one)
    first = term.weights_sha256
    bind(term, other)
    assert reads == [one, other]
    assert first is not None and term.weights_sha256 not in (None, first)


def test_refusals_are_one_line_each(tmp_path: Path) -> None:
    without = write_checkpoint(tmp_path / "g.safetensors", judge=False)
    larger = write_checkpoint(tmp_path / "l.safetensors", side=32)
    text = tmp_path / "text.pkl"
    text.write_text("<html>")
    cases = [
        (DiscriminatorLoss(), "TinyRandom comes without a discriminator; give one with"),
        (DiscriminatorLoss(checkpoint=str(without)), "g.safetensors holds no discriminator; take"),
        (DiscriminatorLoss(checkpoint=str(larger)), "reads 32 px, but the generator makes 16 px"),
        (DiscriminatorLoss(checkpoint=str(tmp_path / "none.pkl")), "none.pkl"),
        (DiscriminatorLoss(checkpoint=str(text)), "text.pkl"),
    ]
    for term, reason in cases:
        with pytest.raises(LmexpError) as caught:
            bind(term, TinyRandom(resolution=SIDE))
        assert reason in str(caught.value) and "\n" not in str(caught.value)
        assert term.weights_sha256 is None


def test_off_at_weight_zero_and_also_used_while_the_look_is_inverted() -> None:
    terms = {"discriminator": DiscriminatorLoss()}
    context = Context(make_generator(), UNUSED, UNUSED)
    look = Targets(torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1, 68, 2))
    assert Objective.bind(terms, [{"discriminator": 1.0}], context, look).names == (
        "discriminator",
    )
    # A generator without a discriminator would be refused: a term of weight 0 is not bound.
    tiny = Context(TinyRandom(resolution=SIDE), UNUSED, UNUSED)
    assert Objective.bind(terms, [{"discriminator": 0.0}], tiny, look).names == ()
