"""What a loss term is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from lmexp.acceleration import PLAIN, Acceleration
from lmexp.draws import Draws
from lmexp.generators.protocol import Generator
from lmexp.landmarks.framing import average
from lmexp.landmarks.jitter import look_through
from lmexp.landmarks.protocol import HeatmapNetwork
from lmexp.latents import LatentStatistics


@dataclass(frozen=True)
class Context:
    """The frozen objects of an experiment, the same for every job of a batch.

    Attributes:
        acceleration: of the terms' own networks and functions.
    """

    generator: Generator
    heatmap_network: HeatmapNetwork
    latent_statistics: LatentStatistics
    acceleration: Acceleration = PLAIN

    def accelerated(self, acceleration: Acceleration) -> Context:
        """The same objects as the steps of a projection use them."""
        return Context(
            generator=acceleration.network(self.generator),
            heatmap_network=acceleration.network(self.heatmap_network),
            latent_statistics=self.latent_statistics,
            acceleration=acceleration,
        )


@dataclass(frozen=True)
class Targets:
    """What the images of a batch shall become; row k belongs to job k.

    Attributes:
        look: [N, 3, R, R] in [-1, 1], aligned, R the generator's resolution.
        look_landmarks: [N, 68, 2], x then y, px of the aligned image.
        expression: as `look`; None while the look alone is inverted.
        expression_landmarks: as `look_landmarks`; None with `expression`.
        landmark_weights: [N, 68], λ_landmark spread over the points of its groups, to be multiplied
            by a candidate's `landmark_factors`; None with `expression`.
    """

    look: Tensor
    look_landmarks: Tensor
    expression: Tensor | None = None
    expression_landmarks: Tensor | None = None
    landmark_weights: Tensor | None = None

    def expression_of(self, k: int) -> tuple[Tensor, Tensor]:
        """Job k's expression, of targets that have one: [3, R, R], and its landmarks [68, 2]."""
        assert self.expression is not None and self.expression_landmarks is not None
        return self.expression[k], self.expression_landmarks[k]


@dataclass
class Candidate:
    """One step's images and latents; what several terms need is computed once.

    Attributes:
        images: [N, 3, R, R], nominally in [-1, 1], not clamped.
        ws: [N, num_ws, w_dim], the latents that are optimised, without the ramped
            exploration noise that `images` were rendered with.
        noise_bufs: one [N, 1, h, w] per noise map of the generator.
        step: 0-based index of the optimisation step. Within a CUDA graph terms are called once
            for all steps: what is to change with them comes from `draws`.
        seeds: one per job; random views derive from them.
        draws: the step's random numbers; None makes them from `seeds` and `step`.
        landmark_factors: [68], the step's factors of `Targets.landmark_weights`; None: all are 1.
        average: `lmexp.landmarks.framing.average`, perhaps compiled.
    """

    images: Tensor
    ws: Tensor
    noise_bufs: tuple[Tensor, ...]
    step: int
    heatmap_network: HeatmapNetwork = field(repr=False)
    seeds: tuple[int, ...] = ()
    draws: Draws | None = field(default=None, repr=False)
    landmark_factors: Tensor | None = field(default=None, repr=False)
    average: Callable[[Tensor, int], Tensor] = field(default=average, repr=False)
    _seen: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _averaged: dict[int, tuple[Tensor, torch.cuda.Event | None]] = field(
        default_factory=dict, init=False, repr=False
    )

    @cached_property
    def heatmaps(self) -> Tensor:
        """[N, 68, 64, 64], the landmark network's answer to `images`."""
        side = getattr(self.heatmap_network, "side", None)
        return self.heatmap_network(self.images if side is None else self.averaged(side))

    def averaged(self, side: int) -> Tensor:
        """`images` averaged over areas, [N, 3, side, side]; themselves where they are no larger.

        Terms that ask for the same side share the pass through the large images, there and back,
        also when they are computed on different streams.
        """
        if self.images.shape[-1] <= side:
            return self.images
        if side not in self._averaged:
            made, done = self.average(self.images, side), None
            if made.is_cuda:
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record()
            self._averaged[side] = made, done
        found, done = self._averaged[side]
        if done is not None:
            torch.cuda.current_stream(found.device).wait_event(done)
        return found

    def see(self, expression: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
        """Heat maps of `images` and of the expression, through the same view of each job.

        Terms that ask for the same jitter share one pass of the network.

        Args:
            expression: [N, 3, R, R] in [-1, 1], the same at every call.
            jitter: > 0, see `lmexp.landmarks.jitter`.

        Returns:
            Two [N, 68, 64, 64]; the second needs no gradient.
        """
        if jitter not in self._seen:
            draws = self.draws or Draws(self.seeds, self.images.device, self.step)
            views = draws.views(jitter)
            with torch.no_grad():
                wanted = self.heatmap_network(look_through(expression, views))
            self._seen[jitter] = (self.heatmap_network(look_through(self.images, views)), wanted)
        return self._seen[jitter]


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


@runtime_checkable
class CheckedTerm(Protocol):
    """A term that can tell, before anything is computed, that `bind` would refuse."""

    def check(self, generator: Generator) -> None:
        """Find out whether the term has all it needs; called only if its weight is not 0.

        Raises:
            LmexpError: it has not.
        """
        ...
