"""A plain projector, for comparison: eager float32, one image at a time, as a textbook has it.

Nothing here is clever on purpose. StyleGAN2's weights are modulated and demodulated image by
image and convolved in groups, as its paper describes and as published code does; features and
heat maps of the targets are kept, nothing else is. It computes the same losses as
`lmexp.projection.project`, which `tests/end_to_end/test_benchmark.py` holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmexp.generators.protocol import Generator
from lmexp.generators.stylegan2 import StyleGAN2Network, StyleGAN2Random
from lmexp.generators.stylegan2_layers import make_random_state
from lmexp.landmarks.groups import GROUPS
from lmexp.latents import Latents, draw_normal, expand
from lmexp.losses.landmarks import LandmarkHeatmaps
from lmexp.losses.lpips import Lpips
from lmexp.losses.noise import NoiseRegularization
from lmexp.losses.objective import Objective
from lmexp.losses.perceptual.protocol import load_network
from lmexp.losses.protocol import Candidate, Context, Targets, Term
from lmexp.schedule import Schedule

Synthesis = Callable[[Tensor, tuple[Tensor, ...]], Tensor]
Loss = Callable[[Tensor, Tensor, tuple[Tensor, ...], int], Tensor]
"""Images, ws, noise maps and the step -> the total, a scalar."""


def project_plainly(
    synthesis: Synthesis,
    loss: Loss,
    start: Latents,
    schedule: Schedule,
    *,
    num_ws: int,
    w_std: float,
    seed: int,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Latents:
    """Minimise `loss` of one image by torch.optim.Adam.

    Args:
        start: of one job, [1, ...].
        callback: called after every step with its index and the loss.
    """
    ws = start.ws.detach().clone().requires_grad_()
    noise_bufs = tuple(noise.detach().clone().requires_grad_() for noise in start.noise_bufs)
    optimizer = torch.optim.Adam([ws, *noise_bufs], betas=(schedule.beta1, schedule.beta2))
    for step in range(schedule.steps):
        optimizer.param_groups[0]["lr"] = schedule.learning_rate_at(step)
        exploration = draw_normal(ws.shape[1:], seed, "w", step)[None].to(ws)
        noisy = ws + schedule.noise_at(step) * w_std * exploration
        images = synthesis(expand(noisy, num_ws), noise_bufs)
        total = loss(images, expand(ws, num_ws), noise_bufs, step)
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for noise in noise_bufs:
                noise -= noise.mean()
                noise *= noise.square().mean().rsqrt()
        if callback is not None:
            callback(step, total.detach())
    return Latents(ws.detach(), tuple(noise.detach() for noise in noise_bufs))


class TextbookStyleGAN2:
    """The synthesis of a `StyleGAN2Random` of the skip architecture, from the same tensors.

    Args:
        generator: whose weights, and on whose device.
        seed: of its weights.
    """

    def __init__(self, generator: StyleGAN2Network, seed: int) -> None:
        config = generator.config
        assert config.architecture == "skip" and config.conv_clamp is None
        device = generator.const.device
        state = make_random_state(config, seed)
        self._tensors = {name: tensor.to(device) for name, tensor in state.items()}
        self._sides = config.sides
        taps = torch.tensor(config.resample_filter, device=device)
        self._kernel = torch.outer(taps, taps)[None, None] / taps.sum() ** 2

    def __call__(self, ws: Tensor, noise_bufs: tuple[Tensor, ...]) -> Tensor:
        """ws [N, num_ws, w_dim] and one [N, 1, h, w] per convolution -> [N, 3, R, R]."""
        noises = iter(noise_bufs)
        x = self._tensors["synthesis.const"].expand(len(ws), -1, -1, -1)
        image, layer = None, 0
        for side in self._sides:
            name = f"synthesis.{side}"
            for conv in ("conv0", "conv1") if side > 4 else ("conv1",):
                stem = f"{name}.{conv}"
                x = self._convolve(x, ws[:, layer], stem, upsample=conv == "conv0")
                x = x + next(noises) * self._tensors[f"{stem}.noise_strength"]
                x = x + self._tensors[f"{stem}.bias"][:, None, None]
                x = F.leaky_relu(x, 0.2) * 2**0.5
                layer += 1
            rgb = self._convolve(x, ws[:, layer], f"{name}.to_rgb", demodulate=False)
            rgb = rgb + self._tensors[f"{name}.to_rgb.bias"][:, None, None]
            image = rgb if image is None else self._double(image) + rgb
        assert image is not None
        return image

    def _convolve(
        self, x: Tensor, w: Tensor, name: str, demodulate: bool = True, upsample: bool = False
    ) -> Tensor:
        """arXiv 1912.04958, section 2.2: one kernel an image, in groups."""
        affine, weight = self._tensors[f"{name}.affine.weight"], self._tensors[f"{name}.weight"]
        styles = w @ affine.T / affine.shape[1] ** 0.5 + self._tensors[f"{name}.affine.bias"]
        kernels = weight / weight[0].numel() ** 0.5 * styles[:, None, :, None, None]
        if demodulate:
            kernels = kernels * (kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        count, out, into, side, _ = kernels.shape
        x = x.reshape(1, count * into, *x.shape[2:])
        if upsample:
            kernels = kernels.transpose(1, 2).reshape(count * into, out, side, side)
            x = F.conv_transpose2d(x, kernels, stride=2, groups=count)
            blur = 4 * self._kernel.flip(2, 3).expand(count * out, 1, -1, -1)
            x = F.conv2d(x, blur, padding=1, groups=count * out)
        else:
            x = F.conv2d(x, kernels.flatten(0, 1), padding=side // 2, groups=count)
        return x.reshape(count, out, *x.shape[2:])

    def _double(self, image: Tensor) -> Tensor:
        kernel = 4 * self._kernel.expand(image.shape[1], 1, -1, -1)
        return F.conv_transpose2d(image, kernel, stride=2, padding=1, groups=image.shape[1])


class PublishedLoss:
    """The loss of `experiment=reference`, written down: LPIPS + λ · heat maps + 1e5 · noise.

    Args:
        terms: the recipe's, for their weights and the name of the perceptual network.
        heatmap_network: the plain one.
        targets: of one job.
    """

    def __init__(
        self, terms: Mapping[str, Term], heatmap_network: nn.Module, targets: Targets
    ) -> None:
        lpips, landmarks, noise = terms["lpips"], terms["landmarks"], terms["noise"]
        assert isinstance(lpips, Lpips) and isinstance(landmarks, LandmarkHeatmaps)
        assert isinstance(noise, NoiseRegularization)
        assert targets.expression is not None and targets.landmark_weights is not None
        self._factors = (lpips.weight, landmarks.weight, noise.weight)
        trunk = load_network(lpips.network)
        assert isinstance(trunk, nn.Module)
        plain = torch.contiguous_format
        self._trunk = trunk.to(targets.look.device, memory_format=plain)  # type: ignore[call-overload]
        self._fan = copy.deepcopy(heatmap_network).to(memory_format=plain)
        weights = targets.landmark_weights.clone()
        weights[:, 30] = weights[:, GROUPS["lower_nose"][0]]  # the tip of the nose, as published
        self._weights = weights[:, :, None, None]
        with torch.no_grad():
            self._features = self._read(targets.look)
            self._heatmaps = self._fan(self._stretch(targets.expression))

    def __call__(
        self, images: Tensor, ws: Tensor, noise_bufs: tuple[Tensor, ...], step: int
    ) -> Tensor:
        distance = images.new_zeros(())
        heads = self._trunk.channel_weights
        for mine, wanted, head in zip(self._read(images), self._features, heads, strict=True):
            squares = (mine - wanted).square() * head[:, None, None]
            distance = distance + squares.sum(1).mean()
        difference = (self._fan(self._stretch(images)) - self._heatmaps) * self._weights
        landmarks = difference.square().sum().sqrt()
        regulariser = images.new_zeros(())
        for noise in noise_bufs:
            while True:
                for axis in (2, 3):
                    regulariser = regulariser + (noise * noise.roll(1, axis)).mean() ** 2
                if noise.shape[2] <= 8:
                    break
                noise = F.avg_pool2d(noise, 2)
        a, b, c = self._factors
        total: Tensor = a * distance + b * landmarks + c * regulariser
        return total

    def _read(self, images: Tensor) -> list[Tensor]:
        features = self._trunk.features(_shrink(images))
        return [f / (f.square().sum(1, keepdim=True) + 1e-20).sqrt() for f in features]

    def _stretch(self, images: Tensor) -> Tensor:
        images = _shrink(images)
        return (images - images.min()) / (images.max() - images.min()) * 2 - 1


def _shrink(images: Tensor) -> Tensor:
    return F.interpolate(images, size=(256, 256), mode="area") if images.shape[2] > 256 else images


def eager_loss(terms: Mapping[str, Term], context: Context, targets: Targets) -> Loss:
    """The terms' own code, for recipes without a textbook: eager, of one job."""
    weights = [{name: term.weight for name, term in terms.items()}]
    objective = Objective.bind(terms, weights, context, targets)

    def loss(images: Tensor, ws: Tensor, noise_bufs: tuple[Tensor, ...], step: int) -> Tensor:
        candidate = Candidate(images, ws, noise_bufs, step, context.heatmap_network, seeds=(0,))
        return objective(candidate).total.sum()

    return loss


def choose(
    recipe_is_published: bool, terms: Mapping[str, Term], context: Context, targets: Targets
) -> tuple[Synthesis, Loss]:
    """The plain synthesis and loss of a recipe; job 0 of the targets."""
    generator: Generator = context.generator
    if isinstance(generator, StyleGAN2Random):
        synthesis: Synthesis = TextbookStyleGAN2(generator, seed=0)
    else:
        synthesis = generator.synthesis
    network = context.heatmap_network
    if recipe_is_published and isinstance(network, nn.Module):
        return synthesis, PublishedLoss(terms, network, targets)
    return synthesis, eager_loss(terms, context, targets)
