"""The perceptual term: distance of deep features between the image and the look photo."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lmexp.acceleration import Checked
from lmexp.errors import LmexpError
from lmexp.landmarks.framing import average
from lmexp.losses.mask import Region, face_weight, keep_mask
from lmexp.losses.perceptual.frozen_vgg import FrozenVgg
from lmexp.losses.perceptual.protocol import NetworkName, PerceptualNetwork, load_network
from lmexp.losses.protocol import BoundTerm, Context, Targets

_MASK_SIDE = 128
"""Of the mask before it is spread over a network's layers, which are coarser or a little finer."""

_LEAST_SIDE = 32
"""Below it the last layers have no place left."""


def normalise(features: Tensor) -> Tensor:
    """[N, C, h, w] -> the same, each place's vector of channels scaled to length 1.

    A vector of zeros stays one. At least float32, since squares leave half precision.
    """
    features = features.to(_at_least_single(features))
    # The root of the floor is the 1e-10 of the published code; inside the root it keeps
    # the gradient at zero finite.
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-20)


def _at_least_single(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


def feature_distance(
    features: Sequence[Tensor],
    target: Sequence[Tensor],
    channel_weights: Sequence[Tensor],
    place_weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """LPIPS between layers of activations, per image.

    Σ_layers Σ_places p · Σ_channels c · (normalise(f) - t)², with the places' weights p
    summing to 1 in each layer (uniform if not given), which is the spatial mean.

    Args:
        features: one [N, C_l, h_l, w_l] a layer, not normalised.
        target: the same shapes, normalised; may be rounded to half precision.
        channel_weights: one [C_l] a layer.
        place_weights: one [N, 1, h_l, w_l] a layer.

    Returns:
        [N].

    Source: Zhang et al., arXiv 1801.03924, equation 1.
    """
    total = features[0].new_zeros(len(features[0]), dtype=_at_least_single(target[0]))
    for layer, (now, wanted, channels) in enumerate(
        zip(features, target, channel_weights, strict=True)
    ):
        squares = (normalise(now) - wanted).square()
        # Not as a 1×1 convolution, which autocast and TF32 would compute in low precision.
        distance = (squares * channels.to(squares.dtype)[:, None, None]).sum(1, keepdim=True)
        if place_weights is None:
            total = total + distance.mean((1, 2, 3))
        else:
            total = total + (distance * place_weights[layer]).sum((1, 2, 3))
    return total


def distance_map(
    features: Sequence[Tensor],
    target: Sequence[Tensor],
    channel_weights: Sequence[Tensor],
    size: tuple[int, int],
) -> Tensor:
    """LPIPS as a picture of where two images differ: each layer's distances, enlarged and added.

    Its mean is about `feature_distance`, which averages before it adds.

    Args:
        features, target, channel_weights: as in `feature_distance`.
        size: height and width of the map, px; those of the images.

    Returns:
        [N, 1, height, width].

    Source: Zhang et al., arXiv 1801.03924; the package lpips with spatial=True.
    """
    dtype = _at_least_single(target[0])
    total = features[0].new_zeros(len(features[0]), 1, *size, dtype=dtype)
    for now, wanted, channels in zip(features, target, channel_weights, strict=True):
        squares = (normalise(now) - wanted).square()
        distance = (squares * channels.to(squares.dtype)[:, None, None]).sum(1, keepdim=True)
        total = total + F.interpolate(distance, size=size, mode="bilinear", align_corners=False)
    return total


def spread(keep: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
    """A mask as weights of the places of each layer, summing to 1 per image.

    Args:
        keep: [N, 1, s, s] ≥ 0. Where it is 0 everywhere, so are the weights.
        features: one [N, C_l, h_l, w_l] a layer.

    Returns:
        One [N, 1, h_l, w_l] a layer: the mask averaged over each place's share of the
        image, and scaled.
    """
    places = [F.adaptive_avg_pool2d(keep, (layer.shape[2], layer.shape[3])) for layer in features]
    return [place / place.sum((2, 3), keepdim=True).clamp_min(1e-12) for place in places]


def shrink(images: Tensor, resolution: int | None) -> Tensor:
    """Average over areas to the side `resolution`; smaller images and None: unchanged."""
    if resolution is None or images.shape[-1] <= resolution:
        return images
    return average(images, resolution)


class Lpips:
    """LPIPS(x, look), ignoring the regions where look and expression contradict each other.

    Args:
        weight: ≥ 0, λ of the term.
        network: whose features: shift-tolerant LPIPS (`stlpips_*`), the trunk of an edge
            detector without linear heads (`hed_vgg16`), or LPIPS itself (`lpips_*`, whose
            trunks are fetched from torchvision's host on first use).
        resolution: images are averaged down to this side before the network, px; null: never.
        mask: regions to ignore in both faces; empty: none. Without an expression (the look
            alone is inverted) nothing is in contradiction and nothing ignored.
        mask_dilation, mask_softness: growth and width of the Gaussian feather of the
            regions, fractions of the distance between the outer eye corners.
        mask_strength: 1 ignores the regions wholly, 0 not at all.
        mask_pixels: also put the look's own pixels into the regions before the network. The
            features beside a region see into it, and without this they go on asking for
            what the look has there.
        face_emphasis: 0 lets every place count alike; at 1 only the look's face counts, and
            hair and background are anybody's. Between, a better likeness is paid for with them.

    Raises:
        LmexpError: when bound, if the network's weights cannot be had or the images are
            smaller than 32 px.
    """

    needs_expression: ClassVar[bool] = False

    def __init__(
        self,
        weight: Annotated[float, Field(ge=0)] = 8.0,
        network: NetworkName = "stlpips_alex",
        resolution: Annotated[int, Field(ge=_LEAST_SIDE)] | None = 256,
        mask: tuple[Region, ...] = ("mouth", "jaw"),
        mask_dilation: Annotated[float, Field(ge=0)] = 0.08,
        mask_softness: Annotated[float, Field(ge=0)] = 0.05,
        mask_strength: Annotated[float, Field(ge=0, le=1)] = 1.0,
        mask_pixels: bool = True,
        face_emphasis: Annotated[float, Field(ge=0, le=1)] = 0.5,
    ) -> None:
        self.weight = weight
        self.network = network
        self.resolution = resolution
        self.mask = mask
        self.mask_dilation = mask_dilation
        self.mask_softness = mask_softness
        self.mask_strength = mask_strength
        self.mask_pixels = mask_pixels
        self.face_emphasis = face_emphasis
        self._loaded: PerceptualNetwork | None = None

    @property
    def weights_sha256(self) -> str:
        """Digest of the network's weights; loads them if they are not yet."""
        return self._load().weights_sha256

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        side = targets.look.shape[-1]
        if side < _LEAST_SIDE:
            raise LmexpError(
                f"loss.lpips: images of {side} px are too small for {self.network}; choose a "
                f"generator of at least {_LEAST_SIDE} px, or loss.lpips.weight=0"
            )
        network = self._load()
        if isinstance(network, torch.nn.Module):
            network.to(targets.look.device)
        network = context.acceleration.network(network)
        with torch.no_grad():
            look = shrink(targets.look, self.resolution)
            # In the features' own type: it is read at every step.
            target = [normalise(layer).to(layer.dtype) for layer in network.features(look)]
            keep = self.keep(targets)
            counts = self._emphasise(targets, keep)
            places = None if counts is None else spread(counts, target)
            pixels = None
            if keep is not None and self.mask_pixels:
                pixels = F.interpolate(keep, size=look.shape[-1], mode="bilinear")
        channels = network.channel_weights

        side, fuse = look.shape[-1], context.acceleration.fuse

        def prepare(images: Tensor) -> Tensor:
            return images if pixels is None else torch.lerp(look, images, pixels)

        def measure(images: Tensor) -> Tensor:
            return feature_distance(network.features(prepare(images)), target, channels, places)

        frozen: FrozenVgg | None = getattr(network, "frozen", None)
        if frozen is None or not frozen.has_kernels:
            fused = fuse(measure)
            return lambda candidate: fused(candidate.averaged(side))

        # Triton comes with PyTorch's CUDA builds alone.
        from lmexp.losses.perceptual.vgg_triton import distance

        count = len(target)

        def plain(images: Tensor, *rows: Tensor) -> Tensor:
            features = network.features(images)
            return feature_distance(features, rows[:count], channels, rows[count:] or None)

        prepared = prepare if pixels is None else fuse(prepare)
        rows = [*target, *(places or ())]
        checked = Checked(self.network, partial(distance, frozen), plain, fuse(plain), slopes=1)
        return lambda candidate: checked(prepared(candidate.averaged(side)), *rows)

    def keep(self, targets: Targets) -> Tensor | None:
        """The mask [N, 1, s, s] of the whole image; None if nothing is ignored."""
        if not self.mask or not self.mask_strength or targets.expression_landmarks is None:
            return None
        resolution = targets.look.shape[-1]
        return keep_mask(
            (targets.look_landmarks, targets.expression_landmarks),
            self.mask,
            resolution=resolution,
            side=min(resolution, _MASK_SIDE),
            dilation=self.mask_dilation,
            softness=self.mask_softness,
            strength=self.mask_strength,
        ).to(targets.look)

    def _emphasise(self, targets: Targets, keep: Tensor | None) -> Tensor | None:
        """`keep` times the weight of the look's face."""
        if not self.face_emphasis:
            return keep
        resolution = targets.look.shape[-1]
        weight = face_weight(
            targets.look_landmarks,
            resolution=resolution,
            side=min(resolution, _MASK_SIDE),
            emphasis=self.face_emphasis,
        ).to(targets.look)
        return weight if keep is None else keep * weight

    def _load(self) -> PerceptualNetwork:
        # Not when constructed: a term of weight 0 is built too, and must not fetch weights.
        if self._loaded is None:
            self._loaded = load_network(self.network)
        return self._loaded
