"""Which pictures a job names, and what they are called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import skimage.data
import torch
from torch import Tensor

from lmexp.content import digest_file
from lmexp.errors import LmexpError
from lmexp.landmarks.decoding import decode
from lmexp.latents import draw_normal, expand
from lmexp.losses.protocol import Context

GENERATED = re.compile(r"generated:(\d+)")
TRUNCATION = 0.7
"""ψ of generated input faces: nearer to the mean, hence cleaner (arXiv 1812.04948, appendix B)."""
SAMPLES = {
    # NASA's portrait of Eileen Collins, in the public domain; shipped by scikit-image.
    "astronaut": Path(skimage.data.__file__).parent / "astronaut.png",
}


@dataclass(frozen=True)
class Source:
    """One picture: a photo, or a face of the generator.

    Attributes:
        label: short name for folders and captions.
        digest: what the run's identity is made of: the photo's SHA-256, or the seed.
        path: the photo's file, None for a generated face.
        seed: the generated face's seed, None for a photo.
    """

    label: str
    digest: str
    path: Path | None = None
    seed: int | None = None


def find(text: str, key: str) -> Source:
    """Resolve `inputs.look` or `inputs.expression`; `key` names it in the error's line."""
    if match := GENERATED.fullmatch(text):
        seed = int(match[1])
        return Source(label=f"generated{seed}", digest=text, seed=seed)
    if text.startswith("sample:"):
        name = text.removeprefix("sample:")
        if name not in SAMPLES:
            raise LmexpError(f"{key}: no sample '{name}'; choices: {', '.join(SAMPLES)}")
        path = SAMPLES[name]
    elif text.startswith("generated:"):
        raise LmexpError(f"{key}: '{text}' needs a whole number as seed, such as generated:7")
    else:
        path = Path(text).expanduser()
    if not path.exists():
        raise LmexpError(f"{key}: no file '{path}' (looked from {Path.cwd()})")
    if not path.is_file():
        raise LmexpError(f"{key}: '{path}' is not a file")
    label = re.sub(r"[^A-Za-z0-9]+", "_", path.stem).strip("_")[:40] or "photo"
    return Source(label=label, digest=digest_file(path), path=path)


def draw_z(seed: int, z_dim: int) -> torch.Tensor:
    """[1, z_dim], the latent of `generated:SEED`."""
    return draw_normal((1, z_dim), seed, "face")


def generate_face(context: Context, seed: int) -> tuple[Tensor, Tensor]:
    """A face of the generator, truncated by `TRUNCATION`.

    Returns:
        (image [1, 3, R, R], nominally in [-1, 1]; its landmarks [1, 68, 2], px).
    """
    generator, w_avg = context.generator, context.latent_statistics.w_avg
    with torch.no_grad():
        w = generator.mapping(draw_z(seed, generator.z_dim).to(w_avg))
        w = w_avg + TRUNCATION * (w - w_avg)
        image = generator.synthesis(expand(w[:, None], generator.num_ws))
        landmarks = decode(context.heatmap_network(image), generator.resolution)
    return image, landmarks
