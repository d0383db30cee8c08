"""MobileStyleGAN against OpenVINO's stored outputs, its gradients, and its 256 px head."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.generators.mobile_head import ImageHead, merge_bands
from lmexp.generators.mobile_stylegan import (
    HEAD_DEPTH,
    MobileNetwork,
    MobileStyleGAN,
    Trunk,
    band_order,
    expand_ws,
)
from lmexp.generators.protocol import Generator
from lmexp.weights import store

VECTORS = Path(__file__).parents[1] / "data" / "mobile_stylegan.npz"
CHANNELS = (16, 16, 8)


def random_tensors(channels: tuple[int, ...] = CHANNELS, w_dim: int = 6) -> dict[str, Tensor]:
    """Weights of a small network: a constant of 4 px, one block per count after the first."""
    torch.manual_seed(0)
    tensors = {"input": torch.randn(1, channels[0], 4, 4)}

    def modulation(name: str, size: int) -> None:
        tensors[f"{name}.modulation.weight"] = torch.randn(size, w_dim)
        tensors[f"{name}.modulation.bias"] = torch.randn(size)

    def conv(name: str, size_in: int, size_out: int, side: int, kernel: int) -> None:
        modulation(name, size_in)
        tensors[f"{name}.weight"] = torch.randn(size_out, size_in, kernel, kernel) / size_in**0.5
        tensors[f"{name}.bias"] = torch.randn(size_out)
        tensors[f"{name}.noise"] = torch.randn(1, 1, side, side)
        if kernel == 1:
            tensors[f"{name}.depthwise"] = torch.randn(size_in, 1, 3, 3)

    for index in range(3):
        tensors[f"mapping.{index}.weight"] = torch.randn(w_dim, w_dim) / w_dim**0.5
        tensors[f"mapping.{index}.bias"] = torch.randn(w_dim)
    conv("conv1", channels[0], channels[0], 4, 3)
    for index, (size_in, size_out) in enumerate(pairwise(channels)):
        side = 8 * 2**index
        modulation(f"layers.{index}.up", size_in)
        conv(f"layers.{index}.conv1", size_in // 4, size_out, side, 1)
        conv(f"layers.{index}.conv2", size_out, size_out, side, 1)
    name = f"layers.{len(channels) - 2}.to_img"
    modulation(name, channels[-1])
    tensors[f"{name}.weight"] = torch.randn(12, channels[-1], 1, 1)
    tensors[f"{name}.bias"] = torch.randn(12)
    return tensors


def inverse_haar(x: Tensor) -> Tensor:
    """The published order and transform, pixel by pixel: low bands, then three bands a channel."""
    count, bands, height, width = x.shape
    channels = bands // 4
    low, high = x[:, :channels], x[:, channels:].view(count, channels, 3, height, width)
    out = x.new_empty(count, channels, 2 * height, 2 * width)
    for row in range(2):
        for column in range(2):
            down, right = (-1) ** row, (-1) ** column
            out[:, :, row::2, column::2] = 0.5 * (
                low + down * high[:, :, 0] + right * high[:, :, 1] + down * right * high[:, :, 2]
            )
    return out


def plain_synthesis(tensors: dict[str, Tensor], ws: Tensor) -> Tensor:
    """The network as its graph says it, one operation after the other, nothing folded."""

    def modulate(x: Tensor, name: str, w: Tensor, gain: float = 1.0) -> Tensor:
        weight = tensors[f"{name}.modulation.weight"]
        style = w @ weight.T + tensors[f"{name}.modulation.bias"]
        return x * (style * gain)[:, :, None, None]

    def conv(x: Tensor, name: str, w: Tensor) -> Tensor:
        x = modulate(x, name, w, gain=1 / (9 * x.shape[1]) ** 0.5)
        if f"{name}.depthwise" in tensors:
            x = F.conv2d(x, tensors[f"{name}.depthwise"], padding=1, groups=x.shape[1])
        weight = tensors[f"{name}.weight"]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2) + tensors[f"{name}.noise"]
        return F.leaky_relu(x + tensors[f"{name}.bias"][:, None, None], 0.2)

    x = conv(tensors["input"].expand(len(ws), -1, -1, -1), "conv1", ws[:, 0])
    blocks = sum(name.endswith("up.modulation.bias") for name in tensors)
    for index in range(blocks):
        first, second = ws[:, 1 + 2 * index], ws[:, 2 + 2 * index]
        x = inverse_haar(modulate(x, f"layers.{index}.up", first))
        x = conv(x, f"layers.{index}.conv1", first)
        x = conv(x, f"layers.{index}.conv2", second)
    name = f"layers.{blocks - 1}.to_img"
    x = modulate(x, name, ws[:, -1], gain=1 / x.shape[1] ** 0.5)
    return inverse_haar(F.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"]))


@pytest.fixture(scope="module")
def full() -> MobileStyleGAN:
    return MobileStyleGAN(1024)


@pytest.fixture(scope="module")
def small() -> MobileStyleGAN:
    return MobileStyleGAN(256)


def test_agrees_with_openvino(full: MobileStyleGAN) -> None:
    with np.load(VECTORS) as stored:
        vectors = {name: torch.from_numpy(stored[name]) for name in stored.files}
    with torch.no_grad():
        w = full.mapping(vectors["z"])
        torch.testing.assert_close(w, vectors["w"], atol=3e-5, rtol=0)
        images = torch.cat([full.synthesis(row.expand(1, full.num_ws, -1)) for row in vectors["w"]])
    averaged = F.avg_pool2d(images, 16)
    torch.testing.assert_close(averaged, vectors["small"], atol=1e-4, rtol=0)
    for index, (top, left) in enumerate(vectors["corners"].tolist()):
        crop = images[:, :, top : top + 32, left : left + 32]
        torch.testing.assert_close(crop, vectors["crops"][:, index], atol=3e-4, rtol=0)


def test_published_sizes(full: MobileStyleGAN) -> None:
    assert isinstance(full, Generator)
    assert (full.z_dim, full.w_dim, full.num_ws, full.resolution) == (512, 512, 16, 1024)
    assert full.noise_shapes == ()
    assert not any(parameter.requires_grad for parameter in full.parameters())


def test_folding_changes_nothing() -> None:
    tensors = {name: tensor.double() for name, tensor in random_tensors().items()}
    network = MobileNetwork(tensors, "")
    ws = torch.randn(3, network.num_ws, network.w_dim, dtype=torch.double)
    torch.testing.assert_close(
        network.synthesis(ws), plain_synthesis(tensors, ws), atol=1e-10, rtol=1e-10
    )


def test_gradcheck() -> None:
    tensors = random_tensors((4, 4), w_dim=3)
    network = MobileNetwork({name: tensor.double() for name, tensor in tensors.items()}, "")
    ws = torch.randn(2, network.num_ws, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(network.synthesis, (ws,), fast_mode=True)


def test_gradcheck_of_the_head() -> None:
    torch.manual_seed(0)
    head = ImageHead(channels=4, width=4, side=3, w_dim=3).double().freeze()
    x = torch.randn(2, 4, 3, 3, dtype=torch.double, requires_grad=True)
    ws = torch.randn(2, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(head, (x, ws), fast_mode=True)


def test_frozen_head_renders_as_the_trained_one() -> None:
    torch.manual_seed(0)
    head = ImageHead(channels=8, width=8, side=4, w_dim=5)
    for layer in (head.layer1, head.layer2):
        torch.nn.init.normal_(layer.noise)
    x, ws = torch.randn(2, 8, 4, 4), torch.randn(2, 3, 5)
    trained = head(x, ws)
    assert trained.requires_grad
    tensors = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    torch.testing.assert_close(ImageHead.from_tensors(tensors)(x, ws), trained)


def test_merge_bands_is_the_inverse_haar_transform() -> None:
    x = torch.randn(2, 12, 3, 5)
    torch.testing.assert_close(0.5 * merge_bands(x[:, band_order(3)]), inverse_haar(x))


def test_merge_bands_by_hand() -> None:
    bands = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    expected = torch.tensor([[1 + 2 + 3 + 4, 1 + 2 - 3 - 4], [1 - 2 + 3 - 4, 1 - 2 - 3 + 4]])
    assert torch.equal(merge_bands(bands)[0, 0], expected.float())


def check_every_style_has_a_gradient(generator: MobileNetwork) -> None:
    torch.manual_seed(1)
    w = generator.mapping(torch.randn(1, generator.z_dim))
    ws = w[:, None].repeat(1, generator.num_ws, 1).requires_grad_()
    images = generator.synthesis(ws)
    assert images.shape == (1, 3, generator.resolution, generator.resolution)
    (images * torch.randn_like(images)).mean().backward()
    assert ws.grad is not None and ws.grad.isfinite().all()
    # Every component of every style moves some pixel.
    assert (ws.grad != 0).all()


def test_every_style_has_a_gradient_at_1024(full: MobileStyleGAN) -> None:
    check_every_style_has_a_gradient(full)


def test_every_style_has_a_gradient_at_256(small: MobileStyleGAN) -> None:
    assert (small.num_ws, small.resolution) == (14, 256)
    check_every_style_has_a_gradient(small)


def test_images_of_a_batch_are_strangers() -> None:
    network = MobileNetwork(random_tensors(), "")
    ws = torch.randn(4, network.num_ws, network.w_dim)
    batch = network.synthesis(ws)
    for index in range(4):
        alone = network.synthesis(ws[index : index + 1])
        torch.testing.assert_close(batch[index : index + 1], alone, atol=1e-5, rtol=1e-5)


def test_head_reproduces_the_1024_px_image(full: MobileStyleGAN, small: MobileStyleGAN) -> None:
    """Mean PSNR in dB, peak 2, against the average of 4 x 4 px; latents no training saw."""
    torch.manual_seed(20261124)
    w = full.mapping(torch.randn(4, 512))
    ratios = []
    with torch.no_grad():
        for row in w:
            ws = row.expand(1, small.num_ws, -1)
            target = F.avg_pool2d(full.synthesis(expand_ws(ws, full.num_ws)), 4)
            error = (small.synthesis(ws) - target).square().mean()
            ratios.append(10 * torch.log10(4 / error).item())
    # 30 dB in the mean is the promise; single faces vary by a few dB.
    assert np.mean(ratios) >= 30
    assert min(ratios) >= 27


def test_sizes_share_mapping_and_differ_in_digest(
    full: MobileStyleGAN, small: MobileStyleGAN
) -> None:
    z = torch.randn(2, 512)
    assert torch.equal(full.mapping(z), small.mapping(z))
    assert full.weights_sha256 != small.weights_sha256


def test_expand_ws_repeats_the_last_style() -> None:
    ws = torch.randn(2, 14, 8)
    expanded = expand_ws(ws, 16)
    assert torch.equal(expanded[:, :14], ws)
    assert torch.equal(expanded[:, 14], ws[:, 13]) and torch.equal(expanded[:, 15], ws[:, 13])
    assert torch.equal(expand_ws(ws, 14), ws)


def test_tap_gives_the_features_of_a_shallower_trunk() -> None:
    tensors = random_tensors()
    ws = torch.randn(2, 6, 6)
    tapped, last = Trunk(tensors)(ws, tap=1)
    shallow, _ = Trunk(tensors, depth=1)(ws)
    assert torch.equal(tapped, shallow)
    assert last.shape[-1] == 2 * tapped.shape[-1]


def test_head_sits_on_128_px_features() -> None:
    tensors = store.load("mobile_stylegan_ffhq").tensors
    trunk = Trunk(tensors, HEAD_DEPTH)
    features, _ = trunk(torch.zeros(1, trunk.num_ws, 512))
    assert features.shape == (1, 256, 128, 128)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_features_are_laid_out_as_the_buffers(memory_format: torch.memory_format) -> None:
    network = MobileNetwork(random_tensors(), "")
    ws = torch.randn(1, network.num_ws, network.w_dim)
    expected = network.synthesis(ws)
    network.to(memory_format=memory_format)
    features, _ = network._trunk(ws)
    assert features.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(network.synthesis(ws), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 5, 6), (1, 6, 5), (6, 6)])
def test_wrong_ws_are_refused(shape: tuple[int, ...]) -> None:
    network = MobileNetwork(random_tensors(), "")
    with pytest.raises(LmexpError, match=r"reads \[N, 6, 6\]"):
        network.synthesis(torch.zeros(shape))


def test_noise_maps_are_refused() -> None:
    network = MobileNetwork(random_tensors(), "")
    with pytest.raises(LmexpError, match="noise is part of its weights"):
        network.synthesis(torch.zeros(1, 6, 6), [torch.zeros(1, 1, 4, 4)])


def test_other_architectures_are_refused() -> None:
    tensors = random_tensors()
    tensors["layers.0.conv1.modulation.weight"] = torch.zeros(5, 6)
    with pytest.raises(LmexpError, match="another architecture"):
        MobileNetwork(tensors, "")
