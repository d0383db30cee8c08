"""The perceptual networks against their originals, and the distance against its formula."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from lmexp.errors import LmexpError
from lmexp.losses.lpips import distance_map, feature_distance, normalise, shrink, spread
from lmexp.losses.perceptual import hed, stlpips
from lmexp.losses.perceptual import lpips as lpips_family
from lmexp.losses.perceptual.protocol import NetworkName, PerceptualNetwork, load_network
from lmexp.weights import registry, store

_BUILDERS = {"alex": stlpips.ShiftTolerantAlex, "vgg": stlpips.ShiftTolerantVgg}
_CONVS = {
    "alex": {
        "slice1.0": (64, 3, 11),
        "slice2.5": (192, 64, 5),
        "slice3.9": (384, 192, 3),
        "slice4.11": (256, 384, 3),
        "slice5.13": (256, 256, 3),
    },
    "vgg": {
        "slice1.0": (64, 3, 3),
        "slice1.2": (64, 64, 3),
        "slice2.6": (128, 64, 3),
        "slice2.8": (128, 128, 3),
        "slice3.12": (256, 128, 3),
        "slice3.14": (256, 256, 3),
        "slice3.16": (256, 256, 3),
        "slice4.20": (512, 256, 3),
        "slice4.22": (512, 512, 3),
        "slice4.24": (512, 512, 3),
        "slice5.28": (512, 512, 3),
        "slice5.30": (512, 512, 3),
        "slice5.32": (512, 512, 3),
    },
}
_HEADS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}

# What the code of the wheel stlpips-pytorch 0.0.2 gives for these images, with its trained
# weights and with those of `draw_tensors`.
_ORIGINAL = {
    ("alex", "trained", (64, 64)): (0.3282287, 0.3306596),
    ("alex", "trained", (65, 72)): (0.2766261, 0.3556961),
    ("alex", "random", (64, 64)): (1.9351931, 2.2129796),
    ("alex", "random", (65, 72)): (1.9307718, 2.0885348),
    ("vgg", "trained", (64, 64)): (0.2635747, 0.2987398),
    ("vgg", "trained", (65, 72)): (0.2830372, 0.2711719),
    ("vgg", "random", (64, 64)): (1.3102750, 1.2927437),
    ("vgg", "random", (65, 72)): (1.2739172, 1.3897977),
}


def draw_images(seed: int, height: int, width: int) -> Tensor:
    """Two noisy images of coloured squares; numpy's legacy generator never changes."""
    draw = np.random.RandomState(seed)
    coarse = draw.uniform(-1, 1, (2, 3, height // 8 + 1, width // 8 + 1))
    coarse = coarse.repeat(8, 2).repeat(8, 3)[:, :, :height, :width]
    noisy = coarse + 0.2 * draw.standard_normal(coarse.shape)
    return torch.tensor(np.clip(noisy, -1, 1), dtype=torch.float32)


def draw_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    draw = np.random.RandomState(seed)
    tensors = {}
    for name in sorted(shapes):
        values = draw.standard_normal(shapes[name])
        if name.startswith("lin"):
            values = np.abs(values)
        elif name.endswith("weight"):
            values = values * np.sqrt(2 / np.prod(shapes[name][1:]))
        else:
            values = 0.1 * values
        tensors[name] = torch.tensor(values, dtype=torch.float32)
    return tensors


def random_stlpips_tensors(trunk: str) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (out, into, side) in _CONVS[trunk].items():
        shapes[f"net.{name}.weight"] = (out, into, side, side)
        shapes[f"net.{name}.bias"] = (out,)
    for index, width in enumerate(_HEADS[trunk]):
        shapes[f"lin{index}.model.1.weight"] = (1, width, 1, 1)
    scaling = {
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None],
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450])[None, :, None, None],
    }
    return {**draw_tensors(shapes, 7), **scaling}


def random_stlpips(trunk: str) -> torch.nn.Module:
    return _BUILDERS[trunk](random_stlpips_tensors(trunk), "random")


def trained(name: NetworkName) -> PerceptualNetwork:
    entry = store.find_entry(name)
    if not store.stored_path(entry).is_file():
        pytest.skip(f"{name} is not in the cache: python -m lmexp.weights fetch {name}")
    return load_network(name)


def distance(network: PerceptualNetwork, images: Tensor, other: Tensor) -> Tensor:
    with torch.no_grad():
        target = [normalise(layer) for layer in network.features(other)]
        return feature_distance(network.features(images), target, network.channel_weights)


@pytest.mark.parametrize(("trunk", "kind", "size"), list(_ORIGINAL))
def test_shift_tolerant_lpips_gives_the_numbers_of_its_original(
    trunk: str, kind: str, size: tuple[int, int]
) -> None:
    if kind == "trained":
        network = trained("stlpips_alex" if trunk == "alex" else "stlpips_vgg")
    else:
        network = random_stlpips(trunk)
    got = distance(network, draw_images(1, *size), draw_images(2, *size))
    assert got.tolist() == pytest.approx(_ORIGINAL[trunk, kind, size], rel=3e-6)


@pytest.mark.parametrize("height", [16, 17])
@pytest.mark.parametrize("width", [18, 21])
def test_blurred_convolution_is_a_convolution_and_a_blur_pool(height: int, width: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 3, 5, 5).double(), torch.randn(4).double()
    x = torch.randn(2, 3, height, width).double().requires_grad_(True)
    folded = stlpips.BlurredConv(weight, bias, padding=2)
    wanted = stlpips.blur_pool(F.conv2d(x, weight, bias, padding=2))
    torch.testing.assert_close(folded(x), wanted, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(wanted)
    (gradient,) = torch.autograd.grad(folded(x), x, cotangent)
    (wanted_gradient,) = torch.autograd.grad(wanted, x, cotangent)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-12, atol=1e-12)


def test_blur_pool_by_hand() -> None:
    # [1, 2, 1] / 4 at every second place of 3 2 | 1 2 3 4 | 3 2, and constant columns.
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].expand(4, 4)[None, None]
    expected = torch.tensor([2.0, 2.0, 3.5])[:, None].expand(3, 3)
    torch.testing.assert_close(stlpips.blur_pool(x)[0, 0], expected)


def test_hed_trunk_is_torchvisions_vgg16_on_bgr_less_the_mean() -> None:
    reference = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    convs = [layer for layer in reference if isinstance(layer, torch.nn.Conv2d)][:10]
    names = [f"conv{b}_{i}" for b, n in ((1, 2), (2, 2), (3, 3), (4, 3)) for i in range(1, n + 1)]
    tensors = {
        f"{name}.weight": conv.weight.detach() for name, conv in zip(names, convs, strict=True)
    }
    tensors |= {f"{name}.bias": conv.bias.detach() for name, conv in zip(names, convs, strict=True)}
    network = hed.HedVgg16(tensors, "random")

    photo = np.random.RandomState(0).randint(0, 256, (1, 32, 48, 3))
    images = torch.tensor(photo / 127.5 - 1, dtype=torch.float32).permute(0, 3, 1, 2)
    x = photo[..., ::-1] - np.array([104.00699, 116.66877, 122.67892])
    x = torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        got = network.features(images)
        for index, layer in enumerate(reference[:23]):
            x = layer(x)
            if index in (3, 8, 15, 22):
                torch.testing.assert_close(
                    got[(3, 8, 15, 22).index(index)], x, rtol=1e-4, atol=1e-3
                )
    assert [tuple(weights.unique()) for weights in network.channel_weights] == [(1.0,)] * 4


def test_trained_hed_trunk_sees_edges_and_not_noise_of_brightness() -> None:
    network = trained("hed_vgg16")
    image = draw_images(1, 64, 64)
    shifted = image.roll(4, 3)
    near, far = distance(network, image * 0.95, image), distance(network, shifted, image)
    assert (near < 0.2 * far).all()


@pytest.fixture(scope="module", params=["alex", "vgg", "squeeze"])
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, lpips.LPIPS, PerceptualNetwork]:
    """The package's network with a random trunk and its own heads, and ours of the same file.

    Our trunk comes through the store: a file in torchvision's format, its digest registered.
    """
    trunk: str = request.param
    torch.manual_seed(0)
    model = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
    name = lpips_family.TRUNKS[trunk][1]
    cache = tmp_path_factory.mktemp("cache")
    entry = registry.FILES[name]
    path = cache / "files" / entry.filename
    path.parent.mkdir()
    state = {f"features.{key.partition('.')[2]}": v for key, v in model.net.state_dict().items()}
    torch.save({**state, "classifier.0.weight": torch.zeros(3)}, path)
    own = replace(entry, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), bytes=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMEXP_CACHE", str(cache))
        patch.setitem(registry.FILES, name, own)
        network: NetworkName = f"lpips_{trunk}"  # type: ignore[assignment]
        return trunk, model, load_network(network)


def test_lpips_of_its_authors(published: tuple[str, lpips.LPIPS, PerceptualNetwork]) -> None:
    trunk, model, ours = published
    assert len(ours.channel_weights) == (7 if trunk == "squeeze" else 5)
    for height, width in ((64, 80), (65, 47)):
        images, other = draw_images(1, height, width), draw_images(2, height, width)
        with torch.no_grad():
            expected = model(images, other).flatten()
        got = distance(ours, images, other)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        # Random trunks give distances that 1e-6 is small against.
        assert expected.min() > 1e-3
    assert len(ours.weights_sha256) == 64
    assert not any(parameter.requires_grad for parameter in ours.parameters())  # type: ignore[attr-defined]


def test_spatial_lpips_of_its_authors(
    published: tuple[str, lpips.LPIPS, PerceptualNetwork],
) -> None:
    _, model, ours = published
    images, other = draw_images(1, 64, 80), draw_images(2, 64, 80)
    model.spatial = True
    try:
        with torch.no_grad():
            expected = model(images, other)
            target = [normalise(layer) for layer in ours.features(other)]
            got = distance_map(ours.features(images), target, ours.channel_weights, (64, 80))
    finally:
        model.spatial = False
    assert got.shape == (2, 1, 64, 80)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_gradient_is_that_of_its_authors(
    published: tuple[str, lpips.LPIPS, PerceptualNetwork],
) -> None:
    _, model, ours = published
    images, other = draw_images(1, 64, 64).requires_grad_(True), draw_images(2, 64, 64)
    with torch.no_grad():
        target = [normalise(layer) for layer in ours.features(other)]
    value = feature_distance(ours.features(images), target, ours.channel_weights)
    (got,) = torch.autograd.grad(value.sum(), images)
    (expected,) = torch.autograd.grad(model(images, other).sum(), images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_weights_of_another_network_are_refused() -> None:
    state = {"features.0.weight": torch.zeros(64, 3, 3, 3)}
    with pytest.raises(LmexpError, match="not the weights of torchvision's alexnet") as raised:
        lpips_family.build_trunk("alexnet", state, "x.pth")
    assert "\n" not in str(raised.value)


def test_lpips_without_network_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LmexpError("no route to host")

    monkeypatch.setenv("LMEXP_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("lmexp.weights.transfer.bring", fail)
    with pytest.raises(LmexpError, match=r"no route to host.*alexnet-owt-7be5be79\.pth") as raised:
        lpips_family.load("alex")
    assert "\n" not in str(raised.value)
    assert "stlpips_alex" in str(raised.value)


def test_distance_by_hand() -> None:
    # One layer of 1×2 places and 2 channels. Normalised: (1, 0) and (0.6, 0.8).
    features = torch.tensor([[3.0, 3.0], [0.0, 4.0]])[None, :, None]
    target = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[None, :, None]
    weights = torch.tensor([1.0, 10.0])
    # Left: 1·1² + 10·1² = 11. Right: 1·0.4² + 10·0.8² = 6.56.
    got = feature_distance([features], [target], [weights])
    assert got.tolist() == pytest.approx([(11 + 6.56) / 2])
    places = torch.tensor([0.25, 0.75])[None, None, None]
    got = feature_distance([features], [target], [weights], [places])
    assert got.tolist() == pytest.approx([0.25 * 11 + 0.75 * 6.56])


def test_distance_by_numpy() -> None:
    draw = np.random.RandomState(3)
    sizes = ((5, 4, 6), (7, 2, 3))
    f = [draw.standard_normal((3, *size)) for size in sizes]
    t = [draw.standard_normal((3, *size)) for size in sizes]
    c = [draw.uniform(0, 1, size[0]) for size in sizes]
    keep = draw.uniform(0, 1, (3, 1, 8, 12))
    expected = np.zeros(3)
    for now, wanted, channels in zip(f, t, c, strict=True):
        _, _, h, w = now.shape
        places = keep.reshape(3, h, 8 // h, w, 12 // w).mean((2, 4))
        for n in range(3):
            for i in range(h):
                for j in range(w):
                    a, b = now[n, :, i, j], wanted[n, :, i, j]
                    squares = (a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2
                    expected[n] += (channels @ squares) * places[n, i, j] / places[n].sum()
    features = [torch.tensor(layer) for layer in f]
    target = [normalise(torch.tensor(layer)) for layer in t]
    weights = [torch.tensor(channels) for channels in c]
    got = feature_distance(features, target, weights, spread(torch.tensor(keep), target))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


def test_distance_gradient() -> None:
    torch.manual_seed(0)
    features = [torch.randn(2, 3, 2, 3).double().requires_grad_(True) for _ in range(2)]
    target = [normalise(torch.randn(2, 3, 2, 3).double()) for _ in range(2)]
    weights = [torch.rand(3).double() for _ in range(2)]
    places = spread(torch.rand(2, 1, 4, 6).double(), target)
    assert torch.autograd.gradcheck(
        lambda *layers: feature_distance(layers, target, weights, places), tuple(features)
    )


@pytest.mark.parametrize("name", ["stlpips_alex", "hed_vgg16"])
def test_network_gradient(name: str) -> None:
    if name == "stlpips_alex":
        network = random_stlpips("alex")
    else:
        network = hed.HedVgg16(random_hed_tensors(), "random")
    network = network.double()
    image = draw_images(1, 32, 32)[:1].double().requires_grad_(True)
    other = draw_images(2, 32, 32)[:1].double()
    target = [normalise(layer) for layer in network.features(other)]
    assert torch.autograd.gradcheck(
        lambda x: feature_distance(network.features(x), target, network.channel_weights),
        (image,),
        eps=1e-7,
        atol=1e-4,
        fast_mode=True,
    )


def random_hed_tensors() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    into = 3
    for block, (convs, out) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512)), start=1):
        for index in range(1, convs + 1):
            shapes[f"conv{block}_{index}.weight"] = (out, into, 3, 3)
            shapes[f"conv{block}_{index}.bias"] = (out,)
            into = out
    return draw_tensors(shapes, 5)


@pytest.mark.parametrize("name", ["stlpips_alex", "stlpips_vgg", "hed_vgg16"])
def test_networks_are_found_by_name_and_frozen(
    name: NetworkName, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = name.partition("_")[2]
    tensors = random_hed_tensors() if trunk == "vgg16" else random_stlpips_tensors(trunk)
    asked: list[str] = []

    def load(wanted: str) -> store.StoredWeights:
        asked.append(wanted)
        return store.StoredWeights(tensors, "digest", Path("nowhere"))

    monkeypatch.setattr(store, "load", load)
    network = load_network(name)
    assert asked == [name]
    assert isinstance(network, PerceptualNetwork) and isinstance(network, torch.nn.Module)
    assert network.weights_sha256 == "digest"
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    features = network.features(draw_images(1, 64, 64))
    widths = [len(weights) for weights in network.channel_weights]
    assert [layer.shape[1] for layer in features] == widths


def test_features_of_zero_have_a_finite_gradient() -> None:
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    target = normalise(torch.rand(1, 4, 2, 2))
    value = feature_distance([features], [target], [torch.ones(4)])
    (gradient,) = torch.autograd.grad(value.sum(), features)
    assert torch.isfinite(gradient).all()
    assert normalise(torch.zeros(1, 4, 2, 2)).abs().max() == 0


def test_half_precision_features_are_normalised_in_single() -> None:
    features = torch.full((1, 4, 1, 1), 300.0, dtype=torch.float16)  # 300² overflows
    torch.testing.assert_close(normalise(features), torch.full((1, 4, 1, 1), 0.5))


@pytest.mark.parametrize(("side", "resolution"), [(12, 4), (10, 4), (12, None), (3, 4)])
def test_shrink_is_the_mean_over_areas(side: int, resolution: int | None) -> None:
    images = torch.rand(2, 3, side, side)
    got = shrink(images, resolution)
    if resolution is None or side <= resolution:
        assert got is images
    elif side % resolution == 0:
        factor = side // resolution
        expected = images.reshape(2, 3, resolution, factor, resolution, factor).mean((3, 5))
        torch.testing.assert_close(got, expected)
    else:
        torch.testing.assert_close(got, F.interpolate(images, size=(4, 4), mode="area"))
