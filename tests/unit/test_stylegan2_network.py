"""StyleGAN2's components, configs and faults, with networks of a few channels."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lmexp.checkpoints import checkpoint as checkpoints
from lmexp.errors import LmexpError
from lmexp.generators.protocol import Generator
from lmexp.generators.stylegan2 import StyleGAN2, StyleGAN2Network, StyleGAN2Random
from lmexp.generators.stylegan2_config import (
    StyleGAN2Config,
    StyleGAN2DiscriminatorConfig,
    channel_table,
    tensor_shapes,
)
from lmexp.generators.stylegan2_discriminator import StyleGAN2Discriminator
from lmexp.generators.stylegan2_layers import LowPass, make_random_state
from lmexp.weights import store


def small_config(**changes: Any) -> StyleGAN2Config:
    plain = {"z_dim": 6, "w_dim": 8, "resolution": 16, "channels": channel_table(16, 64, 8)}
    return StyleGAN2Config(**(plain | {"mapping_layers": 2} | changes))


def small_network(seed: int = 0, **choices: Any) -> StyleGAN2Network:
    config = small_config()
    return StyleGAN2Network(config, make_random_state(config, seed), **choices)


def small_discriminator_config(**changes: Any) -> StyleGAN2DiscriminatorConfig:
    plain = {"resolution": 16, "channels": channel_table(16, 64, 8), "mapping_layers": 1}
    return StyleGAN2DiscriminatorConfig(**(plain | changes))


def write_checkpoint(
    path: Path, c_dim: int = 0, with_discriminator: bool = True
) -> checkpoints.Checkpoint:
    generator = small_config(c_dim=c_dim)
    tensors = make_random_state(generator, 1)
    discriminator = small_discriminator_config(c_dim=c_dim) if with_discriminator else None
    if discriminator is not None:
        tensors |= make_random_state(discriminator, 1)
    made = checkpoints.Checkpoint(generator, tensors, discriminator, "rosinality", "0" * 64)
    checkpoints.write(made, path)
    return made


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_ws(generator: StyleGAN2Network, count: int) -> Tensor:
    ws = generator.map_to_ws(draw(count, generator.z_dim))
    return ws + 0.1 * draw(*ws.shape, seed=1)


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
@pytest.mark.parametrize("resolution", [8, 32])
def test_every_style_and_noise_map_moves_the_image(architecture: Any, resolution: int) -> None:
    generator = StyleGAN2Random(
        resolution, 128, 8, latent_dim=8, mapping_layers=2, architecture=architecture
    )
    assert isinstance(generator, Generator)
    assert generator.num_ws == {8: 4, 32: 8}[resolution]
    ws = draw_ws(generator, 2).requires_grad_()
    noise = [draw(2, 1, *shape).requires_grad_() for shape in generator.noise_shapes]
    assert len(noise) == generator.num_ws - 1
    images = generator.synthesis(ws, noise)
    assert images.shape == (2, 3, resolution, resolution)
    (images * draw(*images.shape)).sum().backward()
    assert ws.grad is not None and ws.grad.isfinite().all() and (ws.grad != 0).any(dim=2).all()
    for buffer in noise:
        assert buffer.grad is not None and buffer.grad.isfinite().all()
        assert (buffer.grad != 0).flatten(1).any(dim=1).all()


def test_nothing_in_it_needs_a_gradient() -> None:
    generator = small_network()
    assert not list(generator.parameters())
    assert not generator.synthesis(draw_ws(generator, 1)).requires_grad


@pytest.mark.parametrize("half_precision", [0, 2])
def test_images_of_a_batch_are_strangers(half_precision: int) -> None:
    generator = small_network(half_precision=half_precision)
    ws = draw_ws(generator, 3)
    noise = [draw(3, 1, *shape) for shape in generator.noise_shapes]
    batch = generator.synthesis(ws, noise)
    for index in range(3):
        own = [buffer[index : index + 1] for buffer in noise]
        alone = generator.synthesis(ws[index : index + 1], own)
        tolerance = 0.05 if half_precision else 1e-5
        torch.testing.assert_close(batch[index : index + 1], alone, atol=tolerance, rtol=0)


def test_half_precision_counts_from_the_highest_and_spares_4_px() -> None:
    plain = small_network()
    ws = draw_ws(plain, 1)
    images = [small_network(half_precision=count).synthesis(ws) for count in range(5)]
    assert torch.equal(images[0], plain.synthesis(ws))
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])
    assert torch.equal(images[2], images[3]) and torch.equal(images[3], images[4])


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_near_float32(architecture: Any, dtype: torch.dtype) -> None:
    """Within a few units of its last place (2^-8 of bfloat16, 2^-11 of float16)."""
    config = small_config(architecture=architecture)
    exact, lowered = (StyleGAN2Network(config, make_random_state(config, 0)) for _ in range(2))
    lowered.lower_precision(dtype)
    assert lowered.num_ws == exact.num_ws and lowered.noise_shapes == exact.noise_shapes
    assert lowered.weights_sha256 == exact.weights_sha256
    ws = draw_ws(exact, 3).requires_grad_()
    noise = [draw(3, 1, *shape).requires_grad_() for shape in exact.noise_shapes]
    found, wanted = lowered.synthesis(ws, noise), exact.synthesis(ws, noise)
    assert found.dtype == torch.float32
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    error = (found - wanted).norm() / wanted.norm()
    assert unit / 50 < error < 4 * unit
    outer = draw(*wanted.shape, seed=2)
    gradients = torch.autograd.grad(found, [ws, *noise], outer)
    for gradient, slope in zip(
        gradients, torch.autograd.grad(wanted, [ws, *noise], outer), strict=True
    ):
        assert gradient.dtype == torch.float32
        # Next to a kink of LeakyReLU single values may differ.
        assert (gradient - slope).norm() < (0.1 if dtype == torch.bfloat16 else 0.05) * slope.norm()


def test_lower_precision_is_half_precision_of_all_resolutions() -> None:
    chosen, lowered = small_network(half_precision=2), small_network()
    lowered.lower_precision(torch.bfloat16)
    ws = draw_ws(chosen, 2)
    wanted = chosen.synthesis(ws)
    assert torch.equal(lowered.synthesis(ws), wanted)
    lowered.lower_precision(torch.bfloat16)
    assert torch.equal(lowered.synthesis(ws), wanted)


def test_lower_precision_completes_what_the_constructor_began() -> None:
    """What was float16 stays it; 8 px becomes bfloat16."""
    half = small_network(half_precision=1, half_dtype="float16")
    ws = draw_ws(half, 2)
    before = half.synthesis(ws)
    half.lower_precision(torch.bfloat16)
    wanted = small_network().synthesis(ws)
    error = [
        float((images - wanted).norm() / wanted.norm()) for images in (before, half.synthesis(ws))
    ]
    assert error[0] < 2.0**-9 < 1.5 * error[1] < 2.0**-4


def test_lower_precision_is_of_halves_alone() -> None:
    generator = small_network()
    with pytest.raises(LmexpError, match=r"precision: torch.float64, .* choose one of the former"):
        generator.lower_precision(torch.float64)
    assert torch.equal(
        generator.synthesis(draw_ws(generator, 1)), small_network().synthesis(draw_ws(generator, 1))
    )


def test_channels_last_gives_the_same_images() -> None:
    generator = small_network()
    ws = draw_ws(generator, 2)
    wanted = generator.synthesis(ws)
    generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(generator.synthesis(ws), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("choice", ["float32", "half_precision", "lower_precision"])
@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_synthesis_is_one_graph(architecture: Any, choice: str) -> None:
    config = small_config(architecture=architecture)
    half = int(choice == "half_precision")
    generator = StyleGAN2Network(config, make_random_state(config, 0), half_precision=half)
    if choice == "lower_precision":
        generator.lower_precision(torch.bfloat16)
    ws = draw_ws(generator, 2)
    noise = [draw(2, 1, *shape) for shape in generator.noise_shapes]
    torch._dynamo.reset()  # All networks share the code, and so the count of its compilations.
    compiled = torch.compile(generator.synthesis, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(ws, noise), generator.synthesis(ws, noise), atol=1e-5, rtol=0
    )


def test_truncation() -> None:
    generator = small_network()
    z = draw(4, 6)
    w = generator.mapping(z)
    assert torch.equal(generator.map_to_ws(z), w[:, None].repeat(1, 6, 1))
    mean = generator.w_avg.expand(4, 6, -1)
    torch.testing.assert_close(generator.map_to_ws(z, 0.0), mean)
    ws = generator.map_to_ws(z, 0.5, 2)
    torch.testing.assert_close(ws[:, 0], (w + generator.w_avg) / 2)
    assert torch.equal(ws[:, 2:], generator.map_to_ws(z)[:, 2:])


def test_noise_modes() -> None:
    const, none = small_network(), small_network(noise_mode="none")
    random, again = (small_network(noise_mode="random", noise_seed=3) for _ in range(2))
    other = small_network(noise_mode="random", noise_seed=4)
    ws = draw_ws(const, 2)
    state = torch.random.get_rng_state()
    images = [network.synthesis(ws) for network in (const, none, random, other)]
    for index, first in enumerate(images):
        assert all(not torch.equal(first, second) for second in images[:index])
    assert torch.equal(random.synthesis(ws), again.synthesis(ws))
    assert torch.equal(torch.random.get_rng_state(), state)
    zeros = [torch.zeros(1, 1, *shape) for shape in const.noise_shapes]
    torch.testing.assert_close(const.synthesis(ws, zeros), images[1])
    tensors = make_random_state(small_config(), 0)
    own = [tensors[name][None, None] for name in tensors if name.endswith(".noise")]
    torch.testing.assert_close(random.synthesis(ws, own), images[0])


def test_noise_that_is_not_optimised_is_part_of_the_weights() -> None:
    fixed = small_network(optimize_noise=False)
    assert fixed.noise_shapes == () == small_network(noise_mode="none").noise_shapes
    ws = draw_ws(fixed, 1)
    assert torch.equal(fixed.synthesis(ws), small_network().synthesis(ws))
    with pytest.raises(LmexpError, match="nothing: its noise is part of its weights"):
        fixed.synthesis(ws, [torch.zeros(1, 1, 4, 4)])


def test_a_network_without_noise() -> None:
    config = small_config(use_noise=False)
    assert not any("noise" in name for name in tensor_shapes(config))
    generator = StyleGAN2Network(config, make_random_state(config, 0), noise_mode="random")
    assert generator.noise_shapes == ()
    assert generator.synthesis(draw_ws(generator, 1)).isfinite().all()


def test_wrong_shapes_are_refused() -> None:
    generator = small_network()
    with pytest.raises(LmexpError, match=r"reads \[N, 6, 8\]"):
        generator.synthesis(torch.zeros(1, 5, 8))
    with pytest.raises(LmexpError, match="this generator takes one channel of"):
        generator.synthesis(torch.zeros(1, 6, 8), [torch.zeros(1, 1, 4, 4)])
    grey = small_config(img_channels=1)
    with pytest.raises(LmexpError, match="images of 1 channels, but a face has 3"):
        StyleGAN2Network(grey, make_random_state(grey, 0))


@pytest.mark.parametrize("spoil", ["drop", "shape", "type"])
def test_tensors_that_do_not_fit_are_named(spoil: str) -> None:
    config, name = small_config(), "synthesis.8.conv0.weight"
    tensors = make_random_state(config, 0)
    if spoil == "drop":
        del tensors[name]
    elif spoil == "shape":
        tensors[name] = tensors[name][:1]
    else:
        tensors[name] = tensors[name].long()
    with pytest.raises(LmexpError, match=rf"{name} is .*convert the checkpoint again"):
        StyleGAN2Network(config, tensors)


def test_random_state_is_the_same_everywhere() -> None:
    state = make_random_state(small_config(), 7)
    assert {name: tuple(value.shape) for name, value in state.items()} == tensor_shapes(
        small_config()
    )
    assert store.digest(state) != store.digest(make_random_state(small_config(), 8))
    # Written down once; numpy promises never to change these streams.
    assert float(state["synthesis.const"][0, 0, 0]) == pytest.approx(-0.7721112, abs=1e-6)
    large = make_random_state(small_config(z_dim=256, w_dim=256), 0)["mapping.layers.1.weight"]
    assert float(large.std()) == pytest.approx(100, rel=0.02)


def test_channel_table_is_that_of_the_papers() -> None:
    assert channel_table(1024) == {
        **dict.fromkeys((4, 8, 16, 32, 64), 512),
        128: 256,
        256: 128,
        512: 64,
        1024: 32,
    }
    assert channel_table(256, 16384)[256] == 64


def test_config_f_has_30_million_weights() -> None:
    """30.0 M without the noise maps, as the paper's config F (arXiv 1912.04958, table 1)."""
    config = StyleGAN2Config(resolution=1024, channels=channel_table(1024))
    sizes = {n: torch.Size(s).numel() for n, s in tensor_shapes(config).items()}
    trained = sum(size for name, size in sizes.items() if not name.endswith((".noise", ".w_avg")))
    assert trained == 30_370_060
    assert config.num_ws == 18 and len(config.noise_shapes) == 17


@pytest.mark.parametrize("config", [small_config(c_dim=3), small_discriminator_config(c_dim=3)])
def test_configs_survive_json(config: Any) -> None:
    assert type(config).from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "no JSON"),
        ("[1]", "unknown keys"),
        ('{"resolution": 8, "channels": {"4": 8, "8": 8}, "speed": 1}', "unknown keys .'speed'"),
        ('{"resolution": 8}', "channels missing"),
        ('{"resolution": 8, "channels": [8, 8]}', "channels: "),
        ('{"resolution": 8, "channels": {"x": 8}}', "given for the sides"),
        ('{"resolution": 8, "channels": {"4": 8, "8>": 8}}', "given for the sides"),
        ('{"resolution": 8, "channels": {"4": 8, "\u00b2": 8}}', "given for the sides"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_broken_json_is_one_line(text: str, reason: str) -> None:
    for cls in (StyleGAN2Config, StyleGAN2DiscriminatorConfig):
        with pytest.raises(LmexpError, match=reason) as caught:
            cls.from_json(text)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resolution", 12),
        ("resolution", 2**20),
        ("resolution", True),
        ("channels", {4: 8, 8: 8}),
        ("channels", {4: 8, 8: 0, 16: 8}),
        ("channels", {4: 8, 8: 10**9, 16: 8}),
        ("z_dim", 0),
        ("w_dim", 2.0),
        ("c_dim", -1),
        ("mapping_layers", 0),
        ("mapping_layers", 65),
        ("mapping_lr_multiplier", 0.0),
        ("mapping_lr_multiplier", float("nan")),
        ("mapping_features", 0),
        ("architecture", "unet"),
        ("conv_clamp", -1.0),
        ("resample_filter", (1.0,)),
        ("resample_filter", (1.0, -1.0)),
        ("resample_filter", [1.0, 1.0]),
        ("img_channels", 0),
        ("use_noise", 1),
    ],
)
def test_values_outside_their_range_are_named(key: str, value: object) -> None:
    with pytest.raises(LmexpError, match=f"StyleGAN2 {key}"):
        small_config(**{key: value})


def test_discriminator_values_outside_their_range_are_named() -> None:
    for key, value in (("mbstd_channels", 3), ("mbstd_group_size", 0), ("cmap_dim", 0)):
        with pytest.raises(LmexpError, match=f"StyleGAN2 {key}"):
            small_discriminator_config(**{key: value})
    with pytest.raises(LmexpError, match="embed_features"):
        small_discriminator_config(c_dim=2, mapping_layers=0, embed_features=5)


@pytest.mark.parametrize("taps", [(1, 1), (1, 2, 3), (1, 3, 3, 1), (1, 2, 3, 4, 5)])
def test_low_pass_resampling_by_its_definition(taps: tuple[float, ...]) -> None:
    """Insert zeros, convolve, keep every other: written out pixel by pixel, in one dimension."""
    filter_ = [tap / sum(taps) for tap in taps]
    signal = draw(6)
    low_pass = LowPass(taps)
    plane = signal[:, None] * signal[None]

    def at(values: list[float], index: int) -> float:
        return values[index] if 0 <= index < len(values) else 0.0

    spread = [float(signal[index // 2]) if index % 2 == 0 else 0.0 for index in range(12)]
    lead = (len(taps) + 1) // 2 - len(taps) + 1
    up = torch.tensor(
        [
            2 * sum(tap * at(spread, x - lead - k) for k, tap in enumerate(filter_))
            for x in range(12)
        ]
    )
    torch.testing.assert_close(low_pass.upsample(plane[None, None])[0, 0], up[:, None] * up[None])
    lead = (len(taps) - 1) // 2 - len(taps) + 1
    dense = [float(value) for value in signal]
    down = torch.tensor(
        [sum(tap * at(dense, 2 * x - lead - k) for k, tap in enumerate(filter_)) for x in range(3)]
    )
    torch.testing.assert_close(
        low_pass.downsample(plane[None, None])[0, 0], down[:, None] * down[None]
    )


def test_component_reads_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    made = write_checkpoint(path)
    generator = StyleGAN2(str(path))
    assert isinstance(generator, Generator) and generator.resolution == 16
    network = StyleGAN2Network(made.generator, made.tensors)
    ws = draw_ws(generator, 2)
    assert torch.equal(generator.synthesis(ws), network.synthesis(ws))
    own = {n: t for n, t in made.tensors.items() if not n.startswith("discriminator.")}
    assert generator.weights_sha256 == store.digest(own)
    assert made.discriminator is not None
    discriminator = StyleGAN2Discriminator(made.discriminator, made.tensors)
    images = generator.synthesis(ws)
    assert torch.equal(generator.discriminator()(images), discriminator(images))


def test_guide_writes_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = Path(__file__).parents[2] / "docs" / "bring_your_own_checkpoint.md"
    (block,) = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(guide), "exec"), {})
    generator = StyleGAN2("mine.safetensors")
    assert generator.resolution == 64
    assert generator.synthesis(draw_ws(generator, 1)).isfinite().all()


def test_component_without_discriminator(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    write_checkpoint(path, with_discriminator=False)
    with pytest.raises(LmexpError, match="it holds no discriminator"):
        StyleGAN2(str(path)).discriminator()


def test_classes(tmp_path: Path) -> None:
    path = tmp_path / "classes.safetensors"
    write_checkpoint(path, c_dim=3)
    first, last = StyleGAN2(str(path), class_index=0), StyleGAN2(str(path), class_index=2)
    z = draw(2, 6)
    assert not torch.equal(first.mapping(z), last.mapping(z))
    images = draw(2, 3, 16, 16)
    assert not torch.equal(first.discriminator()(images), last.discriminator()(images))
    for index in (None, 3):
        with pytest.raises(LmexpError, match="choose a class from 0 to 2"):
            StyleGAN2(str(path), class_index=index)
    plain = tmp_path / "plain.safetensors"
    write_checkpoint(plain)
    with pytest.raises(LmexpError, match="knows no classes"):
        StyleGAN2(str(plain), class_index=0)


def test_random_component_has_a_discriminator() -> None:
    generator = StyleGAN2Random(16, 64, 8, latent_dim=8, mapping_layers=1, seed=3)
    again = StyleGAN2Random(16, 64, 8, latent_dim=8, mapping_layers=1, seed=3)
    assert generator.weights_sha256 == again.weights_sha256
    images = generator.synthesis(draw_ws(generator, 3))
    network = generator.discriminator()
    logits = network(images)
    assert logits.shape == (3,) and logits.isfinite().all() and logits.std() > 0


def test_verdicts_of_a_batch_are_strangers_unless_grouped() -> None:
    config = small_discriminator_config()
    network = StyleGAN2Discriminator(config, make_random_state(config, 0))
    images = draw(4, 3, 16, 16)
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(network(images), alone)
    torch.testing.assert_close(network(images[:1], None), alone[:1])
    assert (network(images, 4) - alone).abs().max() > 1e-3
    torch.testing.assert_close(network(images, None), network(images, 4))
    # Image n is of group n mod 2.
    torch.testing.assert_close(network(images, 2)[::2], network(images[::2], 2))
    with pytest.raises(LmexpError, match="3 images are no multiple"):
        network(images[:3], 2)
    with pytest.raises(LmexpError, match=r"reads \[N, 3, 16, 16\]"):
        network(images[..., :8])


def test_fields_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        small_config().resolution = 8  # type: ignore[misc]
    assert json.loads(small_config().to_json())["channels"] == {"4": 8, "8": 8, "16": 4}


@pytest.mark.parametrize("half", [False, True])
def test_what_is_compiled_is_the_whole_unless_it_has_kernels(half: bool) -> None:
    network = StyleGAN2Random(resolution=32, channel_base=512, channel_max=32, latent_dim=32)
    ws = torch.randn(2, network.num_ws, network.w_dim)
    if half:
        network.lower_precision(torch.bfloat16)
    expected = network.synthesis(ws)
    calls: list[object] = []

    def fuse(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counted(*tensors: Any) -> torch.Tensor:
            calls.append(function)
            return function(*tensors)

        return counted

    network.compile_regions(fuse)
    assert torch.equal(network.synthesis(ws), expected)
    assert len(calls) == (0 if half else 1)
