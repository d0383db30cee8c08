"""The weighted sum: each job's own weights, and no work for what is switched off."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lmexp.landmarks.framing import average
from lmexp.losses.objective import Objective
from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets, Term


class Counted:
    """Gives job k the value `value` · (k + 1), and counts what is asked of it."""

    needs_expression: ClassVar[bool] = False

    def __init__(self, value: float) -> None:
        self.weight = 1.0
        self.value = value
        self.bound = self.evaluated = 0

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        self.bound += 1

        def evaluate(candidate: Candidate) -> Tensor:
            self.evaluated += 1
            return self.value * (1 + torch.arange(len(targets.look)))

        return evaluate


class OfTheExpression(Counted):
    needs_expression: ClassVar[bool] = True


CONTEXT: Context = None  # type: ignore[assignment]  # none of these terms looks at it
CANDIDATE: Candidate = None  # type: ignore[assignment]
PAIR = Targets(
    look=torch.zeros(2, 3, 4, 4),
    look_landmarks=torch.zeros(2, 68, 2),
    expression=torch.zeros(2, 3, 4, 4),
    expression_landmarks=torch.zeros(2, 68, 2),
    landmark_weights=torch.ones(2, 68),
)
LOOK_ALONE = Targets(look=PAIR.look, look_landmarks=PAIR.look_landmarks)


def test_every_job_has_its_own_weights() -> None:
    terms: dict[str, Term] = {"a": Counted(10), "b": Counted(1)}
    weights = [{"a": 1.0, "b": 2.0}, {"a": 0.5, "b": 0.0}]
    losses = Objective.bind(terms, weights, CONTEXT, PAIR)(CANDIDATE)
    assert losses.raw["a"].tolist() == [10, 20]
    assert losses.raw["b"].tolist() == [1, 2]
    assert losses.weighted["a"].tolist() == [10, 10]
    assert losses.weighted["b"].tolist() == [2, 0]
    assert losses.total.tolist() == [12, 10]


def test_a_term_whose_weight_is_0_for_all_is_never_bound() -> None:
    off, on = Counted(1), Counted(2)
    objective = Objective.bind({"off": off, "on": on}, [{"off": 0, "on": 1}] * 2, CONTEXT, PAIR)
    assert objective(CANDIDATE).total.tolist() == [2, 4]
    assert objective.names == ("on",)
    assert (off.bound, off.evaluated) == (0, 0)
    assert (on.bound, on.evaluated) == (1, 1)


def test_terms_of_the_expression_are_left_out_while_the_look_is_inverted() -> None:
    look, expression = Counted(1), OfTheExpression(1)
    terms: dict[str, Term] = {"look": look, "expression": expression}
    weights = [{"look": 1.0, "expression": 1.0}] * 2
    assert Objective.bind(terms, weights, CONTEXT, LOOK_ALONE).names == ("look",)
    assert expression.bound == 0
    assert Objective.bind(terms, weights, CONTEXT, PAIR).names == ("look", "expression")


def test_targets_are_bound_once_for_all_steps() -> None:
    term = Counted(1)
    objective = Objective.bind({"a": term}, [{"a": 1.0}] * 2, CONTEXT, PAIR)
    for _ in range(3):
        objective(CANDIDATE)
    assert (term.bound, term.evaluated) == (1, 3)


def test_a_factor_weighs_the_terms_of_the_expression_alone() -> None:
    terms: dict[str, Term] = {"look": Counted(10), "expression": OfTheExpression(1)}
    weights = [{"look": 1.0, "expression": 2.0}, {"look": 0.5, "expression": 4.0}]
    losses = Objective.bind(terms, weights, CONTEXT, PAIR)(CANDIDATE, 0.25)
    assert losses.raw["expression"].tolist() == [1, 2]
    assert losses.weighted["look"].tolist() == [10, 10]
    assert losses.weighted["expression"].tolist() == [0.5, 2]
    assert losses.total.tolist() == [10.5, 12]


def test_terms_share_the_average_of_large_images() -> None:
    asked: list[int] = []

    def counted(images: Tensor, side: int) -> Tensor:
        asked.append(side)
        return average(images, side)

    class Shown(torch.nn.Module):
        side = 8

        def forward(self, images: Tensor) -> Tensor:
            return images.mean(1, keepdim=True)

    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    network: Any = Shown()
    candidate = Candidate(images, images, (), 0, network, average=counted)
    halved = candidate.averaged(8)
    torch.testing.assert_close(halved, torch.nn.functional.avg_pool2d(images, 2))
    assert candidate.averaged(8) is halved
    torch.testing.assert_close(candidate.heatmaps, halved.mean(1, keepdim=True))
    assert candidate.averaged(16) is images and candidate.averaged(64) is images
    assert candidate.averaged(4).shape == (2, 3, 4, 4)
    assert asked == [8, 4]
    del Shown.side
    assert Candidate(images, images, (), 0, network).heatmaps.shape == (2, 1, 16, 16)
