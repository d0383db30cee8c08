"""Stacked styles against each layer's own affine map."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_mobile_stylegan import random_tensors
from torch import Tensor, nn

from lmexp.generators.mobile_head import ImageHead
from lmexp.generators.mobile_stylegan import MobileNetwork, Modulation
from lmexp.generators.mobile_styles import StackedStyles, split_styles
from lmexp.generators.mobile_synthesis import LoweredSynthesis

W_DIM = 6
WIDTHS = (((64,), (128, 32), (32,)), ((5,), (20, 5), (7,), (3, 1, 2)), ((16,), (16,)))


def build(widths: tuple[tuple[int, ...], ...]) -> list[list[nn.Module]]:
    """Modulations of either kind, of random weights."""
    torch.manual_seed(0)
    found: list[list[nn.Module]] = []
    for of_vector in widths:
        found.append([])
        for width in of_vector:
            weight, bias = torch.randn(width, W_DIM), torch.randn(width)
            found[-1].append(Modulation(weight, bias, 0.5, torch.randperm(width)))
    found[-1][-1] = nn.Linear(W_DIM, widths[-1][-1]).requires_grad_(False)
    return found


def compute(styles: StackedStyles, ws: Tensor, apart: int) -> list[Tensor]:
    """All styles, layer by layer."""
    found, rest = styles(ws, apart)
    assert rest.shape[1] == styles.columns * (ws.shape[1] - apart) and rest.stride(1) == 1
    return [*found, *split_styles(rest, styles.widths[apart:])]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("widths", WIDTHS)
def test_stacked_styles_are_each_modulations_own(
    widths: tuple[tuple[int, ...], ...], count: int
) -> None:
    modulations = build(widths)
    styles = StackedStyles(modulations)
    ws = torch.randn(count, len(widths), W_DIM, requires_grad=True)
    wanted = [
        modulation(ws[:, index])
        for index, of_vector in enumerate(modulations)
        for modulation in of_vector
    ]
    outer = [torch.randn_like(style) for style in wanted]
    (slope,) = torch.autograd.grad(wanted, ws, outer)
    for apart in range(1, len(widths)):
        got = compute(styles, ws, apart)
        torch.testing.assert_close(got, wanted)
        gradients = [torch.autograd.grad(got, ws, outer, retain_graph=True)[0] for _ in range(2)]
        torch.testing.assert_close(gradients[0], slope)
        assert torch.equal(*gradients)


def test_columns_of_no_layer_are_zero() -> None:
    styles = StackedStyles(build(WIDTHS[1]))
    ws = torch.randn(2, len(WIDTHS[1]), W_DIM)
    found, rest = styles(ws, 1)
    assert [style.shape for style in found] == [(2, 5)]
    assert rest.shape == (2, 3 * 32)
    assert (rest.view(2, 3, 32).count_nonzero(2) == torch.tensor([25, 7, 6])).all()


@pytest.mark.parametrize("with_head", [False, True])
def test_a_lowered_network_keeps_no_modulation_beside_the_stack(with_head: bool) -> None:
    head = ImageHead(channels=16, width=8, side=8, w_dim=W_DIM).freeze() if with_head else None
    network = MobileNetwork(random_tensors(), "", head, 1 if with_head else None)
    network.lower_precision(torch.bfloat16)
    names = [name for name, _ in network.named_buffers() if "modulation" in name]
    assert not names and not list(network.parameters())
    lowered = network._lowered
    assert isinstance(lowered, LoweredSynthesis)
    assert len(lowered.styles.weight) == network.num_ws
    assert {"weight", "bias"} == set(dict(lowered.styles.named_buffers()))
    # A copy on another device has its own.
    copied = copy.deepcopy(lowered).to("meta")
    assert copied.styles.weight.is_meta and not lowered.styles.weight.is_meta


def test_their_graph_is_a_product_each_way() -> None:
    styles = StackedStyles(build(WIDTHS[0]))
    counted: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        counted.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(
            lambda ws: styles(ws, 2),
            backend=aot_autograd(fw_compiler=keep, bw_compiler=keep),
            fullgraph=True,
        )
        ws = torch.randn(2, 3, W_DIM, requires_grad=True)
        found, rest = compiled(ws)
        sum((style.square().sum() for style in found), rest.square().sum()).backward()
    assert len(counted) == 2
    for targets in counted:
        assert targets.count("aten.bmm.default") == 1
        assert not any("index" in target or "scatter" in target for target in targets)
