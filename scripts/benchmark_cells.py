"""One measurement of the benchmark: a recipe at a resolution, on a choice of hardware, a batch.

Each runs in a process of its own (`benchmark.py --cell`), so that no other's memory, compiled
code or shapes are in its way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from benchmark_limits import (
    capture,
    extrapolate,
    limit,
    measure_rates,
    take_census,
    time_repeats,
)
from benchmark_weights import random_weights
from benchmark_yardstick import choose, project_plainly
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import Tensor, nn

from lmexp.acceleration import Acceleration
from lmexp.composition import conf_folder
from lmexp.config import Experiment, validate
from lmexp.draws import Draws
from lmexp.landmarks import groups
from lmexp.landmarks.framing import average
from lmexp.latents import Latents, expand, start_at_mean
from lmexp.losses.objective import Objective
from lmexp.losses.protocol import Candidate, Context, Targets
from lmexp.projection import Step, project
from lmexp.recording.provenance import describe_device, describe_versions
from lmexp.rehearsal import make_targets
from lmexp.schedule import Schedule
from lmexp.workbench import Workbench

RECIPES: dict[str, tuple[str, ...]] = {
    "reference": (
        "experiment=reference",
        "generator=ffhq_{resolution}",
        "landmarks=fan_2d",
        "landmarks.box=null",
    ),
    "mobile": (
        "experiment=reference",
        "generator=mobile_{resolution}",
        "latent=w_plus",
        "landmarks=fan_full",
        "loss=[lpips,landmarks,noise,prior]",
        "loss.lpips.network=hed_vgg16",
        "loss.landmarks.stretch_contrast=false",
    ),
    "default": ("generator=mobile_{resolution}",),
    "tiny": (
        "experiment=reference",
        "generator=stylegan2_random",
        "generator.resolution={resolution}",
        "generator.channel_base=512",
        "generator.latent_dim=32",
        "generator.mapping_layers=2",
        "landmarks=fan_slim",
        "latent.samples=64",
    ),
}
"""Overrides of each recipe.

`reference` is the published one with its networks, `mobile` MobileStyleGAN with HED's VGG16 and a
one-stack FAN, `default` what a run is without any override, `tiny` for tests.
"""

RANDOM: dict[str, tuple[str, ...]] = {
    "reference": ("generator=stylegan2_random", "generator.resolution={resolution}"),
}
"""What `random_weights` changes in them beside the tensors themselves."""


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        kind: `step`, our projection; `yardstick`, the plain one; `agreement`, ours on this hardware
            against float32.
        hardware: a choice of conf/hardware.
        devices: GPUs, a process each, all at once.
        parts: also time the parts of a step and count their arithmetic.
        second_start: start once more, with what the first start compiled.
    """

    kind: Literal["step", "yardstick", "agreement"]
    recipe: str
    resolution: int
    hardware: str
    batch: int = 1
    devices: int = 1
    parts: bool = False
    second_start: bool = False

    @property
    def name(self) -> str:
        """For people."""
        size = f"{self.resolution} px"
        if self.kind == "yardstick":
            return f"{self.recipe}, {size}, yardstick on {self.hardware}"
        several = f", {self.devices} GPUs" if self.devices > 1 else ""
        what = "" if self.kind == "step" else f", {self.kind}"
        return f"{self.recipe}, {size}, {self.hardware}, batch {self.batch}{several}{what}"


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    Attributes:
        random_weights: third parties' weights are random.
        windows, window: how often how many steps are timed.
        warm_up: steps before: what they compile and capture is reported as the start.
        repeats: of each part.
        agreement_steps: steps after which losses are compared.
        overrides: further ones.
        pictures: folder for side-by-side pictures; None: none are written.
    """

    random_weights: bool
    windows: int = 5
    window: int = 10
    warm_up: int = 6
    repeats: int = 10
    agreement_steps: int = 100
    overrides: tuple[str, ...] = ()
    pictures: str | None = None


def measure(
    cell: Cell, settings: Settings, began: float, wait: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Run a cell.

    Args:
        began: `time.time()` when its process was started.
        wait: called between warm-up and the first window.

    Returns:
        Plain data; seconds, bytes.
    """
    weights: contextlib.AbstractContextManager[list[str]] = contextlib.nullcontext([])
    if settings.random_weights:
        weights = random_weights()
    with weights as random:
        bench = Bench(cell, settings)
        report: dict[str, Any] = dataclasses.asdict(cell) | {
            "device": describe_device(bench.device),
            "versions": describe_versions(),
        }
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(bench.device)
        if cell.kind == "agreement":
            report |= bench.compare(settings)
        elif cell.kind == "yardstick":
            report |= bench.time_yardstick(settings, began, wait)
        else:
            report |= bench.time_steps(settings, began, wait)
        if bench.device.type == "cuda":
            report["peak_memory"] = torch.cuda.max_memory_allocated(bench.device)
        if cell.parts:
            try:
                report |= bench.time_parts(settings.repeats)
            except (RuntimeError, ValueError) as fault:  # the step's time stands without
                report["parts"] = f"{type(fault).__name__}: {fault}"
        report["random_weights"] = sorted(set(random))
        return report


_SHOWN = 6
"""Jobs of which an agreement's picture shows a row."""


class Bench:
    """A cell's objects: networks, targets, starts."""

    def __init__(self, cell: Cell, settings: Settings) -> None:
        self.cell = cell
        self.config = read_config(cell, settings)
        self.workbench = Workbench(self.config.hardware)
        self.device = self.workbench.device
        self.plain = self.workbench.context(self.config)
        self.terms = {n: t for n, t in self.workbench.terms(self.config).items() if t.weight > 0}
        spread = groups.expand(self.config.landmark_weights.model_dump()).to(self.device)
        self.targets = make_targets(self.plain, cell.batch, spread)
        self.start = self._start(cell.batch)

    def _start(self, batch: int) -> Latents:
        return start_at_mean(
            self.plain.generator,
            self.plain.latent_statistics,
            space=self.config.latent.space,
            seeds=range(batch),
            device=self.device,
        )

    def schedule(self, steps: int) -> Schedule:
        return Schedule.read(self.config.optimizer.model_dump() | {"steps": steps})

    def objective(self, context: Context, rows: int | None = None) -> Objective:
        rows = self.cell.batch if rows is None else rows
        weights = [{name: term.weight for name, term in self.terms.items()}] * rows
        return Objective.bind(self.terms, weights, context, first_rows(self.targets, rows))

    def time_steps(
        self, settings: Settings, began: float, wait: Callable[[], None]
    ) -> dict[str, Any]:
        context = self.workbench.stepping_context(self.config)
        clock = Clock(self.device, settings, wait)
        built = time.time()
        objective = self.objective(context)
        project(
            context,
            objective,
            self.start,
            self.schedule(clock.steps),
            seeds=range(self.cell.batch),
            callback=lambda step: clock.tick(step.step),
            looks_at=clock.reads,
        )
        return clock.report(began, built)

    def time_yardstick(
        self, settings: Settings, began: float, wait: Callable[[], None]
    ) -> dict[str, Any]:
        # Published code has its networks in torch's own layout.
        for network in (self.plain.generator, self.plain.heatmap_network):
            if isinstance(network, nn.Module):
                network.to(memory_format=torch.contiguous_format)
        clock = Clock(self.device, settings, wait)
        built = time.time()
        self.run_yardstick(clock.steps, lambda step, total: clock.tick(step))
        return clock.report(began, built)

    def run_yardstick(self, steps: int, callback: Callable[[int, Tensor], None]) -> Latents:
        """The plain projection of job 0."""
        published = self.cell.recipe in ("reference", "tiny")
        targets = first_rows(self.targets, 1)
        synthesis, loss = choose(published, self.terms, self.plain, targets)
        return project_plainly(
            synthesis,
            loss,
            self._start(1),
            self.schedule(steps),
            num_ws=self.plain.generator.num_ws,
            w_std=self.plain.latent_statistics.w_std,
            seed=0,
            callback=callback,
        )

    def compare(self, settings: Settings) -> dict[str, Any]:
        """Final losses on this hardware against float32, and of float32 started a hair away."""
        steps = settings.agreement_steps

        def run(context: Context, start: Latents) -> tuple[Latents, dict[str, list[float]]]:
            last: dict[str, list[float]] = {}

            def keep(step: Step) -> None:
                if step.step == steps - 1:
                    last.update({name: raw.tolist() for name, raw in step.losses.raw.items()})
                    last["total"] = step.losses.total.tolist()

            found = project(
                context,
                self.objective(context),
                start,
                self.schedule(steps),
                seeds=range(self.cell.batch),
                callback=keep,
            )
            return found, last

        hair = tuple(noise * (1 + 1e-6) for noise in self.start.noise_bufs)
        nudged = Latents(self.start.ws * (1 + 1e-6), hair)
        # A graph computes the same, and float32 takes long enough.
        plain = self.plain.accelerated(Acceleration(graphs=self.device.type == "cuda"))
        with exact_float32():
            exact, exact_losses = run(plain, self.start)
            hair_off, nudged_losses = run(plain, nudged)
        fast, fast_losses = run(self.workbench.stepping_context(self.config), self.start)
        report: dict[str, Any] = {
            "steps": steps,
            "final_losses": {"float32": exact_losses, self.cell.hardware: fast_losses},
            "relative_difference": relative(fast_losses, exact_losses),
            "relative_difference_of_a_hair": relative(nudged_losses, exact_losses),
        }
        if settings.pictures is not None:
            name = f"{self.cell.recipe}_{self.cell.resolution}_{self.cell.hardware}.png"
            path = Path(settings.pictures) / name
            rows = [
                torch.cat([self.render(found, k) for found in (exact, fast, hair_off)])
                for k in range(min(self.cell.batch, _SHOWN))
            ]
            write_rows(rows, path)
            report["picture"] = name
        return report

    def render(self, latents: Latents, k: int) -> Tensor:
        """[1, 3, R, R], job k by the plain generator, as a run's final picture is."""
        generator = self.plain.generator
        with torch.no_grad():
            return generator.synthesis(
                expand(latents.ws[k : k + 1], generator.num_ws),
                tuple(noise[k : k + 1] for noise in latents.noise_bufs),
            )

    def time_parts(self, repeats: int) -> dict[str, Any]:
        """Seconds of each part alone, forward and backward, and the least that it can take."""
        context = self.workbench.stepping_context(self.config)
        half = context.acceleration.half
        rates = measure_rates(self.device, half or torch.float32)
        fast = self.parts(context, self.cell.batch)
        one, two = self.parts(self.plain, 1), self.parts(self.plain, min(2, self.cell.batch))
        parts = {}
        for name, work in fast.items():
            graphed = capture(work, self.device) if context.acceleration.graphs else work
            seconds = time_repeats(graphed, self.device, repeats)
            least = [take_census(plain[name]) for plain in (one, two)]
            if self.cell.batch == 1:
                operations = least[0]
            else:
                operations = extrapolate(least[0], least[1], self.cell.batch)
            size = 4 if half is None else 2
            parts[name] = {"seconds": seconds} | limit(operations, rates, size)
        return {"parts": parts, "rates": dataclasses.asdict(rates)}

    def parts(self, context: Context, rows: int) -> dict[str, Callable[[], object]]:
        """The generator, each term of the look, and the expression's terms together, which share
        the passes of the landmark network; each forward and backward."""
        targets = first_rows(self.targets, rows)
        start = self._start(rows)
        ws = expand(start.ws, context.generator.num_ws).clone().requires_grad_()
        noises = tuple(noise.requires_grad_() for noise in start.noise_bufs)
        # Not under no_grad, which would have to be compiled for itself.
        images = context.generator.synthesis(ws, noises).detach().clone().requires_grad_()
        towards = torch.randn_like(images)
        draws = Draws(range(rows), self.device)
        averaged = context.acceleration.fuse(average)

        def differentiate(made: Tensor, wanted: Sequence[Tensor], gradient: Tensor | None) -> None:
            if made.requires_grad:
                torch.autograd.grad(made, wanted, gradient, allow_unused=True)

        def generate() -> None:
            made = context.generator.synthesis(ws, noises)
            differentiate(made, (ws, *noises), towards.to(made.dtype))

        def evaluate(terms: Sequence[Callable[[Candidate], Tensor]]) -> Callable[[], None]:
            def work() -> None:
                network = context.heatmap_network
                seeds = tuple(range(rows))
                candidate = Candidate(
                    images, ws, noises, 0, network, seeds, draws, average=averaged
                )
                total = torch.stack([term(candidate) for term in terms]).sum()
                differentiate(total, (images, ws, *noises), None)

            return work

        parts: dict[str, Callable[[], object]] = {"generator": generate}
        together: dict[str, list[str]] = {}
        for name, term in self.terms.items():
            together.setdefault("expression" if term.needs_expression else name, []).append(name)
        for names in together.values():
            bound = [self.terms[name].bind(context, targets) for name in names]
            parts[" + ".join(names)] = evaluate(bound)
        return parts


class Clock:
    """Reads the time at the ends of windows of steps, and waits for the device only there."""

    def __init__(self, device: torch.device, settings: Settings, wait: Callable[[], None]) -> None:
        self._device = device
        self._window = settings.window
        self._wait = wait
        self._warm_up = settings.warm_up
        self.steps = self._warm_up + settings.windows * settings.window
        self._stamps: list[float] = []
        self._warm = 0.0

    def reads(self, step: int) -> bool:
        """Whether a window ends, or the first begins, after a step."""
        done = step + 1 - self._warm_up
        return done >= 0 and done % self._window == 0

    def tick(self, step: int) -> None:
        """Called after each step."""
        if not self.reads(step):
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if step + 1 == self._warm_up:
            self._warm = time.time()
            self._wait()
        self._stamps.append(time.perf_counter())

    def report(self, began: float, built: float) -> dict[str, Any]:
        """What was measured; raises if the projection ended before its last step."""
        windows = [b - a for a, b in itertools.pairwise(self._stamps)]
        if len(windows) * self._window + self._warm_up != self.steps:
            raise RuntimeError(f"the projection ended early, after {len(windows)} windows")
        return {
            "seconds_per_step": [window / self._window for window in windows],
            "build_seconds": built - began,
            "start_seconds": self._warm - built,
            "warm_up_steps": self._warm_up,
        }


def read_config(cell: Cell, settings: Settings) -> Experiment:
    """Compose a cell's config."""
    overrides = [*RECIPES[cell.recipe]]
    if settings.random_weights:
        overrides += RANDOM.get(cell.recipe, ())
    overrides = [text.format(resolution=cell.resolution) for text in overrides]
    overrides += [f"hardware={cell.hardware}", "tracker=none", "scores=none", *settings.overrides]
    # A later choice of a group replaces an earlier one, which Hydra itself refuses.
    chosen = {text.partition("=")[0]: text for text in overrides}
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return validate(compose("config", overrides=list(chosen.values())))


def first_rows(targets: Targets, rows: int) -> Targets:
    """The targets of the first jobs."""
    fields = dataclasses.fields(Targets)
    values = {field.name: getattr(targets, field.name) for field in fields}
    return Targets(**{name: value[:rows] for name, value in values.items() if value is not None})


def relative(
    losses: dict[str, list[float]], exact: dict[str, list[float]]
) -> dict[str, dict[str, float]]:
    """By term, the jobs' |a - b| / |b|: their mean, and the largest."""
    found = {}
    for name, values in exact.items():
        pairs = [(a, b) for a, b in zip(losses[name], values, strict=True) if b]
        differences = [abs(a - b) / abs(b) for a, b in pairs] or [0.0]
        means = sum(a for a, _ in pairs), sum(b for _, b in pairs)
        found[name] = {
            "mean": sum(differences) / len(differences),
            "largest": max(differences),
            "of_means": abs(means[0] - means[1]) / abs(means[1]) if pairs else 0.0,
        }
    return found


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 within it."""
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


def write_rows(rows: Sequence[Tensor], path: Path, side: int = 256) -> None:
    """Each row's images, then how the others differ from the first, eight times.

    Args:
        rows: one [M, 3, R, R] in [-1, 1] a row.
    """
    shown = []
    for row in rows:
        images = (row.clamp(-1, 1).cpu() + 1) / 2
        images = torch.cat([images, ((images[1:] - images[0]).abs() * 8).clamp(0, 1)])
        if images.shape[-1] > side:
            images = nn.functional.interpolate(images, size=(side, side), mode="area")
        shown.append(torch.cat(list(images), dim=2))
    pixels = torch.cat(shown, dim=1).permute(1, 2, 0) * 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels.round().to(torch.uint8))).save(path)


def wait_for_others() -> None:
    """Say that the warm-up is over, and wait until every device's is."""
    print("ready", flush=True)
    sys.stdin.readline()
