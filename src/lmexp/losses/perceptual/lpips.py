"""LPIPS as its authors publish it, with their package's own trunks and linear heads.

Source: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual
metric", arXiv 1801.03924, version 0.1 of the package lpips. The linear heads come with
the package; the trunks are torchvision's ImageNet weights, fetched on first use. The package
would fetch them itself, unchecked and unasked; so it is only asked for its modules.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import lpips
import lpips.pretrained_networks
import torch
from torch import Tensor, nn

from lmexp.convolutions import LoweredConv, lower_convolutions
from lmexp.errors import LmexpError
from lmexp.losses.perceptual.frozen_vgg import FrozenVgg
from lmexp.weights import store
from lmexp.weights.converters import first_line, read_state_dict

TRUNKS = {
    "alex": ("alexnet", "torchvision_alexnet"),
    "vgg": ("vgg16", "torchvision_vgg16"),
    "squeeze": ("squeezenet", "torchvision_squeezenet1_1"),
}
"""By the package's name of the network: its class of the trunk, and our name of the weights."""

VERSION = "v0.1"


def load(trunk: str) -> LpipsPackage:
    """The published network of that trunk: "alex", "vgg" or "squeeze".

    Raises:
        LmexpError: torchvision's weights are neither there nor to be fetched.
    """
    module, name = TRUNKS[trunk]
    try:
        stored = store.load(name)
    except LmexpError as error:
        raise LmexpError(
            f"loss.lpips.network=lpips_{trunk}: {error}; or choose "
            "loss.lpips.network=stlpips_alex, which comes from the package index"
        ) from error
    heads = read_state_dict(Path(lpips.__file__).parent / "weights" / VERSION / f"{trunk}.pth")
    return LpipsPackage(
        build_trunk(module, stored.tensors, str(stored.path)),
        [heads[f"lin{index}.model.1.weight"].reshape(-1) for index in range(len(heads))],
    )


def build_trunk(name: str, tensors: Mapping[str, Tensor], source: str) -> nn.Module:
    """One of the package's trunks with torchvision's weights.

    Args:
        name: class in `lpips.pretrained_networks`.
        tensors: torchvision's state dict; its classifier is not read.
        source: where they come from, for the error's line.

    Raises:
        LmexpError: they are another network's.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        # The package calls torchvision by keywords that are deprecated there. Without storage,
        # the random classifier of a VGG16 takes neither half a gigabyte nor seconds.
        warnings.simplefilter("ignore")
        trunk: nn.Module = getattr(lpips.pretrained_networks, name)(pretrained=False)
    # The trunk cuts torchvision's `features` into slices and keeps their numbers.
    state = {key: f"features.{key.partition('.')[2]}" for key in trunk.state_dict()}
    try:
        trunk.load_state_dict({key: tensors[theirs] for key, theirs in state.items()}, assign=True)
    except (KeyError, RuntimeError) as error:
        raise LmexpError(
            f"{source}: not the weights of torchvision's {name} ({first_line(error)}); remove it"
        ) from error
    return trunk.eval().requires_grad_(False)


class LpipsPackage(nn.Module):
    """A trunk and its heads, for targets whose features are kept.

    Inputs in [-1, 1] are standardised by the package's own scaling layer. The layers are
    its five (alex, vgg) or seven (squeeze).

    Args:
        trunk: of `lpips.pretrained_networks`.
        heads: one [C_l] a layer, ≥ 0.
    """

    def __init__(self, trunk: nn.Module, heads: Sequence[Tensor]) -> None:
        super().__init__()
        self.scaling_layer: nn.Module = lpips.ScalingLayer()
        self.trunk = trunk
        for index, head in enumerate(heads):
            self.register_buffer(f"head{index}", head.clone())
        self._layers = len(heads)
        self.weights_sha256 = store.digest(self.state_dict())
        self.frozen: FrozenVgg | None = None

    @property
    def channel_weights(self) -> list[Tensor]:
        return [self.get_buffer(f"head{index}") for index in range(self._layers)]

    def lower_precision(self, dtype: torch.dtype) -> None:
        lower_convolutions(self.trunk, dtype)
        if not isinstance(self.trunk, lpips.pretrained_networks.vgg16):
            return
        shift, scale = (self.scaling_layer.get_buffer(key).flatten() for key in ("shift", "scale"))
        self.frozen = FrozenVgg(
            [
                [module for module in part.modules() if isinstance(module, LoweredConv)]
                for part in self.trunk.children()
            ],
            -shift,
            1 / scale,
            self.channel_weights,
            reverses=False,
            rounds_up=False,
        )

    def features(self, images: Tensor) -> list[Tensor]:
        """images: [N, 3, H, W], RGB in [-1, 1], H and W ≥ 32."""
        return list(self.trunk(self.scaling_layer(images)))
