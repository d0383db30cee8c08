"""The weighted sum of a projection's terms, job by job."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets, Term
from lmexp.side_streams import SideStream


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
    """Terms that are bound to their targets, and each job's weight of each.

    Args:
        terms: by name.
        weights: [T, N], row by row of `terms`.
        of_expression: the terms that need the expression.
    """

    def __init__(
        self,
        terms: Mapping[str, BoundTerm],
        weights: Tensor,
        of_expression: Collection[str] = (),
    ) -> None:
        self._terms = dict(terms)
        self._weights = weights
        self._of_expression = frozenset(of_expression)
        staged = [name in self._of_expression for name in terms]
        self._staged = torch.tensor(staged, device=weights.device)[:, None]

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
        used = {
            name: term
            for name, term in terms.items()
            if any(job[name] for job in weights)
            and not (term.needs_expression and targets.expression is None)
        }
        per_job = torch.tensor([[job[name] for job in weights] for name in used])
        return cls(
            {name: term.bind(context, targets) for name, term in used.items()},
            per_job.to(targets.look),
            [name for name, term in used.items() if term.needs_expression],
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._terms)

    def __call__(self, candidate: Candidate, expression_factor: Tensor | float = 1.0) -> Losses:
        """One step's losses.

        Args:
            expression_factor: ≥ 0, times the weights of the terms that need the expression;
                a number or one per job.
        """
        found = self._evaluate(candidate)
        # One tensor for all terms: what is done to each by itself costs a launch a term.
        raw = torch.stack(list(found.values()))
        weighted = raw * self._weights
        if isinstance(expression_factor, Tensor) or expression_factor != 1:
            weighted = torch.where(self._staged, weighted * expression_factor, weighted)
        return Losses(
            raw=dict(zip(found, raw, strict=True)),
            weighted=dict(zip(found, weighted, strict=True)),
            total=weighted.sum(0),
        )

    def _evaluate(self, candidate: Candidate) -> dict[str, Tensor]:
        names = [name for name in self._terms if name in self._of_expression]
        others = [name for name in self._terms if name not in self._of_expression]
        if not (self._weights.is_cuda and names and others):
            return {name: term(candidate) for name, term in self._terms.items()}
        # The landmark network is many small kernels, one waiting for the other, which leave room
        # for the look's terms beside them; its backward pass takes the same stream by itself.
        with SideStream(candidate.images.device, priority=-1) as aside:
            found = {name: self._terms[name](candidate) for name in names}
        beside = {name: self._terms[name](candidate) for name in others}
        aside.join(*found.values())
        found |= beside
        return {name: found[name] for name in self._terms}
