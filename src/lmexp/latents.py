"""The style space W: its statistics, and where a projection starts in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.generators.protocol import Generator


@dataclass(frozen=True)
class LatentStatistics:
    """Moments of W, from samples of the mapping network.

    Attributes:
        samples: [S, w_dim], mapped standard-normal z.
        w_avg: [w_dim], their mean.
        w_std: √(Σ ‖w − w_avg‖² / S), the scale of the exploration noise. It is the
            standard deviation of the whole vector, not of one component (StyleGAN2,
            arXiv 1912.04958, appendix D).
    """

    samples: Tensor
    w_avg: Tensor
    w_std: float


@dataclass(frozen=True)
class Latents:
    """The optimised variables of a batch; row k belongs to job k.

    Attributes:
        ws: [N, L, w_dim] with L = 1 in W and L = num_ws in W+.
        noise_bufs: one [N, 1, h, w] per noise map of the generator.
    """

    ws: Tensor
    noise_bufs: tuple[Tensor, ...]


def measure(
    generator: Generator, samples: int, seed: int, device: torch.device
) -> LatentStatistics:
    """Draw `samples` z with `seed`, on the CPU so that every device sees the same, and map them.

    With 10,000 samples of seed 123 the z are NVIDIA's projector's, number by number.

    Args:
        generator: whose mapping network it is.
        samples: how many.
        seed: in [0, 2**32).
        device: where the generator is.
    """
    # NumPy's old stream, which is frozen, because the published projectors draw from it.
    draw = np.random.RandomState(seed).randn(samples, generator.z_dim)
    z = torch.from_numpy(draw.astype(np.float32))
    with torch.no_grad():
        w = torch.cat([generator.mapping(part.to(device)) for part in torch.split(z, 2048)])
    w_avg = w.mean(0)
    w_std = float((w.double() - w_avg.double()).square().sum(1).mean().sqrt())
    return LatentStatistics(samples=w, w_avg=w_avg, w_std=w_std)


def derive_seed(seed: int, *purpose: int | str) -> int:
    """A seed for one purpose (and step) of one job, independent of every other.

    Each draw has its own generator, so a job's random numbers depend neither on the
    batch it is in nor on how often it was stopped and resumed.
    """
    text = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def draw_normal(shape: Sequence[int], seed: int, *purpose: int | str) -> Tensor:
    """Standard-normal draw on the CPU from `derive_seed(seed, *purpose)`."""
    generator = torch.Generator().manual_seed(derive_seed(seed, *purpose))
    return torch.randn(tuple(shape), generator=generator)


def start_at_mean(
    generator: Generator,
    statistics: LatentStatistics,
    *,
    space: str,
    seeds: Sequence[int],
    device: torch.device,
) -> Latents:
    """w_avg in every row, and unit normal noise maps from each job's own seed.

    Args:
        space: "w" for one style vector per image, "w_plus" for one per layer.
        seeds: one per job.
    """
    rows = 1 if space == "w" else generator.num_ws
    ws = statistics.w_avg.to(device).expand(len(seeds), rows, -1).clone()
    noise_bufs = tuple(
        torch.stack([draw_normal((1, *shape), seed, "noise", index) for seed in seeds]).to(device)
        for index, shape in enumerate(generator.noise_shapes)
    )
    return Latents(ws=ws, noise_bufs=noise_bufs)


def truncate(latents: Latents, mean: Latents, psi: float) -> Latents:
    """Latents moved towards the mean: psi 1 leaves them where they are, 0 is the mean.

    Noise maps are mixed so that they stay as strong as they are.
    """
    kept = (1 - psi**2) ** 0.5
    return Latents(
        ws=torch.lerp(mean.ws, latents.ws, psi),
        noise_bufs=tuple(
            psi * own + kept * other
            for own, other in zip(latents.noise_bufs, mean.noise_bufs, strict=True)
        ),
    )


def expand(ws: Tensor, num_ws: int) -> Tensor:
    """[N, 1 or num_ws, w_dim] -> [N, num_ws, w_dim]."""
    return ws.expand(-1, num_ws, -1)


def mark_moving(moving_ws: tuple[int, int] | None, ws: Tensor) -> Tensor | None:
    """1 for the ws that a projection moves, 0 for those that stay; None: all move.

    Args:
        moving_ws: first and one past the last of them, as far as there are so many.
        ws: [N, L, w_dim].

    Returns:
        [L, 1], of `ws`'s dtype, where it is.

    Raises:
        LmexpError: none of the L is among them.
    """
    if moving_ws is None:
        return None
    first, end = moving_ws
    if first >= min(end, ws.shape[1]):
        raise LmexpError(
            f"latent.moving_ws: [{first}, {end}] holds none of the generator's {ws.shape[1]} ws, "
            "which count from 0; choose an earlier first one"
        )
    moves = ws.new_zeros(ws.shape[1], 1)
    moves[first:end] = 1
    return moves
