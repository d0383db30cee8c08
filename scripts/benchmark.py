"""Where the time of a projection step goes, on this machine.

    python scripts/benchmark.py                                  # CPU, 256 px
    python scripts/benchmark.py hardware=cuda generator=mobile_1024 --batch 8

Words with `=` are config overrides. Each part is timed alone, forward and backward, median of
--repeats after a warm-up; `whole step` is what the projection really does, Adam and records
left out. Prints a table with each part's share of the whole step, and one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from lmexp.composition import conf_folder
from lmexp.config import Experiment, validate
from lmexp.inputs import draw_z
from lmexp.landmarks import groups
from lmexp.landmarks.decoding import decode
from lmexp.latents import Latents, expand, start_at_mean
from lmexp.losses.objective import Objective
from lmexp.losses.protocol import Candidate, Context, Targets
from lmexp.projection import project
from lmexp.recording.provenance import describe_device, describe_versions
from lmexp.schedule import Schedule
from lmexp.workbench import Workbench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", help="config overrides, such as hardware=cuda")
    parser.add_argument("--batch", type=int, default=1, help="jobs at once")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        config = validate(compose("config", overrides=args.overrides))
    bench = Workbench(config.hardware)
    context = bench.context(config)
    rows = measure(config, bench, context, args.batch, args.repeats)
    whole = rows["whole step"]
    print(f"{describe_device(bench.device)}, {context.generator.resolution} px, batch {args.batch}")
    for name, seconds in rows.items():
        print(f"  {name:28s} {1000 * seconds:9.1f} ms  {seconds / whole:6.0%} of a whole step")
    report = {
        "seconds": rows,
        "batch": args.batch,
        "resolution": context.generator.resolution,
        "overrides": args.overrides,
        "device": describe_device(bench.device),
        "threads": torch.get_num_threads(),
        "versions": describe_versions(),
    }
    print(json.dumps(report))


def measure(
    config: Experiment, bench: Workbench, context: Context, batch: int, repeats: int
) -> dict[str, float]:
    """Median seconds of each part and of the whole step."""
    generator, device = context.generator, bench.device
    z = torch.cat([draw_z(seed, generator.z_dim) for seed in range(2 * batch)]).to(device)
    with torch.no_grad():
        w_avg = context.latent_statistics.w_avg
        w = w_avg + 0.7 * (generator.mapping(z) - w_avg)
        faces = generator.synthesis(expand(w[:, None], generator.num_ws))
        landmarks = decode(context.heatmap_network(faces), generator.resolution)
    weights = groups.expand(config.landmark_weights.model_dump()).to(device)
    targets = Targets(
        look=faces[:batch],
        look_landmarks=landmarks[:batch],
        expression=faces[batch:],
        expression_landmarks=landmarks[batch:],
        landmark_weights=weights.expand(batch, -1),
    )
    start = start_at_mean(
        generator,
        context.latent_statistics,
        space=config.latent.space,
        seeds=range(batch),
        device=device,
    )
    terms = bench.terms(config)
    term_weights = [{name: term.weight for name, term in terms.items()}] * batch

    def render(latents: Latents) -> Tensor:
        return generator.synthesis(expand(latents.ws, generator.num_ws), latents.noise_bufs)

    def time_it(work: Callable[[], Tensor]) -> float:
        spent = []
        for _ in range(repeats + 2):
            synchronize(device)
            began = time.perf_counter()
            work().backward()  # type: ignore[no-untyped-call]
            synchronize(device)
            spent.append(time.perf_counter() - began)
        return statistics.median(spent[2:])

    latents = Latents(
        start.ws.requires_grad_(), tuple(noise.requires_grad_() for noise in start.noise_bufs)
    )
    rows = {"generator": time_it(lambda: render(latents).sum())}
    with torch.no_grad():
        images = render(latents)
    for name, term in terms.items():
        if term.weight == 0:
            continue
        bound = term.bind(context, targets)

        def one_term(bound: Callable[[Candidate], Tensor] = bound) -> Tensor:
            ws = expand(latents.ws, generator.num_ws)
            leaf = images.detach().requires_grad_()
            candidate = Candidate(
                leaf, ws, latents.noise_bufs, 0, context.heatmap_network, tuple(range(batch))
            )
            # A term without any path to images or latents still needs a graph to walk.
            return bound(candidate).sum() + 0 * ws.sum()

        rows[f"loss.{name}"] = time_it(one_term)
    objective = Objective.bind(terms, term_weights, context, targets)

    def whole_step() -> Tensor:
        ws = expand(latents.ws, generator.num_ws)
        candidate = Candidate(
            render(latents), ws, latents.noise_bufs, 0, context.heatmap_network, tuple(range(batch))
        )
        return objective(candidate).total.sum()

    rows["whole step"] = time_it(whole_step)
    rows["projection, per step"] = time_projection(context, objective, start, device, batch)
    return rows


def time_projection(
    context: Context, objective: Objective, start: Latents, device: torch.device, batch: int
) -> float:
    """Seconds per step of `project` itself, Adam and the check for NaN included."""
    stamps: list[float] = []

    def stamp(_: object) -> None:
        synchronize(device)
        stamps.append(time.perf_counter())

    detached = Latents(start.ws.detach(), tuple(noise.detach() for noise in start.noise_bufs))
    project(context, objective, detached, Schedule(8), seeds=range(batch), callback=stamp)
    return statistics.median(b - a for a, b in itertools.pairwise(stamps[2:]))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
