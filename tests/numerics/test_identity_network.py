"""SFace against the stored outputs of its original graph, and its gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lmexp.losses import identity_network
from lmexp.losses.identity_network import SIDE, IdentityNetwork
from lmexp.weights import registry, store
from lmexp.weights.converters import SFACE_CONVOLUTIONS

VECTORS = Path(__file__).parents[1] / "data" / "sface.npz"


def random_tensors(width: int = 4, answers: int = 6) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    tensors = {}
    for name in SFACE_CONVOLUTIONS:
        depthwise = name.endswith("_dw")
        channels = 3 if name == "conv_1" else 1 if depthwise else width
        kernel = 3 if depthwise or name == "conv_1" else 1
        fan_in = channels * kernel**2
        tensors[f"{name}.weight"] = randn(width, channels, kernel, kernel) * (2 / fan_in) ** 0.5
        tensors[f"{name}.bias"] = randn(width) * 0.1
        tensors[f"{name}.slope"] = randn(width).abs()
    tensors |= {"head.scale": randn(width), "head.shift": randn(width)}
    return tensors | {
        "linear.weight": randn(answers, width * 49),
        "linear.bias": randn(answers),
    }


@pytest.fixture(scope="module")
def published() -> IdentityNetwork:
    try:
        stored = store.read(registry.ENTRIES["sface"])
    except FileNotFoundError:
        pytest.skip("weights sface are not in the cache")
    assert stored.sha256 == registry.ENTRIES["sface"].sha256
    return identity_network.load()


def test_answers_are_those_of_the_original_graph(published: IdentityNetwork) -> None:
    with np.load(VECTORS) as stored:
        levels, answers = torch.from_numpy(stored["levels"]), torch.from_numpy(stored["answers"])
    assert levels.shape == (4, 3, SIDE, SIDE) and answers.shape == (4, 128)
    found = published(levels / 127.5 - 1)
    assert answers.abs().max() > 1
    torch.testing.assert_close(found, answers, atol=1e-4, rtol=0)


def test_it_knows_a_face_mirrored_and_darkened_from_noise(published: IdentityNetwork) -> None:
    with np.load(VECTORS) as stored:
        answers = published(torch.from_numpy(stored["levels"]) / 127.5 - 1)
    _, mirrored, dark, noise = torch.cosine_similarity(answers[:1], answers).tolist()
    # 0.363 is the threshold at which OpenCV calls two pictures one person.
    assert mirrored > 0.8 and dark > 0.8 and noise < 0.363


def test_forward_by_numpy() -> None:
    """The whole network with plain loops, strides and paddings included."""
    tensors = random_tensors()
    network = IdentityNetwork(tensors, "none").double()
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x = ((image[0].double().numpy() + 1) * 127.5 - 127.5) * 0.0078125
    strides = {"conv_3_dw": 2, "conv_5_dw": 2, "conv_7_dw": 2, "conv_13_dw": 2}
    for name in SFACE_CONVOLUTIONS:
        weight, bias, slope = (tensors[f"{name}.{k}"].numpy() for k in ("weight", "bias", "slope"))
        kernel, step = weight.shape[2], strides.get(name, 1)
        x = np.pad(x, ((0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2))
        windows = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), (1, 2))
        windows = windows[:, ::step, ::step]
        rule = "cyxij,cij->cyx" if name.endswith("_dw") else "cyxij,ocij->oyx"
        x = np.einsum(rule, windows, weight[:, 0] if name.endswith("_dw") else weight)
        x = x + bias[:, None, None]
        x = np.where(x > 0, x, slope[:, None, None] * x)
    assert x.shape == (4, 7, 7)
    x = x * tensors["head.scale"].numpy()[:, None, None]
    x = x + tensors["head.shift"].numpy()[:, None, None]
    expected = tensors["linear.weight"].numpy() @ x.reshape(-1) + tensors["linear.bias"].numpy()
    np.testing.assert_allclose(network(image.double())[0].detach(), expected, rtol=1e-6)


def test_gradient_by_differences() -> None:
    network = IdentityNetwork(random_tensors(), "none").double()
    draw = torch.Generator().manual_seed(2)
    image = torch.rand(1, 3, SIDE, SIDE, generator=draw, dtype=torch.float64) * 2 - 1
    direction = torch.randn(image.shape, generator=draw, dtype=torch.float64)
    image.requires_grad_()
    (gradient,) = torch.autograd.grad(network(image).square().sum(), image)
    step = 1e-6
    with torch.no_grad():
        ends = [network(image + sign * step * direction).square().sum() for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
    # PReLU has kinks; a step this small crosses next to none of them.
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-3, atol=0)
    assert (gradient != 0).double().mean() > 0.99


def test_answers_do_not_depend_on_the_memory_layout() -> None:
    network = IdentityNetwork(random_tensors(), "none")
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)) * 2 - 1
    plain = network(images)
    last = network.to(memory_format=torch.channels_last)(
        images.contiguous(memory_format=torch.channels_last)
    )
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-4)


def test_network_is_loaded_by_name_and_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> store.StoredWeights:
        assert name == "sface"
        return store.StoredWeights(random_tensors(), "ab12", Path())

    monkeypatch.setattr(store, "load", load)
    network = identity_network.load()
    assert network.weights_sha256 == "ab12" and not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
