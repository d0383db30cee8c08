"""The weighted sum of a projection's terms, job by job."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets, Term


@dataclass(frozen=True)
class Losses:
    """One step's losses; every tensor is [N], row k job k's own.

    Attributes:
        raw: each term as it was computed.
        weighted: each term times its job's weight.
        total: the sum of the weighted terms, what is minimised.
    """

    raw: Mapping[str, Tensor]
    weighted: Mapping[str, Tensor]
    total: Tensor


class Objective:
    """Terms that are bound to their targets, and each job's weight of each."""

    def __init__(
        self, terms: Mapping[str, tuple[BoundTerm, Tensor]], of_expression: Collection[str] = ()
    ) -> None:
        self._terms = dict(terms)
        self._of_expression = frozenset(of_expression)
        self._aside: torch.cuda.Stream | None = None

    @classmethod
    def bind(
        cls,
        terms: Mapping[str, Term],
        weights: Sequence[Mapping[str, float]],
        context: Context,
        targets: Targets,
    ) -> Objective:
        """Bind terms to the jobs' targets.

        Args:
            terms: by name; their own `weight` is not read here.
            weights: each job's weight of each term. A term whose weight is 0 for every job
                is left out before it computes anything.
            targets: row k for job k. Without an expression, the terms that need one are
                left out too.
        """
        bound: dict[str, tuple[BoundTerm, Tensor]] = {}
        for name, term in terms.items():
            per_job = torch.tensor([job[name] for job in weights]).to(targets.look)
            if not per_job.any() or (term.needs_expression and targets.expression is None):
                continue
            bound[name] = (term.bind(context, targets), per_job)
        return cls(bound, [name for name in bound if terms[name].needs_expression])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._terms)

    def __call__(self, candidate: Candidate, expression_factor: Tensor | float = 1.0) -> Losses:
        """One step's losses.

        Args:
            expression_factor: ≥ 0, times the weights of the terms that need the expression;
                a number or one per job.
        """
        raw = self._evaluate(candidate)
        weighted = {name: raw[name] * weight for name, (_, weight) in self._terms.items()}
        if isinstance(expression_factor, Tensor) or expression_factor != 1:
            weighted |= {name: weighted[name] * expression_factor for name in self._of_expression}
        return Losses(raw=raw, weighted=weighted, total=torch.stack(list(weighted.values())).sum(0))

    def _evaluate(self, candidate: Candidate) -> dict[str, Tensor]:
        names = [name for name in self._terms if name in self._of_expression]
        others = [name for name in self._terms if name not in self._of_expression]
        on_cuda = any(weight.is_cuda for _, weight in self._terms.values())
        if not (on_cuda and names and others):
            return {name: term(candidate) for name, (term, _) in self._terms.items()}
        # The landmark network is many small kernels, which leave room for the look's terms beside
        # them; its backward pass takes the same stream by itself.
        here = torch.cuda.current_stream(candidate.images.device)
        if self._aside is None:
            self._aside = torch.cuda.Stream(candidate.images.device, priority=-1)  # type: ignore[no-untyped-call]
        self._aside.wait_stream(here)
        with torch.cuda.stream(self._aside):
            found = {name: self._terms[name][0](candidate) for name in names}
        found |= {name: self._terms[name][0](candidate) for name in others}
        here.wait_stream(self._aside)
        return {name: found[name] for name in self._terms}
