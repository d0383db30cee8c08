"""The perceptual term: what is masked does not count, jobs are strangers, zero is zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from lmexp.config import Component
from lmexp.errors import LmexpError
from lmexp.losses.lpips import Lpips
from lmexp.losses.perceptual import protocol
from lmexp.losses.protocol import Candidate, Context, Targets, Term

SIDE = 64
UNUSED = cast(Any, None)
CONTEXT = Context(generator=UNUSED, heatmap_network=UNUSED, latent_statistics=UNUSED)


class Pixels(torch.nn.Module):
    """Two layers: the image itself, and a 3×3 convolution of it that sees 1 px around."""

    weights_sha256 = "none"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("kernel", torch.randn(5, 3, 3, 3))

    @property
    def channel_weights(self) -> list[Tensor]:
        return [torch.ones(3), torch.arange(5.0)]

    def features(self, images: Tensor) -> list[Tensor]:
        return [images, F.conv2d(images, cast(Tensor, self.kernel), padding=1)]


def make_term(monkeypatch: pytest.MonkeyPatch, **keywords: Any) -> Lpips:
    monkeypatch.setattr("lmexp.losses.lpips.load_network", lambda name: Pixels())
    return Lpips(**{"resolution": None, "face_emphasis": 0.0, **keywords})


def draw_landmarks(n: int) -> Tensor:
    """The mouth is a box of x 24–40, y 40–52, the outer eye corners are 20 px apart."""
    landmarks = torch.full((n, 68, 2), 10.0)
    corners = torch.tensor([[24.0, 40.0], [40.0, 40.0], [40.0, 52.0], [24.0, 52.0]])
    landmarks[:, 48:68] = corners.repeat(5, 1)
    landmarks[:, 36] = torch.tensor([22.0, 20.0])
    landmarks[:, 45] = torch.tensor([42.0, 20.0])
    return landmarks


def draw_targets(n: int = 1, expression: bool = True) -> Targets:
    generator = torch.Generator().manual_seed(1)
    photos = torch.rand(2, n, 3, SIDE, SIDE, generator=generator) * 2 - 1
    if not expression:
        return Targets(look=photos[0], look_landmarks=draw_landmarks(n))
    return Targets(
        look=photos[0],
        look_landmarks=draw_landmarks(n),
        expression=photos[1],
        expression_landmarks=draw_landmarks(n),
        landmark_weights=torch.ones(n, 68),
    )


def candidate(images: Tensor) -> Candidate:
    return Candidate(
        images,
        ws=images.new_zeros(len(images), 1, 4),
        noise_bufs=(),
        step=0,
        heatmap_network=UNUSED,
    )


def test_identical_images_give_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = draw_targets(2)
    for mask in ((), ("mouth",)):
        evaluate = make_term(monkeypatch, mask=mask).bind(CONTEXT, targets)
        assert evaluate(candidate(targets.look)).tolist() == [0, 0]


def test_masked_pixels_neither_count_nor_get_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = draw_targets()
    term = make_term(monkeypatch, mask=("mouth",), mask_dilation=0.1, mask_softness=0.01)
    evaluate = term.bind(CONTEXT, targets)

    images = targets.look.clone()
    images[..., 42:50, 26:38] *= -1  # within the box by more than the network sees
    assert evaluate(candidate(images)).tolist() == [0]

    images = -targets.look.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(evaluate(candidate(images)).sum(), images)
    # The dilated box is 22–42 × 38–54, and one pixel more is seen from outside of it.
    assert (gradient[..., 40:52, 24:40] == 0).all()
    outside = gradient.abs().sum(1)
    outside[..., 36:56, 20:44] = 1
    assert (outside > 0).all()


def test_filled_regions_are_invisible_to_features_beside_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = draw_targets()
    options: dict[str, Any] = {"mask": ("mouth",), "mask_dilation": 0.0, "mask_softness": 0.0}
    box = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    box[40:52, 24:40] = True
    images = torch.where(box, -targets.look, targets.look).requires_grad_(True)
    # Without filling, the 3×3 features just outside of the box see into it.
    assert (
        make_term(monkeypatch, mask_pixels=False, **options).bind(CONTEXT, targets)(
            candidate(images)
        )
        > 0
    )
    filled = make_term(monkeypatch, mask_pixels=True, **options).bind(CONTEXT, targets)
    assert filled(candidate(images)).tolist() == [0]
    images = -targets.look.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(filled(candidate(images)).sum(), images)
    assert ((gradient.abs().sum(1)[0] == 0) == box).all()


def test_masked_value_is_the_mean_over_the_places_that_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = draw_targets()
    images = targets.look.clone()
    images[..., :8, :] = -images[..., :8, :]
    options = {"mask_dilation": 0.0, "mask_softness": 0.0}
    plain = make_term(monkeypatch, mask=()).bind(CONTEXT, targets)
    masked = make_term(monkeypatch, mask=("mouth",), **options).bind(CONTEXT, targets)
    kept = 1 - 16 * 12 / SIDE**2
    ratio = plain(candidate(images)) / masked(candidate(images))
    assert float(ratio) == pytest.approx(kept, rel=1e-5)


def test_nothing_is_masked_while_the_look_alone_is_inverted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    term = make_term(monkeypatch, mask=("mouth",))
    images = candidate(-draw_targets().look)
    alone = term.bind(CONTEXT, draw_targets(expression=False))(images)
    plain = make_term(monkeypatch, mask=()).bind(CONTEXT, draw_targets())(images)
    assert alone == plain
    assert alone != term.bind(CONTEXT, draw_targets())(images)
    assert make_term(monkeypatch, mask_strength=0.0).keep(draw_targets()) is None


def test_job_alone_equals_job_in_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = draw_targets(3)
    assert targets.expression is not None and targets.expression_landmarks is not None
    shifts = torch.tensor([0.0, 4.0, -6.0])[:, None, None]
    targets = Targets(
        look=targets.look,
        look_landmarks=targets.look_landmarks + shifts,
        expression=targets.expression,
        expression_landmarks=targets.expression_landmarks - shifts,
    )
    assert targets.expression_landmarks is not None
    images = (targets.look + 0.3 * torch.randn(3, 3, SIDE, SIDE)).requires_grad_(True)
    term = make_term(monkeypatch, mask=("mouth", "jaw"), resolution=32)
    together = term.bind(CONTEXT, targets)(candidate(images))
    (gradient,) = torch.autograd.grad(together.sum(), images)
    for k in range(3):
        row = slice(k, k + 1)
        single = Targets(
            look=targets.look[row],
            look_landmarks=targets.look_landmarks[row],
            expression=targets.look[row],
            expression_landmarks=targets.expression_landmarks[row],
        )
        image = images.detach()[row].requires_grad_(True)
        alone = term.bind(CONTEXT, single)(candidate(image))
        (own_gradient,) = torch.autograd.grad(alone.sum(), image)
        torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradient[row], own_gradient, rtol=1e-4, atol=1e-8)


def test_resolution_is_the_networks_input_side(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = draw_targets()
    checker = targets.look + 0.5 * (torch.arange(SIDE) % 2 * 2 - 1)
    fine = make_term(monkeypatch, resolution=64, mask=()).bind(CONTEXT, targets)
    coarse = make_term(monkeypatch, resolution=32, mask=()).bind(CONTEXT, targets)
    assert float(fine(candidate(checker))) > 0.01
    assert float(coarse(candidate(checker))) < 1e-6  # stripes of 1 px average out


def test_tiny_images_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(1, 3, 16, 16)
    targets = Targets(look=images, look_landmarks=torch.zeros(1, 68, 2))
    with pytest.raises(LmexpError, match=r"loss\.lpips: images of 16 px .* at least 32 px"):
        make_term(monkeypatch).bind(CONTEXT, targets)


def test_weights_are_loaded_when_bound_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    def load(name: str) -> Pixels:
        loads.append(name)
        return Pixels()

    monkeypatch.setattr("lmexp.losses.lpips.load_network", load)
    term = Lpips(network="hed_vgg16")
    assert isinstance(term, Term) and isinstance(Pixels(), protocol.PerceptualNetwork)
    assert loads == []
    term.bind(CONTEXT, draw_targets())
    term.bind(CONTEXT, draw_targets())
    assert term.weights_sha256 == "none"
    assert loads == ["hed_vgg16"]


@pytest.mark.parametrize("stem", ["lpips", "noise", "prior"])
def test_yaml_builds_the_term_with_its_defaults(stem: str) -> None:
    path = Path(__file__).parents[2] / "conf" / "loss" / f"{stem}.yaml"
    keywords = yaml.safe_load(path.read_text(encoding="utf-8"))[stem]
    term = Component.model_validate(keywords).build()
    assert isinstance(term, Term)
    assert vars(term) == vars(type(term)())


@pytest.mark.parametrize(
    "keywords",
    [
        {"network": "alexnet"},
        {"mask": ["ears"]},
        {"mask_strength": 1.5},
        {"weight": -1.0},
        {"resolution": 8},
        {"mask_dilatation": 0.1},
    ],
)
def test_impossible_keywords_are_refused(keywords: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(keywords))):
        Component.model_validate({"_target_": "lmexp.losses.lpips.Lpips", **keywords})


def test_face_emphasis_counts_the_looks_face_and_less_what_is_around(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = draw_targets(expression=False)
    landmarks = targets.look_landmarks.clone()
    landmarks[:, :17] = torch.stack([torch.linspace(16, 48, 17), torch.full((17,), 56.0)], 1)
    landmarks[:, 17:27] = torch.stack([torch.linspace(16, 48, 10), torch.full((10,), 16.0)], 1)
    landmarks[:, 33] = torch.tensor([32.0, 30.0])
    targets = Targets(look=targets.look, look_landmarks=landmarks)
    inside, outside = targets.look.clone(), targets.look.clone()
    inside[..., 30:34, 30:34] *= -1
    outside[..., 0:4, 0:4] *= -1

    def ratio(emphasis: float) -> float:
        term = make_term(monkeypatch, face_emphasis=emphasis, mask=()).bind(CONTEXT, targets)
        return float(term(candidate(outside)) / term(candidate(inside)))

    assert ratio(0.6) == pytest.approx(0.4 * ratio(0.0), rel=1e-3)
    assert ratio(1.0) == pytest.approx(0.0, abs=1e-6)
