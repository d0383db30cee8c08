"""The Face Alignment Network: one stacked hourglass of hierarchical residual blocks.

Source: Bulat & Tzimiropoulos, "How far are we from solving the 2D & 3D face alignment
problem?", ICCV 2017 (arXiv 1703.07332); its block is that of "Binarized convolutional
landmark localizers for human pose estimation and face alignment with limited resources",
ICCV 2017 (arXiv 1703.00862), figure 3(e); the hourglass is that of Newell et al., ECCV 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUT_SIDE = 256
HEATMAP_SIDE = 64
NUM_LANDMARKS = 68
CEILING = 16.0
"""Where activations saturate.

In training a batch's own statistics bound what a normalisation lets through; frozen ones do
not. Without this, a large patch of one saturated colour was amplified from block to block until
it drowned the face (2 of 164 photos). Ordinary activations hardly reach it.
"""


def rectify(x: Tensor) -> Tensor:
    """ReLU that saturates at `CEILING`."""
    return F.hardtanh(x, 0.0, CEILING)


class HierarchicalBlock(nn.Module):
    """Pre-activated residual block whose branch concatenates three receptive fields.

    Three 3×3 convolutions in a row give 1/2, 1/4 and 1/4 of the output channels; each is
    kept, so that one block sees 3×3, 5×5 and 7×7 pixels at once.

    Args:
        inputs: channels in.
        outputs: channels out, a multiple of 4.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half, quarter = outputs // 2, outputs // 4
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, half, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, quarter, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(quarter)
        self.conv3 = nn.Conv2d(quarter, quarter, 3, padding=1, bias=False)
        self.skip = (
            nn.Identity()
            if inputs == outputs
            else nn.Sequential(
                nn.BatchNorm2d(inputs),
                nn.Hardtanh(0.0, CEILING),
                nn.Conv2d(inputs, outputs, 1, bias=False),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, h, w] → [N, outputs, h, w]."""
        a = self.conv1(rectify(self.norm1(x)))
        b = self.conv2(rectify(self.norm2(a)))
        c = self.conv3(rectify(self.norm3(b)))
        skip: Tensor = self.skip(x)
        return torch.cat((a, b, c), dim=1) + skip


class Hourglass(nn.Module):
    """Features summed over `depth` halvings of the resolution and the original one.

    Args:
        width: channels.
        depth: number of halvings; h and w must be multiples of 2**depth.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.across = HierarchicalBlock(width, width)
        self.down = HierarchicalBlock(width, width)
        self.inner: nn.Module = (
            Hourglass(width, depth - 1) if depth > 1 else HierarchicalBlock(width, width)
        )
        self.up = HierarchicalBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, width, h, w] → the same."""
        y = self.up(self.inner(self.down(F.avg_pool2d(x, 2))))
        across: Tensor = self.across(x)
        return across + F.interpolate(y, scale_factor=2, mode="nearest")


class Fan(nn.Module):
    """One-stack FAN.

    Args:
        width: channels of the hourglass, a multiple of 16; the paper's is 256.
        depth: halvings in the hourglass; the paper's is 4.
        landmarks: heat maps to draw.
    """

    def __init__(self, width: int = 256, depth: int = 4, landmarks: int = NUM_LANDMARKS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width // 4, 7, stride=2, padding=3, bias=False)
        self.stem_norm = nn.BatchNorm2d(width // 4)
        self.block1 = HierarchicalBlock(width // 4, width // 2)
        self.block2 = HierarchicalBlock(width // 2, width // 2)
        self.block3 = HierarchicalBlock(width // 2, width)
        self.hourglass = Hourglass(width, depth)
        self.top = HierarchicalBlock(width, width)
        self.last = nn.Conv2d(width, width, 1, bias=False)
        self.last_norm = nn.BatchNorm2d(width)
        self.heatmaps = nn.Conv2d(width, landmarks, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Draw the heat maps.

        Args:
            images: [N, 3, R, R], RGB in [-1, 1]; R a multiple of 2**(depth + 2).

        Returns:
            heatmaps: [N, landmarks, R/4, R/4], about 1 at a landmark and 0 elsewhere.
        """
        x = rectify(self.stem_norm(self.stem(images)))
        x = F.avg_pool2d(self.block1(x), 2)
        x = self.block3(self.block2(x))
        x = self.top(self.hourglass(x))
        x = rectify(self.last_norm(self.last(x)))
        heatmaps: Tensor = self.heatmaps(x)
        return heatmaps
