"""`experiment=reference` beside the published projectors, step by step.

The numbers in `tests/data/reference_projector.npz` were recorded from `projector.py` and
`projector_video.py` of lukasuz/stylegan2-landmark-projection as they are published, run on a CPU in
float32 with NVIDIA's networks, the weights of `make_random_state`, the stand-ins of
`reference_networks.py` in the place of vgg16.pt and the FAN, and an exploration noise of 0. Per
step: each term before its weight, and the total; also the latents after every tenth step
(`projector`) or the last one (`frame0`, `frame1`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from reference_networks import Heatmaps, Trunk, draw, draw_picture
from torch import Tensor

from lmexp.composition import conf_folder
from lmexp.config import Experiment, validate
from lmexp.generators.stylegan2 import StyleGAN2Network
from lmexp.generators.stylegan2_config import (
    StyleGAN2Config,
    StyleGAN2DiscriminatorConfig,
    channel_table,
)
from lmexp.generators.stylegan2_discriminator import StyleGAN2Discriminator
from lmexp.generators.stylegan2_layers import make_random_state
from lmexp.landmarks import groups
from lmexp.latents import Latents, LatentStatistics, measure, start_at_mean
from lmexp.losses.objective import Objective
from lmexp.losses.protocol import Context, Targets, Term
from lmexp.projection import Step, project
from lmexp.recording.run_folder import RunFolder
from lmexp.schedule import Schedule

CPU = torch.device("cpu")
PUBLISHED = np.load(Path(__file__).parents[1] / "data" / "reference_projector.npz")
STEPS = 50


class Generator(StyleGAN2Network):
    """Random weights of seed 1, and a discriminator of seed 2."""

    def __init__(self, side: int, optimize_noise: bool = True) -> None:
        config = StyleGAN2Config(
            z_dim=32,
            w_dim=32,
            resolution=side,
            channels=channel_table(side, channel_base=1024, channel_max=8),
            mapping_layers=2,
        )
        super().__init__(config, make_random_state(config, 1), optimize_noise=optimize_noise)

    def discriminator(self) -> StyleGAN2Discriminator:
        config = StyleGAN2DiscriminatorConfig(
            resolution=self.resolution, channels=self.config.channels
        )
        return StyleGAN2Discriminator(config, make_random_state(config, 2))


def compose_reference(*overrides: str) -> Experiment:
    fixed = ["experiment=reference", f"optimizer.steps={STEPS}", "optimizer.noise_factor=0"]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return validate(compose("config", overrides=[*fixed, *overrides]))


def as_image(seed: int, side: int) -> Tensor:
    """A picture, [1, 3, side, side] in [-1, 1]."""
    picture = torch.from_numpy(draw_picture(seed, side))
    return picture.permute(2, 0, 1)[None].float() / (255 / 2) - 1


def start_from(generator: Generator, config: Experiment, statistics: LatentStatistics) -> Latents:
    """At the mean, with the noise maps that the published code was given."""
    space = config.latent.space
    mean = start_at_mean(generator, statistics, space=space, seeds=[0], device=CPU)
    noise_bufs = [draw(400 + i, 1, 1, *shape) for i, shape in enumerate(generator.noise_shapes)]
    return Latents(mean.ws, tuple(noise_bufs))


def follow(
    config: Experiment,
    generator: Generator,
    start: Latents,
    statistics: LatentStatistics,
    expression: int,
) -> tuple[Latents, dict[str, list[float]], list[Tensor]]:
    """Project; also each step's raw terms and total, and its latents."""
    context = Context(generator, Heatmaps(), statistics)
    side = generator.resolution
    nowhere = torch.zeros(1, 68, 2)
    weights = groups.expand(config.landmark_weights.model_dump())[None]
    targets = Targets(as_image(1, side), nowhere, as_image(expression, side), nowhere, weights)
    terms: dict[str, Term] = {name: spec.build() for name, spec in config.loss.items()}
    factors = {name: term.weight for name, term in terms.items()}
    objective = Objective.bind(terms, [factors], context, targets)
    losses: dict[str, list[float]] = {name: [] for name in (*objective.names, "total")}
    latents: list[Tensor] = []

    def record(step: Step) -> None:
        for name, value in {**step.losses.raw, "total": step.losses.total}.items():
            losses[name].append(float(value.detach()))
        latents.append(step.states(0)["parameter_0"])

    schedule = Schedule(**config.optimizer.model_dump())
    final = project(context, objective, start, schedule, seeds=[0], callback=record)
    return final, losses, latents


def assert_follows(losses: dict[str, list[float]], run: str, rtol: float = 1e-3) -> None:
    for name, values in losses.items():
        np.testing.assert_allclose(values, PUBLISHED[f"{run}_{name}"], rtol, err_msg=name)


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmexp.losses.lpips.load_network", lambda name: Trunk())


def test_follows_the_published_projector() -> None:
    # 512 px, so that both networks are shown images averaged down to 256.
    config = compose_reference()
    assert set(config.loss) == {"lpips", "landmarks", "noise"}
    generator = Generator(512)
    statistics = measure(generator, config.latent.samples, config.latent.samples_seed, CPU)
    assert statistics.w_std == pytest.approx(float(PUBLISHED["projector_w_std"]), rel=1e-5)
    start = start_from(generator, config, statistics)
    assert start.ws.shape == (1, 1, 32)
    _, losses, latents = follow(config, generator, start, statistics, expression=2)
    assert_follows(losses, "projector")
    # The first step's learning rate is 0: these are w_avg, from the same draws.
    published = PUBLISHED["projector_ws"]
    np.testing.assert_allclose(latents[0][0], published[0], atol=1e-5)
    assert np.abs(published[-1] - published[0]).max() > 1
    np.testing.assert_allclose(torch.stack(latents[9::10])[:, 0], published[1:], atol=2e-2)


def test_follows_the_published_video_projector(tmp_path: Path) -> None:
    terms = "lpips,landmarks,noise,discriminator,fidelity,smoothness"
    # Both latent distances have a kink where they are least, which the published learning rate,
    # 0.1, leaps to and fro over: at the published weights, the published code leaves its own path
    # by 4 % if its noise maps change by 1e-6. Hence the lower rate, and lower weights of those two.
    common = (
        f"loss=[{terms}]",
        "latent=w_plus",
        "optimizer.learning_rate=0.005",
        "loss.discriminator.weight=1",
        "loss.fidelity.weight=0.005",
    )
    # The first frame: no frame before it, noise maps are optimised.
    config = compose_reference(*common, "loss.smoothness.weight=0")
    generator = Generator(64)
    statistics = measure(generator, config.latent.samples, config.latent.samples_seed, CPU)
    start = start_from(generator, config, statistics)
    first, losses, _ = follow(config, generator, start, statistics, expression=2)
    assert set(losses) == {*terms.split(","), "total"} - {"smoothness"}
    assert first.ws.shape == (1, generator.num_ws, 32)
    assert_follows(losses, "frame0")
    np.testing.assert_allclose(first.ws, PUBLISHED["frame0_ws"], atol=2e-2)
    # The second: from the first one's latents and near them. Its noise maps are not optimised, and
    # are the checkpoint's own again: the published code optimises those of a copy of the generator.
    RunFolder(tmp_path).write_projection(first.ws.numpy())
    frame_before = (f"loss.smoothness.previous={tmp_path}", "loss.smoothness.weight=0.005")
    config = compose_reference(*common, *frame_before)
    kept = Generator(64, optimize_noise=False)
    second, losses, _ = follow(config, kept, Latents(first.ws, ()), statistics, expression=3)
    # The published total counts the noise maps, though nothing of it is optimised any more.
    assert losses.pop("noise") == [0.0] * STEPS
    constant = config.loss["noise"].keywords["weight"] * PUBLISHED["frame1_noise"]
    losses["total"] = list(np.array(losses["total"]) + constant)
    assert_follows(losses, "frame1")
    np.testing.assert_allclose(second.ws, PUBLISHED["frame1_ws"], atol=2e-2)
