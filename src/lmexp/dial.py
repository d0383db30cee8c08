"""`python -m lmexp.dial RUN`: a finished run's expression at any strength, without optimising.

The run inverted the look and ended with the expression; the latents between the two are more or
less of the expression, those beyond it exaggerate it:

    ws(s) = ws_inversion + s · (ws_projection − ws_inversion)

so that s = 0 is the look inverted and s = 1 the run's own result. Editing along a direction of
W: Shen et al., "Interpreting the latent space of GANs for semantic face editing", CVPR 2020.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor

from lmexp.config import Component, Hardware
from lmexp.errors import LmexpError
from lmexp.figures.runs import read_sweep
from lmexp.generators.protocol import Generator
from lmexp.losses.mask import Region, keep_mask
from lmexp.recording.atomic_file import write_atomically
from lmexp.recording.images import join_panels, resize, to_picture
from lmexp.recording.run_folder import Picture, RunFolder
from lmexp.recording.video import write_video
from lmexp.workbench import Workbench

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
REACH, FEATHER = 0.12, 0.12
"""Growth and Gaussian feather of a region, fractions of the distance of the outer eye corners:
wide enough that the cheek beside a mouth moves with it."""


@dataclass(frozen=True)
class Ends:
    """What lies between strength 0 and strength 1.

    Attributes:
        ws: of the inversion and of the projection, [1, num_ws, w_dim] each.
        noise_bufs: of both, [1, 1, h, w] a map; empty for a generator without noise maps.
        landmarks: of the look and of the projection, [1, 68, 2] each, px of the image.
    """

    ws: tuple[Tensor, Tensor]
    noise_bufs: tuple[tuple[Tensor, Tensor], ...]
    landmarks: tuple[Tensor, Tensor]

    @staticmethod
    def read(folder: RunFolder) -> Ends:
        """From a finished run's folder.

        Raises:
            LmexpError: it is not finished, began elsewhere than at the inversion, or a file is
                missing or damaged.
        """
        status = folder.read_status()
        if status is None or status.state != "finished":
            said = "no run here" if status is None else status.describe()
            raise LmexpError(f"{folder.path}: {said}; the dial needs a finished run")
        if not (folder.path / "inversion_w.npz").exists():
            raise LmexpError(
                f"{folder.path}: no inversion in it, so there is no strength 0; run the job with "
                "latent.start=inversion (and this version of lmexp)"
            )
        (start, start_noise), (end, end_noise) = folder.read_inversion(), folder.read_projection()
        landmarks = folder.read_landmarks()
        return Ends(
            ws=(torch.from_numpy(start), torch.from_numpy(end)),
            noise_bufs=tuple(
                (torch.from_numpy(one)[None], torch.from_numpy(other)[None])
                for one, other in zip(start_noise, end_noise, strict=True)
            ),
            landmarks=(
                torch.from_numpy(landmarks["look"])[None],
                torch.from_numpy(landmarks["projection"])[None],
            ),
        )

    def to(self, device: torch.device) -> Ends:
        """The same on a device."""

        def pair(values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return values[0].to(device), values[1].to(device)

        return Ends(pair(self.ws), tuple(map(pair, self.noise_bufs)), pair(self.landmarks))


class Dial:
    """Renders a run's expression at a strength.

    Args:
        generator: the run's own.
        ends: what lies between; on the generator's device.
        layers: first and last of the style vectors that move, counted from 0 (coarse: pose
            and shape) to num_ws − 1 (fine: colour); None for all of them. The others stay the
            inversion's.
        regions: parts of the face that move; the rest of the picture stays the inversion's.
            Styles have no place in the image, so this is done to pictures: the moved one is
            laid over the inversion's by a soft mask around that part in both faces. Where head
            or light moved too, the seam shows. Empty for the whole picture.

    Raises:
        LmexpError: no such layers.
    """

    def __init__(
        self,
        generator: Generator,
        ends: Ends,
        layers: tuple[int, int] | None = None,
        regions: Sequence[Region] = (),
    ) -> None:
        first, last = layers or (0, generator.num_ws - 1)
        if not 0 <= first <= last < generator.num_ws:
            raise LmexpError(
                f"--layers {first} {last}: this generator's layers are 0 … {generator.num_ws - 1}, "
                "the smaller first"
            )
        self._generator = generator
        self._ends = ends
        moves = torch.zeros(generator.num_ws, 1)
        moves[first : last + 1] = 1
        self._moves = moves.to(ends.ws[0])
        self._keep: Tensor | None = None
        self._still: Tensor | None = None
        if regions:
            self._keep = keep_mask(
                ends.landmarks,
                regions,
                resolution=generator.resolution,
                side=generator.resolution,
                dilation=REACH,
                softness=FEATHER,
            )
            self._still = self._render(0.0)

    @torch.no_grad()
    def at(self, strength: float) -> Tensor:
        """The image [3, R, R] at a strength; 0 is the inversion, 1 the result."""
        image = self._render(strength)
        if self._keep is not None and self._still is not None:
            image = torch.lerp(image, self._still, self._keep)
        return image[0]

    @torch.no_grad()
    def _render(self, strength: float) -> Tensor:
        start, end = self._ends.ws
        ws = start + strength * self._moves * (end - start)
        noise = tuple(_blend(*pair, strength) for pair in self._ends.noise_bufs)
        return self._generator.synthesis(ws, noise)


def _blend(start: Tensor, end: Tensor, strength: float) -> Tensor:
    """Noise in between; of mean 0 and variance 1, as both ends are and the generator expects.

    Beyond its ends noise has no meaning: it stays the end's.
    """
    noise = torch.lerp(start, end, min(max(strength, 0.0), 1.0))
    noise = noise - noise.mean()
    return noise * noise.square().mean().clamp_min(1e-12).rsqrt()


def turn(
    folder: Path,
    *,
    strengths: Sequence[float] = STRENGTHS,
    layers: tuple[int, int] | None = None,
    regions: Sequence[Region] = (),
    frames: int = 60,
    device: str = "cpu",
    panel: int = 512,
) -> list[Path]:
    """Write a run's pictures at several strengths, side by side, and a video through them.

    Args:
        folder: a finished run's, that began at its look's inversion.
        strengths: of the pictures; the video goes from the least to the largest and back.
        layers, regions: see `Dial`.
        frames: of the video, one way; 0 for none.
        device: cpu, cuda, …
        panel: most side of a picture in the row and in the video, px.

    Returns:
        The files, in `folder`/dial, or dial_REGIONS_LAYERS.

    Raises:
        LmexpError: see `Ends.read` and `Dial`; the device or the weights cannot be had.
    """
    run = RunFolder(folder)
    ends = Ends.read(run)
    bench = Workbench(Hardware(device=device, batch_size=1, threads=None, channels_last=True))
    generator = cast(Generator, bench.module(_component(run.read_config())))
    dial = Dial(generator, ends.to(bench.device), layers, regions)
    name = "_".join(["dial", *regions, *([f"layers{layers[0]}to{layers[1]}"] if layers else [])])
    out = RunFolder(folder / name).create()
    side = min(panel, generator.resolution) // 2 * 2

    written, row = [], []
    for strength in strengths:
        picture = to_picture(dial.at(strength))
        written.append(out.write_picture(f"strength_{strength:.2f}", picture))
        row.append(resize(picture, side))
    captions = [f"{strength:g}" for strength in strengths]
    written.append(out.write_picture("strip", join_panels(row, captions)))
    if frames:
        way = np.linspace(min(strengths), max(strengths), frames)
        there = [resize(to_picture(dial.at(float(s))), side) for s in way]
        labelled = [
            _caption(picture, f"strength {s:.2f}") for picture, s in zip(there, way, strict=True)
        ]
        video = out.path / "dial.mp4"
        write_video(video, [*labelled, *labelled[::-1]], hold=0.5)
        written.append(video)
    told = {
        "strengths": list(strengths),
        "layers": None if layers is None else list(layers),
        "regions": list(regions),
    }
    write_atomically(out.path / "dial.json", json.dumps(told).encode() + b"\n")
    return written


def _component(config: dict[str, Any]) -> Component:
    return Component.model_validate(config["generator"])


def _caption(picture: Picture, text: str) -> Picture:
    return join_panels([picture], [text])


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pictures and the video and print their paths; 0, or 2 with one line of reason.

    Of a sweep's folder it names the jobs that are finished.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lmexp.dial",
        description="A finished run's expression at any strength: 0 the look inverted, 1 the run's "
        "result, beyond it exaggerated. Nothing is optimised.",
    )
    add = parser.add_argument
    add("folder", type=Path, help="a finished run's folder (latent.start=inversion)")
    add("--strengths", type=float, nargs="+", default=list(STRENGTHS), metavar="S")
    add("--regions", nargs="+", choices=get_args(Region), default=[], help="only these parts move")
    add("--layers", type=int, nargs=2, metavar=("FIRST", "LAST"), help="only these styles move")
    add("--frames", type=int, default=60, help="of the video, one way; 0 for none")
    add("--device", default="cpu")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        if (chosen.folder / "index.json").is_file():
            jobs = read_sweep(chosen.folder).runs
            said = f"lmexp: {chosen.folder}: a sweep; the dial needs one of its finished jobs:"
            lines = [f"  {shlex.quote(str(job.folder.path))}  {job.label}" for job in jobs]
            print("\n".join([said, *lines]), file=sys.stderr)
            return 2
        written = turn(
            chosen.folder,
            strengths=chosen.strengths,
            layers=tuple(chosen.layers) if chosen.layers else None,
            regions=chosen.regions,
            frames=chosen.frames,
            device=chosen.device,
        )
    except LmexpError as error:
        print(f"lmexp: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
