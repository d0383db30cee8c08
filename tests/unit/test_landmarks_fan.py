"""The FAN: its shape is the paper's, its gradient is right, images are strangers to each other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.landmarks.decoding import decode
from lmexp.landmarks.embedded import EmbeddedFan, build_fan, resize
from lmexp.landmarks.fan import CEILING, Fan
from lmexp.landmarks.framing import ffhq_views, place, read_faces, resample, tight_views
from lmexp.landmarks.protocol import HeatmapNetwork
from lmexp.landmarks.score import score
from lmexp.weights import store


def random_fan(width: int = 16, depth: int = 4, landmarks: int = 68, seed: int = 0) -> Fan:
    """A FAN in evaluation mode whose batch statistics are not the trivial ones."""
    torch.manual_seed(seed)
    network = Fan(width, depth, landmarks)
    random = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.2, generator=random)
            module.running_var.uniform_(0.5, 1.5, generator=random)
    return network.eval().requires_grad_(False)


def tensors_of(network: Fan) -> dict[str, Tensor]:
    return {
        name: tensor.contiguous()
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "fan.safetensors"
    save_file(tensors_of(random_fan()), path)
    return path


def test_paper_width_has_the_paper_size() -> None:
    # Counted layer by layer.
    network = Fan(256)
    block = 256 * 128 * 9 + 128 * 64 * 9 + 64 * 64 * 9 + 2 * (256 + 128 + 64)
    blocks = 3 * 4 + 1 + 1
    stem = 3 * 64 * 49 + 2 * 64
    first = 64 * 64 * 9 + 64 * 32 * 9 + 32 * 32 * 9 + 2 * (64 + 64 + 32) + 2 * 64 + 64 * 128
    second = 128 * 64 * 9 + 64 * 32 * 9 + 32 * 32 * 9 + 2 * (128 + 64 + 32)
    third = 128 * 128 * 9 + 128 * 64 * 9 + 64 * 64 * 9 + 2 * (128 + 128 + 64) + 2 * 128 + 128 * 256
    last = 256 * 256 + 2 * 256 + 256 * 68 + 68
    expected = stem + first + second + third + blocks * block + last
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize(("width", "depth", "side"), [(16, 4, 256), (32, 2, 64), (16, 1, 8)])
def test_maps_are_a_quarter_of_the_input(width: int, depth: int, side: int) -> None:
    heatmaps = random_fan(width, depth, 5)(torch.zeros(2, 3, side, side))
    assert heatmaps.shape == (2, 5, side // 4, side // 4)


def test_gradient_with_respect_to_the_image_is_exact() -> None:
    network = random_fan(16, 1, 3).double()
    random = torch.Generator().manual_seed(3)
    image = torch.randn(1, 3, 8, 8, generator=random, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(network, (image,), eps=1e-6, atol=1e-6, fast_mode=True)


def test_activations_saturate_so_that_no_patch_can_drown_the_face() -> None:
    network = random_fan()
    linear = (network.stem, network.last)  # the two that read what no ReLU has passed
    reached: list[float] = []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module not in linear:
            module.register_forward_hook(
                lambda _, inputs, __: reached.append(float(inputs[0].max()))
            )
    network(1e4 * torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(6)))
    assert max(reached) == CEILING
    assert len(reached) == sum(isinstance(m, torch.nn.Conv2d) for m in network.modules()) - 2


def test_component_is_a_heatmap_network(weights: Path) -> None:
    network = EmbeddedFan(weights=str(weights))
    assert isinstance(network, HeatmapNetwork)
    assert network.weights_sha256 == store.digest(tensors_of(random_fan()))
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.network.modules())


@pytest.mark.parametrize("side", [64, 200, 256, 320, 512])
def test_any_side_gives_64_cells_and_a_finite_gradient_everywhere(weights: Path, side: int) -> None:
    network = EmbeddedFan(weights=str(weights))
    random = torch.Generator().manual_seed(4)
    images = torch.rand(1, 3, side, side, generator=random) * 2 - 1
    images.requires_grad_()
    heatmaps = network(images)
    assert heatmaps.shape == (1, 68, 64, 64)
    (gradient,) = torch.autograd.grad(heatmaps.square().sum(), images)
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).float().mean() > 0.99


def test_images_of_a_batch_are_strangers(weights: Path) -> None:
    network = EmbeddedFan(weights=str(weights))
    random = torch.Generator().manual_seed(5)
    images = torch.rand(3, 3, 128, 128, generator=random) * 2 - 1
    images.requires_grad_()
    together = network(images)
    for k in range(3):
        torch.testing.assert_close(network(images[k : k + 1])[0], together[k], atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(together[1].square().sum(), images)
    assert gradient[1].abs().max() > 0
    assert torch.equal(gradient[[0, 2]], torch.zeros_like(gradient[[0, 2]]))


def test_half_precision_convolutions_are_widened(weights: Path) -> None:
    halved = {
        name: tensor.half() if tensor.ndim == 4 else tensor
        for name, tensor in tensors_of(random_fan()).items()
    }
    network = build_fan(halved, weights)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    images = torch.zeros(1, 3, 256, 256)
    torch.testing.assert_close(network(images), random_fan()(images), atol=1e-2, rtol=1e-2)


def test_shapes_tell_width_and_depth(weights: Path) -> None:
    network = build_fan(tensors_of(random_fan(32, 2, 5)), weights)
    assert network.heatmaps.weight.shape == (5, 32, 1, 1)
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(
        network(image), random_fan(32, 2, 5).to(memory_format=torch.channels_last)(image)
    )


def test_resize_averages_what_is_larger_and_interpolates_what_is_smaller() -> None:
    large = torch.arange(16.0).reshape(1, 1, 4, 4).expand(1, 3, 4, 4)
    assert resize(large, 2)[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert resize(large, 4) is large
    small = torch.tensor([[0.0, 4.0], [0.0, 4.0]]).expand(1, 3, 2, 2)
    assert resize(small, 4)[0, 0, 0].tolist() == [0.0, 1.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop("heatmaps.weight"), "not a FAN"),
        (lambda tensors: tensors.pop("hourglass.up.conv2.weight"), "misfit at hourglass.up.conv2"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "misfit at extra"),
        (lambda tensors: tensors.update({"stem.weight": torch.zeros(4, 3, 5, 5)}), "not a FAN"),
    ],
)
def test_other_networks_are_refused_in_one_line(weights: Path, change, reason: str) -> None:  # type: ignore[no-untyped-def]
    tensors = tensors_of(random_fan())
    change(tensors)
    save_file(tensors, weights)
    with pytest.raises(LmexpError) as caught:
        EmbeddedFan(weights=str(weights))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(LmexpError, match=r"landmarks\.weights: .*none.* can't be read"):
        EmbeddedFan(weights=str(tmp_path / "none"))
    broken = tmp_path / "broken.safetensors"
    broken.write_text(json.dumps({"no": "tensors"}))
    with pytest.raises(LmexpError, match=r"landmarks\.weights: .*broken.* can't be read"):
        EmbeddedFan(weights=str(broken))


@pytest.mark.parametrize(("variant", "width", "limit"), [("slim", 128, 3.5e6), ("full", 256, 13e6)])
def test_packaged_weights_are_sealed_and_small(
    variant: Literal["slim", "full"], width: int, limit: float
) -> None:
    network = EmbeddedFan(variant)
    assert network.network.heatmaps.weight.shape == (68, width, 1, 1)
    assert network.weights_sha256 == store.load(f"fan_68_{variant}").sha256
    assert store.load(f"fan_68_{variant}").path.stat().st_size < limit


@pytest.mark.parametrize(("variant", "limit"), [("slim", 3.3), ("full", 3.15)])
def test_packaged_weights_find_landmarks_of_real_faces(
    variant: Literal["slim", "full"], limit: float
) -> None:
    data = os.environ.get("LMEXP_TEST_DATA")
    if not data:
        pytest.skip("LMEXP_TEST_DATA does not point at annotated faces")
    images, reference = (part[::5] for part in read_faces(Path(data) / "helen_afw" / "val"))
    network = EmbeddedFan(variant)
    for views in (tight_views(reference), ffhq_views(reference)):
        with torch.no_grad():
            found = decode(network(resample(images.float() / 127.5 - 1, views, 256)), 256)
        result = score(found, place(reference, views, 256))
        assert result.nme < limit
        assert result.failures == 0
