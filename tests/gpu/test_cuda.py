"""The same runs on a GPU: nothing but `hardware` changes."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from lmexp import cli
from lmexp.acceleration import Acceleration
from lmexp.batch import State
from lmexp.generators.stylegan2 import StyleGAN2Random
from lmexp.generators.tiny_random import TinyRandom
from lmexp.latents import Latents, measure, start_at_mean
from lmexp.losses.coordinates import LandmarkCoordinates
from lmexp.losses.landmarks import LandmarkHeatmaps
from lmexp.losses.noise import NoiseRegularization
from lmexp.losses.objective import Objective
from lmexp.losses.protocol import BoundTerm, Candidate, Context, Targets
from lmexp.projection import Step, project
from lmexp.recording.run_folder import RunFolder
from lmexp.schedule import Schedule

TINY = [
    "experiment=debug",
    "loss=[landmarks,prior,noise]",
    "loss.noise.weight=100",
    "figure=[triptych]",
]

LARGE = [
    "experiment=debug",
    "generator=stylegan2_random",
    "generator.resolution=256",
    "loss=[landmarks,noise]",
    "latent.start=mean",
    "figure=[]",
    "hardware=cuda",
    # The search for the fastest convolutions takes longer than all else, at each batch's size.
    "hardware.tune_convolutions=false",
]
"""A network whose jobs take much memory, of what is packaged alone."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here"),
]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> Path:
    monkeypatch.setattr(sys, "argv", ["lmexp", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    root = next(word for word in words if word.startswith("output_dir=")).partition("=")[2]
    (status,) = Path(root).glob("**/status.json")
    return status.parent


def test_a_run_on_cuda_comes_to_what_it_does_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    # The head start of a generator known by 16 pictures is a fit that rounding moves.
    words = [*TINY, "latent.head_start=0"]
    on_cpu = run(monkeypatch, *words, "hardware=cpu", "output_dir=cpu")
    on_cuda = run(monkeypatch, *words, "hardware=cuda", "output_dir=cuda")
    assert on_cpu.name == on_cuda.name
    ws = [RunFolder(path).read_projection()[0] for path in (on_cpu, on_cuda)]
    # Adam's first steps divide tiny gradients by their own size: rounding shows in a few.
    assert np.abs(ws[0] - ws[1]).mean() < 0.02
    assert (
        "CUDA" in RunFolder(on_cuda).read_summary()["device"]
        or torch.cuda.get_device_name(0) in RunFolder(on_cuda).read_summary()["device"]
    )


class Colours:
    """Mean square difference of the pixels, random by the draws, as views are."""

    weight = 1.0
    needs_expression: ClassVar[bool] = False

    def __init__(self, reads_back: bool = False, nan_from: int | None = None) -> None:
        self.reads_back = reads_back
        self.nan_from = nan_from

    def bind(self, context: Context, targets: Targets) -> BoundTerm:
        def evaluate(candidate: Candidate) -> Tensor:
            assert candidate.draws is not None
            shift = candidate.draws.views(1.0)[:, 0, 2].reshape(-1, 1, 1, 1)
            values = (candidate.images + shift - targets.look).square().mean((1, 2, 3))
            if self.nan_from is not None:
                now = candidate.draws.get("now", lambda step: torch.tensor(step))
                second = torch.arange(len(values), device=values.device) == 1
                values = torch.where(second & (now >= self.nan_from), torch.nan, values)
            if self.reads_back:
                values = values * float(values.detach().mean() > 0)
            return values

        return evaluate


def project_tiny(
    *,
    graphs: bool,
    colours: Colours | None = None,
    first_step: int = 0,
    resume: list[State] | None = None,
    callback: Callable[[Step], None] | None = None,
    looks_at: Callable[[int], bool] = lambda step: True,
) -> Latents:
    device = torch.device("cuda")
    generator: Any = TinyRandom(resolution=32, dim=16, channels=8).to(device)
    statistics = measure(generator, 200, 0, device)
    context = Context(generator, generator, statistics).accelerated(Acceleration(graphs=graphs))
    look = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    terms: Any = {"colours": colours or Colours(), "noise": NoiseRegularization()}
    weights = [{"colours": 1.0, "noise": weight} for weight in (1e2, 1e3, 0.0)]
    targets = Targets(look, torch.zeros(3, 68, 2, device=device))
    seeds = (3, 5, 8)
    start = start_at_mean(generator, statistics, space="w_plus", seeds=seeds, device=device)
    return project(
        context,
        Objective.bind(terms, weights, context, targets),
        start,
        Schedule(steps=12, learning_rate=0.05),
        seeds=seeds,
        first_step=first_step,
        resume=resume,
        callback=callback,
        looks_at=looks_at,
    )


class Maps(torch.nn.Module):
    """68 heat maps, each a mix of the image's colours."""

    weights_sha256 = "none"

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.register_buffer("mix", torch.randn(68, 3, 1, 1, generator=draw))

    def forward(self, images: Tensor) -> Tensor:
        mix: Any = self.mix
        return torch.sigmoid(torch.nn.functional.conv2d(images, mix))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_reads_the_landmark_factors_of_each_step(compiled: bool) -> None:
    device = torch.device("cuda")
    generator: Any = TinyRandom(resolution=32, dim=16, channels=8).to(device)
    statistics = measure(generator, 200, 0, device)
    draw = torch.Generator().manual_seed(0)
    look, expression = (torch.rand(2, 3, 3, 32, 32, generator=draw) * 2 - 1).to(device)
    points = torch.rand(3, 68, 2, generator=draw).to(device) * 32
    weights = torch.rand(3, 68, generator=draw).to(device)
    targets = Targets(look, points, expression, points, weights)
    terms: Any = {"landmarks": LandmarkHeatmaps(), "coordinates": LandmarkCoordinates()}
    start = start_at_mean(generator, statistics, space="w_plus", seeds=(3, 5, 8), device=device)
    raw: dict[bool, list[Tensor]] = {False: [], True: []}
    for fast in (False, True):
        how = Acceleration(graphs=fast, compile=fast and compiled)
        context = Context(generator, Maps().to(device), statistics).accelerated(how)

        def note(step: Step, fast: bool = fast) -> None:
            raw[fast].append(torch.stack(list(step.losses.raw.values())).detach().clone())

        project(
            context,
            Objective.bind(terms, [{"landmarks": 0.1, "coordinates": 4.0}] * 3, context, targets),
            start,
            # So slow that what moves is the factors.
            Schedule(12, 1e-5, landmark_ramp=1.0, group_factors=(("inner_lip", 0), ("jaw", 20.0))),
            seeds=(3, 5, 8),
            callback=note,
        )
    assert (raw[False][4][0] - raw[False][11][0]).min() > 0.1
    for one, other in zip(raw[True], raw[False], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


def test_replaying_a_graph_is_taking_the_steps() -> None:
    totals: dict[bool, list[Tensor]] = {False: [], True: []}
    images: dict[bool, list[Tensor]] = {False: [], True: []}
    final = {}
    for graphs in (False, True):

        def note(step: Step, graphs: bool = graphs) -> None:
            totals[graphs].append(step.losses.total.detach().clone())
            assert step.candidate is not None
            images[graphs].append(step.candidate.images.detach().clone())

        final[graphs] = project_tiny(graphs=graphs, callback=note)
    for kept in (totals, images):
        assert len(kept[True]) == 12
        for one, other in zip(kept[True], kept[False], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)
    assert (totals[True][0] - totals[True][5]).abs().min() > 1e-4  # it moves, and sees new draws
    torch.testing.assert_close(final[True].ws, final[False].ws, rtol=0, atol=5e-3)
    for noise in final[True].noise_bufs:
        torch.testing.assert_close(
            noise.square().mean((1, 2, 3)), torch.ones(3, device="cuda"), rtol=1e-4, atol=0
        )


@pytest.mark.parametrize("nan_from", [None, 8])
@pytest.mark.parametrize("graphs", [False, True])
def test_steps_that_are_launched_ahead_are_the_same_steps(
    graphs: bool, nan_from: int | None
) -> None:
    """Also where a job dies, which the host learns when its next steps are under way."""
    told: dict[bool, list[tuple[bool, ...]]] = {False: [], True: []}
    totals: dict[bool, list[Tensor]] = {False: [], True: []}
    final = {}
    for ahead in (False, True):

        def note(step: Step, ahead: bool = ahead) -> None:
            told[ahead].append((step.at_rest, *step.alive))
            totals[ahead].append(step.losses.total)

        final[ahead] = project_tiny(
            graphs=graphs,
            colours=Colours(nan_from=nan_from),
            callback=note,
            looks_at=lambda step, ahead=ahead: not ahead or step % 5 == 4,
        )
    assert [rests for rests, *_ in told[False]] == [True] * 12
    assert [step for step, (rests, *_) in enumerate(told[True]) if rests] == [4, 9, 11]
    assert [alive for _, *alive in told[True]] == [alive for _, *alive in told[False]]
    for one, other in zip(totals[True], totals[False], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3, equal_nan=True)
    torch.testing.assert_close(final[True].ws, final[False].ws, rtol=0, atol=5e-3)


def test_a_stopped_graph_goes_on() -> None:
    saved: list[State] = []

    def save(step: Step) -> None:
        if step.step == 6:
            saved.extend(step.states(k) for k in range(3))

    whole = project_tiny(graphs=True, callback=save)
    resumed = project_tiny(graphs=True, first_step=7, resume=saved)
    torch.testing.assert_close(resumed.ws, whole.ws, rtol=0, atol=5e-3)


def test_a_job_dies_within_a_graph_and_no_other() -> None:
    alive: list[tuple[bool, ...]] = []
    colours = Colours(nan_from=8)
    final = project_tiny(graphs=True, colours=colours, callback=lambda s: alive.append(s.alive))
    assert alive == [(True, step < 8, True) for step in range(12)]
    healthy = project_tiny(graphs=True)
    for job in (0, 2):
        torch.testing.assert_close(final.ws[job], healthy.ws[job], rtol=0, atol=5e-3)
    assert torch.isfinite(final.ws).all() and not torch.equal(final.ws[1], healthy.ws[1])


def test_a_term_that_reads_back_goes_without_a_graph_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps: list[int] = []
    with caplog.at_level("WARNING", logger="lmexp"):
        final = project_tiny(
            graphs=True, colours=Colours(reads_back=True), callback=lambda s: steps.append(s.step)
        )
    assert "hardware.graphs: a step does not fit into one" in caplog.text
    assert steps == list(range(12))
    plain = project_tiny(graphs=False)
    torch.testing.assert_close(final.ws, plain.ws, rtol=0, atol=5e-3)


def test_cuda_fast_comes_to_what_cuda_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    last = {}
    for choice in ("cuda", "cuda_half", "cuda_fast"):
        words = [*TINY, "optimizer.steps=30", f"hardware={choice}", f"output_dir={choice}"]
        lines = list(RunFolder(run(monkeypatch, *words)).read_metrics())
        last[choice] = lines[-1]["loss"]
        assert lines[-1]["loss"] < lines[0]["loss"]
    assert last["cuda_half"] == pytest.approx(last["cuda"], rel=0.05)
    assert last["cuda_fast"] == pytest.approx(last["cuda"], rel=0.05)


def test_a_batch_too_large_for_the_memory_is_halved_and_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*LARGE, "optimizer.steps=6", "recording.video_frames=0"]

    def sweep(jobs: int, folder: str) -> int:
        """Bytes that a batch of so many jobs takes of the GPU at most."""
        seeds = f"seed={','.join(map(str, range(jobs)))}"
        more = ["-m", seeds, f"hardware.batch_size={jobs}"]
        monkeypatch.setattr(sys, "argv", ["lmexp", *words, *more, f"output_dir={folder}"])
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        cli.main()  # a sweep that ends well returns, it does not exit
        return torch.cuda.max_memory_reserved()

    two, four = sweep(2, "two"), sweep(4, "four")
    assert four > two
    # Room for nine jobs: more than six, and not twelve.
    allowed = two + 7 * (four - two) // 2
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        with caplog.at_level("WARNING", logger="lmexp"):
            sweep(12, "runs")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    states = [json.loads(p.read_text())["state"] for p in Path("runs").glob("**/status.json")]
    assert states == ["finished"] * 12
    assert "the GPU's memory does not hold 12 jobs; going on with 6" in caplog.text


def test_the_size_of_a_batch_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*LARGE, "optimizer.steps=4", "-m", "seed=1,2,3", "output_dir=runs"]
    monkeypatch.setattr(sys, "argv", ["lmexp", *words])
    cli.main()
    summaries = [json.loads(p.read_text()) for p in Path("runs").glob("**/summary.json")]
    assert [summary["batch_size"] for summary in summaries] == [3, 3, 3]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_sweep_on_all_gpus_uses_each_and_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*LARGE, "optimizer.steps=60"]
    seeds = ",".join(map(str, range(8)))
    words += ["-m", f"seed={seeds}", "hardware.devices=all", "output_dir=runs"]
    monkeypatch.setattr(
        sys, "argv", ["lmexp", *words, "hardware.batch_size=2", "recording.video_frames=0"]
    )
    seen: dict[int, set[str]] = {}  # process -> GPUs that it has memory on
    over = threading.Event()

    def watch() -> None:
        query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
        while not over.wait(0.5):
            for line in subprocess.check_output(query, text=True).splitlines():
                pid, uuid = line.split(", ")
                seen.setdefault(int(pid), set()).add(uuid)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        cli.main()
    finally:
        over.set()
        watcher.join()
    summaries = [json.loads(p.read_text()) for p in Path("runs").glob("**/summary.json")]
    assert len(summaries) == 8
    assert len({summary["device_uuid"] for summary in summaries}) == torch.cuda.device_count()
    # Where the driver names processes (not in every container), each is on one GPU alone.
    assert all(len(uuids) == 1 for pid, uuids in seen.items() if pid != os.getpid())


def test_the_packaged_networks_run_on_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["optimizer.steps=5", "latent.inversion.steps=3", "tracker=none", "output_dir=runs"]
    folder = RunFolder(run(monkeypatch, *words, "hardware=cuda"))
    totals = [line["loss"] for line in folder.read_metrics()]
    assert np.isfinite(totals).all() and totals[-1] < totals[0]


def test_stylegan2_on_cuda_is_what_it_is_on_the_cpu() -> None:
    generator = StyleGAN2Random(resolution=128, channel_base=2048, channel_max=64, conv_clamp=256.0)
    draw = torch.Generator().manual_seed(0)
    ws = torch.randn(2, generator.num_ws, generator.w_dim, generator=draw)

    def render(
        device: str, memory_format: torch.memory_format
    ) -> tuple[torch.Tensor, torch.Tensor]:
        module = generator.to(device, memory_format=memory_format)  # type: ignore[call-overload]
        leaf = ws.clone().to(device).requires_grad_()
        images = module.synthesis(leaf)
        (images * torch.linspace(-1, 1, 128, device=device)).mean().backward()
        assert leaf.grad is not None
        return [images.detach().cpu(), leaf.grad.cpu()]

    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        images, gradient = render("cpu", torch.contiguous_format)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            there, slope = render("cuda", memory_format)
            assert float((there - images).abs().max()) < 1e-4 * float(images.abs().max())
            assert float((slope - gradient).norm()) < 2e-3 * float(gradient.norm())
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_of_stylegan2_on_cuda_is_close_to_float32(dtype: str) -> None:
    options = {"resolution": 128, "channel_base": 2048, "channel_max": 64, "conv_clamp": 256.0}
    exact = StyleGAN2Random(**options).cuda()
    half = StyleGAN2Random(**options, half_precision=4, half_dtype=dtype).cuda()
    ws = torch.randn(2, exact.num_ws, exact.w_dim, device="cuda")
    with torch.no_grad():
        wanted, got = exact.synthesis(ws), half.synthesis(ws)
    assert got.dtype == torch.float32
    error = float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    assert error < (0.03 if dtype == "bfloat16" else 0.005)
