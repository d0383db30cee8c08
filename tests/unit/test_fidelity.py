"""The fidelity term against a case by hand and numpy; nothing of it is shared between jobs."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from lmexp.latents import LatentStatistics
from lmexp.losses.fidelity import LatentFidelity, latent_distance
from lmexp.losses.objective import Objective
from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets

UNUSED = cast(Any, None)


def bind(w_avg: Tensor) -> BoundTerm:
    context = Context(UNUSED, UNUSED, LatentStatistics(w_avg[None], w_avg, 1.0))
    images = w_avg.new_zeros(1, 3, 8, 8)
    return LatentFidelity().bind(context, Targets(images, images.new_zeros(1, 68, 2)))


def candidate(ws: Tensor) -> Candidate:
    return Candidate(ws.new_zeros(len(ws), 3, 8, 8), ws, (), 0, UNUSED)


def test_by_hand() -> None:
    term = bind(torch.tensor([1.0, -2.0]))
    # Two layers: |3 − 1| + |−2 + 2| and |1 − 1| + |2 + 2|; a zero counts √1e-6 = 1e-3.
    ws = torch.tensor([[[3.0, -2.0], [1.0, 2.0]], [[1.0, -2.0], [1.0, -2.0]]])
    assert term(candidate(ws)).tolist() == pytest.approx([6.002, 0.004], rel=1e-5)


def test_by_numpy_and_gradient() -> None:
    draw = np.random.default_rng(0)
    ws, w_avg = draw.standard_normal((3, 5, 7)), draw.standard_normal(7)
    expected = np.sqrt((ws - w_avg) ** 2 + 1e-6).sum((1, 2))
    term = bind(torch.from_numpy(w_avg))
    np.testing.assert_allclose(term(candidate(torch.from_numpy(ws))), expected, rtol=1e-12)
    at = torch.from_numpy(ws).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: term(candidate(w)), (at,))


def test_gradient_is_zero_at_the_mean_and_bounded_far_from_it() -> None:
    w_avg = torch.zeros(4)
    for ws, slope in ((torch.zeros(1, 2, 4), 0.0), (torch.full((1, 2, 4), 1e4), 1.0)):
        ws.requires_grad_()
        (gradient,) = torch.autograd.grad(latent_distance(ws, w_avg).sum(), ws)
        torch.testing.assert_close(gradient, torch.full_like(ws, slope))


def test_a_job_alone_has_what_it_has_in_a_batch() -> None:
    term = bind(torch.randn(6, generator=torch.Generator().manual_seed(0)))
    ws = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    together = term(candidate(ws))
    for k in range(3):
        torch.testing.assert_close(together[k : k + 1], term(candidate(ws[k : k + 1])))


def test_also_used_while_the_look_is_inverted_and_off_at_weight_zero() -> None:
    w_avg = torch.zeros(4)
    context = Context(UNUSED, UNUSED, LatentStatistics(w_avg[None], w_avg, 1.0))
    look = Targets(torch.zeros(1, 3, 8, 8), torch.zeros(1, 68, 2))
    terms = {"fidelity": LatentFidelity(weight=0.05)}
    assert Objective.bind(terms, [{"fidelity": 0.05}], context, look).names == ("fidelity",)
    # Without statistics binding would fail: a term of weight 0 is not bound.
    nothing = Context(UNUSED, UNUSED, UNUSED)
    assert Objective.bind(terms, [{"fidelity": 0.0}], nothing, look).names == ()
