"""Trains a one-stack FAN on annotated face crops and writes it as safetensors.

    python scripts/train_landmarks.py --data DIR --out fan.safetensors --width 256 --minutes 7

DIR holds `train` and `val`, each with NAME.jpg and NAME.pts (300-W), pictures of one size with
the face in the middle. Training ends by the clock, evaluation included, so that the same
command fits any lease of a GPU; the EMA of the weights is saved every minute.

`--start FILE` goes on from weights that this script wrote. `--unlabelled DIR` adds pictures
without annotations (`scripts/render_faces.py`): `--teacher FILE` annotates them, as the median
over several views of the clean picture, and the network learns them spoilt and warped, which is
the noisy student of Xie et al., arXiv 1911.04252.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from landmark_warps import (
    Mouths,
    constant,
    find_mouths,
    move_brows,
    move_lids,
    move_mouth,
    paint_mouths,
    sources,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lmexp.landmarks.decoding import decode
from lmexp.landmarks.fan import HEATMAP_SIDE, INPUT_SIDE, Fan
from lmexp.landmarks.framing import ffhq_views, place, read_faces, resample, tight_views
from lmexp.landmarks.groups import FLIP, expand
from lmexp.landmarks.score import score
from lmexp.metrics.aspect_ratios import mouth_aspect_ratio

SIGMA = 1.2
"""Standard deviation of the target's Gaussian, in cells of the heat map, unless told."""

PEAK_WEIGHT = 5.0
"""The squared error at a target's peak counts 1 + this times as much as on the background."""

POINT_WEIGHT = 0.5
"""Weight of the mean distance (cells) between a map's centroid around the truth and the truth."""

OPENING_WEIGHT = 0.5
"""Weight of the mean error (cells) of the way from upper to lower lips and lids."""

_WEIGHTS = expand(
    {
        "jaw": 0.5,
        "left_eyebrow": 0.8,
        "right_eyebrow": 0.8,
        "nose_bridge": 0.8,
        "lower_nose": 0.8,
        "left_eye": 1.5,
        "right_eye": 1.5,
        "outer_lip": 1.3,
        "inner_lip": 1.6,
    }
)
GROUP_WEIGHTS = tuple((_WEIGHTS / _WEIGHTS.mean()).tolist())
"""What the projection asks for, eyes and mouth, counts more than the edge of the face."""

OPENINGS = ((61, 67), (62, 66), (63, 65), (37, 41), (38, 40), (43, 47), (44, 46))
"""Upper and lower points of the lips and lids."""

WARPED = 0.5
"""Share of a batch whose mouths, eyes and brows are moved."""


def sampling_weights(landmarks: Tensor) -> Tensor:
    """Show wide-open mouths and closed eyes, of which photos have few, three times as often."""
    p = landmarks
    gap = (p[:, 61:64] - p[:, [67, 66, 65]]).norm(dim=2).mean(dim=1)
    mouth = gap / (p[:, 60] - p[:, 64]).norm(dim=1)
    eyes = torch.stack(
        [
            ((p[:, e + 1] - p[:, e + 5]).norm(dim=1) + (p[:, e + 2] - p[:, e + 4]).norm(dim=1))
            / (2 * (p[:, e] - p[:, e + 3]).norm(dim=1))
            for e in (36, 42)
        ]
    ).amin(dim=0)
    return 1.0 + 2.0 * (mouth > 0.4) + 2.0 * (eyes < 0.18)


class Augmentation:
    """Random views, expressions and photographic faults, drawn for a batch on its device.

    Args:
        mouths: whose insides opened mouths show; without, mouths are not opened or closed.
    """

    def __init__(self, device: torch.device, seed: int, mouths: Mouths | None = None) -> None:
        self.device = device
        self.mouths = mouths if mouths is not None and len(mouths.images) else None
        self.generator = torch.Generator(device).manual_seed(seed)
        self.random = random.Random(
            seed
        )  # for what is one draw a batch: reading it waits for no GPU

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def chance(self, n: int, probability: float) -> Tensor:
        return (self.uniform(n, 1, 1, 1) < probability).float()

    def draw(self, images: Tensor, landmarks: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 crops and their points (px) → views in [-1, 1] and points (px of the view)."""
        views, flipped = self.views(landmarks)
        pictures = resample(images.float() / 255, views, INPUT_SIDE)
        points = place(landmarks, views, INPUT_SIDE)
        mirror = constant(FLIP, self.device)
        points = torch.where(flipped[:, None, None], points[:, mirror], points)
        if self.mouths is not None:
            some = round(len(images) * WARPED)
            changed, moved = self.grimace(pictures[:some], points[:some], self.mouths)
            pictures = torch.cat((changed, pictures[some:]))
            points = torch.cat((moved, points[some:]))
        return self.spoil(pictures).clamp(0, 1) * 2 - 1, points

    def grimace(self, pictures: Tensor, points: Tensor, mouths: Mouths) -> tuple[Tensor, Tensor]:
        """Another expression: mouths opened or shut, eyes closed or widened, brows moved."""
        n = len(points)
        now = mouth_aspect_ratio(points)
        kind = self.uniform(n)
        opened, shut = kind < 0.55, kind > 0.85
        ratio = torch.where(opened, self.uniform(n, low=0.1, high=1.2).maximum(now), now)
        ratio = torch.where(shut, now * self.uniform(n, high=0.7), ratio)
        lower = self.uniform(n, low=0.65, high=1.0)
        chin = self.uniform(n, low=0.4, high=1.0)
        smile = 0.06 * self.normal(n).clamp(-2, 2)
        moved = move_mouth(points, ratio, lower, chin, smile)

        kind = self.uniform(n, 1)
        both = self.uniform(n, 1, low=0.12, high=0.8).expand(n, 2)
        factor = torch.where(kind < 0.4, both, torch.ones_like(both))
        factor = torch.where(kind > 0.85, self.uniform(n, 1, low=1.0, high=1.35), factor)
        wink = torch.stack((left := self.uniform(n) < 0.5, ~left), dim=1)
        factor = torch.where((self.uniform(n, 1) < 0.15) & wink, 1.0, factor)
        moved = move_lids(moved, factor, self.uniform(n, low=0.6, high=1.0))
        moved = move_brows(moved, 0.035 * self.normal(n))

        where = sources(points, moved, INPUT_SIDE)
        warped = F.grid_sample(
            pictures, where / INPUT_SIDE * 2 - 1, padding_mode="reflection", align_corners=False
        )
        # A mouth that was open shows its own inside; the spline has only stretched it.
        lent = torch.randint(len(mouths.images), (n,), generator=self.generator, device=self.device)
        painted, _ = paint_mouths(
            warped, moved, mouths.images[lent].float() / 255, mouths.landmarks[lent]
        )
        borrow = opened & ((now < 0.12) | (self.uniform(n) < 0.3))
        return torch.where(borrow[:, None, None, None], painted, warped), moved

    def views(self, landmarks: Tensor) -> tuple[Tensor, Tensor]:
        """Turn ±40°, scale, stretch, shear, shift and mirror; half the views are near FFHQ's."""
        n = len(landmarks)
        low, high = landmarks.amin(dim=1), landmarks.amax(dim=1)
        span = (high - low).amax(dim=1)
        fill = torch.exp(self.uniform(n, low=math.log(0.4), high=math.log(0.95)))
        side = span / fill
        # A loose view leaves room to shift; in a tight one the face would leave the picture.
        room = 0.06 + 0.5 * (0.95 - fill).clamp(0, 0.3)
        centre = (low + high) / 2 + self.normal(n, 2) * 0.45 * (room * side)[:, None]
        turn = self.uniform(n, low=-1, high=1)
        angle = turn.sign() * turn.abs() ** 1.5 * math.radians(40)

        exact = ffhq_views(landmarks)
        edge = exact[:, :, 0]
        near = self.uniform(n) < 0.5
        exact_side = edge.norm(dim=1) * torch.exp(0.07 * self.normal(n))
        exact_angle = torch.atan2(edge[:, 1], edge[:, 0]) + math.radians(6) * self.normal(n)
        exact_centre = exact.sum(dim=2) - exact[:, :, :2].sum(dim=2) / 2
        exact_centre = exact_centre + 0.03 * exact_side[:, None] * self.normal(n, 2)

        side = torch.where(near, exact_side, side)
        angle = torch.where(near, exact_angle, angle)
        centre = torch.where(near[:, None], exact_centre, centre)

        flipped = self.uniform(n) < 0.5
        stretch = torch.exp(0.06 * self.normal(n))
        shear = 0.05 * self.normal(n)
        cos, sin = torch.cos(angle), torch.sin(angle)
        rotation = torch.stack((cos, -sin, sin, cos), dim=1).reshape(n, 2, 2)
        zero = torch.zeros_like(stretch)
        skew = torch.stack((stretch, shear, zero, 1 / stretch), dim=1).reshape(n, 2, 2)
        linear = side[:, None, None] * (rotation @ skew)
        linear[:, :, 0] *= torch.where(flipped, -1.0, 1.0)[:, None]
        origin = centre - linear.sum(dim=2) / 2
        return torch.cat((linear, origin[:, :, None]), dim=2), flipped

    def spoil(self, images: Tensor) -> Tensor:
        """Colour, light, blur, coarse pixels, grey, noise and things in front of the face."""
        n = len(images)

        def mix(spoilt: Tensor, probability: float) -> Tensor:
            return torch.lerp(images, spoilt, self.chance(n, probability))

        gamma = torch.exp(0.3 * self.normal(n, 1, 1, 1))
        images = images.clamp(1e-4, 1) ** gamma
        mean = images.mean(dim=(2, 3), keepdim=True)
        images = (images - mean) * torch.exp(0.25 * self.normal(n, 1, 1, 1)) + mean
        images = images * torch.exp(0.12 * self.normal(n, 3, 1, 1)) + 0.08 * self.normal(n, 1, 1, 1)
        cast = torch.exp(-1.6 * self.uniform(n, 3, 1, 1) * self.chance(n, 0.7))
        images = mix(images * cast / cast.amax(dim=1, keepdim=True), 0.2)
        images = mix(images * self.lamps(n), 0.08)
        exposure = torch.exp(self.uniform(n, 1, 1, 1, low=-2.0, high=0.9))
        images = mix((images * exposure).clamp_max(1), 0.15)
        grey = images.mean(dim=1, keepdim=True).expand_as(images)
        images = torch.lerp(grey, images, self.uniform(n, 1, 1, 1, low=0.4, high=1.4))
        images = mix(images.mean(dim=1, keepdim=True).expand_as(images), 0.1)

        # Light from one side, as in dark or back-lit photos.
        line = torch.linspace(-1, 1, images.shape[3], device=self.device)
        slope = 0.3 * self.normal(n, 2, 1, 1)
        light = 1 + slope[:, :1] * line + slope[:, 1:] * line[:, None]
        images = mix(images * light, 0.3)

        coarse_side = self.random.choice((64, 96, 128))
        coarse = F.interpolate(images, size=(coarse_side, coarse_side), mode="area")
        coarse = F.interpolate(coarse, size=images.shape[2:], mode="bilinear", align_corners=False)
        images = mix(coarse, 0.2)
        images = mix(blurred(images, self.random.uniform(0.8, 2.5)), 0.25)
        noise = 0.06 * self.uniform(n, 1, 1, 1) * self.normal(*images.shape)
        images = mix(images + noise, 0.5)

        # Hands, hair and microphones: boxes of one colour, of another picture of the batch, or
        # studded with dots, as some hats are.
        at = (line + 1) / 2
        for _ in range(2):
            size = self.uniform(n, 2, low=0.03, high=0.17)
            centre = self.uniform(n, 2, low=0.1, high=0.9)
            inside = ((at - centre[:, :1]).abs() < size[:, :1])[:, None, None, :] & (
                (at - centre[:, 1:]).abs() < size[:, 1:]
            )[:, None, :, None]
            other = torch.where(
                self.uniform(n, 1, 1, 1) < 0.5,
                self.uniform(n, 3, 1, 1),
                images.roll(1, 0),
            )
            images = torch.lerp(images, other, inside.float() * self.chance(n, 0.2))
        return torch.lerp(images, self.uniform(n, 3, 1, 1), self.studs(n, at))

    def lamps(self, n: int) -> Tensor:
        """[N, 3, 1, 1]: light of one colour, which leaves 0.45 to 0.17 of each of the others."""
        channel = torch.arange(3, device=self.device)[:, None, None]
        kept = torch.randint(3, (n, 1, 1, 1), generator=self.generator, device=self.device)
        left = torch.exp(-self.uniform(n, 3, 1, 1, low=0.8, high=1.8))
        return torch.where(channel == kept, 1.0, left)

    def studs(self, n: int, at: Tensor) -> Tensor:
        """[N, 1, R, R], 1 in the dots or stripes that one picture in ten wears in a wide box."""
        waves = torch.exp(self.uniform(n, 2, low=math.log(8), high=math.log(30)))
        phase = 6.3 * self.uniform(n, 2)
        bumps = torch.sin(6.283 * waves[..., None] * at + phase[..., None])
        stripes = self.uniform(n, 1, 1) < 0.3
        down, across = bumps[:, 1, :, None], bumps[:, 0, None, :]
        pattern = torch.where(stripes, down.expand(n, len(at), len(at)), down * across)
        size = self.uniform(n, 2, 1, low=0.08, high=0.4)
        centre = self.uniform(n, 2, 1, low=0.0, high=0.9)
        within = (at - centre).abs() < size * constant((1.0, 0.5), self.device)[:, None]
        inside = within[:, 1, :, None] & within[:, 0, None, :]
        return ((pattern > 0.5) & inside).float()[:, None] * self.chance(n, 0.1)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, sigma in px, borders mirrored."""
    reach = math.ceil(2.5 * sigma)
    at = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    images = F.conv2d(F.pad(images, (reach, reach, 0, 0), mode="reflect"), kernel, groups=3)
    return F.conv2d(
        F.pad(images, (0, 0, reach, reach), mode="reflect"),
        kernel.transpose(2, 3),
        groups=3,
    )


def gaussian_maps(points: Tensor, sigma: float) -> Tensor:
    """Gaussians of height 1 at `points` ([N, K, 2], px of the input) → [N, K, 64, 64]."""
    at = torch.arange(HEATMAP_SIDE, device=points.device, dtype=points.dtype)
    cells = points * (HEATMAP_SIDE / INPUT_SIDE) - 0.5
    bells = torch.exp(-((at - cells[..., None]) ** 2) / (2 * sigma**2))
    return bells[:, :, 1, :, None] * bells[:, :, 0, None, :]


def losses(heatmaps: Tensor, points: Tensor, sigma: float = SIGMA) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error against Gaussians, the centroid's distance, and the openings' error.

    Squares alone are flat at the peak, where decoding reads the fraction of a cell: so the
    error of the centroid is trained as well, where the map has enough mass to have one. Of two
    lips that are both found a cell too low the opening is right, and of two that err in opposite
    ways it is not: so the way from one to the other is trained as well.

    Returns:
        square: heavier at the peaks, as heavy for every sigma.
        point, opening: means, in cells.
    """
    heatmaps = heatmaps.float()
    weights = constant(GROUP_WEIGHTS, heatmaps.device)
    targets = gaussian_maps(points, sigma)
    error = ((1 + PEAK_WEIGHT * targets) * (heatmaps - targets) ** 2).sum(dim=(2, 3))
    square = (weights * error).mean() * (SIGMA / sigma) ** 2

    cells = points * (HEATMAP_SIDE / INPUT_SIDE) - 0.5
    at = torch.arange(HEATMAP_SIDE, device=points.device, dtype=points.dtype)
    near = ((at - cells.round()[..., None]).abs() <= math.ceil(2.5 * sigma)).float()
    mass = heatmaps.clamp_min(0) * near[:, :, 1, :, None] * near[:, :, 0, None, :]
    total = mass.sum(dim=(2, 3))
    total_safe = total.clamp_min(1)
    x = (mass.sum(dim=2) * at).sum(dim=2) / total_safe
    y = (mass.sum(dim=3) * at).sum(dim=2) / total_safe
    inside = ((cells > 3) & (cells < HEATMAP_SIDE - 4)).all(dim=2) & (total > 1)
    way = torch.stack((x, y), dim=2) - cells
    counted = inside * weights
    distance = ((way**2).sum(dim=2) + 1e-4).sqrt()
    point = (distance * counted).sum() / counted.sum().clamp_min(1)

    upper, lower = (constant(ends, points.device) for ends in zip(*OPENINGS, strict=True))
    both = (inside[:, upper] & inside[:, lower]).float()
    error = (((way[:, lower] - way[:, upper]) ** 2).sum(dim=2) + 1e-4).sqrt()
    opening = (error * both).sum() / both.sum().clamp_min(1)
    return square, point, opening


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor, landmarks: Tensor) -> dict[str, object]:
    """Score the network on tight crops and on the FFHQ alignment of the same faces."""
    report: dict[str, object] = {}
    for name, views in (
        ("tight", tight_views(landmarks)),
        ("ffhq", ffhq_views(landmarks)),
    ):
        predicted = []
        for k in range(0, len(images), 20):
            part = resample(images[k : k + 20].float() / 127.5 - 1, views[k : k + 20], INPUT_SIDE)
            predicted.append(
                decode(
                    network(part.contiguous(memory_format=torch.channels_last)),
                    INPUT_SIDE,
                )
            )
        report[name] = score(torch.cat(predicted), place(landmarks, views, INPUT_SIDE)).as_dict()
    return report


def stored(network: nn.Module) -> dict[str, Tensor]:
    """What is written: convolutions in fp16, batch statistics in fp32."""
    return {
        name: (tensor.half() if tensor.ndim == 4 else tensor.float()).cpu().contiguous()
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def save(network: nn.Module, path: Path, metadata: dict[str, object]) -> None:
    """Write atomically: a reader beside the training never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(
        stored(network),
        partial,
        {key: json.dumps(value) for key, value in metadata.items()},
    )
    partial.replace(path)


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, step: int) -> None:
    """Move the EMA (weights and batch statistics) towards the network."""
    keep = min(0.998, (1 + step) / (10 + step))
    pairs = zip(average.state_dict().values(), network.state_dict().values(), strict=True)
    means, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    # One kernel instead of one per tensor, of which there are hundreds.
    torch._foreach_lerp_(list(means), list(values), 1 - keep)


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over 3 % of the time, then half a cosine to 0."""
    warm = min(1.0, progress / 0.03)
    return peak * warm * (0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))


def begin(path: Path, width: int | None = None) -> Fan:
    """A network with the weights that `save` wrote to `path`, of that width if one is named."""
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    written = tensors["heatmaps.weight"].shape[1] if "heatmaps.weight" in tensors else 0
    if not written or width not in (None, written):
        raise SystemExit(f"{path}: its hourglass has {written} channels; say --width {written}")
    network = Fan(written)
    # How many batches the statistics were taken over is not stored: it changes nothing.
    network.load_state_dict(network.state_dict() | tensors)
    return network


def read_unlabelled(folder: Path, side: int) -> tuple[Tensor, Tensor]:
    """FFHQ-aligned pictures of one size, mirrored beyond their border to `side`.

    Returns:
        images: [N, 3, side, side], uint8.
        views: [N, 2, 3], the original picture (unit square) in px of them.
    """
    paths = sorted(folder.glob("*.jpg"))
    if not paths:
        raise SystemExit(f"{folder}: no .jpg file there; scripts/render_faces.py makes some")
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    inner = pixels.shape[1]
    before = (side - inner) // 2
    after = side - inner - before
    padded = np.pad(pixels, ((0, 0), (before, after), (before, after), (0, 0)), mode="reflect")
    view = torch.tensor([[inner, 0, before], [0, inner, before]], dtype=torch.float32)
    return torch.from_numpy(padded).permute(0, 3, 1, 2), view.expand(len(paths), 2, 3).clone()


@torch.no_grad()
def annotate(teacher: nn.Module, images: Tensor, views: Tensor) -> Tensor:
    """The median of what `teacher` finds in eight views of each picture, px of `images`."""
    mirror = torch.tensor(FLIP, device=images.device)
    found = []
    for angle, scale, flipped in (
        *((0.0, 1.0, False), (0.0, 1.0, True), (0.1, 1.0, False), (-0.1, 1.0, True)),
        *((0.0, 0.9, True), (0.0, 1.1, False), (0.15, 0.95, True), (-0.15, 1.05, False)),
    ):
        sign = -1.0 if flipped else 1.0
        turn = torch.tensor(
            [
                [scale * math.cos(angle) * sign, -scale * math.sin(angle)],
                [scale * math.sin(angle) * sign, scale * math.cos(angle)],
            ],
            device=images.device,
        )
        linear = views[:, :, :2] @ turn
        centre = views.sum(dim=2) - views[:, :, :2].sum(dim=2) / 2
        seen = torch.cat((linear, (centre - linear.sum(dim=2) / 2)[:, :, None]), dim=2)
        points = []
        for part, view in zip(images.split(32), seen.split(32), strict=True):
            shown = resample(part.float() / 127.5 - 1, view, INPUT_SIDE)
            at = decode(teacher(shown.contiguous(memory_format=torch.channels_last)), 1.0)
            points.append(at @ view[:, :, :2].transpose(1, 2) + view[:, None, :, 2])
        all_points = torch.cat(points)
        found.append(all_points[:, mirror] if flipped else all_points)
    return torch.stack(found).median(dim=0).values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, required=True, help="safetensors to write")
    parser.add_argument("--width", type=int, default=256, help="channels of the hourglass")
    parser.add_argument("--minutes", type=float, default=7.0, help="wall time, all included")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--sigma", type=float, default=SIGMA, help="width of the maps, cells")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--unlabelled", type=Path, help="folder of aligned faces, NAME.jpg")
    parser.add_argument("--teacher", type=Path, help="weights that annotate them")
    parser.add_argument("--share", type=float, default=0.25, help="of a batch that is unlabelled")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.unlabelled and not args.teacher:
        parser.error("--unlabelled needs a --teacher")

    start = time.monotonic()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    images, landmarks = (t.to(device) for t in read_faces(args.data / "train"))
    val_images, val_landmarks = (t.to(device) for t in read_faces(args.data / "val"))
    odds = sampling_weights(landmarks)
    mouths = find_mouths(images, landmarks)
    if args.unlabelled:
        extra, extra_views = (
            t.to(device) for t in read_unlabelled(args.unlabelled, images.shape[3])
        )
        teacher = begin(args.teacher).to(device, memory_format=torch.channels_last).eval()
        extra_landmarks = annotate(teacher, extra, extra_views)
        more = sampling_weights(extra_landmarks)
        more = more * (args.share / (1 - args.share) * odds.sum() / more.sum())
        images = torch.cat((images, extra))
        landmarks, odds = torch.cat((landmarks, extra_landmarks)), torch.cat((odds, more))
    print(
        f"[{time.monotonic() - start:5.0f} s] {len(images)} + {len(val_images)} faces of "
        f"{images.shape[3]} px, {len(mouths.images)} mouths to borrow",
        flush=True,
    )

    network = begin(args.start, args.width) if args.start else Fan(args.width)
    network = network.to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(network).eval().requires_grad_(False)
    decayed = [p for p in network.parameters() if p.ndim == 4]
    plain = [p for p in network.parameters() if p.ndim != 4]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 1e-2},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=args.lr,
        fused=device.type == "cuda",
    )
    augmentation = Augmentation(device, args.seed, mouths)
    metadata: dict[str, object] = {
        "architecture": "fan",
        "width": args.width,
        "sigma": args.sigma,
        "recipe": {
            "batch": args.batch,
            "lr": args.lr,
            "minutes": args.minutes,
            "seed": args.seed,
            "fine_tuned": args.start is not None,
            "unlabelled": len(extra) if args.unlabelled else 0,
        },
    }

    # Evaluation and writing take a few seconds, more on a CPU or a shared GPU: measure them.
    before = time.monotonic()
    evaluate(average, val_images, val_landmarks)
    reserve = 3 + 1.5 * (time.monotonic() - before)
    training = time.monotonic()
    span = max(1.0, 60 * args.minutes - (training - start) - reserve)

    step, printed, saved = 0, training, training
    running = torch.zeros(3, device=device)
    counted = 0
    while (progress := (time.monotonic() - training) / span) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr)
        batch = torch.multinomial(
            odds, args.batch, replacement=True, generator=augmentation.generator
        )
        with torch.no_grad():
            views, points = augmentation.draw(images[batch], landmarks[batch])
        with torch.autocast(device.type, dtype=torch.bfloat16):
            heatmaps = network(views.contiguous(memory_format=torch.channels_last))
        square, point, opening = losses(heatmaps, points, args.sigma)
        optimizer.zero_grad(set_to_none=True)
        (square + POINT_WEIGHT * point + OPENING_WEIGHT * opening).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 20.0)
        optimizer.step()
        follow(average, network, step)
        running += torch.stack((square, point, opening)).detach()
        counted += 1
        step += 1
        now = time.monotonic()
        if now - printed > 15:
            means = (running / counted).tolist()
            print(
                f"[{now - start:5.0f} s] step {step} ({1000 * (now - printed) / counted:.0f} ms) "
                f"squares {means[0]:.3f} centroid {means[1]:.3f} opening {means[2]:.3f} cells",
                flush=True,
            )
            running.zero_()
            printed, counted = now, 0
        if now - saved > 60:
            save(average, args.out, metadata | {"steps": step, "finished": False})
            saved = now

    # What is scored is what is written: the weights after their trip through fp16.
    average.load_state_dict({**average.state_dict(), **stored(average)})
    metadata |= {"steps": step, "finished": True}
    save(average, args.out, metadata)
    report = evaluate(average, val_images, val_landmarks)
    save(average, args.out, metadata | {"val": report})
    print(
        f"[{time.monotonic() - start:5.0f} s] {step} steps, wrote {args.out}",
        flush=True,
    )
    print(json.dumps({**metadata, "val": report}, indent=1), flush=True)


if __name__ == "__main__":
    main()
