"""What a loss term is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from lmexp.generators.protocol import Generator
from lmexp.landmarks.protocol import HeatmapNetwork
from lmexp.latents import LatentStatistics


@dataclass(frozen=True)
class Context:
    """The frozen objects of an experiment, the same for every job of a batch."""

    generator: Generator
    heatmap_network: HeatmapNetwork
    latent_statistics: LatentStatistics


@dataclass(frozen=True)
class Targets:
    """What the images of a batch shall become; row k belongs to job k.

    Attributes:
        look: [N, 3, R, R] in [-1, 1], aligned, R the generator's resolution.
        look_landmarks: [N, 68, 2], x then y, px of the aligned image.
        expression: as `look`; None while the look alone is inverted.
        expression_landmarks: as `look_landmarks`; None with `expression`.
        landmark_weights: [N, 68], λ_landmark spread over the points of its groups;
            None with `expression`.
    """

    look: Tensor
    look_landmarks: Tensor
    expression: Tensor | None = None
    expression_landmarks: Tensor | None = None
    landmark_weights: Tensor | None = None


@dataclass
class Candidate:
    """One step's images and latents; what several terms need is computed once.

    Attributes:
        images: [N, 3, R, R], nominally in [-1, 1], not clamped.
        ws: [N, num_ws, w_dim], the latents that are optimised, without the ramped
            exploration noise that `images` were rendered with.
        noise_bufs: one [N, 1, h, w] per noise map of the generator.
        step: 0-based index of the optimisation step.
    """

    images: Tensor
    ws: Tensor
    noise_bufs: tuple[Tensor, ...]
    step: int
    heatmap_network: HeatmapNetwork = field(repr=False)

    @cached_property
    def heatmaps(self) -> Tensor:
        """[N, 68, 64, 64], the landmark network's answer to `images`."""
        return self.heatmap_network(self.images)


BoundTerm = Callable[[Candidate], Tensor]


@runtime_checkable
class Term(Protocol):
    """One term of the loss: a class a file, its constructor keywords the yaml's keys.

    Attributes:
        weight: factor of the term in the total; 0 switches it off at no cost. The only
            setting of a term that may differ between the jobs of a batch.
        needs_expression: False for a term that is also used while the look alone is
            inverted.
    """

    weight: float
    needs_expression: ClassVar[bool]

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        """Compute what depends on the targets alone, once, without gradients.

        Returns:
            A function of a `Candidate` that gives the raw (unweighted) loss [N], one
            value per job; value k depends on row k alone.
        """
        ...
