"""StyleGAN2 against stored outputs of the published code.

`tests/data/stylegan2.npz` holds numbers alone: outputs and gradients of NVIDIA's StyleGAN2-ADA and
of rosinality's StyleGAN2, run on a CPU in float32. Small networks come with their weights; large
ones have those of `make_random_state`, whose random stream is frozen.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lmexp.generators.stylegan2 import StyleGAN2Network
from lmexp.generators.stylegan2_config import StyleGAN2Config, StyleGAN2DiscriminatorConfig
from lmexp.generators.stylegan2_discriminator import StyleGAN2Discriminator
from lmexp.generators.stylegan2_layers import make_random_state

VECTORS = Path(__file__).parents[1] / "data" / "stylegan2.npz"
GENERATORS = ["skip", "resnet", "orig", "conditional"]
DISCRIMINATORS = ["d_resnet", "d_skip", "d_orig", "d_conditional"]
IMAGE = 1e-4
GRADIENT = 1e-3


@cache
def vectors() -> dict[str, np.ndarray]:
    with np.load(VECTORS) as archive:
        return dict(archive)


def stored(name: str) -> Tensor:
    return torch.from_numpy(vectors()[name])


def stored_below(prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): torch.from_numpy(value)
        for name, value in vectors().items()
        if name.startswith(prefix)
    }


def noise_of(case: str, kind: str = "noise") -> list[Tensor]:
    found = stored_below(f"{case}/{kind}/")
    return [found[str(index)] for index in range(len(found))]


def class_of(case: str) -> int | None:
    index = int(vectors()[f"{case}/class_index"])
    return None if index < 0 else index


def small_generator(case: str, **choices: object) -> StyleGAN2Network:
    config = StyleGAN2Config.from_json(str(vectors()[f"{case}/config"]))
    weights = stored_below(f"{case}/weights/")
    return StyleGAN2Network(config, weights, class_index=class_of(case), **choices)  # type: ignore[arg-type]


def large_generator(case: str, seed: int) -> StyleGAN2Network:
    config = StyleGAN2Config.from_json(str(vectors()[f"{case}/config"]))
    return StyleGAN2Network(config, make_random_state(config, seed), weights_sha256="unused")


def differentiate(images: Tensor, *variables: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a scalar in which every pixel has a weight of its own."""
    ramp = torch.linspace(-1, 1, images.numel()).view_as(images)
    return torch.autograd.grad((images * ramp).sum() + images.square().sum(), variables)


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=IMAGE)


def assert_parallel(found: Tensor, wanted: Tensor) -> None:
    """Relative error of the whole tensor: next to a kink of LeakyReLU single values may differ."""
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= GRADIENT * wanted.norm()
    assert wanted.norm() > 0


@pytest.mark.parametrize("case", GENERATORS)
def test_mapping_is_that_of_nvidia(case: str) -> None:
    generator = small_generator(case)
    z = stored(f"{case}/z")
    assert_equal(generator.mapping(z), stored(f"{case}/w"))
    truncated = generator.map_to_ws(z, truncation_psi=0.6, truncation_cutoff=3)
    assert_equal(truncated, stored(f"{case}/ws_truncated"))
    assert_equal(truncated[:, 3:], generator.map_to_ws(z)[:, 3:])


@pytest.mark.parametrize("case", GENERATORS)
def test_images_and_gradients_are_those_of_nvidia(case: str) -> None:
    generator = small_generator(case)
    ws = stored(f"{case}/ws").requires_grad_()
    noise = [buffer.requires_grad_() for buffer in noise_of(case)]
    images = generator.synthesis(ws, noise)
    assert_equal(images, stored(f"{case}/image"))
    found = differentiate(images, ws, *noise)
    for gradient, wanted in zip(
        found, [stored(f"{case}/grad_ws"), *noise_of(case, "grad_noise")], strict=True
    ):
        assert_parallel(gradient, wanted)


@pytest.mark.parametrize("case", GENERATORS)
@pytest.mark.parametrize("mode", ["const", "none"])
def test_noise_modes_are_those_of_nvidia(case: str, mode: str) -> None:
    generator = small_generator(case, noise_mode=mode)
    images = generator.synthesis(generator.map_to_ws(stored(f"{case}/z")))
    assert_equal(images, stored(f"{case}/image_{mode}"))


def test_stored_noise_matters() -> None:
    """The comparisons above would see a noise map in the wrong place."""
    generator = small_generator("skip")
    noise = noise_of("skip")
    for index in range(len(noise)):
        other = [*noise]
        other[index] = other[index].flip(2)
        images = generator.synthesis(stored("skip/ws"), other)
        assert (images - stored("skip/image")).abs().max() > 20 * IMAGE


@pytest.mark.parametrize("case", DISCRIMINATORS)
def test_verdicts_are_those_of_nvidia(case: str) -> None:
    config = StyleGAN2DiscriminatorConfig.from_json(str(vectors()[f"{case}/config"]))
    network = StyleGAN2Discriminator(config, stored_below(f"{case}/weights/"), class_of(case))
    images = stored(f"{case}/images").requires_grad_()
    for kind, group_size in (("grouped", config.mbstd_group_size), ("alone", 1)):
        logits = network(images, group_size)
        assert_equal(logits, stored(f"{case}/logits_{kind}"))
        (gradient,) = torch.autograd.grad(logits.sum(), images)
        assert_parallel(gradient, stored(f"{case}/grad_{kind}"))
    assert torch.equal(network(images), network(images, 1))


def test_images_and_gradients_are_those_of_rosinality() -> None:
    case = "rosinality"
    generator = large_generator(case, seed=5)
    w = generator.mapping(stored(f"{case}/z"))
    assert_equal(w, stored(f"{case}/w"))
    ws = w[:, None].repeat(1, generator.num_ws, 1)
    assert_equal(generator.synthesis(ws), stored(f"{case}/image_const"))
    ws.requires_grad_()
    noise = [buffer.requires_grad_() for buffer in noise_of(case)]
    images = generator.synthesis(ws, noise)
    assert_equal(images, stored(f"{case}/image"))
    found = differentiate(images, ws, *noise)
    assert_parallel(found[0], stored(f"{case}/grad_ws"))
    for gradient, wanted in zip(found[1:], noise_of(case, "grad_noise"), strict=True):
        assert_parallel(gradient, wanted)


@pytest.mark.parametrize(("case", "stride"), [("config_f_256", 16), ("config_f_1024", 64)])
def test_config_f_is_that_of_nvidia(case: str, stride: int) -> None:
    generator = large_generator(case, seed=0)
    w = generator.mapping(stored(f"{case}/z"))
    assert_equal(w, stored(f"{case}/w"))
    ws = w[:, None].repeat(1, generator.num_ws, 1)
    with_gradient = f"{case}/grad_ws" in vectors()
    with torch.set_grad_enabled(with_gradient):
        images = generator.synthesis(ws.requires_grad_())
    assert_equal(images[..., ::stride, ::stride], stored(f"{case}/image_const"))
    assert_equal(images.mean((0, 2, 3)), stored(f"{case}/image_mean"))
    assert_equal(images.std((0, 2, 3)), stored(f"{case}/image_std"))
    if with_gradient:
        assert_parallel(differentiate(images, ws)[0], stored(f"{case}/grad_ws"))


@pytest.mark.parametrize("case", GENERATORS)
def test_gradients_are_the_difference_quotients(case: str) -> None:
    generator = small_generator(case).double()
    ws = stored(f"{case}/ws").double().requires_grad_()
    noise = [buffer.double().requires_grad_() for buffer in noise_of(case)]
    assert torch.autograd.gradcheck(
        lambda ws, *noise: generator.synthesis(ws, noise), (ws, *noise), fast_mode=True, atol=1e-4
    )


@pytest.mark.parametrize("half_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", GENERATORS)
def test_half_precision_is_near(case: str, half_dtype: str) -> None:
    """Within a few units of its last place (2^-8 of bfloat16, 2^-11 of float16)."""
    generator = small_generator(case, half_precision=2, half_dtype=half_dtype)
    exact = small_generator(case)
    ws = stored(f"{case}/ws").requires_grad_()
    images, wanted = generator.synthesis(ws), exact.synthesis(ws)
    assert images.dtype == torch.float32
    unit = 2.0**-8 if half_dtype == "bfloat16" else 2.0**-11
    error = (images - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert unit / 50 < error < 4 * unit
    (found,) = differentiate(images, ws)
    (gradient,) = differentiate(wanted, ws)
    assert (found - gradient).norm() < 0.1 * gradient.norm()


def test_float16_survives_styles_and_weights_far_outside_its_range() -> None:
    """Without the normalisation the sums would be infinite, and so would the image."""
    config = StyleGAN2Config.from_json(str(vectors()["skip/config"]))
    weights = stored_below("skip/weights/")
    for name in weights:
        if ".conv" in name and name.endswith((".weight", "affine.bias")):
            weights[name] = weights[name] * 1e5
    exact = StyleGAN2Network(config, weights).synthesis(stored("skip/ws"))
    half = StyleGAN2Network(config, weights, half_precision=2, half_dtype="float16")
    images = half.synthesis(stored("skip/ws"))
    assert images.isfinite().all()
    assert (images - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()
