"""LPIPS as its authors publish it, with their package's own trunks and linear heads.

Source: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual
metric", arXiv 1801.03924, version 0.1 of the package lpips. The linear heads come with
the package; the trunks are torchvision's ImageNet weights, fetched on first use.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import lpips
import torch
import torchvision.models  # type: ignore[import-untyped]
from torch import Tensor, nn

from lmexp.errors import LmexpError

_TRUNK_WEIGHTS = {
    "alex": torchvision.models.AlexNet_Weights.IMAGENET1K_V1,
    "vgg": torchvision.models.VGG16_Weights.IMAGENET1K_V1,
    "squeeze": torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
}


def load(trunk: str) -> LpipsPackage:
    """The published network of that trunk: "alex", "vgg" or "squeeze".

    Raises:
        LmexpError: torchvision's weights are neither in its cache nor to be fetched.
    """
    try:
        with warnings.catch_warnings():
            # The package calls torchvision by keywords that are deprecated there.
            warnings.simplefilter("ignore")
            model = lpips.LPIPS(net=trunk, verbose=False)
    except (OSError, RuntimeError) as error:
        url = _TRUNK_WEIGHTS[trunk].url
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise LmexpError(
            f"loss.lpips.network=lpips_{trunk}: torchvision's weights cannot be fetched "
            f"({error}); put {url.rpartition('/')[2]} into {cache}, or choose "
            "loss.lpips.network=stlpips_alex, which needs no download from there"
        ) from error
    return LpipsPackage(model)


class LpipsPackage(nn.Module):
    """The trunk and the heads of a `lpips.LPIPS`, for targets whose features are kept.

    Inputs in [-1, 1] are standardised by the package's own scaling layer. The layers are
    its five (alex, vgg) or seven (squeeze).
    """

    def __init__(self, model: lpips.LPIPS) -> None:
        super().__init__()
        self.scaling_layer: nn.Module = model.scaling_layer
        self.trunk: nn.Module = model.net
        for index, head in enumerate(model.lins):
            self.register_buffer(f"head{index}", head.model[-1].weight.detach().reshape(-1).clone())
        self._layers = len(model.lins)
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        self.weights_sha256 = digest.hexdigest()

    @property
    def channel_weights(self) -> list[Tensor]:
        return [self.get_buffer(f"head{index}") for index in range(self._layers)]

    def features(self, images: Tensor) -> list[Tensor]:
        """images: [N, 3, H, W], RGB in [-1, 1], H and W ≥ 32."""
        return list(self.trunk(self.scaling_layer(images)))
