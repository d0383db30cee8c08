"""Train the 256 px image head of MobileStyleGAN against its own 1024 px output.

The student is `lmexp.generators.mobile_head.ImageHead` on the features of the first five
blocks; the teacher is the whole network. Both see the same latents, drawn on the fly: plain W,
truncated W, style mixing, and W+ (a perturbation of every style). The teacher's two styles
that the student lacks repeat the student's last one. The target is the 1024 px image
averaged over 4 x 4 px, not clamped.

    PYTHONPATH=src python scripts/train_mobile_head.py --out head.safetensors --minutes 7

Needs torch, numpy, safetensors and the generator's weights (in the cache, or `--weights`). Prints
one JSON line with the held-out result; peak signal-to-noise ratios are those of images in [-1, 1]
(peak 2), averaged in dB over images.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from lmexp.generators.mobile_head import ImageHead
from lmexp.generators.mobile_stylegan import HEAD_DEPTH, MobileNetwork, expand_ws
from lmexp.weights import store

NUM_WS = 1 + 2 * HEAD_DEPTH + ImageHead.num_ws
HELD_OUT_SEED = 1_000_003
EMA_DECAY = 0.999
WARM_UP_STEPS = 200


class Teacher:
    """The frozen network, its statistics of W, and the pairs that a head learns from.

    Args:
        weights: converted weights; None takes them from the cache.
        device: where to run.
        seed: seed of the statistics' samples.
    """

    def __init__(self, weights: Path | None, device: torch.device, seed: int) -> None:
        if weights is None:
            stored = store.load("mobile_stylegan_ffhq")
            tensors, self.sha256 = stored.tensors, stored.sha256
        else:
            tensors = load_file(weights)
            self.sha256 = store.digest(tensors)
        self.network = MobileNetwork(tensors, self.sha256).to(device)
        self.device = device
        samples = self.draw_w(4096, torch.Generator(device).manual_seed(seed))
        self.w_avg, self.w_std = samples.mean(dim=0), samples.std(dim=0)

    def draw_w(self, count: int, random: torch.Generator) -> Tensor:
        """w: [count, w_dim]."""
        z = torch.randn(count, self.network.z_dim, generator=random, device=self.device)
        return self.network.mapping(z)

    def draw_ws(self, count: int, num_ws: int, random: torch.Generator) -> Tensor:
        """A training batch of latents, ws: [count, num_ws, w_dim]."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=random, device=self.device)

        first, second = self.draw_w(2 * count, random).chunk(2)
        layer = torch.arange(num_ws, device=self.device)
        # Style mixing in 30 % of the samples: the second latent from a random layer on.
        crossover = torch.where(
            uniform(count, 1) < 0.3,
            1 + (uniform(count, 1) * (num_ws - 1)).floor(),
            num_ws,
        )
        ws = torch.where((layer >= crossover)[:, :, None], second[:, None], first[:, None])
        # Truncation between 0.4 and 1 in half of the samples.
        psi = torch.where(uniform(count, 1, 1) < 0.5, 0.4 + 0.6 * uniform(count, 1, 1), 1.0)
        ws = self.w_avg + psi * (ws - self.w_avg)
        # W+ in half of the samples: up to one standard deviation of w, every style its own.
        strength = torch.where(uniform(count, 1, 1) < 0.5, uniform(count, 1, 1), 0.0)
        noise = torch.randn(ws.shape, generator=random, device=self.device)
        return ws + strength * self.w_std * noise

    @torch.no_grad()
    def render(self, ws: Tensor) -> tuple[Tensor, Tensor]:
        """ws: [N, n, w_dim] -> (features below the head, images averaged to 256 px)."""
        whole = expand_ws(ws, self.network.num_ws)
        features, last = self.network._trunk(whole, tap=HEAD_DEPTH)
        images = self.network._head(last, whole[:, self.network._trunk.num_ws :])
        return features, F.avg_pool2d(images, 4)


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of [N, 3, h, w] images of range 2, dB: [N]."""
    error = (images - targets).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error)


def edge_difference(images: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring-pixel differences, a scalar."""
    error = images - targets
    return error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


@torch.no_grad()
def evaluate(
    teacher: Teacher, heads: list[ImageHead], count: int, batch: int
) -> list[dict[str, float]]:
    """Held-out results of every head over `count` latents of each kind."""
    random = torch.Generator(teacher.device).manual_seed(HELD_OUT_SEED)
    w = teacher.draw_w(count, random)
    truncated = teacher.w_avg + 0.7 * (w - teacher.w_avg)
    kinds = {
        "w": w[:, None].expand(-1, NUM_WS, -1),
        "w_truncated_0.7": truncated[:, None].expand(-1, NUM_WS, -1),
        "training_mix": teacher.draw_ws(count, NUM_WS, random),
    }
    results: list[dict[str, float]] = [{} for _ in heads]
    for kind, ws in kinds.items():
        values: list[list[Tensor]] = [[] for _ in heads]
        clamped: list[list[Tensor]] = [[] for _ in heads]
        for part in ws.split(batch):
            features, targets = teacher.render(part)
            for index, head in enumerate(heads):
                images = head(features, part[:, -ImageHead.num_ws :])
                values[index].append(psnr(images, targets))
                clamped[index].append(psnr(images.clamp(-1, 1), targets.clamp(-1, 1)))
        for index, result in enumerate(results):
            decibels = torch.cat(values[index])
            result[f"psnr_{kind}"] = round(decibels.mean().item(), 3)
            result[f"psnr_{kind}_min"] = round(decibels.min().item(), 3)
            result[f"psnr_{kind}_clamped"] = round(torch.cat(clamped[index]).mean().item(), 3)
    return results


def start_head(teacher: Teacher, width: int, seed: int) -> ImageHead:
    """A head whose first modulation brings every feature to unit mean square."""
    random = torch.Generator(teacher.device).manual_seed(seed)
    ws = teacher.draw_ws(16, NUM_WS, random)
    features = torch.cat([teacher.render(part)[0] for part in ws.split(4)])
    torch.manual_seed(seed)
    head = ImageHead(features.shape[1], width, features.shape[-1], teacher.network.w_dim)
    with torch.no_grad():
        rms = features.square().mean(dim=(0, 2, 3)).sqrt()
        head.layer1.modulation.bias.copy_(1 / rms.clamp(min=1e-3).cpu())
    return head.to(teacher.device)


def output_path(out: Path, width: int, widths: list[int]) -> Path:
    """`out`, or with several widths `out` with the width before its suffix."""
    return out if len(widths) == 1 else out.with_name(f"{out.stem}-{width}{out.suffix}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--minutes", type=float, default=7.0, help="training time")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--weights", type=Path, help="converted generator weights")
    parser.add_argument(
        "--width", type=int, nargs="+", default=[128], help="channels; one head each"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--edge-weight", type=float, default=0.02, help="weight of the absolute gradient difference"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=128, help="latents of each kind")
    parser.add_argument("--eval-batch", type=int, default=8)
    arguments = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    device = torch.device(arguments.device)
    teacher = Teacher(arguments.weights, device, arguments.seed)
    heads = [start_head(teacher, width, arguments.seed) for width in arguments.width]
    averages = [copy.deepcopy(head).requires_grad_(False) for head in heads]
    optimizer = torch.optim.Adam(
        [parameter for head in heads for parameter in head.parameters()],
        lr=arguments.lr,
        betas=(0.9, 0.99),
    )
    random = torch.Generator(device).manual_seed(arguments.seed + 1)

    def save(results: list[dict[str, float]] | None) -> None:
        for index, (width, average) in enumerate(zip(arguments.width, averages, strict=True)):
            recipe: dict[str, object] = {
                "recipe": "scripts/train_mobile_head.py",
                "seed": arguments.seed,
                "minutes": arguments.minutes,
                "batch": arguments.batch,
                "lr": arguments.lr,
                "edge_weight": arguments.edge_weight,
                "width": width,
                "steps": step,
                "teacher_sha256": teacher.sha256,
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "torch": torch.__version__,
            }
            if results is not None:
                recipe |= results[index]
            tensors = {name: value.cpu() for name, value in average.state_dict().items()}
            # One metadata entry: safetensors writes several in no fixed order.
            path = output_path(arguments.out, width, arguments.width)
            store.write(tensors, path, {"recipe": json.dumps(recipe, sort_keys=True)})
            if results is not None:
                print(json.dumps({"out": path.name, **recipe}, sort_keys=True), flush=True)

    step, spoken = 0, 0.0
    start = time.perf_counter()
    while (progress := (time.perf_counter() - start) / (60 * arguments.minutes)) < 1:
        rate = arguments.lr * min(1.0, (step + 1) / WARM_UP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress))
        ws = teacher.draw_ws(arguments.batch, NUM_WS, random)
        features, targets = teacher.render(ws)
        outputs = [head(features, ws[:, -ImageHead.num_ws :]) for head in heads]
        losses = [
            F.mse_loss(images, targets) + arguments.edge_weight * edge_difference(images, targets)
            for images in outputs
        ]
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        for head in heads:
            # Apart for every head, so that training several at once changes none of them.
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for head, average in zip(heads, averages, strict=True):
                torch._foreach_lerp_(list(average.parameters()), list(head.parameters()), 1 - decay)
        step += 1
        if step % 10 == 0:
            # Wait for the device now and then, so that the clock tells the truth.
            value = losses[0].item()
            if not math.isfinite(value):
                sys.exit(f"loss became {value} at step {step}; lower --lr")
            if time.perf_counter() - spoken > 20:
                spoken = time.perf_counter()
                values = ", ".join(f"{psnr(i, targets).mean().item():.2f}" for i in outputs)
                print(
                    f"step {step}, {spoken - start:.0f} s: PSNR {values} dB",
                    file=sys.stderr,
                )
                save(None)
    for average in averages:
        average.eval()
    save(evaluate(teacher, averages, arguments.held_out, arguments.eval_batch))


if __name__ == "__main__":
    main()
