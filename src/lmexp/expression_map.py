"""What a generator's own samples say of latents and landmarks, and a head start by it.

Two mouths that lie far apart, one shut and one wide open, are not joined by a slope that a
heat map could follow. But the generator itself knows how its latents move when landmarks do: over
samples z of Gaussian space and their landmarks l,

    l ≈ z B + c,    residual covariance R,    z's covariance S,

so that the most probable change of z for a wanted change of l is the conditional mean

    Δz = Δl · (S B (Bᵀ S B + R + W)⁻¹)ᵀ,

with W the leave that landmarks of little weight have to stay where they are. No gradient, no
training: one regression a generator, kept in the cache folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.faces.agreement import STEADY
from lmexp.generators.protocol import Generator
from lmexp.landmarks.decoding import decode
from lmexp.landmarks.protocol import HeatmapNetwork
from lmexp.latents import LatentStatistics, expand
from lmexp.losses.prior import GaussianSpace
from lmexp.weights import store
from lmexp.weights.converters import first_line

log = logging.getLogger("lmexp")

TRUNCATION = 0.8
"""ψ of the samples: of untruncated ones, some are no faces and their landmarks noise."""

OUTLIER = 0.25
"""A sample with a landmark farther than this from the mean's, in sides, is no face."""

RIDGE = 0.05
"""Added to the variances of z, against chance correlations of few samples."""

LEEWAY = 1e-6
"""Variance of a landmark of weight 1, in sides²: a thousandth of the side."""

VARIANCE_FLOOR = 1e-4
"""Of the Gaussian space that z lives in; see `losses.prior.GaussianSpace`."""

PACKAGED = "expression_map_mobile"
"""The map of the packaged generator, since a CPU would measure it for a quarter of an hour."""

SAME_MEAN = 0.02
"""Two means of W whose components differ by less belong to one mapping network; components
spread by about 0.5 and 10,000 draws leave 0.005 of it."""


@dataclass(frozen=True)
class ExpressionMap:
    """Moments of latents and landmarks over a generator's samples.

    Attributes:
        gain: [w_dim, 136], S B.
        explained: [136, 136], Bᵀ S B, the landmarks' covariance that z explains.
        residual: [136, 136], R, the one that it does not.
    """

    gain: Tensor
    explained: Tensor
    residual: Tensor

    def step(self, change: Tensor, weights: Tensor) -> Tensor:
        """The most probable Δz for wanted changes of landmarks.

        Args:
            change: [N, 68, 2], fractions of the image's side, steady landmarks laid over.
            weights: [N, 68] ≥ 0, λ_landmark; only their ratios count.

        Returns:
            [N, w_dim] in Gaussian space.
        """
        # float64: the covariances are near singular.
        largest = weights.amax(1, keepdim=True).clamp_min(1e-12)
        relative = (weights / largest).double().clamp_min(1e-3).repeat_interleave(2, dim=1)
        leave = torch.diag_embed(LEEWAY / relative)
        total = (self.explained + self.residual).double() + leave
        solved = torch.linalg.solve(total, change.flatten(1).double()[..., None])
        step: Tensor = (self.gain.double() @ solved)[..., 0].to(change.dtype)
        return step


def measure(
    generator: Generator,
    network: HeatmapNetwork,
    statistics: LatentStatistics,
    samples: int,
    *,
    batch: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> ExpressionMap:
    """Render samples, find their landmarks, regress.

    Args:
        samples: how many of `statistics.samples` are rendered.
        batch: how many at once.
        progress: told how many are done, after each batch.

    Raises:
        LmexpError: no sample is a face.
    """
    w = statistics.samples[:samples]
    w = statistics.w_avg + TRUNCATION * (w - statistics.w_avg)
    found = []
    for part in torch.split(w, batch):
        found.append(locate(generator, network, part[:, None]))
        progress(sum(map(len, found)))
    landmarks = torch.cat(found)
    centre = landmarks.median(0).values[None].expand_as(landmarks)
    points = lay_over_points(landmarks, centre).flatten(1).double()
    faces = (points - points.mean(0)).abs().amax(1) < OUTLIER
    if not faces.any():
        raise LmexpError(
            f"latent.head_start: none of the generator's {len(w)} samples looks like a face to the "
            "landmark network; go without, latent.head_start=0"
        )
    z = GaussianSpace.measure(statistics.samples, VARIANCE_FLOOR).standardise(w)[faces].double()
    z, points = z - z.mean(0), points[faces] - points[faces].mean(0)
    covariance = z.T @ z / len(z)
    ridge = covariance + RIDGE * torch.eye(len(covariance), dtype=z.dtype, device=z.device)
    slope = torch.linalg.solve(ridge, z.T @ points / len(z))
    left = points - z @ slope
    return ExpressionMap(
        gain=(covariance @ slope).float(),
        explained=(slope.T @ covariance @ slope).float(),
        residual=(left.T @ left / len(left)).float(),
    )


def find(
    generator: Generator, network: HeatmapNetwork, statistics: LatentStatistics, samples: int
) -> ExpressionMap | None:
    """The generator's map, packaged or from the cache folder; None if it is to be measured."""
    device = statistics.w_avg.device
    tensors = store.load(PACKAGED).tensors
    w_avg = tensors.pop("w_avg").to(device)
    # W is what the map is of: every image head of one mapping network shares it.
    if w_avg.shape == statistics.w_avg.shape and torch.allclose(
        w_avg, statistics.w_avg, atol=SAME_MEAN
    ):
        return ExpressionMap(**{name: t.float().to(device) for name, t in tensors.items()})
    path = _path(generator, network, samples)
    try:
        return ExpressionMap(**{name: t.to(device) for name, t in load_file(path).items()})
    except FileNotFoundError:
        return None
    except (SafetensorError, TypeError, OSError) as error:
        log.warning("%s: unreadable (%s); measured anew", path, first_line(error))
        return None


def keep(made: ExpressionMap, generator: Generator, network: HeatmapNetwork, samples: int) -> Path:
    """Write a measured map into the cache folder, where `find` looks."""
    path = _path(generator, network, samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    store.write(as_tensors(made), path)
    return path


def as_tensors(made: ExpressionMap) -> dict[str, Tensor]:
    """A map's tensors by name, on the CPU."""
    return {f.name: getattr(made, f.name).cpu().contiguous() for f in fields(made)}


def _path(generator: Generator, network: HeatmapNetwork, samples: int) -> Path:
    name = f"{generator.weights_sha256[:16]}-{network.weights_sha256[:8]}-{samples}.safetensors"
    return store.cache_folder() / "expression_maps" / name


def head_start(
    ws: Tensor,
    expression_map: ExpressionMap,
    generator: Generator,
    network: HeatmapNetwork,
    statistics: LatentStatistics,
    *,
    look_landmarks: Tensor,
    expression_landmarks: Tensor,
    weights: Tensor,
    share: float,
    rows: tuple[int, int],
) -> Tensor:
    """Latents on their way to the expression, before any optimisation.

    Args:
        ws: [N, num_ws, w_dim], the look's inversion; [N, 1, w_dim] in W.
        look_landmarks, expression_landmarks: [N, 68, 2], px of the generator's image.
        weights: [N, 68], λ_landmark.
        share: of the way that is gone, ≥ 0.
        rows: first and one past the last of `ws` that move, as far as there are so many; in W
            the one does.

    Returns:
        As `ws`.
    """
    with torch.no_grad():
        now = locate(generator, network, ws)
        side = generator.resolution
        now = lay_over_points(now, look_landmarks / side)
        wanted = lay_over_points(expression_landmarks / side, look_landmarks / side)
        step = share * expression_map.step(wanted - now, weights)
        space = GaussianSpace.measure(statistics.samples, VARIANCE_FLOOR)
        moves = ws.new_zeros(ws.shape[1])
        first, end = rows if ws.shape[1] > 1 else (0, 1)
        moves[first:end] = 1
        return space.restore(space.standardise(ws) + moves[:, None] * step[:, None])


def locate(generator: Generator, network: HeatmapNetwork, ws: Tensor) -> Tensor:
    """Landmarks [N, 68, 2] of the images of `ws` [N, 1 or num_ws, w_dim], fractions of the side."""
    with torch.no_grad():
        return decode(network(generator.synthesis(expand(ws, generator.num_ws))), 1.0)


def lay_over_points(landmarks: Tensor, onto: Tensor) -> Tensor:
    """Turn, scale and shift each face so that its steady landmarks lie on another's.

    Args:
        landmarks, onto: [N, 68, 2].
    """
    z, target = (torch.view_as_complex(points.contiguous()) for points in (landmarks, onto))
    steady, goal = z[:, STEADY], target[:, STEADY]
    centred = steady - steady.mean(1, keepdim=True)
    turn = (centred.conj() * (goal - goal.mean(1, keepdim=True))).sum(1)
    turn = turn / centred.abs().square().sum(1)
    shift = goal.mean(1) - turn * steady.mean(1)
    return torch.view_as_real(turn[:, None] * z + shift[:, None])
