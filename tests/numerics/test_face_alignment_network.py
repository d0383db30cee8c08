"""The published landmark networks' crop, maps and gradients, on networks of random weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lmexp.errors import LmexpError
from lmexp.landmarks import face_alignment_network as module
from lmexp.landmarks.decoding import decode
from lmexp.landmarks.face_alignment_network import (
    FFHQ_BOX,
    FaceAlignmentNetwork,
    build_fan,
    frame,
    put_back,
    show_whole,
    take_crop,
)
from lmexp.landmarks.protocol import HeatmapNetwork

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from face_alignment.models import FAN
    from face_alignment.utils import crop as their_crop
    from face_alignment.utils import transform_np


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A four-stack FAN of random weights, in the format of the published files."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("fan") / "2DFAN4.pth.tar"
    torch.save(FAN(4).state_dict(), path, _use_new_zipfile_serialization=False)
    return path


def smooth_images(n: int, side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator) * 1.8 - 0.8
    return nn.functional.interpolate(coarse, size=side, mode="bicubic").clamp(-1, 1)


def test_maps_are_those_of_the_last_of_four_stacks(published: Path) -> None:
    network = FaceAlignmentNetwork(box=None, weights=str(published))
    assert isinstance(network, HeatmapNetwork) and len(network.weights_sha256) == 64
    theirs = FAN(4)
    theirs.load_state_dict(torch.load(published, weights_only=True))
    theirs.eval()
    images = smooth_images(1, 256)
    with torch.no_grad():
        stacks = theirs((images + 1) / 2)
        maps = network(images)
    assert len(stacks) == 4 and maps.shape == (1, 68, 64, 64)
    torch.testing.assert_close(maps, stacks[3], rtol=0, atol=0)
    assert not torch.equal(stacks[3], stacks[2])
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("side", [256, 640])
@pytest.mark.parametrize("box", [FFHQ_BOX, (0.3, 0.2, 0.65, 0.7)])
def test_crop_is_that_of_face_alignment(side: int, box: module.Box) -> None:
    image = (smooth_images(1, side) + 1) / 2
    pixels = (image[0].permute(1, 2, 0) * 255).round().byte().numpy()
    left, top, right, bottom = (side * value for value in box)
    centre = torch.tensor([(left + right) / 2, (top + bottom) / 2 - 0.12 * (bottom - top)])
    theirs = their_crop(pixels, centre, ((right - left) + (bottom - top)) / 195)
    ours = take_crop(image, *frame(box))[0].permute(1, 2, 0).numpy() * 255
    # Theirs cuts whole px, up to two off; the image is smooth, and its edges are left out.
    inside = torch.from_numpy(((ours > 0) & (theirs > 0)).all(axis=2))[None].float()
    inside = (nn.functional.avg_pool2d(inside, 9, 1, 4, count_include_pad=False)[0] == 1).numpy()
    assert inside.mean() > 0.5
    difference = np.abs(ours - theirs).max(axis=2)[inside]
    assert np.median(difference) < 3 and difference.max() < 12
    reach = ((ours > 0).all(axis=2).mean() - (theirs > 0).all(axis=2).mean()) / inside.mean()
    assert abs(reach) < 0.05


def test_crop_of_whole_pixels_is_exact() -> None:
    images = torch.rand(2, 3, 208, 208)
    # 208 px of 256 and a shift of whole px: nothing is interpolated.
    crops = take_crop(images, 0.5, 0.5 - 8 / 208, 256 / 208)
    torch.testing.assert_close(crops[:, :, 32:240, 24:232], images, rtol=0, atol=1e-4)
    assert crops[:, :, :31].abs().max() == 0 and crops[:, :, :, :23].abs().max() == 0


@pytest.mark.parametrize("box", [FFHQ_BOX, (0.35, 0.4, 0.6, 0.65)])
def test_landmarks_lie_where_the_crop_showed_them(box: module.Box) -> None:
    x, y, side = frame(box)
    # One Gaussian a map, at known places of the crop.
    places = torch.tensor([[20.0, 24.5], [33.25, 40.0], [44.0, 30.75]])
    at = torch.arange(64) + 0.5
    maps = torch.exp(
        -((at[None, None] - places[:, 0, None, None]) ** 2 / 2.5)
        - (at[None, :, None] - places[:, 1, None, None]) ** 2 / 2.5
    )[None]
    corner = torch.tensor([x, y]) - side / 2
    expected = 1000 * (corner + places / 64 * side)
    found = decode(put_back(maps, x, y, side), 1000)[0]
    assert ((expected > 0) & (expected < 1000)).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=2.5)
    # Theirs rounds down to whole px. Uncompiled: numba would take 15 s for three points.
    centre, scale = 1000 * np.array([x, y]), 1000 * side / 200
    for place, point in zip(places.numpy(), expected.numpy(), strict=True):
        theirs = transform_np.py_func(place, centre, scale, 64, True)
        assert (np.abs(theirs + 0.5 - point) < 0.51).all()


class Still(nn.Module):
    """In place of a FAN: blurs and shifts its input, so that maps follow the image."""

    def forward(self, crops: Tensor) -> list[Tensor]:
        maps = nn.functional.avg_pool2d(crops.mean(1, keepdim=True), 4).expand(-1, 68, -1, -1)
        return [torch.zeros_like(maps), maps]


def test_a_bright_spot_is_found_where_it_is(published: Path) -> None:
    network = FaceAlignmentNetwork(weights=str(published))
    network.network = Still()
    side = 512
    at = torch.arange(side) + 0.5
    spot = torch.exp(-((at[None] - 300) ** 2 + (at[:, None] - 210) ** 2) / (2 * 14.0**2))
    images = (spot.expand(1, 3, side, side)) * 2 - 1
    found = decode(network(images), side)[0]
    torch.testing.assert_close(found, torch.tensor([[300.0, 210.0]]).expand(68, 2), rtol=0, atol=2)


@pytest.mark.parametrize("side", [64, 256, 300])
@pytest.mark.parametrize("box", [None, FFHQ_BOX])
def test_every_image_is_treated_alone_at_any_size(
    published: Path, side: int, box: module.Box | None
) -> None:
    network = FaceAlignmentNetwork(box=box, weights=str(published))
    network.network = Still()
    images = smooth_images(2, side)
    maps = network(images)
    assert maps.shape == (2, 68, 64, 64)
    torch.testing.assert_close(maps[1:], network(images[1:]), rtol=0, atol=1e-6)


def test_whole_image_is_shown_as_published() -> None:
    small = torch.rand(1, 3, 64, 64)
    assert torch.equal(show_whole(small), small.repeat_interleave(4, 2).repeat_interleave(4, 3))
    large = torch.rand(1, 3, 512, 512)
    torch.testing.assert_close(show_whole(large), nn.functional.avg_pool2d(large, 2))


def test_gradient_of_crop_and_return() -> None:
    torch.manual_seed(0)
    x, y, side = frame(FFHQ_BOX)
    images = torch.rand(1, 1, 24, 24).double().requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda images: take_crop(images, x, y, side)[:, :, ::16, ::16], (images,), fast_mode=True
    )
    maps = torch.rand(1, 1, 64, 64).double().requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda maps: put_back(maps, x, y, side), (maps,), fast_mode=True
    )


def test_every_pixel_of_a_large_image_has_a_gradient() -> None:
    images = torch.rand(1, 3, 1024, 1024, requires_grad=True)
    crops = take_crop(images, *frame(FFHQ_BOX))
    (gradient,) = torch.autograd.grad(crops.sum(), images)
    assert (gradient > 0).float().mean() > 0.99


def test_gradient_through_a_fan() -> None:
    """Central differences in float64 through crop, a whole one-stack FAN and the way back."""
    torch.manual_seed(1)
    path_free = FaceAlignmentNetwork.__new__(FaceAlignmentNetwork)
    nn.Module.__init__(path_free)
    path_free.frame = frame(FFHQ_BOX)
    path_free.network = build_fan(FAN(1).state_dict(), Path("random")).double()
    images = smooth_images(1, 64).double().requires_grad_(True)
    cotangent = torch.randn(1, 68, 64, 64).double()
    (gradient,) = torch.autograd.grad((path_free(images) * cotangent).sum(), images)
    with torch.no_grad():
        for seed in range(2):
            along = torch.randn(
                images.shape, generator=torch.Generator().manual_seed(seed)
            ).double()
            step = 1e-6
            ahead = (path_free(images + step * along) * cotangent).sum()
            behind = (path_free(images - step * along) * cotangent).sum()
            slope = ((ahead - behind) / (2 * step)).item()
            assert slope == pytest.approx((gradient * along).sum().item(), rel=1e-4)


def test_what_is_no_fan_is_refused(tmp_path: Path, published: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(LmexpError, match="misfit at") as caught:
        FaceAlignmentNetwork(weights=str(path))
    assert "\n" not in str(caught.value)
    state = torch.load(published, weights_only=True)
    state["l3.weight"] = torch.zeros(98, 256, 1, 1)
    torch.save(state, path)
    with pytest.raises(LmexpError, match=r"l3\.weight") as caught:
        FaceAlignmentNetwork(weights=str(path))
    assert "\n" not in str(caught.value)
    path.write_bytes(b"<html>")
    with pytest.raises(LmexpError, match="not a readable checkpoint"):
        FaceAlignmentNetwork(weights=str(path))
    with pytest.raises(LmexpError, match="no such file"):
        FaceAlignmentNetwork(weights=str(tmp_path / "none"))
    with pytest.raises(LmexpError, match="has no area"):
        FaceAlignmentNetwork(box=(0.5, 0.2, 0.5, 0.8), weights=str(published))


def test_absent_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMEXP_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def fail(*_: object, **__: object) -> None:
        raise LmexpError("no route to host")

    monkeypatch.setattr("lmexp.weights.transfer.bring", fail)
    for points in ("2d", "3d"):
        with pytest.raises(
            LmexpError, match=rf"face_alignment_{points}fan4.*put {points.upper()}FAN4-.*pth\.tar"
        ):
            FaceAlignmentNetwork(points)  # type: ignore[arg-type]
